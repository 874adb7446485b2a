"""With sharded tokens, every variant computes what one device does; devices exchange sums and edge rows, no tokens."""

import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lina_jax import generate, hlo, mesh, programs, state, training_step
from lina_jax.config import MeshConfig
from lina_jax.models import draws, sequence

# Relative difference of the gradient in the Euclidean norm, due to the order of summation. Measured 3.1e-7 at most over
# these variants; the bound is eight times that. A missing reduction makes a difference of order 1.
TOLERANCE = 2.5e-6
VARIANTS = {
    "subtraction, decoupled gate": {"normalization": "subtraction", "kv_gate": "decoupled", "condition": "text"},
    "dynamic gate, rematerialised, scanned": {"kv_gate": "dynamic", "remat": "full", "scan_layers": True},
    "key gate": {"kv_gate": "key"},
    "subtraction, value gate": {"normalization": "subtraction", "kv_gate": "value"},
    "hybrid, shared gate": {"attention": "hybrid", "softmax_period": 2, "kv_gate": "shared", "image_depth": 3},
    "rotary": {"rotary": True, "heads": 1},
}


@pytest.fixture(scope="module")
def cut():
    """A mesh that shards batches over two groups of devices and the tokens of each image over four devices."""
    return mesh.build(MeshConfig(data=2, sequence=4))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cut_sequence_gives_the_loss_and_gradients_of_a_whole_one(
    variant, tiny, one_device, cut, first_step, error_between
):
    config = tiny(model=VARIANTS[variant])
    want_loss, want = first_step(config, one_device)
    loss, got = first_step(config, cut)
    assert abs(loss / want_loss - 1) < TOLERANCE
    assert error_between(got, want) < TOLERANCE


@pytest.fixture
def deep(tiny):
    """A grid of 8 rows, so that shards have spare capacity for visible tokens and can run out of it."""
    return tiny(
        model={"image_grid": (8, 8), "condition_grid": (4, 4), "remat": "full", "scan_layers": True},
        loss={"mask_ratio_mean": 0.5, "mask_ratio_std": 0.01, "mask_ratio_min": 0.5},
        sample={"steps": 6},
    )


def test_more_visible_tokens_than_a_shard_has_capacity_for_are_not_lost(
    deep, one_device, cut, first_step, error_between, monkeypatch
):
    monkeypatch.setattr(sequence, "DEVIATIONS", -3.0)
    with jax.set_mesh(cut):
        capacities = jax.eval_shape(lambda: jnp.zeros((sequence.capacity(64, 32), sequence.max_in_shard(64, 32)))).shape
    assert capacities == (8, 16)
    counts = np.sum(~np.asarray(masks_of_first_step(deep)).reshape(-1, 4, 16), axis=2)
    assert counts.max() > 8
    want_loss, want = first_step(deep, one_device)
    loss, got = first_step(deep, cut)
    assert abs(loss / want_loss - 1) < TOLERANCE
    assert error_between(got, want) < TOLERANCE


def masks_of_first_step(config) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    return draws.draw(key, jnp.arange(config.batch_size), config.model, config.loss).mask


def test_pictures_are_the_same(deep, one_device, cut, rough):
    def draw(devices):
        plan = state.make_blueprint(deep, devices)
        run = rough(plan)
        sampler = generate.make_sampler(plan, deep.sample)
        return np.asarray(sampler(run.params, run.frozen, {"label": jnp.arange(8) % 3}, jnp.arange(8), jnp.int32(0)))

    one, other = draw(one_device), draw(cut)
    # Rounding can move a value from one of 256 levels to the next.
    assert np.max(np.abs(one.astype(int) - other)) <= 1
    assert np.mean(one != other) < 0.01


def test_devices_exchange_sums_and_edges_only(deep, cut, batch_of):
    plan = state.make_blueprint(deep, cut)
    batch = jax.device_put(batch_of(deep), mesh.sharding(cut, "batch"))
    program = training_step.make_train_step(plan).lower(plan.shapes, batch).compile().as_text()
    exchanged = set(
        re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", program)
    )
    assert exchanged == {"all-reduce", "collective-permute"}


