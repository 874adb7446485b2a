"""Validation losses, on examples that a run does not train on."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lina_jax import data, preemption
from lina_jax import mesh as mesh_lib
from lina_jax.image_metrics import Value
from lina_jax.models import flow
from lina_jax.models.draws import draw, latent_noise
from lina_jax.state import VALIDATION, Blueprint, Program, Tree, key_of
from lina_jax.training_step import model_inputs

SIGMA_BINS = 4  # equal bins of sigma in which the loss is reported
# Significant digits of reported validation losses. The order of sums within a batch depends on the number of devices,
# which changes a loss by 1e-7 of itself.
_DIGITS = 5


class Validation:
    """Losses on fixed examples with fixed draws, the same for any checkpoint, batch size and mesh.

    Each process holds the examples of its devices in memory from the start.
    """

    def __init__(self, blueprint: Blueprint, records: data.Records):
        config, self._mesh = blueprint.config, blueprint.mesh
        self._step = make_eval_step(blueprint)
        self._count = min(config.eval.examples, len(records))
        wanted = config.eval.batch_size or min(config.batch_size, self._count)
        self._batch = mesh_lib.round_up_batch(blueprint.mesh, wanted)
        self._rows = mesh_lib.local_rows(blueprint.mesh, self._batch)
        self._held = sorted({number for start in self._starts for number in self._numbers(start)})
        self._examples = data.fixed_examples(records, self._count, self._held)

    def both(self, params: Tree, ema: Tree, frozen: Tree) -> dict[str, float]:
        """Losses of the parameters and (with names ending in _ema) of their EMA."""
        raw, ema = self.losses([params, ema], frozen)
        return raw | {f"{name}_ema": value for name, value in ema.items()}

    def losses(self, weights: Sequence[Tree], frozen: Tree) -> list[dict[str, float]]:
        """For each of `weights`: 'loss', 'loss_standard_error', and 'loss_sigma_LOW_HIGH' by noise level."""
        parts: list[list[np.ndarray]] = [[] for _ in weights]
        for start in self._starts:
            rows = np.searchsorted(self._held, self._numbers(start))
            numbers = start + np.array(self._rows)
            given = {name: array[rows] for name, array in self._examples.items()}
            given["example"] = np.where(numbers < self._count, numbers, -1)
            batch = mesh_lib.make_global_batch(self._mesh, self._batch, self._rows, given)
            examples = batch.pop("example")
            for made, params in zip(parts, weights, strict=True):
                sums = self._step(params, frozen, batch, examples)
                made.append(multihost_utils.process_allgather(sums, tiled=True))
                preemption.raise_if_preempted()
        return [self._summary(made) for made in parts]

    @property
    def _starts(self) -> range:
        """The first example of each batch."""
        return range(0, self._count, self._batch)

    def _numbers(self, start: int) -> list[int]:
        """The example in each of this process' rows of a batch; the last example is repeated as padding."""
        return [min(start + row, self._count - 1) for row in self._rows]

    def _summary(self, parts: Sequence[np.ndarray]) -> dict[str, float]:
        total, weight = np.concatenate(parts, axis=1, dtype=np.float64)[:, : self._count]
        edges = np.linspace(0, 1, SIGMA_BINS + 1)
        overall = mean_loss(total.sum(axis=1), weight.sum(axis=1))
        losses = {"loss": overall.value, "loss_standard_error": overall.standard_error} | {
            f"loss_sigma_{low:.2f}_{high:.2f}": mean_loss(*sums).value
            for low, high, *sums in zip(edges, edges[1:], total.T, weight.T, strict=False)
            if np.any(sums[1])  # else no token had a noise level in this bin
        }
        return {name: float(f"{value:.{_DIGITS}g}") for name, value in losses.items() if value is not None}


def make_eval_step(blueprint: Blueprint) -> Program:
    """(params, frozen, batch, examples (B,)) -> masked loss and number of masked tokens, each summed by bin of sigma.

    Both sums are (B, SIGMA_BINS). The draws depend on (seed, example) alone: they are the same for every checkpoint.
    Examples with a negative number are padding.
    """
    config = blueprint.config
    sigmas = flow.training_sigmas(config.loss.shift)
    loss_config = dataclasses.replace(config.loss, condition_dropout=0.0, repeat=1, mask_ratio_per="example")

    def step(params, frozen, batch, examples, weights):
        key = key_of(config, VALIDATION)
        tokens, condition = model_inputs(blueprint, weights, batch, functools.partial(latent_noise, key, examples))
        draws = draw(key, examples, config.model, loss_config)
        losses = blueprint.inference(params, frozen).token_losses(tokens, condition, draws, sigmas)
        weight = (draws.mask & (examples >= 0)[:, None]).astype(jnp.float32)
        level = jnp.clip((jnp.asarray(sigmas)[draws.timestep] * SIGMA_BINS).astype(jnp.int32), 0, SIGMA_BINS - 1)
        bins = jax.nn.one_hot(level, SIGMA_BINS) * weight[None, ..., None]
        sums = jnp.einsum("rbn,rbnl->bl", losses, bins, precision=jax.lax.Precision.HIGHEST)
        return sums, jnp.sum(bins, axis=(0, 2))

    return blueprint.jit(step, blueprint.encoders.weights)


def mean_loss(total: np.ndarray, weight: np.ndarray) -> Value:
    """Mean over the tokens of N examples, from each example's sum `total` (N,) and number of tokens `weight` (N,).

    The standard error is that of a ratio of sums over randomly drawn examples; None for a single example.
    """
    count, tokens = len(total), max(weight.sum(), 1.0)
    mean = total.sum() / tokens
    error = math.sqrt(np.square(total - mean * weight).sum() * count / (count - 1)) / tokens if count > 1 else None
    return Value(mean, error)
