"""Turn a raw collection of captioned images into training records.

python -m lina_jax.prepare --source=shapes --out=DIR --resolution=32 --train=20000 --validation=500
python -m lina_jax.prepare --source=parquet --input='RAW/*.parquet' --out=DIR --resolution=32 --validation=1000
python -m lina_jax.prepare --source=webdataset --input='gs://BUCKET/*.tar' --out=DIR --resolution=256 \
    --autoencoder=VAE --text_encoder=PHI --process_index=$I --process_count=$N

`out` becomes a TFDS dataset directory (see `records.py`) with two more files: `prepare.json` (settings and totals) and
`rejects.jsonl` (one line per rejected item). With --autoencoder the records hold latents, otherwise pixels. Any number
of processes can share the work: each makes every N-th unit (see `work_units.py`), and the last to finish (with
--distributed, process 0) assembles the dataset. If it is killed at any point, the same command continues the work. The
`validation` images are drawn evenly over the collection by `seed`; rejects among them are not replaced.
"""

import collections
import contextlib
import dataclasses
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from tqdm import tqdm

from lina_jax import (
    config_file,
    entry,
    hosts,
    images,
    output_files,
    pictures,
    preemption,
    records,
    rejects,
    shapes,
    work_units,
)
from lina_jax.errors import UserError
from lina_jax.recording import LatentRecorder, PixelRecorder, Record, Recorder, make_records
from lina_jax.shares import WHOLE, Share, resolve_share, take_gpu
from lina_jax.sources.base import Fields, Reject, Source, filesystem, is_local
from lina_jax.sources.folder import FolderSource
from lina_jax.sources.parquet import ParquetSource
from lina_jax.sources.scenes import ShapesSource
from lina_jax.sources.tfds import TfdsSource
from lina_jax.sources.webdataset import WebDatasetSource

SOURCES = {
    "parquet": (ParquetSource, Fields("image", "text", "", "label")),
    "webdataset": (WebDatasetSource, Fields("", "txt", "", "")),
    "folder": (FolderSource, Fields("", "", "", "")),
    "tfds": (TfdsSource, Fields("image", "", "", "label")),
}


