"""The random draws of one training step, each a function of (seed, step, example) alone.

Keyed by example, they are the same on any mesh, for any number of hosts and for any split into micro-batches.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lina_jax.config import LossConfig, ModelConfig
from lina_jax.mesh import constrain
from lina_jax.models import flow


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Draws:
    """Random draws for a batch of B images of N tokens, with R repeats of the head."""

    drop: jax.Array  # (B,) bool, True where the condition is dropped
    mask: jax.Array  # (B, N) bool, True where content is hidden
    timestep: jax.Array  # (R, B, N) int32, index into the table of noise levels
    noise: jax.Array  # (R, B, N, p*p*C) float32
    max_visible: int = dataclasses.field(metadata={"static": True})  # most tokens left visible in an image


def root_key(seed: int | jax.Array) -> jax.Array:
    """The key from which all randomness of a seed derives.

    It is Threefry, whatever JAX_DEFAULT_PRNG_IMPL says: with other generators, a number depends on the batch in which
    it is drawn.
    """
    return jax.random.key(seed, impl="threefry2x32")


def max_visible(config: LossConfig, tokens: int) -> int:
    """The most tokens that can be visible."""
    return int(np.round((1 - config.mask_ratio_min) * tokens))


def draw(key: jax.Array, examples: jax.Array, model: ModelConfig, config: LossConfig) -> Draws:
    """Draws for `examples` (B,), which are positions in the global batch; `key` is that of (seed, step)."""
    most = max_visible(config, model.image_tokens)
    shared = jax.random.fold_in(key, np.uint32(2**32 - 1))  # no example has this number

    def one(example: jax.Array):
        drop, ratio, order, timestep, noise = jax.random.split(jax.random.fold_in(key, example), 5)
        if config.mask_ratio_per == "step":
            ratio = shared
        count = visible_count(ratio, config, model.image_tokens)
        place = jnp.argsort(jnp.argsort(jax.random.uniform(order, (model.image_tokens,))))
        gaussian = jax.random.normal(timestep, (config.repeat, model.image_tokens))
        return Draws(
            drop=jax.random.uniform(drop) < config.condition_dropout,
            mask=place >= count,
            timestep=flow.timestep_index(gaussian),
            noise=jax.random.normal(noise, (config.repeat, model.image_tokens, model.token_dim)),
            max_visible=most,
        )

    # The repeats come first, so that the head's tokens are (R, B, N, ...) and z is broadcast, never tiled.
    axes = Draws(drop=0, mask=0, timestep=1, noise=1, max_visible=most)
    draws = jax.vmap(one, out_axes=axes)(examples)
    # Not sharded over tokens: sorting sharded numbers would exchange them between devices.
    return dataclasses.replace(draws, mask=constrain(draws.mask, "batch", None))


def latent_noise(key: jax.Array, examples: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise (B, *shape) for drawing latents from their moments, keyed like `draw`."""

    def one(example: jax.Array):
        # A number that `draw` does not derive a key from.
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, example), np.uint32(2**32 - 1)), shape)

    return jax.vmap(one)(examples)


def visible_count(key: jax.Array, config: LossConfig, tokens: int) -> jax.Array:
    """round((1 - r) N), r from a normal truncated to [mask_ratio_min, 1]."""
    low = (config.mask_ratio_min - config.mask_ratio_mean) / config.mask_ratio_std
    high = (1.0 - config.mask_ratio_mean) / config.mask_ratio_std
    ratio = config.mask_ratio_mean + config.mask_ratio_std * jax.random.truncated_normal(key, low, high)
    visible = jnp.round((1 - ratio) * tokens).astype(jnp.int32)
    return jnp.minimum(visible, max_visible(config, tokens))  # the bound is rounded in float64
