"""AdamW as published, or Muon, with schedule, weight decay and clipping. Frozen arrays are not passed to it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from lina_jax.config import OptimConfig

MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # of an update at learning rate 1, like AdamW's, so that both share a learning rate (arXiv 2502.16982)


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Updates applied so far -> learning rate.

    Warm-up is linear, from nearly `warmup_factor` times the peak. Then the rate is constant, or follows a cosine to
    `final_learning_rate` at update `steps`.
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


def optimizer(
    config: OptimConfig, steps: int, decayed: Any, matrices: Mapping[Any, tuple]
) -> optax.GradientTransformation:
    """Clipping, then AdamW or Muon.

    `decayed` is a tree of bools like the parameters, False for the scales and biases of layer norms. `matrices` lists
    the arrays that map features to features: key path -> (contracted axes, output axes). Muon (Jordan 2024)
    orthogonalises their momentum, so that no direction learns slower than another. AdamW updates the rest, with
    Nesterov momentum like Muon.
    """
    rate = learning_rate(config, steps)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
        nesterov=config.name == "muon",
    )
    if config.name == "adamw":
        return optax.chain(clip, adamw)

    def axes(params):
        return jax.tree.map_with_path(lambda path, _: MuonDimensionNumbers(*matrices[path]), params)

    def names(params):
        return jax.tree.map_with_path(lambda path, _: "muon" if path in matrices else "adamw", params)

    orthogonal = muon(
        rate,
        beta=MUON_MOMENTUM,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=axes,
        consistent_rms=MUON_RMS,
    )
    return optax.chain(clip, optax.partition({"adamw": adamw, "muon": orthogonal}, names))