def _flag(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides what a dataset holds; each field is a flag. None: the source's default, in SOURCES."""

    source: str = _flag("shapes", f"kind of collection: shapes | {' | '.join(SOURCES)}")
    resolution: int = _flag(32, "side of the stored images, in pixels")
    validation: int = _flag(500, "images in the validation split")
    seed: int = _flag(0, "shapes: seed of the scenes; others: seed that chooses the validation images")
    train: int = _flag(20_000, "shapes: images in the train split")
    input: str = _flag("", "a path, a quoted glob, or a URL with a glob; folder, tfds: a directory (tfds: DIR:SPLIT)")
    image_column: str | None = _flag(None, "parquet, tfds: column of encoded images")
    caption_column: str | None = _flag(None, "column of captions (webdataset: txt, json.FIELD); empty = none")
    short_caption_column: str | None = _flag(None, "column of second, short captions; empty = none")
    label_column: str | None = _flag(None, "column of class indices (webdataset: cls); empty = none")
    min_size: int = _flag(1, "reject images with a side shorter than this many pixels")
    max_caption_bytes: int = _flag(8_000, "reject captions longer than this many bytes")
    quality: int = _flag(0, "pixels: 0 = PNG, 1 to 100 = JPEG of this quality")
    shard_mb: int = _flag(256, "target size in MiB of a shard, and of a unit of work (webdataset: each tar is a unit)")
    autoencoder: str = _flag("", "directory of a KL autoencoder: store latents")
    text_encoder: str = _flag("", "latents: directory of a Phi text encoder; empty = classes only")
    dtype: str = _flag("bfloat16", "latents: compute dtype of the encoders, bfloat16 | float32")
    batch_size: int = _flag(32, "latents: images encoded at once")

    def __post_init__(self):
        if self.source != "shapes" and self.source not in SOURCES:
            raise UserError(f"--source={self.source!r} is unknown, expected one of shapes, {', '.join(SOURCES)}")
        columns = tuple(f"{name}_column" for name in Fields._fields)
        if self.source == "shapes":
            for name in ("input", *columns):
                self._refuse(name, "--source=shapes")
        else:
            self._refuse("train", f"--source={self.source}")
        if self.source in ("parquet", "tfds") and self.image_column == "":
            raise UserError(f"--image_column='': --source={self.source} needs the name of a column")
        if self.source in ("webdataset", "folder"):  # the image is found by its file name
            self._refuse("image_column", f"--source={self.source}")
        if self.autoencoder:
            self._refuse("quality", "latents")
        else:
            for name in ("text_encoder", "dtype", "batch_size"):
                self._refuse(name, "pixels: it needs --autoencoder")
        if self.source != "shapes" and not self.input:
            raise UserError(
                f"--source={self.source} needs --input: {type(self).__dataclass_fields__['input'].metadata['help']}"
            )
        if self.source in SOURCES:  # __setattr__ of object, as the dataclass is frozen
            for name, usual in zip(columns, SOURCES[self.source][1], strict=True):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, usual)
        if self.text_encoder and self.source in SOURCES and not self.caption_column:
            raise UserError(f"--text_encoder={self.text_encoder!r} needs captions: give --caption_column")
        for name in ("validation", "seed", "quality"):
            self._check_least(name, 0)
        for name in ("resolution", "train", "shard_mb", "min_size", "max_caption_bytes", "batch_size"):
            self._check_least(name, 1)
        if self.resolution**2 > images.MAX_PIXELS:
            raise UserError(f"--resolution={self.resolution}: more than {images.MAX_PIXELS} pixels")
        if self.quality > 100:
            raise UserError(f"--quality={self.quality}, expected 0 (PNG) or 1 to 100 (JPEG)")
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"--dtype={self.dtype!r}, expected bfloat16 or float32")

    def _refuse(self, name: str, where: str) -> None:
        if getattr(self, name) != getattr(type(self), name):
            raise UserError(f"--{name}={getattr(self, name)!r} does not apply to {where}")

    def _check_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise UserError(f"--{name}={getattr(self, name)}, expected at least {least}")

    @property
    def fields(self) -> Fields:
        return Fields(*(getattr(self, f"{name}_column") for name in Fields._fields))

    @property
    def is_class_folder(self) -> bool:
        """Whether every file below --input is an item: folders without metadata have no columns."""
        return self.source == "folder" and not any(self.fields)

    def recorded(self) -> dict[str, Any]:
        """What identifies a dataset: its settings and, if scenes are rendered, a fingerprint of the rendering code."""
        scenes = {"scenes": shapes.fingerprint()} if self.source == "shapes" else {}
        return dataclasses.asdict(self) | scenes


