"""Random access to the raw records of a split on disk; damaged records and failing storage raise different errors."""

import bisect
import contextlib
import errno
import functools
import hashlib
import itertools
import os
import re
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from lina_jax import cache as cache_lib
from lina_jax.errors import UserError

COMMON_FIELDS = ("caption", "short_caption", "label", "key")  # what every record has


class RecordLayout(NamedTuple):
    """What the records of a dataset hold besides captions and label."""

    moments: tuple[int, int, int] | None  # (2C, H, W) of latents; None: pixels
    text_dim: int  # of text features; 0: none


class ShardSlice(NamedTuple):
    """The part of a file that belongs to a split."""

    path: str
    skip: int
    take: int


class Readers:
    """Keeps the most recently used shards open: a dataset may have more of them than a process may have open files."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._open: OrderedDict[str, ArrayRecordReader] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, path: str) -> ArrayRecordReader:
        """The reader of a file. Raises OSError or RuntimeError if it cannot be opened."""
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
        # Outside the lock, so that stalling storage holds up only this thread.
        os.stat(path)
        reader = ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=2**15)
        if not reader.ok():
            reader.read([0])  # raises the reason
        with self._lock:
            self._open[path] = reader
            while len(self._open) > self._capacity:
                self._open.popitem(last=False)  # closed when no thread uses it any longer
        return reader

    def drop(self, path: str) -> None:
        with self._lock:
            self._open.pop(path, None)


class Split:
    """Random access to the serialized records of one split."""

    def __init__(
        self,
        shards: Sequence[ShardSlice],
        layout: RecordLayout,
        manifest: str = "",
        label_names: Sequence[str] = (),
    ):
        """`manifest` is a digest of the dataset's metadata and the name of the split; `label_names`: of its classes."""
        self.layout, self.manifest, self.label_names = layout, manifest, tuple(label_names)
        self._shards = shards
        self._ends = list(itertools.accumulate(shard.take for shard in shards))
        for shard in shards:
            _readers().drop(shard.path)  # it may have been rewritten

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self):
        return self._shards, self.layout, self.manifest, self.label_names

    def __setstate__(self, state):
        self.__init__(*state)

    def __getitem__(self, index: int) -> bytes:
        """A serialized record. Raises ValueError if it is corrupt, OSError or RuntimeError if the storage fails.

        Reads one record at a time, so that the next one reuses its memory: reading many at once takes twice the CPU
        time, most of it for fresh pages.
        """
        path, place = self._place(index)
        try:
            (record,) = _readers()(path).read([place])
            if not record:  # what ArrayRecord reads from a file that has shrunk
                raise OSError("the file has become shorter")
        except (OSError, RuntimeError) as error:
            # How ArrayRecord reports damage to the records themselves; anything else is due to the storage.
            if re.search("(chunk data|chunk header|block header) hash mismatch", str(error)):
                raise ValueError(str(error)) from error
            _readers().drop(path)
            if (number := errno_of(error)) and not isinstance(error, OSError):
                raise OSError(number, str(error)) from error
            raise
        return record

    def location(self, index: int) -> str:
        """Where a record is stored, for messages."""
        path, place = self._place(index)
        return f"record {place} of {path}"

    def _place(self, index: int) -> tuple[str, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        shard = self._shards[number]
        return shard.path, shard.skip + shard.take - (self._ends[number] - index)


def errno_of(error: Exception) -> int | None:
    """The errno of an error, from its message if need be (ArrayRecord keeps only that); None if it has none."""
    if isinstance(error, OSError):
        return error.errno
    matches = {os.strerror(number): number for number in errno.errorcode if os.strerror(number) in str(error)}
    return matches[max(matches, key=len)] if matches else None


def open_split(directory: str | Path, split: str, *, cache: str = "", timeout: float = 60.0, threads: int = 8) -> Split:
    """Open one split (`train`, or a TFDS slice such as `train[:100]`) of a TFDS directory stored as ArrayRecord.

    If there is a `cache` directory, the shards are first copied there by `threads` threads; a copy that makes no
    progress for `timeout` seconds is retried. `directory` may then be a URL. Raises UserError, naming the path and what
    exists, if the directory, its metadata, the split or a shard is missing.
    """
    asked = directory
    local_copy = cache_lib.Copy(str(directory), cache, timeout=timeout) if cache else None
    if local_copy:
        directory = local_copy.copy_metadata(("dataset_info.json", "features.json"))
    else:
        directory = cache_lib.local_path(directory)
    if not directory.is_dir():
        raise UserError(f"dataset directory {directory} does not exist; python -m lina_jax.prepare creates one")
    present = set(os.listdir(directory))  # one request; one per shard would be thousands
    for name in ("dataset_info.json", "features.json"):
        if name not in present:
            found = f"; it holds {', '.join(sorted(present)[:10]) or 'nothing'}"
            raise UserError(f"{asked} is not a TFDS dataset directory: it has no {name}{'' if local_copy else found}")
    info = _info(directory)
    try:
        parts = info.splits[split].file_instructions
    except (KeyError, ValueError):
        known, example = ", ".join(info.splits), f"{next(iter(info.splits), 'train')}[:500]"
        raise UserError(
            f"{directory} has no split {split!r}; its splits: {known}, or parts of them, such as {example!r}"
        ) from None
    # A slice that ends before it begins has parts of negative length.
    shards = [ShardSlice(str(part.filename), part.skip, part.take) for part in parts if part.take > 0]
    if local_copy:
        local_copy.copy_shards([os.path.basename(shard.path) for shard in shards], threads)
    else:
        missing = [shard.path for shard in shards if os.path.basename(shard.path) not in present]
        if missing:
            raise UserError(f"{len(missing)} of the {len(shards)} shards of {split!r} are missing, first {missing[0]}")
    metadata = b"".join((directory / name).read_bytes() for name in ("dataset_info.json", "features.json"))
    manifest = hashlib.sha256(metadata + split.encode()).hexdigest()[:16]
    return Split(shards, _layout(info.features), manifest, _label_names(info))


def label_names(directory: str | Path) -> Sequence[str]:
    """Class names of a dataset, () if it has none. Raises UserError for a URL, or if its metadata cannot be read."""
    return _label_names(_info(cache_lib.local_path(directory)))


def _label_names(info: tfds.core.DatasetInfo) -> Sequence[str]:
    label = info.features["label"]
    return label.names if isinstance(label, tfds.features.ClassLabel) else ()


def _info(directory: Path) -> tfds.core.DatasetInfo:
    try:
        info = tfds.builder_from_directory(directory).info
    except Exception as error:  # TFDS raises errors of many types for broken JSON
        raise UserError(f"cannot read the metadata of {directory}: {error}") from error
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{directory} is stored as {info.file_format.value}; only array_record allows random access: "
            "prepare it again with file_format='array_record'"
        )
    absent = [name for name in COMMON_FIELDS if name not in info.features]
    if "moments" not in info.features and "image" not in info.features:
        absent.append("image or moments")
    if absent:
        raise UserError(f"{directory}: records have no {', '.join(absent)}; they have {', '.join(info.features)}")
    return info


def _layout(features: tfds.features.FeaturesDict) -> RecordLayout:
    moments = tuple(features["moments"].shape) if "moments" in features else None
    return RecordLayout(moments, features["text"].shape[-1] if "text" in features else 0)


@functools.cache
def _readers() -> Readers:
    """The readers of all splits of this process, which share its limit on open files."""
    return Readers(_open_files() // 2)


def _open_files() -> int:
    """The number of files that this process may open, after raising it as far as allowed (2**16 if unlimited)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2**16 if hard == resource.RLIM_INFINITY else hard
    with contextlib.suppress(ValueError, OSError):  # macOS may refuse what its hard limit allows
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return soft
