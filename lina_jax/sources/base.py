"""What every reader of a raw collection shares: units of work, items, the checks of captions and labels, storage.

A source cuts its collection into units, each read in order by one process. What is in a unit, and so in a dataset, does
not depend on the number of processes.
"""

import contextlib
import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import fsspec
import numpy as np
from fsspec.core import has_magic

from lina_jax import cache
from lina_jax.errors import UserError, storage_failed
from lina_jax.retry import of_storage, patiently

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "img")  # extensions

T = TypeVar("T")
_STALLED_S = 600.0  # without an answer from a bucket; a whole listing is one answer
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # limits of the process or the machine


class Example(NamedTuple):
    """One image, encoded (bytes) or not (uint8 (H,W,3)); no caption is "", no label is -1."""

    key: str
    image: bytes | np.ndarray
    caption: str
    short_caption: str
    label: int


class Reject(NamedTuple):
    """An item that cannot be used, and why."""

    key: str
    reason: str


class Unit(NamedTuple):
    """A stretch of a collection: items start to stop of `path`; stop is None where only reading tells it."""

    path: str
    start: int = 0
    stop: int | None = None
    split: str | None = None  # where the collection itself says so

    @property
    def count(self) -> int | None:
        return None if self.stop is None else self.stop - self.start


class Fields(NamedTuple):
    """Where the parts of an item stand in the collection (columns, members, features); "" = there is none."""

    image: str = ""
    caption: str = ""
    short_caption: str = ""
    label: str = ""


class Source(Protocol):
    name: str
    label_names: Sequence[str]
    units: Sequence[Unit]
    contents: Sequence[Any]  # what is there to be read, to notice if it changes: files and their sizes, or the like

    def open(self, unit: Unit) -> contextlib.AbstractContextManager[tuple[int, Iterator[Example | Reject]]]:
        """The number of items, and exactly so many of them."""


def raise_if_storage(error: Exception) -> None:
    """Raises an error that is not of the data, and can be mended, instead of making it a reject for ever.

    It is one of storage, a refusal by the system, or of a file that has gone since it was listed.
    """
    refused = isinstance(error, FileNotFoundError | PermissionError)
    if storage_failed(error) or refused or (isinstance(error, OSError) and error.errno in _EXHAUSTED):
        raise error


class Unusable(Exception):
    """Why an item cannot be used; sources turn it into a `Reject`."""


def checked(
    key: str, fields: Fields, image: Any, caption: Any, short_caption: Any, label: Any, classes: int = 0
) -> Example | Reject:
    """The example, or the first reason against it. `classes` 0: any label that is not negative."""
    try:
        if image is None or (isinstance(image, bytes) and not image):
            raise Unusable("missing image")
        caption = _caption(caption) if fields.caption else ""
        if fields.caption and not caption:
            raise Unusable("empty caption")
        short_caption = _caption(short_caption) if fields.short_caption else ""
        return Example(key, image, caption, short_caption, _label(label, classes) if fields.label else -1)
    except Unusable as reason:
        return Reject(key, str(reason))


