"""Time calls, and make the rows that `benchmark` prints (docs/performance.md explains their fields)."""

import collections
import dataclasses
import json
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from lina_jax.errors import UserError

Row = dict[str, Any]

RUN_S = 0.3  # a run repeats its call for about this long, so that its start and end weigh little
# Fields whose ratios --compare reports.
COMPARED = (
    "median_s", "images_per_s", "tokens_per_s", "records_per_s", "cpu_s", "cpu_ms", "mfu", "model_flops",
    "compiled_flops", "compiled_bytes", "program_bytes", "device_peak_bytes", "host_peak_bytes", "compile_s",
)  # fmt: skip


# Fields that say how a measurement was set up; several rows of one measurement may differ in them.
SETUP = (
    "overrides", "dtype", "mesh", "remat", "scan_layers", "attention_kernel", "device",
    "threads", "prefetch", "seconds", "memory_batches",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call, for each run: wall time, and CPU time of all threads of this process."""

    seconds: Sequence[float]
    cpu_seconds: Sequence[float]
    calls: int = 1  # in a run

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def fields(self) -> Row:
        return {
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "cpu_s": statistics.median(self.cpu_seconds),
            "runs": len(self.seconds),
            "calls_per_run": self.calls,
        }


def in_turns(sides: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, Timing]:
    """Time `runs` runs of each side's call, which returns arrays to wait for.

    The first call of each side is not timed. Runs of the sides alternate, so that other load on the machine affects
    all of them alike. All processes make as many calls per run as process 0 chooses by its clock.
    """
    calls = {}
    for name, call in sides.items():
        timed(call, 1)
        wanted = max(1, math.ceil(RUN_S / max(timed(call, 1)[0], 1e-9)))
        calls[name] = int(multihost_utils.broadcast_one_to_all(wanted))
    taken = {name: [] for name in sides}
    for _ in range(runs):
        for name, call in sides.items():
            taken[name].append(timed(call, calls[name]))
    return {name: Timing(*zip(*pairs, strict=True), calls[name]) for name, pairs in taken.items()}


def timed(call: Callable[[], Any], calls: int = 1) -> tuple[float, float]:
    """(seconds, CPU seconds) per call, over `calls` calls that return arrays to wait for."""
    started, used = time.perf_counter(), time.process_time()
    for _ in range(calls):
        result = call()
        if jax.default_backend() == "cpu":  # calls that do not depend on each other would run at the same time
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / calls, (time.process_time() - used) / calls


def machine() -> Row:
    """The machine that a measurement is made on, and its load."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "host_cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def memory() -> Row:
    """Peak memory of this process and its devices so far, in bytes; the latter only where devices report it."""
    known = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats())]
    host = {"host_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    return ({"device_peak_bytes": max(known)} if known else {}) | host


def efficiency(model_flops: float, seconds: float, peak: float) -> Row:
    """FLOP/s, and the MFU if the peak (of all devices together) is known, i.e. not 0."""
    rate = model_flops / seconds
    return {"model_flops": model_flops, "model_flops_per_s": rate} | ({"mfu": rate / peak} if peak else {})


class Baseline:
    """The rows of an earlier call."""

    def __init__(self, path: str):
        """Read a file of rows. Raises UserError if there is none, or its lines are not rows."""
        self.path = path
        try:
            rows = [json.loads(line) for line in Path(path).expanduser().read_text().splitlines() if line.strip()]
            self._rows = collections.defaultdict(list)
            for row in rows:
                self._rows[_row_key(row)].append(row)
                if not all(isinstance(row.get(name) or 0, int | float) for name in COMPARED):
                    raise TypeError("a figure is no number")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--compare={path}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--compare={path}: expected lines that `benchmark` printed") from error

    def ratios(self, row: Row) -> dict[str, float] | None:
        """This row's figures divided by those of the same measurement in the file; None if there is none.

        Among several rows of the measurement, the last with the same setup counts; None if all have another. A single
        row counts whatever its setup.
        """
        measured = self._rows.get(_row_key(row), [])
        alike = [then for then in measured if all(then.get(name) == row.get(name) for name in SETUP)]
        if not alike and len(measured) != 1:
            return None
        then = (alike or measured)[-1]
        both = (name for name in COMPARED if row.get(name) is not None and then.get(name))
        return {name: row[name] / then[name] for name in both}


def _row_key(row: Row) -> str:
    """A key for the measurement that a row belongs to."""
    return json.dumps([row["benchmark"], row["config"], row.get("shapes")], sort_keys=True)
