"""Averages of stored checkpoints: the mean of the last ones, and post-hoc EMAs of other decays.

An EMA is a weighted mean of the parameters after every update. Checkpoints hold some of these parameters, and EMAs of
the run's own decay; a combination of both is another weighted mean. Post-hoc EMA (Karras et al. 2024, arXiv 2312.02696,
section 3.2) chooses the combination whose weights are nearest to those of the EMA that is wanted.

Here cumulative weights are compared: if F(s) is the total weight of all parameters before update s, two means differ by
the sum over s of (F'(s) - F(s)) times the change by update s. This gives a bound for any training, and uses the stored
parameters, too.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lina_jax import mesh as mesh_lib
from lina_jax import state
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import Config, EmaConfig
from lina_jax.ema import ema_decay
from lina_jax.errors import UserError
from lina_jax.state import Tree
from lina_jax.workdir import load_config

# Assumed error of a stored array from the rounding of all updates before it, in units of the change of one update. It
# is multiplied by the array's coefficient, and so penalises large coefficients.
ROUNDING = 1e-3
CHUNK = 2**14  # updates


@dataclasses.dataclass(frozen=True)
class Average:
    """Weights averaged over several checkpoints, whose steps are `steps`."""

    config: Config
    params: Tree
    frozen: Tree
    steps: list[int]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Parameters, or their EMA, after a number of updates."""

    step: int
    updates: int
    ema: bool


@dataclasses.dataclass(frozen=True)
class Fit:
    """A combination of snapshots, and its error as an estimate of the EMA that is wanted.

    The error is at most `bound` times the largest change of one update. `share` is the expected error relative to the
    distance between that EMA and the last parameters, if updates are independent of each other.
    """

    coefficients: np.ndarray
    bound: float
    share: float


def mean(workdir: Path, last: int) -> Average:
    """The mean of the parameters of the last `last` checkpoints.

    Raises UserError unless 1 <= last <= the number of checkpoints.
    """
    config = load_config(workdir)
    checkpoints = Checkpoints(workdir, config.checkpoint, create=False)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"--average={last}: no checkpoint in {workdir}")
    if not 1 <= last <= len(steps):
        raise UserError(f"--average={last}: expected 1 to {len(steps)}, the checkpoints in {workdir}")
    steps = steps[-last:]
    snapshots = [Snapshot(step, 0, ema=False) for step in steps]
    return Average(config, *_combined(config, checkpoints, snapshots, [1 / last] * last), steps)


def ema(workdir: Path, decay: float, step: int | None = None) -> tuple[Average, Fit]:
    """The EMA that the run would have had with another ema.decay, estimated from all checkpoints up to a step.

    Raises UserError unless 0 < decay < 1 and the checkpoints hold updates to average.
    """
    if not 0 < decay < 1:
        raise UserError(f"--ema_decay={decay}: must be between 0 and 1")
    config = load_config(workdir)
    checkpoints = Checkpoints(workdir, config.checkpoint, create=False)
    last, *_ = checkpoints.candidates(step)
    steps = [step for step in checkpoints.steps() if step <= last]
    snapshots = []
    for stored in steps:
        alone = checkpoints.imported(stored)
        updates = 0 if alone else checkpoints.updates(stored)
        snapshots += [Snapshot(stored, updates, ema=kind) for kind in ((False,) if alone else (False, True))]
    if snapshots[-1].updates == 0:
        raise UserError(f"{workdir} has no updates to average")
    found = fit(config.ema, dataclasses.replace(config.ema, decay=decay), snapshots)
    return Average(config, *_combined(config, checkpoints, snapshots, found.coefficients), steps), found


def _combined(
    config: Config, checkpoints: Checkpoints, snapshots: Sequence[Snapshot], coefficients: Sequence[float]
) -> tuple[Tree, Tree]:
    """(sum of the snapshots times their coefficients, frozen arrays), with at most two models in memory."""
    blueprint, total = state.make_blueprint(config, mesh_lib.mesh_for_weights(config.model)), None
    for snapshot, x in zip(snapshots, map(np.float32, coefficients), strict=True):
        params, frozen, _ = checkpoints.restore_weights(blueprint, ema=snapshot.ema, step=snapshot.step)
        if total is None:
            total = jax.tree.map(lambda array, x=x: x * array, params)
        else:
            total = jax.tree.map(lambda sum_, array, x=x: sum_ + x * array, total, params)
    return total, frozen


def fit(own: EmaConfig, wanted: EmaConfig, snapshots: Sequence[Snapshot]) -> Fit:
    """Coefficients that sum to one, for the EMA at the update of the last snapshot.

    Least squares over all updates, reduced chunk by chunk to a triangle (QR); `ROUNDING` penalises large coefficients.
    """
    last, count = snapshots[-1].updates, len(snapshots)
    ahead = count - 1  # free coefficients: the last one is 1 minus their sum
    held = np.vstack([np.eye(ahead, count), [*[-1.0] * ahead, -1.0]]) * ROUNDING
    triangle = held
    for target, stored in _cumulated(own, wanted, snapshots, last):
        rows = np.column_stack([stored[:, :-1] - stored[:, -1:], target - stored[:, -1]])
        triangle = np.linalg.qr(np.vstack([triangle, rows]), mode="r")
    others = np.linalg.lstsq(triangle[:, :-1], triangle[:, -1], rcond=None)[0]
    coefficients = np.append(others, 1 - others.sum())
    bound = square = distance = 0.0
    for target, stored in _cumulated(own, wanted, snapshots, last):
        error = stored @ coefficients - target
        bound, square, distance = bound + np.abs(error).sum(), square + (error**2).sum(), distance + (target**2).sum()
    return Fit(coefficients, float(bound), float(np.sqrt(square / distance)))


def _cumulated(
    own: EmaConfig, wanted: EmaConfig, snapshots: Sequence[Snapshot], last: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of F over updates s from 1 on: of the EMA that is wanted (s,), and of each snapshot (s, snapshot)."""
    kept, wanted_kept = _kept(own, last), _kept(wanted, last)
    counts, averaged = np.array([s.updates for s in snapshots]), np.array([s.ema for s in snapshots])
    for start in range(1, last + 1, CHUNK):
        s = np.arange(start, min(start + CHUNK, last + 1))
        stored = np.where(averaged, np.exp(np.minimum(kept[counts] - kept[s - 1][:, None], 0.0)), 0.0)
        yield np.exp(wanted_kept[last] - wanted_kept[s - 1]), np.where(s[:, None] > counts, 1.0, stored)


def _kept(config: EmaConfig, updates: int) -> np.ndarray:
    """Logarithm of the EMA's weight of the initial parameters after n updates, n from 0 on."""
    decays = np.asarray(ema_decay(config, jnp.arange(1, updates + 1)), np.float64)
    return np.concatenate([[0.0], np.cumsum(np.log(np.maximum(decays, 1e-300)))])
