"""FLOPs computed from sizes equal those of the matmuls that compilers find in the programs."""

import dataclasses

import pytest

from lina_jax import decoding_schedule, flops, hlo, programs, roofline
from lina_jax.config import LossConfig, ModelConfig
from lina_jax.models import chunks

# No convolution (compilers have no matmul for it), and masks whose padded number of visible tokens equals the mean.
# With 32,768 tokens in the head, the table of 1,000 timesteps is only 0.5 % of the training matmuls. The unconditional
# condition is 0.2 % of sampling.
SIZES = {
    "width": 128, "heads": 4, "head_width": 128, "head_depth": 1, "condition_depth": 1, "image_depth": 2,
    "image_grid": (8, 8), "condition_grid": (4, 4), "depthwise_conv": False, "scan_layers": True,
}  # fmt: skip
MASKS = {"repeat": 4, "mask_ratio_mean": 0.75, "mask_ratio_std": 1e-3, "mask_ratio_min": 0.75}
VARIANTS = {
    # The last of three blocks is softmax; with heads this narrow, linear attention would have 2.5 % fewer FLOPs. The
    # sampling test is all linear.
    "hybrid, classes": {"attention": "hybrid", "softmax_period": 2, "heads": 16},
    "softmax, text": {
        "attention": "softmax", "kv_gate": "none", "condition": "text", "text_encoder": "features", "text_length": 16,
        "text_dim": 1024,
    },
}  # fmt: skip


def compiled_flops(program, arguments, unknown_trips: float = 1.0) -> float:
    compiled = programs.compile_program(program, arguments, {})
    return roofline.count(hlo.Module(compiled.text), unknown_trips=unknown_trips).matmul_flops


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_flops_are_those_that_the_compiler_counts(variant, tiny, one_device):
    config = tiny(batch_size=128, model=SIZES | VARIANTS[variant], loss=MASKS)
    tokens = 128 * config.model.image_tokens
    found = compiled_flops(*programs.train_step(config, one_device), unknown_trips=chunks.max_count(tokens))
    assert found == pytest.approx(128 * flops.training_flops(config.model, config.loss), rel=0.01)


def test_sampling_flops_are_those_that_the_compiler_counts(tiny, one_device):
    config = tiny(model=SIZES, sample={"steps": 3, "stages": 3, "euler_steps": 6, "guidance": 2.0})
    schedule = decoding_schedule.make_schedule(config)
    found = compiled_flops(*programs.sampling_step(config, one_device, 8), unknown_trips=6)
    assert found == pytest.approx(8 * flops.sampling_flops(config.model, schedule), rel=0.01)


def test_a_mask_ratio_may_be_all_but_fixed(tiny):
    """The distribution is so narrow that its weights, computed directly, would all underflow to zero."""
    model, masks = tiny(model=SIZES).model, LossConfig(**MASKS)
    fixed = dataclasses.replace(masks, mask_ratio_mean=0.85, mask_ratio_std=1e-6, mask_ratio_min=0.7)
    near = dataclasses.replace(fixed, mask_ratio_std=1e-2)
    assert flops.training_flops(model, fixed) == pytest.approx(flops.training_flops(model, near), rel=1e-3)


def test_linear_attention_takes_two_fifths_of_the_flops_of_softmax_at_5120_tokens():
    """At 5,120 tokens, width 1536 and 16 heads, the module alone has 0.39 of the FLOPs of softmax attention."""
    model = ModelConfig(width=1536, heads=16, image_grid=(64, 64), condition_grid=(32, 32))
    linear = flops.attention_flops(model, 5120, softmax=False, conv=True)
    softmax = flops.attention_flops(model, 5120, softmax=True, conv=False)
    assert linear / softmax == pytest.approx(0.39, abs=0.005)


def test_a_picture_of_1024_pixels_costs_less_than_by_the_paper_s_sampler(load_preset):
    """The paper's takes 1.81e15, since its last block computes all tokens; ours computes only those of the step."""
    config = load_preset("t2i:1024")
    schedule = decoding_schedule.make_schedule(config)
    assert flops.sampling_flops(config.model, schedule) == pytest.approx(1.746e15, rel=0.001)
