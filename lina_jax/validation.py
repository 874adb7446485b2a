"""Validation losses: how well a run predicts examples that it does not train on."""

import math

import jax
import numpy as np
from jax.experimental import multihost_utils

from lina_jax import data, preemption, state
from lina_jax import mesh as mesh_lib
from lina_jax.config import Config
from lina_jax.image_metrics import Value
from lina_jax.state import SIGMA_BINS, Blueprint, Tree

# Significant digits of validation losses that are told. Sums within a batch come in another order on other numbers of
# devices, which changes a loss by 1e-7 of itself.
_DIGITS = 5


class Validation:
    """Loss on fixed examples with fixed draws, whatever the checkpoint, the batch size or the mesh."""

    def __init__(self, config: Config, records: data.Records):
        self._count = min(config.eval.examples, len(records))
        self._batch = config.eval.batch_size or min(config.batch_size, self._count)
        self._examples = data.fixed_examples(records, self._count)
        self._step = None

    def both(self, plan: Blueprint, params: Tree, ema: Tree, frozen: Tree) -> dict[str, float]:
        """Losses of the parameters, and (names ending in _ema) of their EMA."""
        raw, ema = self.losses(plan, params, frozen), self.losses(plan, ema, frozen)
        return raw | {f"{name}_ema": value for name, value in ema.items()}

    def losses(self, plan: Blueprint, params: Tree, frozen: Tree) -> dict[str, float]:
        """'loss' and its 'loss_standard_error', and 'loss_sigma_LOW_HIGH' for each bin of noise levels."""
        self._step = self._step or state.make_eval_step(plan)
        size = mesh_lib.batch_parts(plan.mesh)
        batch = -(-self._batch // size) * size
        place = mesh_lib.sharding(plan.mesh, "batch")
        parts = []
        for start in range(0, self._count, batch):
            numbers = start + np.arange(batch)
            present = numbers < self._count
            rows = {name: array[np.minimum(numbers, self._count - 1)] for name, array in self._examples.items()}
            # Every process has all rows in memory, and gives its devices theirs.
            rows, numbers = jax.tree.map(
                lambda array: jax.make_array_from_callback(array.shape, place, array.__getitem__),
                (rows, np.where(present, numbers, -1)),
            )
            parts.append(multihost_utils.process_allgather(self._step(params, frozen, rows, numbers), tiled=True))
            preemption.heed()
        total, weight = np.concatenate(parts, axis=1, dtype=np.float64)[:, : self._count]
        edges = np.linspace(0, 1, SIGMA_BINS + 1)
        overall = mean_loss(total.sum(axis=1), weight.sum(axis=1))
        told = {"loss": overall.value, "loss_standard_error": overall.standard_error} | {
            f"loss_sigma_{low:.2f}_{high:.2f}": mean_loss(*sums).value
            for low, high, *sums in zip(edges, edges[1:], total.T, weight.T, strict=False)
            if np.any(sums[1])  # of a noise level that no token has nothing is known
        }
        return {name: float(f"{value:.{_DIGITS}g}") for name, value in told.items() if value is not None}


def mean_loss(total: np.ndarray, weight: np.ndarray) -> Value:
    """Mean over tokens of examples, of which `total` (N,) are the sums and `weight` (N,) the numbers of tokens.

    Standard error: that of a ratio of sums over examples drawn at random; None of a single one.
    """
    count, tokens = len(total), max(weight.sum(), 1.0)
    mean = total.sum() / tokens
    error = math.sqrt(np.square(total - mean * weight).sum() * count / (count - 1)) / tokens if count > 1 else None
    return Value(mean, error)
