"""What a first state is drawn with."""

import jax
import numpy as np
from flax import nnx

from lina_jax.models.initializers import Keys


def test_keys_made_at_once_are_those_of_nnx():
    rngs, keys = nnx.Rngs(jax.random.key(3)), Keys(jax.random.key(3))
    for _ in range(2 * Keys.AT_ONCE + 1):
        np.testing.assert_array_equal(jax.random.key_data(keys.params()), jax.random.key_data(rngs.params()))
