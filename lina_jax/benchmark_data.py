"""The measurements of `benchmark data`: training batches against the same work without this code."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image, ImageOps

from lina_jax import data, decode, output_files, reading, records
from lina_jax.timing import Row

MOMENTS, TEXT_DIM, TEXT_LENGTH = (8, 32, 32), 2560, 256
LATENTS, PICTURES = 3000, 1000
PICTURE, SIZE = (480, 360), (256, 256)  # (width, height) stored; (H, W) trained on
MANY, PER_SHARD = 10_000_000, 800


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of `benchmark data`."""

    seconds: float
    repeats: int
    batch_size: int
    threads: int
    prefetch: int
    memory_batches: int


def latents(out: Path, settings: Settings) -> list[Row]:
    """Cached latents of 256 px, batched and padded, against grain reading the same files without padding.

    Grain is measured twice: reading single records, the usual way, and a whole batch per thread, the fastest way found.
    """
    directory = _dataset(out / "latents", _latents)
    split = reading.open_split(directory, "train")
    columns = [decode.Label(), decode.Moments(MOMENTS), decode.Features(TEXT_LENGTH, TEXT_DIM)]
    source = ArrayRecordDataSource(sorted(map(str, directory.glob("*.array_record*"))))
    order = grain.MapDataset.source(source).shuffle(0).repeat(None)

    def ours() -> Iterator:
        return _batches(data.Records([split], columns, threads=settings.threads), settings)

    def raw() -> Iterator:
        options = grain.ReadOptions(settings.threads, settings.prefetch * settings.batch_size)
        return iter(order.to_iter_dataset(options).batch(settings.batch_size, batch_fn=list))

    def raw_lists() -> Iterator:
        options = grain.ReadOptions(settings.threads, settings.prefetch)
        return iter(order.batch(settings.batch_size, drop_remainder=True, batch_fn=list).to_iter_dataset(options))

    return _compare(settings, "float16", latents=ours, latents_raw=raw, latents_raw_lists=raw_lists)


def jpeg(out: Path, settings: Settings) -> list[Row]:
    """Images decoded and resized for training, against the same in a bare loop over bytes in memory."""
    directory = _dataset(out / "pictures", _pictures)
    split = reading.open_split(directory, "train")
    columns = [decode.Label(), decode.Pixels(SIZE, resize=True), decode.Caption(TEXT_LENGTH)]
    encoded = [_jpeg(np.random.default_rng(i)) for i in range(16)]

    def one(i: int) -> np.ndarray:
        image = Image.open(io.BytesIO(encoded[i % len(encoded)])).convert("RGB")
        return np.asarray(ImageOps.fit(image, SIZE[::-1], Image.Resampling.BICUBIC))

    def bare() -> Iterator:
        with ThreadPoolExecutor(settings.threads) as pool:
            for _ in itertools.count():
                yield list(pool.map(one, range(settings.batch_size)))

    def ours() -> Iterator:
        return _batches(data.Records([split], columns, threads=settings.threads), settings)

    return _compare(settings, "uint8", jpeg=ours, jpeg_bare=bare)


