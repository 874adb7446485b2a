"""What a first state is drawn with."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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
