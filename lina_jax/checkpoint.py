"""Checkpoints: orbax, asynchronous, atomic.

WORKDIR/checkpoints/STEP holds the state after STEP batches in four items, so that sampling reads only the weights that
it needs, and digests of their files (`integrity.py`). If a checkpoint is damaged, it is reported and an earlier one
used; training moves the damaged one to WORKDIR/damaged.
"""

import contextlib
import dataclasses
import itertools
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from lina_jax import errors, hosts, integrity
from lina_jax.config import CheckpointConfig
from lina_jax.errors import TransientFailure, UserError
from lina_jax.state import Blueprint, TrainState, Tree
from lina_jax.workdir import is_imported, kind_of_weights, saved_steps

Shape = tuple[int, ...]
Flat = dict[tuple[str, ...], Any]  # arrays, concrete or abstract, by path
Choice = Callable[[dict[tuple[str, ...], Shape]], Flat]
WEIGHTS = ("params", "frozen", "ema")
WEIGHT_ITEMS = ("params", "frozen")  # the items of imported weights
# Each device that holds a replica of an array writes a slice of it. Slicing smaller arrays, each with a program of its
# own, costs more than it saves: the first save of a tiny model on eight devices took ten times as long.
SMALLEST_SLICE_BYTES = 2**20
CONCURRENT_GB = 96  # most that a process reads or writes at once; orbax's default for states


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: Path, config: CheckpointConfig, *, create: bool = True):
        self.directory = workdir.resolve() / "checkpoints"
        self._aside = workdir.resolve() / "damaged"
        self._saving: int | None = None
        self._under_way = False
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep_last,
            keep_period=config.keep_every or None,
            create=create,
            cleanup_tmp_directories=create,  # left by killed saves; a reader leaves them alone: a run may be writing
            # A slow save may take its time; in training, the watchdog notices one that stalls.
            async_options=ocp.options.AsyncOptions(
                timeout_secs=hosts.PATIENCE_S, post_finalization_callback=self._record_digests
            ),
        )
        self._manager = _Manager(self.directory, options=options, handler_registry=_handlers())

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Start saving; the arrays are copied before this returns. Raises UserError if an earlier save failed."""
        step = int(state.step)
        if step == self.latest_step():
            return
        items = {name: ocp.args.PyTreeSave(getattr(state, name)) for name in WEIGHTS}
        items["progress"] = ocp.args.PyTreeSave(_progress(state))
        self.wait()  # for the previous save, which reads `_saving` until it is finished
        self._saving, self._under_way = step, True
        with _naming_failures(self.directory, self._saving):
            begun = self._manager.save(step, args=ocp.args.Composite(**items))
        assert begun, f"orbax did not save step {step}"

    def save_weights(self, params: Tree, frozen: Tree) -> None:
        """Save weights without the rest of a state, as the checkpoint that a run starts from (step 0).

        By default, orbax makes data files of up to 2 GB, which are in memory until they are written.
        """
        trees = dict(zip(WEIGHT_ITEMS, (params, frozen), strict=True))
        items = {name: ocp.args.PyTreeSave(t, ocdbt_target_data_file_size=2**26) for name, t in trees.items()}
        self._saving = 0
        with _naming_failures(self.directory, self._saving):
            self._manager.save(0, args=ocp.args.Composite(**items))

    def describe_weights(self, step: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shapes and dtypes of a checkpoint's parameters and frozen arrays, from metadata alone.

        Raises UserError if the metadata is damaged.
        """
        try:
            trees = [_metadata(self.directory / str(step) / item) for item in WEIGHT_ITEMS]
        except (OSError, ValueError) as error:
            raise UserError(f"checkpoint {step} in {self.directory} is damaged ({error})") from error
        leaves = {name: leaf for tree in trees for name, leaf in flatten_dict(tree, sep="/").items()}
        return {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in leaves.items()}

    def imported(self, step: int) -> bool:
        """Whether the checkpoint was made by `save_weights`."""
        return is_imported(self.directory / str(step))

    def kind(self, step: int, *, ema: bool) -> str:
        """ema | raw: which weights `restore_weights` and `restore_some` return."""
        return kind_of_weights(self.directory / str(step), ema=ema)

    def restore(self, blueprint: Blueprint, step: int | None = None) -> TrainState:
        """The state at `step`, sharded as `blueprint` says, whatever mesh it was saved from.

        Without a step, it is the latest state that is not damaged; damaged ones are moved aside, since the run will
        reach their steps again. Imported weights become a fresh state.
        """

        trees = {name: getattr(blueprint.shapes, name) for name in WEIGHTS} | {"progress": _progress(blueprint.shapes)}
        _, items, damaged = self._restore_sound(step, (*trees,), lambda there: {name: trees[name] for name in there})
        if damaged:
            self._move_aside(damaged)
        if "progress" not in items:
            return blueprint.init_from_weights(**items)
        progress = items.pop("progress")
        return TrainState(**progress, **items)

    def restore_weights(
        self, blueprint: Blueprint, *, ema: bool = True, step: int | None = None
    ) -> tuple[Tree, Tree, int]:
        """(parameters or their EMA, frozen arrays, step); nothing else is read from disk.

        Imported weights have no EMA: their parameters are returned in any case.
        """

        trees = {name: getattr(blueprint.shapes, name) for name in WEIGHTS}
        step, items, _ = self._restore_sound(step, _weights(ema), lambda there: {name: trees[name] for name in there})
        frozen = items.pop("frozen")
        (params,) = items.values()
        return params, frozen, step

    def restore_some(self, choose: Choice, *, ema: bool = True, step: int | None = None) -> tuple[Flat, int]:
        """(some of the parameters, or of their EMA, and of the frozen arrays, by path; step); nothing else is read.

        `choose` gets the shapes of all saved arrays, and returns a jax.ShapeDtypeStruct with sharding for each to read.
        """

        def wanted(there: dict[str, Tree]) -> dict[str, Tree]:
            flat = {name: flatten_dict(tree) for name, tree in there.items()}
            chosen = choose({path: tuple(leaf.shape) for leaves in flat.values() for path, leaf in leaves.items()})
            return {
                name: unflatten_dict({path: leaf for path, leaf in chosen.items() if path in leaves})
                for name, leaves in flat.items()
            }

        step, items, _ = self._restore_sound(step, _weights(ema), wanted, partial=True)
        return {path: array for tree in items.values() for path, array in flatten_dict(tree).items()}, step

    def updates(self, step: int) -> int:
        """The number of updates that the run had applied at a checkpoint."""
        count = jax.ShapeDtypeStruct((), np.int32, sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
        wanted = {"progress": {"updates": count}}
        _, items, _ = self._restore_sound(step, (*wanted,), lambda there: wanted, partial=True)
        return int(items["progress"]["updates"])

    def check(self) -> None:
        """Raises UserError or TransientFailure if the last save has failed; does not wait for one that is under way."""
        if self._under_way and not self._manager.is_saving_in_progress():
            self._under_way = False
            self.wait()  # only this raises an error of the saving thread

    def wait(self) -> None:
        """Wait until everything is on disk. Raises UserError if a save failed."""
        with _naming_failures(self.directory, self._saving):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Close, after everything is on disk. Raises UserError if a save failed."""
        with _naming_failures(self.directory, self._saving):
            self._manager.close()

    def _restore_sound(
        self,
        step: int | None,
        names: Sequence[str],
        wanted: Callable[[dict[str, Tree]], dict[str, Tree]],
        *,
        partial: bool = False,
    ) -> tuple[int, dict[str, Tree], list[int]]:
        """(step, items, damaged later steps), the same in all processes. Raises UserError if there is nothing sound.

        `names` are the items to read (WEIGHT_ITEMS for imported weights). `wanted` maps their metadata to the abstract
        arrays to read: some if `partial`, else all, which must match.
        """
        damaged: dict[int, str] = {}
        for candidate in self.candidates(step):
            try:
                items = self._restore(candidate, WEIGHT_ITEMS if self.imported(candidate) else names, wanted, partial)
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
        raise UserError(f"{named}: {'no other was requested' if step is not None else 'there is no older checkpoint'}")

    def _restore(self, step: int, names: Sequence[str], wanted, partial: bool) -> dict[str, Tree]:
        """The wanted items of a checkpoint. Raises _Damaged, and UserError if it does not fit or storage fails."""
        folder = self.directory / str(step)
        if reason := integrity.damage(folder, names):
            raise _Damaged(reason)
        try:
            # Orbax raises the same lengthy errors for a damaged checkpoint and for one of another model.
            there = {name: _metadata(folder / name) for name in names}
            trees = {name: tree for name, tree in wanted(there).items() if tree}
            if not partial:
                for name, tree in trees.items():
                    _check_shapes(folder / name, there[name], tree)
            args = {name: _arguments(tree, partial) for name, tree in trees.items()}
            return dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # the last: no memory on a device
            raise
        except Exception as error:  # orbax raises many types for unreadable data
            cause = error
            while cause.__cause__:
                cause = cause.__cause__
            cause = _os_error_in(cause) or cause
            reason = errors.first_line(cause).split(" [")[0][:200]  # brackets say how it was read
            if errors.storage_failed(cause):
                raise UserError(f"checkpoint {step} in {self.directory} cannot be read ({reason})") from cause
            said = f"checkpoint {step} in {self.directory} cannot be read ({reason})"
            if integrity.fingerprint(folder):
                raise UserError(f"{said}, although its files are exactly as they were saved") from error
            if jax.process_count() > 1:  # others may have read it: all have to start again
                raise UserError(f"{said}; if it is damaged, remove it") from error
            raise _Damaged(reason) from error

    def candidates(self, step: int | None) -> list[int]:
        """The given step, or all, the latest first. Raises UserError if there is none."""
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.directory}")
        if step is None:
            return steps[::-1]
        if step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.directory}: its steps are {steps}")
        return [step]

    def _move_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            self._aside.mkdir(exist_ok=True)
            for step in steps:
                places = (self._aside / f"{step}.{count}" for count in itertools.count())
                place = next(place for place in places if not place.exists())
                shutil.move(self.directory / str(step), place)  # `checkpoints` may be a link to another disk
        # A process that still listed one of them would not save when the run reaches its step again.
        hosts.check_shared(
            f"damaged checkpoints in {self.directory}",
            lambda: [step for step in saved_steps(self.directory.parent) if step in steps],
        )
        self._manager.reload()

    def _record_digests(self) -> None:
        """Called by orbax in process 0 when everything is written, before the folder gets its final name."""
        folders = list(self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
        assert folders, f"nothing to take digests of: {self.directory} has no unfinished checkpoint {self._saving}"
        for folder in folders:
            integrity.record(folder)


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, without its checks for preemption.

    JAX announces the point at which all processes stop to callers whose numbers keep increasing. Orbax would ask with
    steps, between the questions of `preemption.Notice`, and the notice would be lost.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """The handlers that write and read the items."""
    kinds = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SMALLEST_SLICE_BYTES)),
    )
    limits = {"save_concurrent_gb": CONCURRENT_GB, "restore_concurrent_gb": CONCURRENT_GB}
    items = (*WEIGHTS, "progress")
    return ocp.handlers.create_default_handler_registry(
        **{name: ocp.PyTreeCheckpointHandler(type_handler_registry=kinds, **limits) for name in items}
    )


class _Damaged(Exception):
    """A checkpoint's files cannot be read as they were saved."""


@contextlib.contextmanager
def _naming_failures(directory: Path, step: int | None = None) -> Iterator[None]:
    """Turn the error of a failed write (a full disk, lost permissions) into one line with the place and the step."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # If another process is gone, orbax raises a TimeoutError from JAX's error, which hosts.py recognises.
        reason = error.__cause__ if isinstance(error, TimeoutError) else error
        if isinstance(reason, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            raise reason from None
        system = _os_error_in(error)
        line = system.strerror if system else errors.first_line(error)
        what = "saving" if step is None else f"saving step {step}"
        said = f"{what} to {directory} failed, earlier checkpoints are intact: {line}"
        if jax.process_count() > 1 and not (system or isinstance(error, OSError)):
            raise TransientFailure(said) from error  # probably the failure of another process
        raise UserError(said) from system or error


def _os_error_in(error: BaseException) -> OSError | None:
    """The operating system's error in a message of tensorstore, after place and operation; None if absent."""
    first = str(error).strip().partition("\n")[0]
    number = re.search(r" \[os_error_code='?(\d+)", first)
    return OSError(int(number[1]), first[: number.start()].rpartition(": ")[2]) if number else None


def _weights(ema: bool) -> tuple[str, str]:
    """The names of the items with the parameters, or their EMA, and the frozen arrays."""
    return "ema" if ema else "params", "frozen"


def _metadata(item: Path) -> Tree:
    """Shapes and dtypes of the arrays in an item. Raises ValueError if its files are missing."""
    for part in ("_METADATA", "manifest.ocdbt"):
        if not (item / part).exists():
            raise ValueError(f"{item.name}/{part} is missing")
    return ocp.StandardCheckpointHandler().metadata(item).tree


def _arguments(tree: Tree, partial: bool) -> ocp.args.CheckpointArgs:
    restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
    return ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=partial)


def _check_shapes(item: Path, there: Tree, wanted: Tree) -> None:
    there, here = _shapes(there), _shapes(wanted)
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


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    named = ((jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in jax.tree.leaves_with_path(tree))
    return {name: tuple(leaf.shape) for name, leaf in named}


def _progress(state: TrainState) -> dict[str, Tree]:
    names = (f.name for f in dataclasses.fields(TrainState) if f.name not in WEIGHTS)
    return {name: getattr(state, name) for name in names}
