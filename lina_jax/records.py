"""Data on disk: TFDS dataset directories of ArrayRecord shards, which `tfds.data_source` reads without this code.

One record is `image` (PNG bytes), `caption` (text), `label` (int64, -1 = none) and `key` (text: where it came from).
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from lina_jax.errors import UserError

SHARD_BYTES = 256 * 2**20
SHARD_RECORDS = 10_000  # reading one record costs array_record a pass over the shard's index: 3.5 ns per record there
_SHARD_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # TFDS's default, spelt out in dataset_info.json


def features(label_names: Sequence[str] = ()) -> tfds.features.FeaturesDict:
    """TFDS features of a record; label names, if there are any, are saved beside the shards by TFDS itself."""
    label = tfds.features.ClassLabel(names=list(label_names)) if label_names else tfds.features.Scalar(np.int64)
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
            "label": label,
            "key": tfds.features.Text(),
        }
    )


class Writer:
    """Appends records to the splits of one dataset in `directory`; made by `create`."""

    def __init__(self, directory: Path, name: str, label_names: Sequence[str] = ()):
        self.directory = directory
        self._name = name
        self._features = features(label_names)
        self._serializer = ExampleSerializer(self._features.get_serialized_info())
        self._splits: dict[str, _SplitWriter] = {}

    def write(self, split: str, *, image: bytes, caption: str, label: int, key: str) -> None:
        """Append one record. Raises UserError if the disk refuses it."""
        if split not in self._splits:
            self._splits[split] = _SplitWriter(self.directory / f"{self._name}-{split}.array_record")
        record = {"image": image, "caption": caption, "label": label, "key": key}
        example = self._serializer.get_tf_example(self._features.encode_example(record))
        # Fields are a map, which protobuf writes in another order in every process unless asked not to.
        self._splits[split].append(example.SerializeToString(deterministic=True))

    @property
    def counts(self) -> dict[str, int]:
        """Number of records of each split so far."""
        return {name: sum(split.lengths) for name, split in self._splits.items()}

    def finish(self) -> None:
        """Close the shards and write TFDS's metadata."""
        splits = [
            {
                "name": name,
                "shardLengths": [str(length) for length in split.finish()],
                "numBytes": str(split.total_bytes),
                "filepathTemplate": _SHARD_TEMPLATE,
            }
            for name, split in self._splits.items()
        ]
        info = {"name": self._name, "version": "1.0.0", "fileFormat": "array_record", "splits": splits}
        self._features.save_config(str(self.directory))
        (self.directory / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")


class _SplitWriter:
    """The shards of one split: `STEM-00000`, ... while writing, TFDS's `STEM-00000-of-00002`, ... when finished."""

    def __init__(self, stem: Path):
        self.lengths: list[int] = []
        self.total_bytes = 0
        self._stem = stem
        self._room = 0  # bytes left in the shard
        self._writer: ArrayRecordWriter | None = None

    def append(self, record: bytes) -> None:
        if not self._writer or len(record) > self._room or self.lengths[-1] == SHARD_RECORDS:
            self._close()
            # One record per group: readers fetch records one by one, in random order.
            self._writer = self._checked(ArrayRecordWriter, str(self._part(len(self.lengths))), "group_size:1")
            self.lengths.append(0)
            self._room = SHARD_BYTES
        self._checked(self._writer.write, record)
        self._room -= len(record)
        self.total_bytes += len(record)
        self.lengths[-1] += 1

    def finish(self) -> list[int]:
        self._close()
        count = len(self.lengths)
        for i in range(count):
            self._part(i).rename(f"{self._part(i)}-of-{count:05d}")
        return self.lengths

    def _part(self, i: int) -> Path:
        return self._stem.with_name(f"{self._stem.name}-{i:05d}")

    def _close(self) -> None:
        if self._writer:
            self._checked(self._writer.close)

    def _checked(self, call, *args):
        try:
            return call(*args)
        except RuntimeError as error:  # what ArrayRecord makes of a full disk
            raise UserError(f"cannot write {self._stem.parent}: {error}") from error


@contextlib.contextmanager
def create(directory: str | Path, name: str, label_names: Sequence[str] = ()) -> Iterator[Writer]:
    """Write a dataset; `directory` appears, complete, when the block ends, and not at all if it raises."""
    directory = Path(directory).expanduser().absolute()
    partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        writer = Writer(partial, name, label_names)
        yield writer
        writer.finish()
        partial.rename(directory)  # replaces an empty directory and refuses any other
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Split:
    """Random access to the raw records of one split: dict(image=PNG bytes, caption=bytes, label=int, key=bytes)."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        self._source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        self._shards = builder.info.splits[split].file_instructions

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        """Raises RuntimeError where the shard is corrupt, DecodeError where the record is."""
        return self._source[index]

    def location(self, index: int) -> str:
        """Where a record lies, for messages."""
        for shard in self._shards:
            if index < shard.take:
                return f"record {shard.skip + index} of {shard.filename}"
            index -= shard.take
        raise IndexError(index)


def open_split(directory: str | Path, split: str) -> Split:
    """Open one split (`train`, or a TFDS slice such as `train[:100]`) of a TFDS directory stored as ArrayRecord.

    Raises UserError, naming the path and what exists, if the directory, its metadata, the split or a shard is missing.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise UserError(f"dataset directory {directory} does not exist; python -m lina_jax.prepare makes one")
    for name in ("dataset_info.json", "features.json"):
        if not (directory / name).is_file():
            found = ", ".join(sorted(path.name for path in directory.iterdir())[:10]) or "nothing"
            raise UserError(f"{directory} is not a TFDS dataset directory: it has no {name}; it holds {found}")
    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS raises many kinds on broken JSON
        raise UserError(f"cannot read the metadata of {directory}: {error}") from error
    _check_format(directory, builder.info)
    try:
        shards = builder.info.splits[split].file_instructions
    except (KeyError, ValueError):
        known = ", ".join(builder.info.splits)
        raise UserError(f"{directory} has no split {split!r}; its splits: {known}") from None
    missing = [shard.filename for shard in shards if not os.path.exists(shard.filename)]
    if missing:
        raise UserError(f"{len(missing)} of the {len(shards)} shards of {split!r} are missing, first {missing[0]}")
    return Split(builder, split)


def _check_format(directory: Path, info: tfds.core.DatasetInfo) -> None:
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{directory} is stored as {info.file_format.value}; only array_record can be read at random: "
            "prepare it again with file_format='array_record'"
        )
    absent = [name for name in features() if name not in info.features]
    if absent:
        raise UserError(f"{directory}: records have no {', '.join(absent)}; they have {', '.join(info.features)}")
