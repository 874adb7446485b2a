"""Parquet files as Hugging Face writes them: images as struct{bytes, path} or bytes, labels as integers."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from lina_jax.errors import UserError
from lina_jax.sources import base
from lina_jax.sources.base import Example, Fields, Reject, Unit

_BATCH = 256  # rows held in memory at once
_BUFFER = 2**20  # bytes; without a buffer, the first batch would read a row group's whole column
_FOOTERS = 16  # read at once: in a bucket, each takes a round trip


class ParquetSource:
    """Rows of the files that match `pattern`, keyed `FILE:ROW`, in the order of the sorted file names.

    A `labels.txt` beside the files names the classes, one per line. A file that cannot be read is one reject. Raises
    UserError if nothing matches, no file is readable, or a column is missing or of the wrong type.
    """

    def __init__(self, pattern: str, fields: Fields, unit_items: int):
        self.name = pattern
        self._fields = fields
        files = base.find_files(pattern)
        paths = list(files)
        self._short = base.relative(paths)
        self.contents = list(files.items())
        self.label_names = _label_names(paths) if fields.label else ()
        self._broken: dict[str, str] = {}
        with ThreadPoolExecutor(_FOOTERS) as pool:
            rows = dict(zip(paths, pool.map(self._rows, paths), strict=True))
        if len(self._broken) == len(paths):
            raise UserError(f"cannot read {paths[0]}: {self._broken[paths[0]]}")
        self.units = [unit for path in paths for unit in base.ranges(path, rows[path], unit_items)]

    @contextlib.contextmanager
    def open(self, unit: Unit) -> Iterator[tuple[int, Iterator[Example | Reject]]]:
        if unit.path in self._broken:
            yield 1, iter([Reject(self._short[unit.path], f"unreadable file: {self._broken[unit.path]}")])
        else:
            yield unit.count, self._read(unit)

    def _read(self, unit: Unit) -> Iterator[Example | Reject]:
        with _opened(unit.path) as file:
            first = 0
            for group in range(file.num_row_groups):
                rows = range(first, first + file.metadata.row_group(group).num_rows)
                first = rows.stop
                wanted = range(max(rows.start, unit.start), min(rows.stop, unit.stop))
                if wanted:
                    yield from self._read_group(file, group, rows.start, wanted, unit.path)
            for row in range(max(first, unit.start), unit.stop):
                yield Reject(f"{self._short[unit.path]}:{row}", "in no row group")

    def _read_group(self, file, group: int, first: int, wanted: range, path: str) -> Iterator[Example | Reject]:
        keys = {row: f"{self._short[path]}:{row}" for row in wanted}
        row, left, problem = first, list(wanted), "it ends early"
        try:
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[c for c in self._fields if c]):
                if not left:
                    return
                for i in range(batch.num_rows):
                    if row in keys:
                        left.pop(0)
                        yield self._item(keys[row], batch, i)
                    row += 1
        except MemoryError:  # Arrow's own is an ArrowException, too
            raise
        except (pa.ArrowException, OSError) as error:
            base.raise_if_storage(error)
            problem = str(error)
        yield from (Reject(keys[row], f"unreadable row group: {problem}") for row in left)

    def _item(self, key: str, batch: pa.RecordBatch, row: int) -> Example | Reject:
        def value(column: str):
            try:
                return batch[column][row].as_py() if column else None
            except UnicodeDecodeError:
                return b"\xff"  # not UTF-8: the check of captions rejects it

        image = value(self._fields.image)
        image = image["bytes"] if isinstance(image, dict) else image
        captions = value(self._fields.caption), value(self._fields.short_caption)
        return base.checked(key, self._fields, image, *captions, value(self._fields.label), len(self.label_names))

    def _rows(self, path: str) -> int:
        """Number of rows of a file; 1 if it cannot be read. Raises UserError if a column is missing or unsuitable."""
        try:
            with _opened(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        except MemoryError:
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a damaged name of a column
            base.raise_if_storage(error)
            self._broken[path] = str(error)
            return 1
        for name, column in self._fields._asdict().items():
            fits, wanted = _KINDS[name]
            if column and column not in schema.names:
                known = ", ".join(schema.names)
                raise UserError(f"--{name}_column={column!r}: {path} has no such column; its columns: {known}")
            if column and schema.names.count(column) > 1:
                raise UserError(f"--{name}_column={column!r}: {path} has several columns of that name")
            if column and not fits(schema.field(column).type):
                kind = schema.field(column).type
                raise UserError(f"--{name}_column={column!r}: {path} holds {kind} there, not {wanted}")
        return rows


@contextlib.contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    fs, inner = base.filesystem(path)
    # Arrow reads local files faster if it opens them itself.
    source = inner if base.is_local(fs) else base.PatientFile(path)
    with pq.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False) as file:
        yield file


def _label_names(paths: Sequence[str]) -> tuple[str, ...]:
    """Class names beside the files, as in `_names_in`. Raises UserError, too, if directories name them differently."""
    first, *others = dict.fromkeys(map(os.path.dirname, paths))
    names = _names_in(first)
    for directory in others:
        if _names_in(directory) != names:
            raise UserError(f"{first} and {directory} must have the same labels.txt, or none")
    return names


def _names_in(directory: str) -> tuple[str, ...]:
    """Class names in labels.txt, one per line; () if there is no such file. Raises UserError if they cannot be used."""
    path = f"{directory}/labels.txt"
    fs, inner = base.filesystem(path)
    if not base.path_type(fs, inner):
        return ()
    try:
        names = [line.strip() for line in base.read_bytes(fs, inner).decode("utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None
    first = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise UserError(f"{path}: line {number} is blank; each line names a class, from class 0 on")
        if first.setdefault(name, number) != number:
            raise UserError(f"{path}: {name!r} is in lines {first[name]} and {number}; names must differ")
    return tuple(names)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


_KINDS = {
    "image": (_is_image, "an image (bytes, or a struct with bytes)"),
    "caption": (_is_text, "text"),
    "short_caption": (_is_text, "text"),
    "label": (pa.types.is_integer, "an integer"),
}
