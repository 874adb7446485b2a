"""Processes that share the work of a preparation: which units each one makes, and on which GPU."""

import dataclasses
import os
from collections.abc import Mapping

import jax

from lina_jax.errors import UserError

_SLURM = ("PROCID", "STEP_NUM_TASKS", *(f"ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "STEP", "COUNT")))


@dataclasses.dataclass(frozen=True)
class Share:
    """This process's share of the units: every `count`-th, starting at `index`."""

    index: int = 0
    count: int = 1


WHOLE = Share()


def resolve_share(index: int | None, count: int | None) -> Share:
    """The share of this process: from flags, else from SLURM, else everything. Raises UserError for wrong flags."""
    if index is None and count is None:
        return _slurm_share(os.environ)
    if index is None or count is None or not 0 <= index < count:
        raise UserError(f"--process_index={index} --process_count={count}: expected 0 <= index < count")
    return Share(index, count)


def _slurm_share(environment: Mapping[str, str]) -> Share:
    """The share of this task of a job step, within this element of a job array; everything if outside of SLURM."""
    value = {name: int(environment[f"SLURM_{name}"]) for name in _SLURM if f"SLURM_{name}" in environment}
    # Not NTASKS, which is also set in a batch script or a shell: they are one task, whatever the allocation holds.
    share = Share(value["PROCID"], value["STEP_NUM_TASKS"]) if "STEP_NUM_TASKS" in value else WHOLE
    if "ARRAY_TASK_ID" in value:
        first, step, count = value["ARRAY_TASK_MIN"], value.get("ARRAY_TASK_STEP", 1), value["ARRAY_TASK_COUNT"]
        if value["ARRAY_TASK_MAX"] - first != (count - 1) * step:
            raise UserError(
                f"a SLURM array of {count} tasks from {first} to {value['ARRAY_TASK_MAX']} has gaps: set the share of "
                "each task with --process_index and --process_count"
            )
        element = (value["ARRAY_TASK_ID"] - first) // step
        share = Share(element * share.count + share.index, count * share.count)
    return share


def take_gpu(environment: Mapping[str, str]) -> None:
    """If several SLURM tasks share a node, make this one use only the GPU of its local number.

    Call it before JAX is first used. jax.distributed does the same. A task that has a node to itself, or sees only one
    GPU, keeps what it sees.
    """
    value = {name: int(environment.get(f"SLURM_{name}", 1)) for name in ("STEP_NUM_TASKS", "STEP_NUM_NODES")}
    one_visible = "," not in environment.get("CUDA_VISIBLE_DEVICES", ",")
    if value["STEP_NUM_TASKS"] > value["STEP_NUM_NODES"] and "SLURM_LOCALID" in environment and not one_visible:
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, environment["SLURM_LOCALID"])
