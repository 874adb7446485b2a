"""The random numbers that an initial state is drawn from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lina_jax import state
from lina_jax.models.draws import draw
from lina_jax.models.initializers import Keys
from lina_jax.models.layers import Linear
from lina_jax.models.transformer import stacked


def test_keys_made_at_once_are_those_of_nnx():
    rngs, keys = nnx.Rngs(jax.random.key(3)), Keys(jax.random.key(3))
    for _ in range(2 * Keys.AT_ONCE + 1):
        np.testing.assert_array_equal(jax.random.key_data(keys.params()), jax.random.key_data(rngs.params()))


def test_stacked_layers_start_as_those_of_nnx():
    def make(rngs):
        return Linear(4, 8, ("embed", "mlp"), rngs=rngs, dtype=jnp.float32)

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        return make(rngs)

    rngs, keys = nnx.Rngs(jax.random.key(3)), Keys(jax.random.key(3))
    for _ in range(2):  # the second stack has other keys
        found, wanted = (jax.tree.leaves(nnx.state(layers)) for layers in (stacked(make, 3, keys), build(rngs)))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


def test_no_layer_starts_as_the_noise_of_a_training_step(tiny, one_device):
    """Kernels and noise both increase with their random bits, so the same bits would give the same ranks."""
    plan = state.make_blueprint(tiny(model={"scan_layers": True}), one_device)
    weights = [leaf[0] for leaf in jax.tree.leaves(plan.init().params) if leaf.ndim > 2 and leaf[0].size > 1000]
    config = plan.config
    model = dataclasses.replace(config.model, image_grid=(16, 16))

    @jax.jit
    def noise_of(step):
        return draw(state.key_of(config, step), jnp.arange(1), model, config.loss).noise

    def ranks(x):
        return np.argsort(np.argsort(np.ravel(x)[:500]))

    noises = [ranks(noise_of(step)) for step in range(32)]
    likeness = np.corrcoef([*map(ranks, weights), *noises])[: len(weights), len(weights) :]
    assert len(weights) > 5 and np.abs(likeness).max() < 0.3
