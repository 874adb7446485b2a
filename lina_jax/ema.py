"""The exponential moving average of the parameters."""

import jax
import jax.numpy as jnp

from lina_jax.config import EmaConfig
from lina_jax.state import Tree


def averaged(config: EmaConfig, ema: Tree, params: Tree, updates: jax.Array) -> Tree:
    """The EMA, a tree like `params`, after `updates` () updates, the last of which gave `params`."""
    decay = ema_decay(config, updates)
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, ema, params)


def ema_decay(config: EmaConfig, updates: jax.Array) -> jax.Array:
    """The share of itself in [0, 1] that the EMA keeps at update numbers (...), counted from 1."""
    decay = jnp.minimum(config.decay, (1 + updates) / (10 + updates)) if config.warmup else jnp.float32(config.decay)
    return jnp.where(updates % config.every == 0, decay, 1.0)
