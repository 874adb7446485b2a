"""What all readers of raw collections share: units of work, items, checks of captions and labels, storage.

A source divides its collection into units, each of which one process reads in order. The content of a unit, and so of
the dataset, does not depend on the number of processes.
"""

import contextlib
import errno
import functools
import io
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import fsspec
import numpy as np
from absl import logging
from fsspec.core import has_magic
from fsspec.utils import glob_translate

from lina_jax import cache
from lina_jax.errors import UserError, storage_failed
from lina_jax.retry import storage_errors, with_retries

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "img")  # extensions

T = TypeVar("T")
_STALLED_S = 600.0  # longest wait for an answer from a bucket; a whole listing of a directory is one answer
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # limits of the process or the machine


class Example(NamedTuple):
    """One image, encoded (bytes) or decoded (uint8 (H, W, 3)), with captions ("": none) and a label (-1: none)."""

    key: str
    image: bytes | np.ndarray
    caption: str
    short_caption: str
    label: int


class Reject(NamedTuple):
    """An item that cannot be used, and why: a reason, by which items are counted, and the value that it is about."""

    key: str
    reason: str
    value: str = ""


class Unit(NamedTuple):
    """A part of a collection: items start to stop of `path`; stop is None if it is known only after reading."""

    path: str
    start: int = 0
    stop: int | None = None
    split: str | None = None  # if the collection itself defines it

    @property
    def count(self) -> int | None:
        return None if self.stop is None else self.stop - self.start


class Fields(NamedTuple):
    """The columns, members or features of a collection that hold the parts of an item; "" = there is none."""

    image: str = ""
    caption: str = ""
    short_caption: str = ""
    label: str = ""


class Source(Protocol):
    name: str
    label_names: Sequence[str]
    units: Sequence[Unit]
    contents: Sequence[Any]  # identifies the data, so that changes are noticed: files and their sizes, for example

    def open(self, unit: Unit) -> contextlib.AbstractContextManager[tuple[int, Iterator[Example | Reject]]]:
        """The number of items of the unit, and an iterator of exactly that many."""


def raise_if_storage(error: Exception) -> None:
    """Raise the error again if it is not due to the data: it may pass or be fixed, and a reject is permanent.

    Such errors are failures of the storage, exhausted limits of the system, missing permissions, and files that are
    gone since they were listed.
    """
    refused = isinstance(error, FileNotFoundError | PermissionError)
    if storage_failed(error) or refused or (isinstance(error, OSError) and error.errno in _EXHAUSTED):
        raise error


class Unusable(Exception):
    """Why an item cannot be used: reason and value of the `Reject` that sources turn it into."""


def checked(
    key: str, fields: Fields, image: Any, caption: Any, short_caption: Any, label: Any, classes: int = 0
) -> Example | Reject:
    """The example, or a reject with the first reason against it. `classes` 0: any label that is not negative."""
    try:
        if image is None or (isinstance(image, bytes) and not image):
            raise Unusable("missing image")
        caption = _caption(caption) if fields.caption else ""
        if fields.caption and not caption:
            raise Unusable("empty caption")
        short_caption = _caption(short_caption) if fields.short_caption else ""
        return Example(key, image, caption, short_caption, _label(label, classes) if fields.label else -1)
    except Unusable as why:
        return Reject(key, *why.args)


