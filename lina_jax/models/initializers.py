"""Initial weights: the keys of a model's arrays, and the distributions that are drawn with them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer


class Keys:
    """The keys that `nnx.Rngs(key)` gives, derived many at once.

    Derived one by one, each key is a loop of its own in the compiled program. They were half of the loops in the
    program that makes the first state; for eight devices it took twice as long to compile.
    """

    AT_ONCE = 32  # more than one layer needs

    def __init__(self, key: jax.Array):
        self._key, self._given = key, 0

    def params(self) -> jax.Array:
        """The next key, ()."""
        place = self._given % self.AT_ONCE
        if place == 0:
            numbers = jnp.arange(self._given, self._given + self.AT_ONCE)
            self._made = jax.vmap(jax.random.fold_in, (None, 0))(self._key, numbers)
        self._given += 1
        return self._made[place]


def uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for weights and biases alike, as published."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        # Published initial weights went through float16 on their way to disk.
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(jnp.float16).astype(dtype)

    return init


def normal(std: float = 0.02) -> Initializer:
    """N(0, std^2), rounded to float16 as the published initial weights are."""

    def init(key, shape, dtype=jnp.float32):
        return (std * jax.random.normal(key, shape)).astype(jnp.float16).astype(dtype)

    return init


zeros = nnx.initializers.zeros
