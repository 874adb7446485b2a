"""Image folders: one sub-folder per class, or images described by a metadata.jsonl or metadata.csv."""

import collections
import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from absl import logging

from lina_jax.errors import UserError
from lina_jax.sources import base
from lina_jax.sources.base import Example, Fields, Reject, Unit

_READS = 16  # files read at once: in a bucket, each takes a round trip


class _Row(NamedTuple):
    path: str
    columns: dict[str, Any]
    problem: str = ""


class FolderSource:
    """The images of a directory, keyed by their path in it.

    If there is a `metadata.jsonl` or `metadata.csv` (Hugging Face's convention: `file_name`, and the columns that
    `fields` names), its rows are the items. Otherwise, the first directory of an image's path is its class, numbered in
    the order of the sorted names, there are no captions, and hidden files are left out. Raises UserError if the
    directory is missing or empty, if it has two files of metadata or one that names no file, or if `fields` does not
    fit: columns without metadata, metadata with neither captions nor labels named, or a column that is in no row.
    """

    def __init__(self, directory: str, fields: Fields, unit_items: int):
        self.name = directory
        self._fs, self._root = base.filesystem(directory)
        if base.path_type(self._fs, self._root) != "directory":
            raise UserError(f"--input={directory}: no such directory")
        described = _metadata(self._fs, self._root)
        self.label_names: tuple[str, ...] = ()
        if described is None:
            self._rows, self.contents = self._classes(directory, fields)
            self._fields = Fields(image="file_name", label="label")
        else:
            self._rows, digest = described
            self.contents, self._fields = [digest], fields._replace(image="file_name")
            known = {column for row in self._rows for column in row.columns}
            if not (fields.caption or fields.label):
                raise UserError(f"give --caption_column or --label_column: the metadata has {', '.join(sorted(known))}")
            for name, column in fields._asdict().items():
                if column and name != "image" and column not in known:
                    raise UserError(f"--{name}_column={column!r}: not in metadata; it has {', '.join(sorted(known))}")
        self._described = described is not None
        self.units = base.ranges(directory, len(self._rows), unit_items)

    @contextlib.contextmanager
    def open(self, unit: Unit) -> Iterator[tuple[int, Iterator[Example | Reject]]]:
        if self._described and not unit.start:  # by a single process, as it lists the whole folder
            self._warn_of_images_without_row()
        rows = self._rows[unit.start : unit.stop]
        with ThreadPoolExecutor(_READS) as pool:
            chunks = (rows[i : i + 4 * _READS] for i in range(0, len(rows), 4 * _READS))
            yield unit.count, (item for chunk in chunks for item in pool.map(self._item, chunk))

    def _sizes(self) -> dict[str, int]:
        """Sizes of the files that are not hidden, sorted by their paths in the directory."""
        found = base.files_below(self._fs, self._root)
        sizes = {path[len(self._root) :].lstrip("/"): found[path] for path in sorted(found)}
        return {path: size for path, size in sizes.items() if not base.is_hidden(path)}

    def _warn_of_images_without_row(self) -> None:
        described = {_plain(row.path) for row in self._rows}
        others = (path for path in self._sizes() if path not in described)
        images = [path for path in others if path.lower().rpartition(".")[2] in base.IMAGES]
        if images:
            logging.warning("%s: %d images have no metadata row, such as %s", self.name, len(images), images[0])

    def _classes(self, directory: str, fields: Fields) -> tuple[list[_Row], list[tuple[str, int]]]:
        """A row for each file that is not hidden, and the sizes of the files."""
        for name, column in fields._asdict().items():
            if column:
                raise UserError(f"--{name}_column={column!r}: {directory} has no metadata.jsonl or metadata.csv")
        sizes = self._sizes()
        self.label_names = tuple(sorted({path.split("/")[0] for path in sizes if "/" in path}))
        if not self.label_names:
            raise UserError(f"--input={directory}: neither class sub-folders nor metadata.jsonl or metadata.csv in it")
        for name in self.label_names:
            # TFDS keeps the names as lines of UTF-8, and reads them without the spaces around them.
            if name.encode(errors="replace").decode().strip() != name or {"\n", "\r"} & set(name):
                raise UserError(f"--input={directory}: {name!r} cannot be the name of a class; rename the folder")
        number = {name: i for i, name in enumerate(self.label_names)}
        problems = {True: "", False: "not in a class folder"}
        rows = [_Row(path, {"label": number.get(path.split("/")[0])}, problems["/" in path]) for path in sizes]
        return rows, list(sizes.items())

    def _item(self, row: _Row) -> Example | Reject:
        if row.problem:
            return Reject(row.path, row.problem)
        if row.path.startswith("/") or ".." in row.path.split("/"):
            return Reject(row.path, "outside the folder")
        path = f"{self._root}/{row.path}"
        if base.is_local(self._fs) and base.is_special(path):
            return Reject(row.path, "not a file")
        try:
            image = base.read_bytes(self._fs, path)
        except (FileNotFoundError, ValueError):  # ValueError: a name that no file can have
            return Reject(row.path, "missing file")
        except OSError as error:
            base.raise_if_storage(error)
            return Reject(row.path, f"unreadable file: {error.strerror or error}")
        values = (row.columns.get(column) for column in self._fields[1:])
        return base.checked(row.path, self._fields, image, *values, len(self.label_names))


