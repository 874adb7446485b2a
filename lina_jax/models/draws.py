"""The random draws of one training step, each a function of (seed, step, example) alone (spec sections 6, 7, 9, 17).

Keyed by example, they are the same on any mesh, for any number of hosts and for any split into micro-batches.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lina_jax.config import LossConfig, ModelConfig
from lina_jax.models import flow


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Draws:
    """What chance decides for a batch: B images of N tokens, V slots for visible ones, R repeats of the head."""

    drop: jax.Array  # (B,) bool, train unconditionally
    visible_ids: jax.Array  # (B, V) int32, raster indices in decoding order
    visible: jax.Array  # (B, V) bool, which slots are used
    mask: jax.Array  # (B, N) bool, True where content is hidden
    timestep: jax.Array  # (R, B, N) int32, index into the table of noise levels
    noise: jax.Array  # (R, B, N, p*p*C) float32


def visible_slots(config: LossConfig, tokens: int) -> int:
    """V: the most tokens that can be visible."""
    return int(np.round((1 - config.mask_ratio_min) * tokens))


def draw(key: jax.Array, examples: jax.Array, model: ModelConfig, config: LossConfig) -> Draws:
    """Draws for `examples` (B,), their positions in the global batch; `key` is that of (seed, step)."""
    slots = visible_slots(config, model.image_tokens)
    shared = jax.random.fold_in(key, np.uint32(2**32 - 1))  # no example has this number

    def one(example: jax.Array):
        drop, ratio, order, timestep, noise = jax.random.split(jax.random.fold_in(key, example), 5)
        if config.mask_ratio_per == "step":
            ratio = shared
        count = visible_count(ratio, config, model.image_tokens)
        ids = jnp.argsort(jax.random.uniform(order, (model.image_tokens,)))[:slots]
        visible = jnp.arange(slots) < count
        mask = (
            jnp.ones((model.image_tokens,), bool)
            .at[jnp.where(visible, ids, model.image_tokens)]
            .set(False, mode="drop")
        )
        gaussian = jax.random.normal(timestep, (config.repeat, model.image_tokens))
        return Draws(
            drop=jax.random.uniform(drop) < config.condition_dropout,
            visible_ids=ids.astype(jnp.int32),
            visible=visible,
            mask=mask,
            timestep=flow.timestep_index(gaussian),
            noise=jax.random.normal(noise, (config.repeat, model.image_tokens, model.token_dim)),
        )

    # The repeats lead, so that the head's tokens are (R, B, N, ...) and z is broadcast, never tiled.
    return jax.vmap(one, out_axes=Draws(drop=0, visible_ids=0, visible=0, mask=0, timestep=1, noise=1))(examples)


def latent_noise(key: jax.Array, examples: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise (B, *shape) for drawing latents from their moments, keyed like `draw`."""

    def one(example: jax.Array):
        # A number that `draw` does not split its key by.
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, example), np.uint32(2**32 - 1)), shape)

    return jax.vmap(one)(examples)


def visible_count(key: jax.Array, config: LossConfig, tokens: int) -> jax.Array:
    """round((1 - r) N), r from a normal truncated to [mask_ratio_min, 1]."""
    low = (config.mask_ratio_min - config.mask_ratio_mean) / config.mask_ratio_std
    high = (1.0 - config.mask_ratio_mean) / config.mask_ratio_std
    ratio = config.mask_ratio_mean + config.mask_ratio_std * jax.random.truncated_normal(key, low, high)
    return jnp.round((1 - ratio) * tokens).astype(jnp.int32)