def prepare(
    out: str | Path,
    settings: Settings,
    max_reject_fraction: float = 0.05,
    share: Share = WHOLE,
) -> dict[str, Any] | None:
    """Make this process's units of the dataset `out`, then the dataset itself if no unit is missing.

    Returns the totals (images per split, rejects per reason, truncated captions), or None while units of other
    processes are missing. Under jax.distributed, all processes wait for each other, then process 0 assembles and the
    others return None. A finished dataset with the same settings is left as it is. Raises UserError if `out` holds
    anything else, or if more than `max_reject_fraction` of the items are rejected; `out` does not appear then, but
    finished units are kept for a retry.
    """
    out = Path(out).expanduser().resolve()
    if totals := finished(out, settings):
        _meet(out)
        print(f"{out} is already prepared with these settings")
        return totals
    if os.path.ismount(out):
        raise UserError(f"--out={out}: a mount point, which a dataset cannot replace; choose a directory below it")
    if settings.is_class_folder:
        fs, collection = filesystem(settings.input)
        if is_local(fs) and out.is_relative_to(Path(collection).resolve()):  # it would become part of the collection
            raise UserError(f"--out={out}: lies in --input={settings.input}; choose a directory outside of it")
    output_files.check("out", out.parent)
    if not share.index:
        output_files.check_renames("out", out.parent)
    recorder = _recorder(settings)
    source = open_source(settings, recorder)
    try:
        if share.index:  # process 0 creates the work directory first, so that the others can check that they see it
            _meet(out)
        work = work_units.WorkDirectory(out, settings.recorded(), source)
        if not share.index:
            _meet(out)
        if totals := finished(out, settings):  # by others, while this process was loading encoders
            work.remove()
            return totals
        _make_units(work, source, recorder, settings, max_reject_fraction, share)
        hosts.barrier("units are made")
        if share.index and jax.distributed.is_initialized():  # process 0 assembles
            return None
        hosts.soon(lambda: not work.missing())
        if missing := len(work.missing()):
            remaining = f"{missing} of {len(source.units)} units"
            if jax.distributed.is_initialized():
                raise UserError(f"{remaining} are not in {work.path}: all processes must work in one shared directory")
            print(f"this process is done; {remaining} are left to other processes")
            return None
        receipts = [work.receipt(number) for number in range(len(source.units))]
        totals = _totals(receipts)
        rejects.check_fraction(
            totals["rejected"], sum(receipt.items for receipt in receipts), max_reject_fraction, work.path
        )
        if not totals["images"].get("train"):
            raise UserError(f"nothing to train on: {rejects.listed(totals['rejected'], work.path)}")
        summary = {"settings": settings.recorded(), "totals": totals}
        work.assemble(receipts, settings.source, recorder.features(source.label_names), summary)
    except OSError as error:
        if totals := finished(out, settings):  # another process was faster
            return totals
        raise UserError(f"cannot prepare {out}: {error}") from error
    return totals


def _meet(out: Path) -> None:
    """Under jax.distributed, wait for all processes. Raises UserError unless all see `out` at the same stage."""
    hosts.check_shared("--out", lambda: work_units.stage(out))