def _metadata(fs, root: str) -> tuple[list[_Row], str] | None:
    """The rows of the metadata file, and its digest; None if there is no such file.

    Raises UserError if there are two such files, or if no row names a file.
    """
    there = [name for name in _METADATA if base.path_type(fs, f"{root}/{name}")]
    if len(there) > 1:
        raise UserError(f"{root} has {' and '.join(there)}: remove the one whose rows are not the items")
    if not there:
        return None
    (name,) = there
    rows, seen, content = [], set(), base.read_bytes(fs, f"{root}/{name}")
    for line, columns in _METADATA[name](content):
        path = columns.get("file_name") if isinstance(columns, dict) else None
        if not isinstance(path, str) or not path:
            problem = columns if isinstance(columns, str) else "metadata row without file_name"
            rows.append(_Row(f"{name}:{line}", {}, problem))
            continue
        problem = "duplicate key" if _plain(path) in seen else ""
        if None in columns:  # a line of CSV with a comma too many
            columns, problem = {}, "more fields than columns"
        rows.append(_Row(path, columns, problem))
        seen.add(_plain(path))
    if not seen:
        known = {column for _, row in _METADATA[name](content) if isinstance(row, dict) for column in row if column}
        raise UserError(f"{root}/{name}: no row has a file_name; its columns: {', '.join(sorted(known))}")
    return rows, hashlib.sha256(content).hexdigest()


def _plain(path: str) -> str:
    """A path without `.` and double slashes; `..` stays, as the directory before it may be a link."""
    return str(PurePosixPath(path))


def _jsonl(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number of a line that is not blank, what it holds, or None if it is not JSON)."""
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _csv(content: bytes) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (number of a row's first line, its columns or what is wrong with it)."""
    # Bytes that are not UTF-8 become lone surrogates, which the check of captions rejects; Excel writes a BOM.
    lines = list(io.StringIO(content.decode("utf-8-sig", errors="surrogateescape")))
    rows = csv.DictReader(lines)
    try:
        names = rows.fieldnames or ()  # reads the first line
    except csv.Error as error:
        raise UserError(f"metadata.csv: unreadable header: {error}") from error
    if repeated := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise UserError(f"metadata.csv: several columns named {', '.join(map(repr, repeated))}")
    while True:
        first = rows.line_num
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            row = f"unreadable metadata row: {error}"
        if rows.line_num == len(lines) and _ends_within_quotes(lines[first:]):
            row = f"unclosed quote in metadata, which takes in the last {len(lines) - first} lines"
        yield first + 1, row


def _ends_within_quotes(lines: list[str]) -> bool:
    try:
        collections.deque(csv.reader(lines, strict=True), maxlen=0)
    except csv.Error as error:
        return "end of data" in str(error)
    return False


_METADATA = {"metadata.jsonl": _jsonl, "metadata.csv": _csv}
