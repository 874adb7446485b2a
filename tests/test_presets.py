"""The published models have the published number of parameters, and their train steps fit together."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lina_jax import state, training_step
from lina_jax.config import ModelConfig
from lina_jax.models.layers import Frozen
from lina_jax.models.lina import LINA

PLAIN = {"depthwise_conv": False, "kv_gate": "none"}
SOFTMAX = {"attention": "softmax", **PLAIN}
W768 = ModelConfig()
W1024 = dataclasses.replace(W768, width=1024, heads=16, head_width=1024)
W1536 = dataclasses.replace(W768, width=1536, heads=16, head_width=1536)


def text(side: int, width: int = 1536, **variant) -> ModelConfig:
    return ModelConfig(
        condition="text", latent_channels=4, patch_size=2, image_grid=(side, side),
        condition_grid=(side // 2, side // 2), width=width, heads=16, head_width=width, **variant,
    )  # fmt: skip


# Parameters (all, trainable) of the published models.
TABLE = {
    "c2i w768 head": (W768, {}, 363_190_288, 362_349_328),
    "c2i w1024 head": (W1024, {}, 644_685_840, 643_302_416),
    "c2i w1536 head": (W1536, {}, 1_448_243_216, 1_445_381_648),
    "c2i w768 softmax": (W768, SOFTMAX, 362_747_920, 361_906_960),
    "c2i w768 division": (W768, PLAIN, 362_747_920, 361_906_960),
    "c2i w768 subtraction": (W768, PLAIN | {"normalization": "subtraction"}, 362_747_920, 361_906_960),
    "c2i w768 division conv": (W768, {"kv_gate": "none"}, 363_067_408, 362_226_448),
    "c2i w768 subtraction conv": (
        W768, {"kv_gate": "none", "normalization": "subtraction"}, 363_067_408, 362_226_448
    ),
    "c2i w768 decoupled": (W768, {"kv_gate": "decoupled"}, 363_251_728, 362_410_768),
    "c2i w768 dynamic": (W768, {"kv_gate": "dynamic"}, 363_362_704, 362_521_744),
    "c2i w768 shared": (W768, {"kv_gate": "shared"}, 363_077_648, 362_236_688),
    "c2i w768 key": (W768, {"kv_gate": "key"}, 363_128_848, 362_287_888),
    "c2i w768 value": (W768, {"kv_gate": "value"}, 363_128_848, 362_287_888),
    "c2i w1024 division": (W1024, PLAIN, 644_096_016, 642_712_592),
    "c2i w1024 division conv": (W1024, {"kv_gate": "none"}, 644_522_000, 643_138_576),
    "c2i w1536 division": (W1536, PLAIN, 1_447_440_400, 1_444_578_832),
    "c2i w1536 division conv": (W1536, {"kv_gate": "none"}, 1_448_079_376, 1_445_217_808),
    "t2i w1536 256": (text(16), {}, 1_450_639_376, 1_447_777_808),
    "t2i w1536 512": (text(32), {}, 1_451_130_896, 1_448_269_328),
    "t2i w1536 1024": (text(64), {}, 1_453_096_976, 1_450_235_408),
    "t2i w1024 1024 softmax": (text(64, 1024, **SOFTMAX), {}, 645_693_456, 644_310_032),
}  # fmt: skip

PRESETS = {
    "imagenet256_c2i:w768": "c2i w768 head",
    "imagenet256_c2i:w1024": "c2i w1024 head",
    "imagenet256_c2i:w1536": "c2i w1536 head",
    "t2i:256": "t2i w1536 256",
    "t2i:512": "t2i w1536 512",
    "t2i:1024": "t2i w1536 1024",
}


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@functools.cache
def parameters(model: ModelConfig) -> tuple[int, int]:
    """(all, trainable) parameters; the padding rows of text are a buffer and are not counted."""
    _, trained, frozen = nnx.split(nnx.eval_shape(lambda: LINA(model, rngs=nnx.Rngs(0))), nnx.Param, Frozen)
    if model.condition == "text":
        del frozen["text_embed"]["padding"]
    return count(trained) + count(frozen), count(trained)


@pytest.mark.parametrize("name", TABLE)
def test_parameter_counts_are_the_published_ones(name):
    model, variant, total, trained = TABLE[name]
    assert parameters(dataclasses.replace(model, **variant)) == (total, trained)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_published_models(preset, load_preset):
    _, _, total, trained = TABLE[PRESETS[preset]]
    assert parameters(load_preset(preset).model) == (total, trained)


@pytest.mark.parametrize("preset", [*PRESETS, "t2i:2048", "t2i:4096"])
def test_the_train_step_of_a_preset_fits_together(preset, load_preset, one_device):
    """Only shapes are checked, nothing is computed. Fewer layers are enough: they are scanned and have equal shapes."""
    config = load_preset(preset)
    model = dataclasses.replace(config.model, condition_depth=1, image_depth=2, head_depth=1)
    plan = state.make_blueprint(dataclasses.replace(config, model=model), one_device)
    size, (height, width) = config.batch_size, model.latent_size
    batch = {
        "moments": jax.ShapeDtypeStruct((size, 2 * model.latent_channels, height, width), jnp.float16),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        "text": jax.ShapeDtypeStruct((size, model.text_length, model.text_dim), jnp.float16),
        "text_length": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    after, metrics = training_step.make_train_step(plan).lower(plan.shapes, batch).out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), plan.shapes)
    assert metrics["loss"].shape == ()