def test_beside_fsdp_weights_and_tables_are_gathered_but_no_tokens(tiny):
    """A batch of 14 identifies the arrays of images: no other has an axis divisible by 7."""
    model = {
        "image_grid": (8, 8), "condition_grid": (4, 4), "condition": "text", "text_encoder": "features",
        "text_length": 10,
    }  # fmt: skip
    config = tiny(batch_size=14, model=model)
    program, arguments = programs.train_step(config, mesh.build(MeshConfig(data=1, fsdp=2, sequence=4)))
    module = hlo.Module(program.lower(*arguments).compile().as_text())
    exchanged = {kind: set() for kind in hlo.COLLECTIVES}
    for computation in module.computations:
        for instruction in module.instructions(computation):
            if kind := hlo.collective_kind(instruction):
                exchanged[kind] |= {shape.dims for shape in instruction.shapes}
    of_images = {kind: {dims for dims in shapes if any(n % 7 == 0 for n in dims)} for kind, shapes in exchanged.items()}
    edges = {(7, config.model.conv_kernel // 2, 8, config.model.width)}
    assert exchanged["all-gather"]
    sums = of_images.pop("all-reduce")
    assert sums and {kind: shapes for kind, shapes in of_images.items() if shapes} == {"collective-permute": edges}


@pytest.mark.parametrize("shards", [2, 4])
def test_joining_and_splitting_tokens_are_inverse(shards):
    condition, image = jnp.arange(8)[None, :, None], 100 + jnp.arange(16)[None, :, None]
    with jax.set_mesh(mesh.build(MeshConfig(sequence=shards))):
        together = jax.jit(sequence.join_tokens)(condition, image)
        apart = jax.jit(sequence.split_tokens, static_argnums=1)(together, 8)
    assert together[0, : 8 // shards + 1, 0].tolist() == [*range(8 // shards), 100]
    np.testing.assert_array_equal(apart[0], condition)
    np.testing.assert_array_equal(apart[1], image)


def test_capacity_is_exceeded_less_than_once_in_a_hundred_million_draws():
    """Exact tails of the hypergeometric distribution, for a shard of the 1024 px and the 256 px grid."""
    for tokens, shards in ((4096, 4), (256, 8)):
        with jax.set_mesh(mesh.build(MeshConfig(sequence=shards))):
            places = jax.eval_shape(
                lambda tokens=tokens: jnp.zeros(sequence.capacity(tokens, int(0.3 * tokens)))
            ).shape[0]
        assert tail(tokens, tokens // shards, int(0.3 * tokens), places) < 1e-8


@pytest.mark.parametrize(
    ("platform", "images", "axes", "tokens", "visible", "places"),
    [
        ("gpu", 2, {}, 1024, 307, 308),
        ("gpu", 1, {}, 4096, 1228, 1232),
        ("gpu", 8, {}, 256, 77, 77),
        ("gpu", 8, {"data": 4, "fsdp": 2}, 256, 77, 80),
        ("gpu", 3, {}, 20, 19, 20),
        ("tpu", 2, {}, 1024, 307, 307),
    ],
)
def test_gpus_have_whole_tiles_of_visible_tokens(platform, images, axes, tokens, visible, places, monkeypatch):
    """But no more than an image has tokens; surplus places are marked as empty."""
    monkeypatch.setattr(sequence, "platform", lambda: platform)
    mask = jnp.broadcast_to(jnp.arange(tokens) >= visible, (images, tokens))
    with jax.set_mesh(mesh.build(MeshConfig(**axes), jax.devices() if axes else jax.devices()[:1])):
        chosen = jax.jit(lambda mask: sequence.on_visible(lambda chosen: chosen, mask, visible))(mask)
    assert chosen.ids.shape == chosen.exists.shape == (images, places)
    np.testing.assert_array_equal(chosen.exists, np.broadcast_to(np.arange(places) < visible, (images, places)))


@pytest.mark.parametrize("shards", [1, 4])
def test_visible_tokens_are_moved_by_gathering_in_gradients_too(shards):
    """Scatters are slow on accelerators, or add in a random order. The expected values come from a Boolean mask."""
    rng = np.random.default_rng(0)
    hidden = np.argsort(rng.random((3, 16)), axis=1) >= np.array([[0], [3], [5]])
    x, scale = rng.standard_normal((3, 16, 2)).astype(np.float32), np.arange(1, 33).reshape(16, 2)

    def total(x):
        def double(chosen):
            return sequence.put_back(x, 2 * sequence.pick(x, chosen), chosen)

        return jnp.sum(scale * sequence.on_visible(double, hidden, 5))

    with jax.set_mesh(mesh.build(MeshConfig(sequence=shards), jax.devices()[:shards])):
        function = jax.jit(jax.value_and_grad(total))
        value, gradient = function(x)
        assert "scatter" not in function.lower(x).as_text()
    factor = np.where(hidden, 1, 2)[..., None]
    np.testing.assert_allclose(value, np.sum(scale * factor * x), rtol=1e-6)
    np.testing.assert_array_equal(gradient, np.broadcast_to(scale * factor, x.shape))


def tail(tokens: int, shard: int, visible: int, places: int) -> float:
    """P(more than `places` of `visible` tokens, drawn from `tokens`, lie in a shard of `shard`)."""
    ways = [
        math.comb(shard, n) * math.comb(tokens - shard, visible - n) for n in range(places + 1, min(shard, visible) + 1)
    ]
    return float(Fraction(sum(ways), math.comb(tokens, visible)))
