"""Data on disk: TFDS dataset directories of ArrayRecord shards, which `tfds.data_source` reads without this code.

A record has `caption` and `short_caption` (text, "" = none), `label` (int64, -1 = none), `key` (text: where it came
from) and
* as pixels: `image` (PNG or JPEG bytes);
* as latents: `moments` (2C, H, W), the mean and log variance of the autoencoder, and `text` and `short_text` (rows, D),
  the features of the text encoder for the real tokens of the two captions, all float16.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from lina_jax import output_files
from lina_jax.errors import UserError

SHARD_BYTES = 256 * 2**20
SHARD_RECORDS = 10_000  # to read one, array_record passes over the whole index of its shard: 3.5 ns per record there
_SHARD_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # TFDS's default, spelt out in dataset_info.json


def pixel_features(label_names: Sequence[str] = (), encoding: str = "png") -> tfds.features.FeaturesDict:
    """TFDS features of records of pixels. TFDS itself saves the label names, if any, beside the shards."""
    image = tfds.features.Image(shape=(None, None, 3), encoding_format=encoding)
    return tfds.features.FeaturesDict({"image": image, **_common_fields(label_names)})


def latent_features(
    moments: tuple[int, int, int], text_dim: int, label_names: Sequence[str] = ()
) -> tfds.features.FeaturesDict:
    """TFDS features of records of latents: `moments` is (2C, H, W), `text_dim` is 0 if there is no text encoder."""

    def half(*shape):
        # As bytes: otherwise, TFDS would store a list of float32.
        return tfds.features.Tensor(shape=shape, dtype=np.float16, encoding=tfds.features.Encoding.BYTES)

    text = {name: half(None, text_dim) for name in ("text", "short_text")} if text_dim else {}
    return tfds.features.FeaturesDict({"moments": half(*moments), **text, **_common_fields(label_names)})


def _common_fields(label_names: Sequence[str]) -> dict[str, Any]:
    label = tfds.features.ClassLabel(names=list(label_names)) if label_names else tfds.features.Scalar(np.int64)
    text = tfds.features.Text
    return {"caption": text(), "short_caption": text(), "label": label, "key": text()}


class Serializer:
    """Serializes records to bytes, the same in every process."""

    def __init__(self, features: tfds.features.FeaturesDict):
        self._features = features
        self._serializer = ExampleSerializer(features.get_serialized_info())

    def __call__(self, record: Mapping[str, Any]) -> bytes:
        example = self._serializer.get_tf_example(self._features.encode_example(dict(record)))
        # The fields are a map; without this option, protobuf writes it in a different order in every process.
        return example.SerializeToString(deterministic=True)


class Shard(NamedTuple):
    """One finished ArrayRecord file."""

    path: str
    records: int
    bytes: int


class Shards:
    """Appends serialized records to files STEM-00000, STEM-00001, ...

    Each file holds at most SHARD_RECORDS records and `size` bytes of them; a larger record gets a file of its own.
    """

    def __init__(self, stem: Path, size: int = SHARD_BYTES):
        self._stem = stem
        self._size = size
        self._finished: list[Shard] = []
        self._writer: ArrayRecordWriter | None = None
        self._records = self._bytes = 0

    def append(self, record: bytes) -> None:
        """Append a record. Raises OSError if it cannot be written."""
        if self._writer and (self._bytes + len(record) > self._size or self._records == SHARD_RECORDS):
            self._close()
        if not self._writer:
            # One record per group: readers fetch records one by one, in random order. Uncompressed: pictures are
            # compressed already, and for float16 noise zstd saves 6 % but makes reading take three times as long.
            self._writer = self._checked(ArrayRecordWriter, self._path(), "group_size:1,uncompressed")
        self._checked(self._writer.write, record)
        self._records += 1
        self._bytes += len(record)

    def finish(self) -> list[Shard]:
        self._close()
        return self._finished

    def _path(self) -> str:
        return f"{self._stem}-{len(self._finished):05d}"

    def _close(self) -> None:
        if self._writer:
            self._checked(self._writer.close)
            with open(self._path(), "rb+") as file:  # a receipt that survives a power failure vouches for the content
                os.fsync(file.fileno())
            self._finished.append(Shard(self._path(), self._records, self._bytes))
        self._writer, self._records, self._bytes = None, 0, 0

    def _checked(self, call, *args):
        try:
            return call(*args)
        except RuntimeError as error:  # how ArrayRecord reports a full disk
            raise OSError(f"cannot write {self._stem.parent}: {error}") from error


def assemble(
    directory: Path, name: str, features: tfds.features.FeaturesDict, splits: Mapping[str, Sequence[Shard]]
) -> None:
    """Turn finished shards into a TFDS dataset: move them to their final names in `directory` and add its metadata.

    May run again, and in several processes at once: a shard that is already in place stays there.
    """
    described = []
    for split, shards in splits.items():
        for i, shard in enumerate(shards):
            place = directory / f"{name}-{split}.array_record-{i:05d}-of-{len(shards):05d}"
            try:
                os.rename(shard.path, place)
            except FileNotFoundError:
                if not place.exists():
                    raise
        described.append(
            {
                "name": split,
                "shardLengths": [str(shard.records) for shard in shards],
                "numBytes": str(sum(shard.bytes for shard in shards)),
                "filepathTemplate": _SHARD_TEMPLATE,
            }
        )
    info = {"name": name, "version": "1.0.0", "fileFormat": "array_record", "splits": described}
    # Each process writes its own files, so that none is half-written when another process renames the directory.
    with output_files.own_directory(directory) as own:
        features.save_config(str(own))
        (own / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")
        for path in own.iterdir():
            os.replace(path, directory / path.name)


class Writer:
    """Appends records to the splits of one dataset; made by `create`."""

    def __init__(self, directory: Path, features: tfds.features.FeaturesDict):
        self.directory = directory
        self._serialize = Serializer(features)
        self.splits: dict[str, Shards] = {}

    def write(self, split: str, **record) -> None:
        """Append one record. Raises OSError, of which `create` makes a UserError, if it cannot be written."""
        if split not in self.splits:
            self.splits[split] = Shards(self.directory / split)
        self.splits[split].append(self._serialize(record))


@contextlib.contextmanager
def create(directory: str | Path, name: str, features: tfds.features.FeaturesDict) -> Iterator[Writer]:
    """Write a dataset; `directory` appears, complete, at the end of the block, or not at all if the block raises."""
    directory = Path(directory).expanduser().absolute()
    try:
        with output_files.new_directory(directory) as partial:
            writer = Writer(partial, features)
            yield writer
            assemble(partial, name, features, {split: shards.finish() for split, shards in writer.splits.items()})
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error}") from error
