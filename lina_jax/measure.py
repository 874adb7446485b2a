"""Seconds of calls, and the rows of figures that `benchmark` prints (docs/performance.md explains their fields)."""

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

RUN_S = 0.3  # a run repeats its call until it lasts about so long: its start and its end weigh little
# Fields whose ratios tell how two rows of one measurement differ.
COMPARED = (
    "median_s", "images_per_s", "tokens_per_s", "records_per_s", "cpu_s", "cpu_ms", "mfu", "model_flops",
    "compiled_flops", "compiled_bytes", "program_bytes", "device_peak_bytes", "host_peak_bytes", "compile_s",
)  # fmt: skip


# Fields that say how a row was set up: rows of one call may differ in them.
SETUP = (
    "overrides", "dtype", "mesh", "remat", "scan_layers", "attention_kernel", "device",
    "threads", "prefetch", "seconds", "memory_batches",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call, by run, by the clock and of all processors of this process together."""

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

    What is made at first calls is left out. The sides take turns, so that they all see the same neighbours. All
    processes of a run make as many calls as process 0, whatever their own clocks say.
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
    """(seconds, processor seconds) of one of `calls` calls, which return arrays to wait for."""
    started, used = time.perf_counter(), time.process_time()
    for _ in range(calls):
        result = call()
        if jax.default_backend() == "cpu":  # calls that do not need each other would share the processors
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / calls, (time.process_time() - used) / calls


def machine() -> Row:
    """Where and beside what a measurement is made."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "host_cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def memory() -> Row:
    """The most that a device and this process have held so far, in bytes; devices do not all say."""
    known = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats())]
    host = {"host_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    return ({"device_peak_bytes": max(known)} if known else {}) | host


def efficiency(model_flops: float, seconds: float, peak: float) -> Row:
    """FLOP/s, and the MFU where the peak (of all devices together) is known."""
    rate = model_flops / seconds
    return {"model_flops": model_flops, "model_flops_per_s": rate} | ({"mfu": rate / peak} if peak else {})


class Earlier:
    """The rows of an earlier call."""

    def __init__(self, path: str):
        """Raises UserError when there is no such file, or its lines are not rows."""
        self.path = path
        try:
            rows = [json.loads(line) for line in Path(path).expanduser().read_text().splitlines() if line.strip()]
            self._rows = collections.defaultdict(list)
            for row in rows:
                self._rows[_what(row)].append(row)
                if not all(isinstance(row.get(name) or 0, int | float) for name in COMPARED):
                    raise TypeError("a figure is no number")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--compare={path}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--compare={path}: expected lines that `benchmark` printed") from error

    def ratios(self, row: Row) -> dict[str, float] | None:
        """This row's figures over those of the same measurement then; None where it was not made.

        Of several the latest that was set up alike counts, and none where all were set up otherwise.
        """
        measured = self._rows.get(_what(row), [])
        alike = [then for then in measured if all(then.get(name) == row.get(name) for name in SETUP)]
        if not alike and len(measured) != 1:
            return None
        then = (alike or measured)[-1]
        both = (name for name in COMPARED if row.get(name) is not None and then.get(name))
        return {name: row[name] / then[name] for name in both}


def _what(row: Row) -> str:
    """The measurement that a row is of."""
    return json.dumps([row["benchmark"], row["config"], row.get("shapes")], sort_keys=True)