def startup(out: Path, settings: Settings) -> list[Row]:
    """Seconds until the first batch of a dataset of ten million records, at its beginning and in the middle."""
    directory = _dataset(out / "many", _tiny)
    _multiply(directory, MANY // PER_SHARD)
    rows = []
    for name, step in (("startup", 0), ("startup_resumed", MANY // settings.batch_size // 2)):
        seconds = []
        for _ in range(settings.repeats):
            started = time.perf_counter()
            source = _tiny_records(directory)
            next(_batches(source, settings, step))
            seconds.append(time.perf_counter() - started)
        rows.append(_row(name, settings, "float16", seconds) | {"records": len(source)})
    return rows


def memory(out: Path, settings: Settings) -> list[Row]:
    """Resident memory and its growth over many batches."""
    batches = _batches(_tiny_records(_dataset(out / "tiny", _tiny)), settings)
    ends = [round(tenth * settings.memory_batches / 10) for tenth in range(11)]
    next(batches)
    resident, seconds = [_resident_mb()], []
    for count in np.diff(ends):
        started = time.perf_counter()
        for _ in range(count):
            next(batches)
        seconds.append((time.perf_counter() - started) / count)
        resident.append(_resident_mb())
    # During the first tenth, queues and allocators fill up.
    growth = resident[-1] - resident[1]
    figures = {"batches": settings.memory_batches, "mb_by_tenth": resident, "growth_after_first_tenth_mb": growth}
    return [_row("memory", settings, "float16", seconds[1:]) | figures]


PARTS: dict[str, Callable[[Path, Settings], list[Row]]] = {
    "latents": latents,
    "jpeg": jpeg,
    "startup": startup,
    "memory": memory,
}


def _compare(settings: Settings, dtype: str, **sides: Callable[[], Iterator]) -> list[Row]:
    """Rows of several sides, whose runs alternate so that other load affects all alike; the first has ratios."""
    seconds = {name: [] for name in sides}
    costs = {name: [] for name in sides}
    for _ in range(settings.repeats):
        for name, make in sides.items():
            second, cost = _seconds(make(), settings)
            seconds[name].append(second)
            costs[name].append(cost)
    first, *others = sides
    rows = [_row(name, settings, dtype, seconds[name]) | {"cpu_ms": statistics.median(costs[name])} for name in sides]
    for other in others:
        ratios = [theirs / ours for ours, theirs in zip(seconds[first], seconds[other], strict=True)]
        rows[0][f"of_{other}"] = statistics.median(ratios)
    return rows


def _row(name: str, settings: Settings, dtype: str, seconds: Sequence[float]) -> Row:
    """A row for the `seconds` per batch of each run. All work is on the host, so the device is the CPU and FLOPs 0."""
    fields = dataclasses.asdict(settings)
    del fields["repeats"]
    return {
        "benchmark": name,
        "device": "cpu",
        "host_cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "dtype": dtype,
        "shapes": {"batch": fields.pop("batch_size")},
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "runs": len(seconds),
        "records_per_s": settings.batch_size / statistics.median(seconds),
        "model_flops": 0,
        **fields,
    }


def _seconds(batches: Iterator, settings: Settings) -> tuple[float, float]:
    """(seconds per batch, milliseconds of CPU time per record)."""
    for _ in range(2 * settings.prefetch):  # batches that are ready before the clock starts do not count
        next(batches)
    started, used, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < settings.seconds:
        next(batches)
        count += settings.batch_size
    seconds, used = time.perf_counter() - started, time.process_time() - used
    batches.close()
    return seconds * settings.batch_size / count, 1000 * used / count


def _batches(source: data.Records, settings: Settings, step: int = 0) -> Iterator:
    return data.training_batches(
        source, global_batch=settings.batch_size, seed=0, start_step=step, prefetch=settings.prefetch
    )


def _tiny_records(directory: Path) -> data.Records:
    split = reading.open_split(directory, "train")
    return data.Records([split], [decode.Label(), decode.Moments((2, 2, 2)), decode.Caption(16)])


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def _dataset(directory: Path, write: Callable[[Path], None]) -> Path:
    if not directory.exists():
        write(directory)
    return directory


def _latents(directory: Path) -> None:
    """Write records of 16 KB of moments and 20 to 100 rows of text features, 320 KB on average."""
    rng = np.random.default_rng(0)

    def noise(*shape):
        return rng.standard_normal(shape, np.float32).astype(np.float16)

    with records.create(directory, "latents", records.latent_features(MOMENTS, TEXT_DIM)) as writer:
        for i in range(LATENTS):
            text = {"text": noise(rng.integers(20, 101), TEXT_DIM), "short_text": noise(0, TEXT_DIM)}
            writer.write("train", moments=noise(*MOMENTS), **text, **_common_fields(i))


def _pictures(directory: Path) -> None:
    with records.create(directory, "pictures", records.pixel_features()) as writer:
        for i in range(PICTURES):
            writer.write("train", image=_jpeg(np.random.default_rng(i % 16)), **_common_fields(i))


def _tiny(directory: Path) -> None:
    with records.create(directory, "tiny", records.latent_features((2, 2, 2), 0)) as writer:
        for i in range(PER_SHARD):
            writer.write("train", moments=np.zeros((2, 2, 2), np.float16), **_common_fields(i))


def _common_fields(i: int) -> Row:
    return {"caption": f"caption {i}", "short_caption": "", "label": i % 10, "key": str(i)}


def _jpeg(rng: np.random.Generator) -> bytes:
    """The JPEG of a smooth random image, which compresses like a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    out = io.BytesIO()
    coarse.resize(PICTURE, Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def _multiply(directory: Path, shards: int) -> None:
    """Turn a dataset of one shard into one of many, all of them links to the same file."""
    path = directory / "dataset_info.json"
    info = json.loads(path.read_text())
    (split,) = info["splits"]
    if len(split["shardLengths"]) == shards:
        return
    (first,) = directory.glob("*.array_record-00000-of-00001")
    for i in range(shards):
        with contextlib.suppress(FileExistsError):  # a call that was killed has left it
            os.link(first, directory / f"tiny-train.array_record-{i:05d}-of-{shards:05d}")
    split["shardLengths"] = [str(PER_SHARD)] * shards
    output_files.write_json(path, info)
