"""Batches for training: which records make up the batch of a step depends on (seed, step) alone.

No position is saved, and the global batches are the same for any number of processes.
"""

import functools
import itertools
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import NamedTuple

import grain
from absl import logging

from lina_jax import decode, order, reading, tf_example
from lina_jax.config import Config
from lina_jax.decode import Arrays, Variant
from lina_jax.encoders import TextEncoder
from lina_jax.errors import TransientFailure, UserError, storage_failed
from lina_jax.reading import Split
from lina_jax.retry import Progress, with_retries

_MAX_TRIES = 100  # this many bad records in a row mean a broken dataset, not bad luck


class RowRef(NamedTuple):
    """One row of a batch: a record of one of the datasets."""

    dataset: int
    index: int
    variant: Variant = Variant()


class ReadReport(NamedTuple):
    """What happened while a batch was read."""

    bad: list[tuple[int, int, str]]  # dataset, index, reason
    truncated: int  # number of truncated texts


def open_records(config: Config, split: str, text_encoder: TextEncoder | None = None) -> "Records":
    """Open the records of a split in the form that this config's model reads.

    Captions become token ids if the model reads text features and the dataset holds none. Raises UserError if records
    are missing or do not fit the config.
    """
    data, model = config.data, config.model
    if not data.path:
        raise UserError("data.path is empty: name a directory made by `python -m lina_jax.prepare`")
    splits = [
        reading.open_split(path, split, cache=data.cache, timeout=data.read_timeout, threads=data.threads)
        for path, _ in data.datasets
    ]
    layout = splits[0].layout
    for (path, _), opened in zip(data.datasets, splits, strict=True):
        if not len(opened):
            raise UserError(f"{path}: split {split!r} is empty")
        _check_layout(config, path, opened.layout, text_encoder)
        if opened.layout != layout:
            raise UserError(f"{path} and {data.datasets[0][0]}: one holds latents or text features, the other does not")
    if model.condition == "class":
        _check_label_names([path for path, _ in data.datasets], splits)
    if layout.moments:
        columns = [decode.Moments(layout.moments)]
    else:
        columns = [decode.Pixels(tuple(side * config.autoencoder.stride for side in model.latent_size), data.resize)]
    if model.condition == "class":
        columns.append(decode.Label(model.num_classes))
    elif model.text_encoder == "bytes":
        columns.append(decode.Caption(model.text_length))
    elif layout.text_dim:
        columns.append(decode.Features(model.text_length, model.text_dim))
    else:
        columns.append(decode.TokenIds(text_encoder))
    return Records(
        splits,
        columns,
        weights=[weight for _, weight in data.datasets],
        short_caption=data.short_caption,
        flip=data.flip,
        threads=data.threads,
        read_timeout=data.read_timeout,
    )


def _check_label_names(paths: Sequence[str], splits: Sequence[Split]) -> None:
    """Raises UserError if two datasets give a class different names; numbers are no names."""
    first: dict[int, tuple[str, str]] = {}
    for path, split in zip(paths, splits, strict=True):
        for number, name in enumerate(split.label_names):
            other, where = first.setdefault(number, (name, path))
            if name != other and str(number) not in (name, other):
                raise UserError(f"data.path: class {number} is {other!r} in {where}, but {name!r} in {path}")


def _check_layout(config: Config, path: str, layout: reading.RecordLayout, text_encoder: TextEncoder | None) -> None:
    model, kind = config.model, config.autoencoder.kind
    wanted = (2 * model.latent_channels, *model.latent_size)
    if kind == "identity" and layout.moments:
        raise UserError(f"{path} holds latents of {layout.moments}, but autoencoder.kind=identity trains on pixels")
    if kind != "identity" and not layout.moments and not config.autoencoder.path:
        raise UserError(
            f"{path} holds pixels, but autoencoder.kind={kind} trains on latents: set autoencoder.path to its "
            "directory, or encode the dataset with lina_jax.prepare --autoencoder"
        )
    if kind != "identity" and layout.moments and layout.moments != wanted:
        raise UserError(
            f"{path} holds latents of {layout.moments}, but autoencoder.kind={kind} and model need {wanted}"
        )
    if config.data.flip and layout.moments:
        raise UserError("data.flip=True: latents cannot be flipped, only pixels; prepare flipped records instead")
    if model.reads_text_features:
        if not layout.text_dim and not text_encoder:
            raise UserError(
                f"{path} holds no text features: set text_encoder.path to the directory of a text encoder, or prepare "
                "the dataset with lina_jax.prepare --text_encoder"
            )
        if layout.text_dim and layout.text_dim != model.text_dim:
            raise UserError(f"{path} holds text features of {layout.text_dim}, but model.text_dim={model.text_dim}")


