"""Checkpoints: orbax, asynchronous, atomic; and the config that a workdir belongs to.

WORKDIR/checkpoints/STEP holds the state after STEP batches in four items, so that sampling reads just the weights it
needs, and digests of their files (`integrity.py`). A damaged checkpoint is named and the one before it used; training
moves it to WORKDIR/damaged.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from lina_jax import config as config_lib
from lina_jax import integrity
from lina_jax.config import CheckpointConfig, Config
from lina_jax.errors import UserError
from lina_jax.state import Blueprint, TrainState, Tree

WEIGHTS = ("params", "frozen", "ema")
ALONE = ("params", "frozen")  # of an import


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: Path, config: CheckpointConfig, *, create: bool = True):
        self.directory = workdir.resolve() / "checkpoints"
        self._aside = workdir.resolve() / "damaged"
        self._saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep_last,
            keep_period=config.keep_every or None,
            create=create,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._record_digests),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Start saving; the arrays are copied before this returns. Raises UserError when an earlier save failed."""
        step = int(state.step)
        if step == self.latest_step():
            return
        items = {name: ocp.args.StandardSave(getattr(state, name)) for name in WEIGHTS}
        items["progress"] = ocp.args.StandardSave(_progress(state))
        self.wait()  # for the save before, to which `_saving` belongs until it is finished
        self._saving = step
        with self._naming_failures():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def save_weights(self, params: Tree, frozen: Tree) -> None:
        """Save weights of which nothing else is known as the checkpoint that a run starts from (step 0).

        By themselves data files would grow to 2 GB, in memory until they are written.
        """
        trees = dict(zip(ALONE, (params, frozen), strict=True))
        items = {name: ocp.args.PyTreeSave(t, ocdbt_target_data_file_size=2**26) for name, t in trees.items()}
        self._saving = 0
        with self._naming_failures():
            self._manager.save(0, args=ocp.args.Composite(**items))

    def describe_weights(self, step: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shapes and types of the arrays that a model needs, none of which is read."""
        described = {}
        for item in ALONE:
            tree = ocp.StandardCheckpointHandler().metadata(self.directory / str(step) / item).tree
            for path, leaf in jax.tree.leaves_with_path(tree):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                described[name] = tuple(leaf.shape), np.dtype(leaf.dtype)
        return described

    def imported(self, step: int) -> bool:
        """Whether the checkpoint is one of `save_weights`."""
        return _imported(self.directory / str(step))

    def restore(self, plan: Blueprint, step: int | None = None) -> TrainState:
        """The state at `step`, laid out as `plan` says, whatever mesh it was saved from.

        Without a step it is the latest that is not damaged; damaged ones are moved away, since the run will come to
        their steps again. Weights alone become a fresh state.
        """

        def wanted(imported: bool) -> dict[str, Tree]:
            weights = {name: getattr(plan.shapes, name) for name in WEIGHTS}
            if imported:
                return {name: weights[name] for name in ALONE}
            return weights | {"progress": _progress(plan.shapes)}

        _, items, damaged = self._restore_sound(step, wanted)
        if damaged:
            self._move_aside(damaged)
        if "progress" not in items:
            return plan.start(**items)
        progress = items.pop("progress")
        return TrainState(**progress, **items)

    def restore_weights(self, plan: Blueprint, *, ema: bool = True, step: int | None = None) -> tuple[Tree, Tree, int]:
        """(parameters or their EMA, frozen arrays, step), nothing else read from disk.

        Where there are weights alone, they are their EMA.
        """

        def wanted(imported: bool) -> dict[str, Tree]:
            name = "ema" if ema and not imported else "params"
            return {name: getattr(plan.shapes, name), "frozen": plan.shapes.frozen}

        step, items, _ = self._restore_sound(step, wanted)
        frozen = items.pop("frozen")
        (params,) = items.values()
        return params, frozen, step

    def wait(self) -> None:
        """Until everything is on disk. Raises UserError when a save failed."""
        with self._naming_failures():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """After everything is on disk. Raises UserError when a save failed."""
        with self._naming_failures():
            self._manager.close()

    def _restore_sound(
        self, step: int | None, wanted: Callable[[bool], dict[str, Tree]]
    ) -> tuple[int, dict[str, Tree], list[int]]:
        """(step, items, damaged later steps), the same in all processes. Raises UserError if there is nothing sound.

        `wanted` tells the shapes of the items, of a checkpoint of weights alone or of another.
        """
        damaged: dict[int, str] = {}
        for candidate in self._candidates(step):
            try:
                items = self._restore(candidate, wanted(self.imported(candidate)))
            except _Damaged as error:
                damaged[candidate] = str(error)
                continue
            for later, reason in damaged.items():
                if jax.process_index() == 0:
                    logging.warning(
                        "checkpoint %d in %s is damaged (%s): using %d", later, self.directory, reason, candidate
                    )
            return candidate, items, list(damaged)
        named = "; ".join(f"checkpoint {later} in {self.directory} is damaged ({damaged[later]})" for later in damaged)
        raise UserError(f"{named}: {'no other was asked for' if step is not None else 'there is no older one'}")

    def _restore(self, step: int, shapes: dict[str, Tree]) -> dict[str, Tree]:
        """Raises _Damaged, and UserError when the checkpoint has other arrays than `shapes`."""
        folder = self.directory / str(step)
        if reason := integrity.damage(folder, shapes):
            raise _Damaged(reason)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
        try:
            # Orbax tells neither from the other, and says either at length.
            for name, tree in shapes.items():
                self._check_shapes(folder / name, tree)
            return dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())
        except (UserError, jax.errors.JaxRuntimeError):  # the latter: no memory
            raise
        except Exception as error:  # what orbax raises of unreadable data is no narrower
            cause = error
            while cause.__cause__:
                cause = cause.__cause__
            reason = str(cause).strip().splitlines()[0].split(" [")[0][:200]  # in brackets: how it was read
            if jax.process_count() > 1:  # others may have read it, so that all of them have to start again
                raise UserError(
                    f"checkpoint {step} in {self.directory} cannot be read ({reason}); if it is damaged, remove it"
                ) from error
            raise _Damaged(reason) from error

    def _check_shapes(self, item: Path, wanted: Tree) -> None:
        for part in ("_METADATA", "manifest.ocdbt"):
            if not (item / part).exists():
                raise ValueError(f"{item.name}/{part} is missing")
        there, here = _shapes(ocp.StandardCheckpointHandler().metadata(item).tree), _shapes(wanted)
        differing = [
            f"{path}: {there.get(path, 'absent')} in the checkpoint, {here.get(path, 'absent')} in this config"
            for path in there | here
            if there.get(path) != here.get(path)
        ]
        if differing:
            more = f"; and {len(differing) - 2} more" if len(differing) > 2 else ""
            kind = "optimizer" if item.name == "progress" else "model"
            raise UserError(
                f"{item} does not fit the {kind} of this config: {'; '.join(differing[:2])}{more} "
                "(--allow_config_change cannot change the arrays of model or optimizer: choose another --workdir)"
            )

    def _candidates(self, step: int | None) -> list[int]:
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.directory}")
        if step is None:
            return steps[::-1]
        if step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.directory}: there are {steps}")
        return [step]

    def _move_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            self._aside.mkdir(exist_ok=True)
            for step in steps:
                before = len(list(self._aside.glob(f"{step}.*")))
                os.rename(self.directory / str(step), self._aside / f"{step}.{before}")
        multihost_utils.sync_global_devices("damaged checkpoints are moved aside")
        self._manager.reload()

    def _record_digests(self) -> None:
        """Called by orbax in process 0 when all is written, before the folder gets its name."""
        for folder in self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
            integrity.record(folder)

    def _naming_failures(self):
        return _NamedFailure(self.directory)


class _Damaged(Exception):
    """A checkpoint's files are not those that were saved."""


@dataclasses.dataclass
class _NamedFailure:
    """Turns what a failed write raises (a full disk, lost permissions) into one line naming the place."""

    directory: Path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        gone = isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1  # another process, not a disk
        if isinstance(error, Exception) and not isinstance(error, UserError) and not gone:
            first = str(error).strip().splitlines()[0] if str(error).strip() else kind.__name__
            raise UserError(f"saving to {self.directory} failed, earlier checkpoints are intact: {first}") from error


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    named = ((jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in jax.tree.leaves_with_path(tree))
    return {name: tuple(leaf.shape) for name, leaf in named}


def _progress(state: TrainState) -> dict[str, Tree]:
    names = (f.name for f in dataclasses.fields(TrainState) if f.name not in WEIGHTS)
    return {name: getattr(state, name) for name in names}


def _imported(checkpoint: Path) -> bool:
    # Of a damaged checkpoint of a run, one of the two is there still.
    return checkpoint.is_dir() and not any((checkpoint / name).exists() for name in ("ema", "progress"))


def check_config(workdir: Path, config: Config, *, allow_changes: bool = False) -> None:
    """Check that a workdir may go on with a config.

    Raises UserError naming each field that changes the function, the optimiser or the data order, unless told
    otherwise. Imported weights, before they are trained, have a function only.
    """
    if not (workdir / "config.json").exists():
        return
    changed = config_lib.differences(load_config(workdir), config)
    steps = [path for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()]
    if steps and all(_imported(path) for path in steps):
        changed = [field for field in changed if field.startswith(("model.", "autoencoder."))]
    if changed and not allow_changes:
        raise UserError(
            f"{workdir} belongs to another config: {'; '.join(changed)} "
            "(choose another --workdir, or pass --allow_config_change)"
        )


def write_config(workdir: Path, config: Config) -> None:
    """Bind a workdir to a config."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "config.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        os.replace(partial, path)


def load_config(workdir: Path) -> Config:
    """The config that a workdir was trained with. Raises UserError when there is none."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is not a training directory: it has no config.json")
    try:
        return config_lib.freeze(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is corrupt: {error}") from error
