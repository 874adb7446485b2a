"""Measurements during training: when they are due, how they are recorded, and which of them a kill has prevented."""

import itertools
import shutil
from collections.abc import Collection
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from lina_jax import drawing, hosts, metrics, previews, quality, state
from lina_jax.config import Config
from lina_jax.data import Records
from lina_jax.validation import Validation


def falls_on(step: int, every: int) -> bool:
    """Whether a cadence of `every` steps falls on a step; 0: never."""
    return every > 0 and step % every == 0


def due(config: Config, step: int) -> list[str]:
    """Which of validation, quality and previews are due after a step."""
    cadences = {"validation": config.eval.every}
    if config.eval.images:
        cadences["quality"] = config.eval.images_every
    if config.log.preview_images and not drawing.missing_encoder(config):
        cadences["previews"] = config.log.preview_every
    if not 0 < step <= config.steps:
        return []
    return [name for name, every in cadences.items() if step == config.steps or falls_on(step, every)]


def overdue(config: Config, workdir: Path, step: int) -> list[str]:
    """What was due at a checkpoint's step and is not recorded; the same in all processes.

    A checkpoint that is due is saved before anything is measured, so that a run that ends meanwhile loses no training.
    Features that a killed run has left are removed, unless quality is missing, which needs them.
    """
    missing = _missing(config, workdir, step)
    if "quality" not in missing and jax.process_index() == 0:
        shutil.rmtree(_features(workdir), ignore_errors=True)
    return missing


def _features(workdir: Path) -> Path:
    """Where the features of pictures are, until quality is measured."""
    return workdir / "measuring"


def _missing(config: Config, workdir: Path, step: int) -> list[str]:
    names = due(config, step)
    if not names:
        return []
    recorded = _recorded(workdir / "metrics.jsonl", step)
    if previews.preview_path(workdir, step).exists():
        recorded.add("previews")
    # Process 0 writes the records; the others may not see them.
    missing = multihost_utils.broadcast_one_to_all(np.array([name not in recorded for name in names]))
    return list(itertools.compress(names, missing))


def _recorded(log: Path, step: int) -> set[str]:
    """What has been measured at a step since the run last reached it.

    A run that a damaged checkpoint sets back reaches the step again; the rows of the steps in between show this.
    """
    found: set[str] = set()
    for row in metrics.rows_as_written(log):
        if row["step"] < step or (row["step"] == step and "loss" in row):
            found.clear()
        if row["step"] == step:
            found |= {name.partition("/")[0] for name in row}
    return found


class Measurements:
    """Measures the weights of a run: validation losses and quality go to its logs, previews to files."""

    def __init__(self, blueprint: state.Blueprint, records: Records, workdir: Path):
        """`records` are those of the validation split. Raises UserError for what cannot be read or drawn."""
        config = blueprint.config
        self._blueprint, self._work = blueprint, _features(workdir)
        self._validation = Validation(blueprint, records)
        self._quality = quality.DrawnQuality(blueprint, records) if config.eval.images else None
        draws = config.log.preview_images and not drawing.missing_encoder(config)
        self._previews = previews.Previews(blueprint, workdir) if draws else None

    def take(self, names: Collection[str], step: int, train_state: state.TrainState, writer: metrics.Writer) -> None:
        """Take these measurements, in all processes, and record each as soon as it is known."""
        if "validation" in names:
            losses = self._validation.both(train_state.params, train_state.ema, train_state.frozen)
            writer.scalars(step, {f"validation/{name}": value for name, value in losses.items()})
        if "quality" in names:
            found = self._quality.measure(train_state.ema, train_state.frozen, step=step, work=self._work)
            if found:
                writer.scalars(step, found.scalars())
                shutil.rmtree(self._work)
            hosts.barrier(f"quality of {step}")  # process 0 compared the pictures alone
        if "previews" in names:
            self._previews.draw(step, train_state, writer)