class Records:
    """Random access to the decoded records of one or more datasets; a bad record is replaced by the next good one.

    Record i is replaced by the first good record among i+1, i+2, ... (modulo the length) of the same dataset, so it is
    the same one in every process and every run.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        columns: Sequence[decode.Column],
        *,
        weights: Sequence[Fraction] = (Fraction(1),),
        short_caption: float = 0.0,
        flip: bool = False,
        threads: int = 1,
        read_timeout: float = 60.0,
    ):
        """`short_caption` is the chance of the short caption; `flip` mirrors half of the images.

        `threads` threads read and decode the batches. A read that takes more than `read_timeout` seconds is retried.
        Raises UserError for a weight that is too small for an exact order (`order.integers`).
        """
        self._splits, self._columns = splits, columns
        self._weights = order.integers(weights)
        self._short_caption, self._flip = short_caption, flip
        self.threads, self._timeout = threads, read_timeout
        self._bad: set[tuple[int, int]] = set()
        self._truncated = 0

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_pool"}

    @property
    def skipped(self) -> int:
        """Bad records met so far, each counted once."""
        return len(self._bad)

    @property
    def truncated(self) -> int:
        """Texts truncated so far, counted each time they are read."""
        return self._truncated

    def __len__(self) -> int:
        """Examples before a dataset has to repeat, at these weights."""
        total = sum(self._weights)
        return min(len(s) * total // weight for s, weight in zip(self._splits, self._weights, strict=True))

    @property
    def mixture(self) -> list[int]:
        """The weights of the datasets, as integers."""
        return list(self._weights)

    @property
    def manifest(self) -> str:
        """Digests of the datasets: equal wherever the same records are opened."""
        return " ".join(split.manifest for split in self._splits)

    def order(self, seed: int) -> order.Order:
        return order.make([len(split) for split in self._splits], self._weights, seed)

    def evenly_spaced(self, count: int) -> list[RowRef]:
        """`count` evenly spaced records, split among the datasets by weight; of sorted data, a few of every class."""
        counts = order.apportion(self._weights, count)
        sizes = [len(split) for split in self._splits]
        return [RowRef(dataset, i * sizes[dataset] // n) for dataset, n in enumerate(counts) for i in range(n)]

    def variants(self, seed: int, positions: Sequence[int]) -> list[Variant]:
        """Random variant of the example at each position: a function of (seed, position)."""
        short = order.uniforms(seed, positions, order.SHORT_CAPTIONS) < self._short_caption
        flip = order.uniforms(seed, positions, order.FLIPS) < (0.5 if self._flip else 0.0)
        return list(map(Variant, short.tolist(), flip.tolist()))

    def read(self, wanted: Sequence[RowRef], batches: int = 1) -> tuple[Arrays, ReadReport]:
        """Read the rows of one batch; `batches` such calls run at the same time and share the threads.

        Raises TransientFailure if storage fails in a way that may pass, and UserError if it fails otherwise or too many
        bad records follow each other. The message names shard and record.
        """
        arrays = decode.empty(self._columns, len(wanted))
        read_rows = functools.partial(self._read_rows, arrays, wanted)
        parts = min(max(1, self.threads // batches), len(wanted))
        if parts == 1:
            reports = read_rows(range(len(wanted)))
        else:
            rows = [range(part * len(wanted) // parts, (part + 1) * len(wanted) // parts) for part in range(parts)]
            reports = list(itertools.chain.from_iterable(self._pool.map(read_rows, rows)))
        bad = [bad for report in reports for bad in report.bad]
        return arrays, ReadReport(bad, sum(report.truncated for report in reports))

    def record(self, report: ReadReport) -> None:
        """Count what happened, and name each bad record once."""
        for dataset, index, reason in report.bad:
            if (dataset, index) not in self._bad:
                self._bad.add((dataset, index))
                logging.warning("skipping a bad record: %s", reason)
        if report.truncated and not self._truncated:
            logging.warning(
                "captions longer than the model reads (model.text_length) are truncated; the log counts them"
            )
        self._truncated += report.truncated

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, "read")

    def _read_rows(self, arrays: Arrays, wanted: Sequence[RowRef], rows: range) -> list[ReadReport]:
        finished: dict[int, ReadReport] = {}

        def read_rest(progress: Progress) -> None:
            for row in rows:
                if row not in finished:
                    finished[row] = self._read_row(arrays, row, wanted[row], progress)

        try:
            with_retries(read_rest, self._timeout)
        except (OSError, RuntimeError) as error:
            # Decided here, because an error loses its cause on the way out of a worker process.
            kind = TransientFailure if storage_failed(error) else UserError
            raise kind(f"cannot read {error.at}: {error}") from error
        return list(finished.values())

    def _read_row(self, arrays: Arrays, row: int, wanted: RowRef, progress: Progress) -> ReadReport:
        """Fill one row with the wanted record or its replacement.

        A thread that stalled and was given up may wake up here. It writes what its successor wrote, because a row
        depends on `wanted` alone.
        """
        split, bad = self._splits[wanted.dataset], []
        for offset in range(min(len(split), _MAX_TRIES)):
            index = (wanted.index + offset) % len(split)
            progress.reach(split.location(index))
            try:
                record = split[index]
            except ValueError as error:
                bad.append((wanted.dataset, index, f"{split.location(index)}: {error}"))
                continue
            finally:
                progress.check()
            try:
                return ReadReport(
                    bad, decode.fill(self._columns, arrays, row, tf_example.parse(record), wanted.variant)
                )
            except Exception as error:  # image decoders raise errors of many types
                bad.append((wanted.dataset, index, f"{split.location(index)}: {error}"))
        raise UserError(f"{len(bad)} bad records in a row, the last: {bad[-1][2]}")


class Blocks:
    """One process's rows of each global batch, one block per step, as a random-access source for grain."""

    def __init__(
        self,
        records: Records,
        *,
        global_batch: int,
        rows: Sequence[int],
        seed: int,
        start_step: int,
        concurrency: int = 1,
    ):
        """`concurrency` blocks will be read at the same time."""
        self._records, self._order, self._seed = records, records.order(seed), seed
        self._global_batch, self._rows = global_batch, rows
        self._start_step, self._concurrency = start_step, concurrency

    def __len__(self) -> int:
        return 2**40  # no end

    def __getitem__(self, step: int) -> tuple[Arrays, ReadReport]:
        """The block of step start_step + `step`; row r of step s is at position s * global_batch + r."""
        first = (self._start_step + step) * self._global_batch
        positions = [first + row for row in self._rows]
        variants = self._records.variants(self._seed, positions)
        places = [self._order[position] for position in positions]
        wanted = [RowRef(*place, variant) for place, variant in zip(places, variants, strict=True)]
        return self._records.read(wanted, self._concurrency)