def _caption(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise Unusable("caption is not UTF-8") from None
    if value is not None and not isinstance(value, str):
        raise Unusable(f"caption is not text but {type(value).__name__}")
    text = (value or "").strip()
    # A lone surrogate, which JSON may hold, is not a character and cannot be encoded as UTF-8.
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Unusable("caption is not UTF-8")
    return text


def _label(value: Any, classes: int) -> int:
    if value is None or (isinstance(value, str | bytes) and not value):
        raise Unusable("missing label")
    try:
        if isinstance(value, str) and value.strip().endswith(".0"):  # pandas writes columns with gaps like that
            value = value.strip().removesuffix(".0")
        label = int(value)
    except (TypeError, ValueError, OverflowError):
        raise Unusable("label is not a number", f"{value!r:.40}") from None
    if isinstance(value, float | np.floating) and label != value:
        raise Unusable("label is not a whole number", f"{value!r:.40}")
    if label >= 2**63:
        raise Unusable("label is too large", f"{value!r:.40}")
    if label < 0:
        raise Unusable("missing label")
    if classes and label >= classes:
        raise Unusable(f"label is not one of the {classes} classes", str(label))
    return label


def ranges(path: str, count: int, size: int, split: str | None = None) -> list[Unit]:
    """Divide `count` items into units of at most `size`."""
    return [Unit(path, start, min(start + size, count), split) for start in range(0, count, size)]


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a local path or URL, and the path within it. Raises UserError for an unknown protocol."""
    try:
        return fsspec.url_to_fs(os.path.expanduser(path))
    except (ImportError, ValueError) as error:  # a protocol whose package is missing, or that does not exist
        raise UserError(f"cannot open {path}: {error}") from error


def find_files(pattern: str) -> dict[str, int]:
    """The files that match a path, a glob or a URL, sorted, with their sizes. Raises UserError if there are none."""
    fs, inner = filesystem(pattern)
    try:
        if is_local(fs) and os.path.isfile(inner):  # its name may hold what a glob would read as a wildcard
            found = {inner: fs.info(inner)}
        elif is_local(fs):
            found = fs.glob(inner, detail=True)
        elif has_magic(inner):
            found = _matches(fs, inner)
        else:
            found = {inner: retry_storage(pattern, lambda: fs.info(inner))}
    except FileNotFoundError:
        found = {}
    except ValueError as error:  # a pattern like a**b
        raise UserError(f"{pattern!r} matches no file: {error}") from error
    if inner in found and found[inner]["type"] == "directory":
        raise UserError(f"no file matches {pattern!r}, a directory; did you mean {pattern}/*?")
    files = {path: about["size"] for path, about in sorted(found.items()) if about["type"] != "directory"}
    if is_local(fs):
        files = {path: size for path, size in files.items() if not _left_out(path)}
    if not files:
        raise UserError(f"no file matches {pattern!r}")
    return {path if is_local(fs) else fs.unstrip_protocol(path): size for path, size in files.items()}


def _matches(fs: fsspec.AbstractFileSystem, pattern: str) -> dict[str, dict[str, Any]]:
    """The files in a bucket that match a pattern with wildcards, with what is known of each."""
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if has_magic(part))
    depth = None if "**" in pattern else len(parts) - fixed
    wanted = re.compile(glob_translate(pattern))
    return {path: about for path, about in _listed(fs, "/".join(parts[:fixed]), depth).items() if wanted.match(path)}


def files_below(fs: fsspec.AbstractFileSystem, root: str) -> dict[str, int]:
    """All files below a directory, with their sizes; on local disks, links to directories are followed."""
    if is_local(fs):
        return dict(_local_files(root, ()))
    return {path: about["size"] for path, about in _listed(fs, root).items()}


def is_hidden(relative_path: str) -> bool:
    """Whether a file, or a directory on the way to it, is hidden."""
    return any(part.startswith(".") for part in relative_path.split("/"))


def _listed(fs: fsspec.AbstractFileSystem, root: str, depth: int | None = None) -> dict[str, dict[str, Any]]:
    """The files below a directory in a bucket, at most `depth` levels below it, with what is known of each.

    (A directory whose listing fails is an empty one for fsspec's own `find` and `glob`.)
    """
    files, level = {}, [root]
    while level and depth != 0:
        below = []
        for directory in level:
            url = fs.unstrip_protocol(directory)
            for about in retry_storage(url, functools.partial(fs.ls, directory, detail=True)):
                path = about["name"].rstrip("/")
                if path == directory.rstrip("/"):  # the mark of an empty directory
                    continue
                if about["type"] == "directory":
                    below.append(path)
                else:
                    files[path] = about
        level, depth = below, None if depth is None else depth - 1
    return files


def _local_files(directory: str, above: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """(path, size) of each file; `above` holds the real paths of the directories above this one."""
    real = os.path.realpath(directory)
    if real in above:  # a link to a directory above it
        return
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _local_files(entry.path, (*above, real))
            elif entry.is_file():
                yield entry.path, entry.stat().st_size
            elif not _left_out(entry.path):
                yield entry.path, 0  # a broken link, rejected by name when it is read


def is_special(path: str) -> bool:
    """Whether a local path is a pipe, socket or device, of which a read would wait for a writer or never end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _left_out(path: str) -> bool:
    """`is_special`, of which a warning tells."""
    if special := is_special(path):
        logging.warning("%s: left out, as it is not a file", path)
    return special


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,))


def path_type(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
    """The type of what is at a path: "file", "directory" or another type of the file system; None if there is nothing.

    Raises UserError if a bucket cannot be asked, OSError if a local disk cannot. (fsspec's own `exists` and `isdir`
    return False on a failure.)
    """

    def look() -> str:
        return fs.info(path)["type"]

    try:
        return look() if is_local(fs) else retry_storage(path, look)
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextlib.contextmanager
def local_file(path: str, size: int | None) -> Iterator[str]:
    """The path of a local file: the file itself, or a temporary copy if it is in a bucket, of `size` bytes if known.

    Raises UserError if it cannot be copied, FileNotFoundError if the bucket does not hold it.
    """
    fs, inner = filesystem(path)
    if is_local(fs):
        yield inner
        return
    # A thread that was given up may still write a file there.
    with tempfile.TemporaryDirectory(prefix="lina_jax-", ignore_cleanup_errors=True) as directory:
        copy = Path(directory, os.path.basename(inner))
        with _naming(path):
            cache.fetch(fs, inner, copy, size, _STALLED_S)
        yield str(copy)


def retry_storage(path: str, call: Callable[[], T]) -> T:
    """Result of `call()`, retried if the storage fails. Raises UserError with the path; FileNotFoundError at once."""
    with _naming(path):
        return with_retries(storage_errors(lambda _: call()), _STALLED_S)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn an error of the storage into a UserError that names the path; FileNotFoundError stays as it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_bytes(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    """All bytes of a file, with retries in a bucket. Raises UserError for buckets, OSError for local files."""
    return fs.cat_file(path) if is_local(fs) else retry_storage(path, lambda: fs.cat_file(path))


class PatientFile(io.RawIOBase):
    """A file in a bucket: reads are retried, and end with a UserError, never with an error that looks like damage."""

    def __init__(self, path: str):
        fs, inner = filesystem(path)
        self._path, self._at, self._file = path, 0, None
        self._open = lambda: fs.open(inner, "rb")

        def opened() -> tuple[io.IOBase, int]:
            file = self._open()
            return file, file.seek(0, os.SEEK_END)

        self._file, self._size = retry_storage(path, opened)

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
            # Each retry opens the file again: a thread that was given up may wake up and go on reading.
            file = files.pop() if files else self._open()
            file.seek(at)
            return file, file.read(size)

        self._file, data = retry_storage(self._path, read)
        self._at += len(data)
        return data

    def close(self) -> None:
        if self._file:  # not if it could not be opened
            self._file.close()
        super().close()


def relative(paths: Sequence[str]) -> dict[str, str]:
    """Each path relative to the directory that all have in common: short, unique names for keys."""
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return {path: os.path.relpath(path, root) for path in paths}