def finished(out: Path, settings: Settings) -> dict[str, Any] | None:
    """Totals of the dataset in `out`, None if there is nothing yet. Raises UserError if `out` holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "prepare.json").is_file():
        raise UserError(
            f"--out={out} exists and is not a dataset made by lina_jax.prepare: choose another or remove it"
        )
    summary = json.loads((out / "prepare.json").read_text())
    work_units.compare(summary["settings"], settings.recorded(), f"--out={out} holds a dataset with other settings")
    work_units.clean(out)
    return summary["totals"]


def open_source(settings: Settings, recorder: Recorder) -> Source:
    """The collection, divided into units of about one shard each."""
    items = max(1, min(records.SHARD_RECORDS, settings.shard_mb * 2**20 // recorder.record_bytes))
    if settings.source == "shapes":
        return ShapesSource(settings.train, settings.validation, settings.resolution, settings.seed, items)
    source_class, _ = SOURCES[settings.source]
    source = source_class(settings.input, settings.fields, items)
    counts = [unit.count for unit in source.units]
    if not any(count is None or count for count in counts):
        raise UserError(f"--input={settings.input} has no items")
    if None not in counts and settings.validation >= sum(counts):
        raise UserError(f"--validation={settings.validation} leaves none of the {sum(counts)} items to train on")
    return source


def validation_items(source: Source, number: int, count: int, settings: Settings) -> set[int]:
    """Positions of a unit's validation items; its part of --validation is proportional to its size.

    If the sizes are known only after reading, all units count the same. No unit gives more than half of its items.
    """
    sizes = [unit.count for unit in source.units]
    if None in sizes:
        sizes = [1] * len(sizes)
    before, after, total = sum(sizes[:number]), sum(sizes[: number + 1]), sum(sizes)
    share = settings.validation * after // total - settings.validation * before // total
    return set(random.Random(f"{settings.seed}/{number}").sample(range(count), min(share, count // 2)))


def _recorder(settings: Settings) -> Recorder:
    if not settings.autoencoder:
        return PixelRecorder(settings.resolution, settings.quality)
    return LatentRecorder(
        settings.autoencoder, settings.text_encoder, settings.resolution, settings.batch_size, settings.dtype
    )


def _make_units(
    work: work_units.WorkDirectory,
    source: Source,
    recorder: Recorder,
    settings: Settings,
    max_reject_fraction: float,
    share: Share,
) -> None:
    """Make this process's units that are not finished."""
    mine = range(share.index, len(source.units), share.count)
    serialize = records.Serializer(recorder.features(source.label_names))
    receipts = {number: work.receipt(number) for number in set(mine) - work.missing()}
    sizes = {number: receipt.items for number, receipt in receipts.items()}
    guard = rejects.Guard(source, settings.fields, max_reject_fraction, work.path)
    for receipt in receipts.values():
        guard.add_receipt(receipt)
    expected = _expected(source, mine, sizes)
    with tqdm(total=expected, initial=sum(sizes.values()), unit=" images", disable=None) as progress:

        def assign_splits(
            items: Iterable[Record | Reject], split: str | None, validation: Set[int]
        ) -> Iterator[work_units.SplitItem]:
            for position, item in enumerate(items):
                progress.update()
                yield split or ("validation" if position in validation else "train"), item
                guard.check(item)  # now that it is listed

        for number in mine:
            if number in receipts:
                continue
            unit = source.units[number]
            with source.open(unit) as (count, examples):
                sizes[number] = count
                progress.total = _expected(source, mine, sizes)
                recorder.truncated = 0
                validation = set() if unit.split else validation_items(source, number, count, settings)
                limits = settings.resolution, settings.min_size, settings.max_caption_bytes
                with contextlib.closing(make_records(examples, recorder, *limits)) as items:
                    split_items = assign_splits(items, unit.split, validation)
                    size = settings.shard_mb * 2**20
                    work.make(number, source.name, count, split_items, serialize, size, lambda: recorder.truncated)


def _expected(source: Source, mine: Iterable[int], sizes: dict[int, int]) -> int:
    """The number of items in this process's units; a unit of unknown size counts as the mean of the known ones."""
    unit_sizes = [sizes.get(number, source.units[number].count) for number in mine]
    known_sizes = [size for size in unit_sizes if size is not None]
    mean = sum(known_sizes) // max(1, len(known_sizes))
    return sum(known_sizes) + (len(unit_sizes) - len(known_sizes)) * mean


def _totals(receipts: Sequence[work_units.Receipt]) -> dict[str, Any]:
    written: collections.Counter[str] = collections.Counter()
    rejected: collections.Counter[str] = collections.Counter()
    for receipt in receipts:
        written.update({split: sum(shard.records for shard in shards) for split, shards in receipt.shards.items()})
        rejected.update(receipt.rejected)
    truncated = sum(receipt.truncated for receipt in receipts)
    return {"images": dict(sorted(written.items())), "rejected": dict(rejected), "truncated_captions": truncated}


