"""AdamW as published: schedule, which parameters decay, clipping (spec section 13). Frozen arrays never get here."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lina_jax.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Updates applied so far -> learning rate. Warm-up is linear from nearly `warmup_factor` times the peak.

    After it: constant, or a cosine to `final_learning_rate` at update `steps`.
    """

    def schedule(count: jax.Array) -> jax.Array:
        warm = jnp.minimum((count + 1) / max(config.warmup_steps, 1), 1.0)
        rate = config.learning_rate * (warm + (1 - warm) * config.warmup_factor)
        if config.schedule == "cosine":
            progress = jnp.clip((count - config.warmup_steps) / max(steps - config.warmup_steps, 1), 0.0, 1.0)
            falling = 0.5 * (1 + jnp.cos(jnp.pi * progress))
            rate = jnp.where(warm < 1, rate, config.final_learning_rate + (rate - config.final_learning_rate) * falling)
        return rate

    return schedule


def optimizer(config: OptimConfig, steps: int, decayed: Any) -> optax.GradientTransformation:
    """`decayed` is a tree of bools like the parameters: all but the scales and biases of layer norms."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return optax.chain(clip, adamw)