def training_batches(
    records: Records,
    *,
    global_batch: int,
    seed: int,
    start_step: int,
    rows: Sequence[int] | None = None,
    prefetch: int = 2,
    workers: int = 0,
) -> Iterator[Arrays]:
    """Endless batches of steps start_step, start_step + 1, ...: `rows` (None: all) of each global batch.

    `prefetch` batches are kept ready, by threads of this process or, if `workers` > 0, by so many processes with
    threads of their own. Every epoch has its own order, and may end within a batch.

    Raises TransientFailure if a signal killed a worker (SIGKILL, as on a host that is out of memory).
    """
    ahead = 1 if workers else prefetch
    # Up to `ahead` blocks at once (each takes memory), ideally one per thread: threads that share a block wait for each
    # other at its end.
    concurrency = min(records.threads, ahead)
    blocks = Blocks(
        records,
        global_batch=global_batch,
        rows=range(global_batch) if rows is None else rows,
        seed=seed,
        start_step=start_step,
        concurrency=concurrency,
    )
    batches = grain.MapDataset.source(blocks).to_iter_dataset(grain.ReadOptions(concurrency, ahead))
    if workers:
        # At a run's end, after its last line, a process of Python's own would warn of memory that it then frees.
        quiet, given = "ignore::UserWarning:multiprocessing.resource_tracker", os.environ.get("PYTHONWARNINGS")
        os.environ["PYTHONWARNINGS"] = ",".join(dict.fromkeys([*(given.split(",") if given else []), quiet]))
        each = max(1, prefetch // workers)
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=each)
        batches = batches.mp_prefetch(options, worker_init_fn=_live_as_long_as_the_parent)
    return _recording(records, iter(batches))


def _live_as_long_as_the_parent(number: int, count: int) -> None:
    """Initialise a worker: it ends when its parent does, however that is, and ignores signals meant for the parent."""
    del number, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()


def _recording(records: Records, batches: Iterator[tuple[Arrays, ReadReport]]) -> Iterator[Arrays]:
    try:
        for arrays, report in batches:
            records.record(report)
            yield arrays
    except RuntimeError as error:  # from grain, which names the exit code: negative for a signal
        if killed := re.search(r"Worker process .* exit code -(\d+)", str(error)):
            raise TransientFailure(f"a data-loading process was killed by signal {killed[1]}") from None
        raise


def fixed_examples(records: Records, count: int, chosen: Sequence[int] | None = None) -> Arrays:
    """A fixed set of `count` examples, or the `chosen` ones of it. Raises UserError if the split has fewer."""
    if count > len(records):
        raise UserError(f"{count} examples requested, but the split has only {len(records)}")
    wanted = records.evenly_spaced(count)
    arrays, report = records.read(wanted if chosen is None else [wanted[number] for number in chosen])
    records.record(report)
    return arrays
