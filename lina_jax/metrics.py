"""The reports of a run: JSON lines and TensorBoard events, throughput and MFU."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from lina_jax import chips
from lina_jax.config import Config
from lina_jax.errors import UserError
from lina_jax.flops import training_flops


def peak_flops(config: Config) -> float:
    """Peak FLOP/s of one device; 0 if unknown."""
    chip = chips.of_kind(jax.devices()[0].device_kind)
    return config.log.peak_flops or (chip.peak_flops if chip else 0.0)


class Writer:
    """Scalars and pictures to WORKDIR/metrics.jsonl and TensorBoard event files; does nothing except in process 0."""

    def __init__(self, workdir: Path):
        self.path = workdir / "metrics.jsonl"
        self._active = jax.process_index() == 0
        if self._active:
            workdir.mkdir(parents=True, exist_ok=True)
            before = self.path.read_bytes() if self.path.exists() else b""
            if before and not before.endswith(b"\n"):  # a kill cut off the last line
                self._append("\n")
            events = workdir / "events"
            with self._writing(events):
                events.mkdir(exist_ok=True)
                # Not a SummaryWriter: after a failed write in its thread, adding more events blocks forever.
                self._events = EventsWriter(str(events / "events"))

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        if self._active:
            values = {name: float(value) for name, value in values.items()}
            finite = {name: value for name, value in values.items() if np.isfinite(value)}
            # JSON has no NaN: values that are not finite are written as null.
            self._append(json.dumps({"step": step, **{name: finite.get(name) for name in values}}) + "\n")
            self._show(step, [summary.scalar(name, value) for name, value in finite.items()])

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Show an image (H, W, 3) uint8 in TensorBoard."""
        if self._active:
            self._show(step, [summary.image(name, image, dataformats="HWC")])

    def close(self) -> None:
        if self._active:
            with self._writing(self.path.parent / "events"):
                self._events.close()

    def _append(self, line: str) -> None:
        with self._writing(self.path), self.path.open("a") as lines:  # closed: a mounted bucket has nothing before
            lines.write(line)

    def _show(self, step: int, summaries: list) -> None:
        """Write to TensorBoard."""
        with self._writing(self.path.parent / "events"):
            for each in summaries:
                self._events.write_event(Event(wall_time=time.time(), step=step, summary=each))
            self._events.flush()

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from error


class Throughput:
    """Images/s, model FLOP/s and MFU between calls of `rates`."""

    def __init__(self, config: Config, step: int):
        self._config = config
        self._flops = training_flops(config.model, config.loss)
        self._peak = peak_flops(config) * jax.device_count()
        self._step, self._time = step, time.monotonic()

    def rates(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        images = (step - self._step) * self._config.batch_size / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        rates = {"images_per_s": images, "model_flops_per_s": images * self._flops}
        return rates | ({"mfu": images * self._flops / self._peak} if self._peak else {})

    def restart(self) -> None:
        """Leave out all time until now."""
        self._time = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context for work that is not training, whose time is left out."""
        started = time.monotonic()
        yield
        self._time += time.monotonic() - started


def rows_as_written(path: Path) -> Iterator[dict[str, float | None]]:
    """Rows of metrics.jsonl in the order written, repeated steps included; a line cut off by a kill is left out.

    So is any other line that is no row.
    """
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def read_jsonl(path: Path) -> list[dict[str, float | None]]:
    """One row per step, in order; if a resumed run repeated a step, its last values count."""
    rows: dict[int, dict[str, float | None]] = {}
    for row in rows_as_written(path):
        rows[row["step"]] = rows.get(row["step"], {}) | row
    return [rows[step] for step in sorted(rows)]
