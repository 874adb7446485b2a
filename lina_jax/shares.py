"""Processes that share the work of a preparation: who does what, and on which GPU."""

import dataclasses
import os
from collections.abc import Mapping

import jax

from lina_jax.errors import UserError

_SLURM = ("PROCID", "STEP_NUM_TASKS", *(f"ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "STEP", "COUNT")))


@dataclasses.dataclass(frozen=True)
class Share:
    """This process's part of the units: every `count`-th from `index` on."""

    index: int = 0
    count: int = 1


ALONE = Share()


def the_share(index: int | None, count: int | None) -> Share:
    """This process among those that prepare: from flags, else from SLURM, else alone."""
    if index is None and count is None:
        return _slurm_share(os.environ)
    if index is None or count is None or not 0 <= index < count:
        raise UserError(f"--process_index={index} --process_count={count}: expected 0 <= index < count")
    return Share(index, count)


def _slurm_share(environment: Mapping[str, str]) -> Share:
    """Tasks of a job step within the elements of a job array; all of it outside of SLURM."""
    value = {name: int(environment[f"SLURM_{name}"]) for name in _SLURM if f"SLURM_{name}" in environment}
    # Not NTASKS, which a batch script and a shell see, too: they are one task, whatever the allocation has.
    share = Share(value["PROCID"], value["STEP_NUM_TASKS"]) if "STEP_NUM_TASKS" in value else ALONE
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
    """Makes a task of SLURM see the GPU of its number alone where several share a node; before JAX is first used.

    So does jax.distributed. A task that has a node, or a GPU, to itself keeps what it sees.
    """
    value = {name: int(environment.get(f"SLURM_{name}", 1)) for name in ("STEP_NUM_TASKS", "STEP_NUM_NODES")}
    one_visible = "," not in environment.get("CUDA_VISIBLE_DEVICES", ",")
    if value["STEP_NUM_TASKS"] > value["STEP_NUM_NODES"] and "SLURM_LOCALID" in environment and not one_visible:
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, environment["SLURM_LOCALID"])