def _caption(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise Unusable("caption is not UTF-8") from None
    if value is not None and not isinstance(value, str):
        raise Unusable(f"caption is not text but {type(value).__name__}")
    text = (value or "").strip()
    # Half of a surrogate pair, as JSON may hold, is no character and has no UTF-8.
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Unusable("caption is not UTF-8")
    return text


def _label(value: Any, classes: int) -> int:
    if value is None or (isinstance(value, str | bytes) and not value):
        raise Unusable("missing label")
    try:
        label = int(value)
    except (TypeError, ValueError, OverflowError):
        raise Unusable(f"label {value!r:.40} is not a number") from None
    if isinstance(value, float | np.floating) and label != value:
        raise Unusable(f"label {value!r:.40} is not a whole number")
    if label >= 2**63:
        raise Unusable(f"label {value!r:.40} is too large")
    if label < 0:
        raise Unusable("missing label")
    if classes and label >= classes:
        raise Unusable(f"label {label} is not one of the {classes} classes")
    return label


def ranges(path: str, count: int, size: int, split: str | None = None) -> list[Unit]:
    """Cut `count` items into units of at most `size`."""
    return [Unit(path, start, min(start + size, count), split) for start in range(0, count, size)]


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a local path or URL, and the path within it. Raises UserError for an unknown protocol."""
    try:
        return fsspec.url_to_fs(os.path.expanduser(path))
    except (ImportError, ValueError) as error:  # a protocol whose package is missing, or that does not exist
        raise UserError(f"cannot open {path}: {error}") from error


def matching(pattern: str) -> dict[str, int]:
    """Sorted files that match a path, a glob or a URL with a glob, and their sizes. UserError if there are none."""
    fs, inner = filesystem(pattern)

    def look() -> dict[str, Any]:
        # Of a name without wildcards in a bucket, `glob` takes a failure for absence.
        return fs.glob(inner, detail=True) if has_magic(inner) or is_local(fs) else {inner: fs.info(inner)}

    try:
        found = patient(pattern, look)
    except FileNotFoundError:
        found = {}
    if not found:
        raise UserError(f"no file matches {pattern!r}")
    return {path if is_local(fs) else fs.unstrip_protocol(path): found[path]["size"] for path in sorted(found)}


def files_below(fs: fsspec.AbstractFileSystem, root: str) -> dict[str, int]:
    """All files of a directory and their sizes; on local disks those, too, of directories that are linked into it."""
    if is_local(fs):
        return dict(_local_files(root, ()))
    return {path: about["size"] for path, about in fs.find(root, detail=True).items()}


def _local_files(directory: str, above: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """(path, size) of each; `above` are the real paths of the directories on the way."""
    real = os.path.realpath(directory)
    if real in above:  # a link to a directory that it lies in
        return
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _local_files(entry.path, (*above, real))
            else:
                # A link to nothing is rejected by name when it is read.
                lost = entry.is_symlink() and not os.path.exists(entry.path)
                yield entry.path, 0 if lost else entry.stat().st_size


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,))


def kind(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
    """What is there: "file", "directory" or what else the file system knows; None: nothing.

    Raises UserError where a bucket does not tell, OSError where a local disk does not. (fsspec's own `exists` and
    `isdir` take a failure for a no.)
    """

    def look() -> str:
        return fs.info(path)["type"]

    try:
        return look() if is_local(fs) else patient(path, look)
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextlib.contextmanager
def local_file(path: str, size: int | None) -> Iterator[str]:
    """A file on a local disk: the file itself, or a temporary copy of one in a bucket, of `size` bytes if known.

    Raises UserError where it cannot be copied, FileNotFoundError where it is not there.
    """
    fs, inner = filesystem(path)
    if is_local(fs):
        yield inner
        return
    # A thread that was given up may still have a file there.
    with tempfile.TemporaryDirectory(prefix="lina_jax-", ignore_cleanup_errors=True) as directory:
        copy = Path(directory, os.path.basename(inner))
        with _naming(path):
            cache.fetch(fs, inner, copy, size, _STALLED_S)
        yield str(copy)


def patient(path: str, call: Callable[[], T]) -> T:
    """`call()`, tried again while the storage fails. Raises UserError naming the path, FileNotFoundError at once."""
    with _naming(path):
        return patiently(lambda _: of_storage(call), _STALLED_S)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Makes what storage raises a UserError that names the path; FileNotFoundError stays as it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def content(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    """All bytes of a file; of one in a bucket with patience. Raises UserError, and OSError of local files."""
    return fs.cat_file(path) if is_local(fs) else patient(path, lambda: fs.cat_file(path))


class PatientFile(io.RawIOBase):
    """A file in a bucket: reads are tried again, then end with a UserError, never with what a damaged file raises."""

    def __init__(self, path: str):
        fs, inner = filesystem(path)
        self._path, self._at = path, 0
        self._open = lambda: fs.open(inner, "rb")

        def opened() -> tuple[io.IOBase, int]:
            file = self._open()
            return file, file.seek(0, os.SEEK_END)

        self._file, self._size = patient(path, opened)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        at, files = self._at, [self._file]

        def read() -> tuple[io.IOBase, bytes]:
            # Each further try opens the file anew: a thread that was given up may wake and go on reading.
            file = files.pop() if files else self._open()
            file.seek(at)
            return file, file.read(size)

        self._file, data = patient(self._path, read)
        self._at += len(data)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


def relative(paths: Sequence[str]) -> dict[str, str]:
    """Each path without what all directories have in common: short, unique names for keys."""
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return {path: os.path.relpath(path, root) for path in paths}
