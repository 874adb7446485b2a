"""The optimizers: Muon updates matrices, AdamW the rest; clipping and the schedule."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lina_jax import mesh, optim, state, training_step
from lina_jax.config import MeshConfig, OptimConfig


@pytest.fixture(scope="module")
def muon(tiny):
    # With b1 = 0, the AdamW inside Muon, which has Nesterov momentum, equals plain AdamW.
    return tiny(optim={"name": "muon", "b1": 0.0, "weight_decay": 0.0, "warmup_steps": 0})


@pytest.fixture(scope="module")
def stepped(rough, batch_of):
    """(parameters before, parameters after one step) of a blueprint."""

    def step(plan):
        run = rough(plan)
        before = jax.device_get(run.params)
        run, _ = training_step.make_train_step(plan)(run, batch_of(plan.config))
        return before, jax.device_get(run.params)

    return step


@pytest.fixture(scope="module")
def by_muon(muon, one_device, stepped):
    return stepped(state.make_blueprint(muon, one_device))


def change(before_after, *path):
    before, after = before_after
    for name in path:
        before, after = before[name], after[name]
    return after - before


LAYER = ("encoder", "runs", "from_00")


def test_muon_makes_queries_keys_and_values_orthogonal_each(muon, one_device, rough):
    plan = state.make_blueprint(muon, one_device)
    run = rough(plan)
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), run.params)
    updates, _ = plan.optimizer.update(gradient, run.opt_state, run.params)
    for name in LAYER:
        updates = updates[name]
    width = muon.model.width
    for part in range(3):
        update = np.asarray(updates["attention"]["qkv"]["kernel"])[0, :, part]
        values = np.linalg.svd(update, compute_uv=False)
        # Five Newton-Schulz steps are approximate: singular values end between 0.68 and 1.14 times the exact value.
        values /= muon.optim.learning_rate * optim.MUON_RMS * width**0.5
        assert np.all((values > 0.6) & (values < 1.2)), values


def test_muon_leaves_embeddings_outputs_and_vectors_to_adamw(tiny, one_device, stepped, by_muon):
    by_adamw = stepped(
        state.make_blueprint(tiny(optim={"b1": 0.0, "weight_decay": 0.0, "warmup_steps": 0}), one_device)
    )
    for path in (("patch_embed", "kernel"), ("head", "out", "kernel"), ("mask_token",), (*LAYER, "norm1", "scale")):
        np.testing.assert_allclose(change(by_muon, *path), change(by_adamw, *path), atol=1e-9, err_msg=str(path))
    path = (*LAYER, "mlp", "fc1", "kernel")
    assert np.abs(change(by_muon, *path) - change(by_adamw, *path)).max() > 1e-4


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_spares_layer_norms_alone(name, tiny, one_device, rough):
    plan = state.make_blueprint(tiny(optim={"name": name, "weight_decay": 0.5, "warmup_steps": 0}), one_device)
    run = rough(plan)
    still = jax.tree.map(jnp.zeros_like, run.params)
    updates, _ = plan.optimizer.update(still, run.opt_state, run.params)
    # A zero gradient moves nothing, so only decay is left.
    kept = 1 - plan.config.optim.learning_rate * 0.5
    for path, update in jax.tree.leaves_with_path(updates):
        names = [key.key for key in path]
        factor = 1.0 if any("norm" in n for n in names[:-1]) and names[-2] != "proj" else kept
        param = jax.tree.reduce(lambda tree, key: tree[key], names, run.params)
        np.testing.assert_allclose(param + update, factor * param, rtol=1e-6, err_msg=str(names))


def test_muon_on_eight_devices_steps_as_on_one(muon, by_muon, stepped, error_between):
    cut = stepped(state.make_blueprint(muon, mesh.build(MeshConfig(fsdp=4, tensor=2))))
    moved, expected = (jax.tree.map(np.subtract, after, before) for before, after in (cut, by_muon))
    # Measured 6e-6: orthogonalising scales the smallest singular values, and their rounding, up a few hundred times.
    assert error_between(moved, expected) < 5e-5


def test_the_momentum_of_muon_is_cut_over_fsdp(muon):
    plan = state.make_blueprint(muon, mesh.build(MeshConfig(data=1, fsdp=8)))
    momentum = plan.shapes.opt_state[1].inner_states["muon"].inner_state
    leaves = [leaf for leaf in jax.tree.leaves(momentum) if leaf.ndim > 2]
    assert leaves
    assert all(8 * math.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size for leaf in leaves)


@pytest.mark.parametrize(("length", "kept"), [(1.0, 1e-3), (1e-4, 1e-4)], ids=["long", "short"])
def test_long_gradients_are_shortened_before_adam_sees_them(length, kept):
    """By the global norm, not per array. Adam would cancel the factor, but its eps has the size of the gradient."""
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    direction = {"a": jnp.array([0.6, 0.0, 0.0]), "b": jnp.array([[0.0, 0.8], [0.0, 0.0]])}

    def update(length, **settings):
        config = OptimConfig(eps=1e-3, warmup_steps=0, learning_rate=1.0, **settings)
        optimizer = optim.optimizer(config, 10, {"a": True, "b": True}, {})
        gradient = jax.tree.map(lambda x: length * x, direction)
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    want = update(kept)
    for name, array in update(length, clip_norm=1e-3).items():
        np.testing.assert_allclose(array, want[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("warmup", [0, 10])
def test_the_cosine_ends_at_the_final_learning_rate(warmup):
    config = OptimConfig(schedule="cosine", learning_rate=1e-3, final_learning_rate=2e-4, warmup_steps=warmup)
    rate = optim.learning_rate(config, steps=110)
    half = (110 + warmup) // 2
    assert [float(rate(n)) for n in (warmup, half, 110, 1000)] == pytest.approx([1e-3, 6e-4, 2e-4, 2e-4])


def test_a_warm_up_is_linear_and_the_peak_is_kept():
    config = OptimConfig(learning_rate=1e-3, warmup_steps=4, warmup_factor=0.2)
    rate = optim.learning_rate(config, steps=100)
    assert [float(rate(n)) for n in (0, 1, 3, 99)] == pytest.approx([0.4e-3, 0.6e-3, 1e-3, 1e-3])
