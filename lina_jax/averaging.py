"""Averages of stored checkpoints: the mean of the last ones, and EMAs of other decays, made afterwards.

An EMA is a weighted mean of the parameters after every update. Checkpoints hold some of these, and EMAs of the run's
own decay; what is combined of them is another weighted mean. Post-hoc EMA (Karras et al. 2024, arXiv 2312.02696,
section 3.2) chooses the one whose weights are nearest to those of the EMA that is wanted. Here weights are compared
cumulated: with F(s) the weight of all parameters before update s, two means differ by the sum over s of (F'(s) - F(s))
times what update s changed. That is bounded for any training, and makes use of the stored parameters, too.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lina_jax import mesh, state
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import Config, EmaConfig
from lina_jax.errors import UserError
from lina_jax.state import Tree
from lina_jax.workdir import load_config

# How far a stored array may be off by the rounding of all updates before it, in changes of one update. Large
# coefficients multiply it, so they must be worth it.
ROUNDING = 1e-3
CHUNK = 2**14  # updates


@dataclasses.dataclass(frozen=True)
class Average:
    """Weights made of those of several checkpoints."""

    config: Config
    params: Tree
    frozen: Tree
    steps: list[int]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Parameters, or their EMA, as they were after some updates."""

    step: int
    updates: int
    ema: bool


@dataclasses.dataclass(frozen=True)
class Fit:
    """A combination of snapshots, and how far it is from the EMA that is wanted.

    `bound` times the largest change of one update is more than any error; `share` is the expected error against the
    distance between that EMA and the last parameters, where updates are independent of each other.
    """

    coefficients: np.ndarray
    bound: float
    share: float


def mean(workdir: Path, last: int) -> Average:
    """Of the parameters of the last checkpoints. Raises UserError."""
    config = load_config(workdir)
    checkpoints = Checkpoints(workdir, config.checkpoint, create=False)
    steps = checkpoints.steps()[-last:] if last > 0 else []
    if len(steps) != last or last < 1:
        raise UserError(f"--average={last}: expected 1 to {len(checkpoints.steps())}, the checkpoints of {workdir}")
    snapshots = [Snapshot(step, 0, ema=False) for step in steps]
    return Average(config, *_combined(config, checkpoints, snapshots, [1 / last] * last), steps)


def ema(workdir: Path, decay: float, step: int | None = None) -> tuple[Average, Fit]:
    """The EMA that the run would have had with another ema.decay, from all checkpoints up to a step.

    Raises UserError.
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
        raise UserError(f"{workdir} has no update to average")
    found = fit(config.ema, dataclasses.replace(config.ema, decay=decay), snapshots)
    return Average(config, *_combined(config, checkpoints, snapshots, found.coefficients), steps), found


def _combined(
    config: Config, checkpoints: Checkpoints, snapshots: Sequence[Snapshot], coefficients: Sequence[float]
) -> tuple[Tree, Tree]:
    """(the sum of the snapshots times their coefficients, frozen arrays), two models in memory at most."""
    plan, total = state.blueprint(config, mesh.holding(config.model)), None
    for snapshot, x in zip(snapshots, map(np.float32, coefficients), strict=True):
        params, frozen, _ = checkpoints.restore_weights(plan, ema=snapshot.ema, step=snapshot.step)
        if total is None:
            total = jax.tree.map(lambda array, x=x: x * array, params)
        else:
            total = jax.tree.map(lambda sum_, array, x=x: sum_ + x * array, total, params)
    return total, frozen


def fit(own: EmaConfig, wanted: EmaConfig, snapshots: Sequence[Snapshot]) -> Fit:
    """Coefficients that sum to one, for the EMA after as many updates as the last snapshot has.

    By least squares over all updates, a triangle of them at a time; large coefficients are held down by `ROUNDING`.
    """
    last, count = snapshots[-1].updates, len(snapshots)
    ahead = count - 1  # of the others each, the last has what is left to one
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
    """F of the EMA that is wanted (s,) and of each snapshot (s, snapshot), for updates s from 1 on, in chunks."""
    kept, wanted_kept = _kept(own, last), _kept(wanted, last)
    counts, averaged = np.array([s.updates for s in snapshots]), np.array([s.ema for s in snapshots])
    for start in range(1, last + 1, CHUNK):
        s = np.arange(start, min(start + CHUNK, last + 1))
        stored = np.where(averaged, np.exp(np.minimum(kept[counts] - kept[s - 1][:, None], 0.0)), 0.0)
        yield np.exp(wanted_kept[last] - wanted_kept[s - 1]), np.where(s[:, None] > counts, 1.0, stored)


def _kept(config: EmaConfig, updates: int) -> np.ndarray:
    """Logarithm of what n updates leave of the weight of the first parameters, n from 0 on."""
    decays = np.asarray(state.ema_decay(config, jnp.arange(1, updates + 1)), np.float64)
    return np.concatenate([[0.0], np.cumsum(np.log(np.maximum(decays, 1e-300)))])