def contact_sheet(dataset: Path, settings: Settings, path: Path) -> None:
    """Save a picture of evenly spaced records of the training split, with their captions."""
    decoders = None if settings.autoencoder else {"image": tfds.decode.SkipDecoding()}  # TFDS would need OpenCV
    stored = tfds.builder_from_directory(dataset).as_data_source("train", decoders=decoders)
    count = min(pictures.SHOWN, len(stored))
    rows = [stored[i * len(stored) // count] for i in range(count)]
    if settings.autoencoder:
        decoder = LatentRecorder(settings.autoencoder, "", settings.resolution, settings.batch_size, settings.dtype)
        shown = decoder.pixels(np.stack([row["moments"] for row in rows]))
    else:
        shown = np.stack([np.asarray(images.decode(row["image"])) for row in rows])
    captions = [row["caption"].decode() or (f"class {row['label']}" if row["label"] >= 0 else "") for row in rows]
    pictures.save(path, pictures.grid(shown, captions))


def define_flags() -> None:
    """Define the entry point's flags; not at import, when they would clash with those of other entry points."""
    for field in dataclasses.fields(Settings):
        define = flags.DEFINE_integer if field.type is int else flags.DEFINE_string
        define(field.name, field.default, field.metadata["help"])
    flags.DEFINE_string("out", None, "directory for the dataset")
    flags.DEFINE_float("max_reject_fraction", 0.05, "end with an error if a larger fraction of the items is rejected")
    flags.DEFINE_integer(
        "process_index", None, "index of this process among those that share the work; default: SLURM's, or 0"
    )
    flags.DEFINE_integer("process_count", None, "number of processes that share the work; default: SLURM's, or 1")
    flags.DEFINE_bool("distributed", False, "share the work among the processes of jax.distributed, which end together")
    flags.DEFINE_string("preview", None, "PNG file for a contact sheet of what was written")


def main(argv: Sequence[str]) -> None:
    del argv
    preemption.exit_on_sigterm()
    values = flags.FLAGS
    if not values.out:
        raise UserError("--out=DIR is missing: the directory for the dataset")
    settings = Settings(**{field.name: values[field.name].value for field in dataclasses.fields(Settings)})
    if "://" in values.out:
        raise UserError(f"--out={values.out}: shards are written as local files; name a disk or a mounted bucket")
    if not 0 <= values.max_reject_fraction <= 1:
        raise UserError(f"--max_reject_fraction={values.max_reject_fraction}, expected 0 to 1")
    if values.preview:
        preview = Path(values.preview).expanduser()
        if preview.is_dir():
            raise UserError(f"--preview={values.preview}: a directory; name a PNG file")
        output_files.check("preview", preview.parent)
    together = values.distributed or values.coordinator
    inapplicable = ("process_index", "process_count") if together else ("processes", "process_id")
    for name in inapplicable:
        if values[name].value is not None and (name, values[name].value) != ("processes", 1):
            reason = "jax.distributed sets it" if together else "needs --coordinator; without it, give --process_index"
            raise UserError(f"--{name}={values[name].value}: {reason}")
    if together:
        # A process that has finished its share waits for the others, for up to a day.
        with hosts.distributed_run(config_file.given_flags()):
            if jax.process_count() == 1:
                print("there are no other processes: this one prepares everything", file=sys.stderr)
            _prepare(values, settings, Share(jax.process_index(), jax.process_count()))
    else:
        if values.process_index is None:
            take_gpu(os.environ)
        _prepare(values, settings, resolve_share(values.process_index, values.process_count))


def _prepare(values: flags.FlagValues, settings: Settings, share: Share) -> None:
    totals = prepare(values.out, settings, values.max_reject_fraction, share)
    if totals is None or (share.index and jax.distributed.is_initialized()):  # one process reports
        return
    print(f"{values.out}: " + ", ".join(f"{count} {split} images" for split, count in totals["images"].items()))
    if (drawn := totals["images"].get("validation", 0)) < settings.validation and settings.source != "tfds":
        reason = "no unit of work gives more than half of its images, and rejects are not replaced"
        print(f"{drawn} of {settings.validation} validation images: {reason}", file=sys.stderr)
    if totals["truncated_captions"]:
        print(f"captions truncated to the text encoder's length: {totals['truncated_captions']}", file=sys.stderr)
    for reason, count in totals["rejected"].items():
        print(f"rejected {count}: {reason}", file=sys.stderr)
    if values.preview:
        contact_sheet(Path(values.out).expanduser(), settings, Path(values.preview).expanduser())


if __name__ == "__main__":
    define_flags()
    hosts.define_flags()
    flags.adopt_module_key_flags(hosts)  # listed by --help
    entry.run(main)
