"""Raw collections of captioned images, behind one small reader interface.

A source has `name`, `label_names` and `len()`, and iterating it yields exactly `len()` items in a fixed order: an
`Example`, or a `Reject` in place of one that cannot be used.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lina_jax.errors import UserError

_BATCH = 256  # rows held in memory at once


class Example(NamedTuple):
    """One image, encoded (bytes) or not (uint8 (H,W,3)); no caption is "", no label is -1."""

    key: str
    image: bytes | np.ndarray
    caption: str
    label: int


class Reject(NamedTuple):
    """An item that cannot be used, and why."""

    key: str
    reason: str


class Source(Protocol):
    name: str
    label_names: Sequence[str]

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Example | Reject]: ...


class ShapesSource:
    """Rendered scenes 0 to count-1 of `lina_jax.shapes`, a pure function of (split, seed)."""

    label_names = ()

    def __init__(self, split: str, count: int, resolution: int, seed: int):
        self.name = f"shapes/{split}"
        self._split, self._count, self._resolution, self._seed = split, count, resolution, seed

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Example]:
        from lina_jax import shapes

        for i in range(self._count):
            scene = shapes.scene(self._split, i, self._seed)
            yield Example(f"{self._split}/{i}", shapes.render(scene, self._resolution), scene.caption, -1)


class ParquetSource:
    """Parquet files as Hugging Face writes them: images as struct{bytes, path} or bytes, labels as integers.

    An empty `caption_column` or `label_column` means that the collection has none. A `labels.txt` beside the files
    names the classes, one per line. Rows are keyed `FILE:ROW` and read in the order of the sorted file names.
    Raises UserError if nothing matches, a file is unreadable, or a column is missing or of the wrong type.
    """

    def __init__(
        self, pattern: str, image_column: str = "image", caption_column: str = "text", label_column: str = "label"
    ):
        self.name = pattern
        self._image, self._caption, self._label = image_column, caption_column, label_column
        self._columns = [column for column in (image_column, caption_column, label_column) if column]
        self._paths = sorted(glob.glob(os.path.expanduser(pattern)))
        if not self._paths:
            raise UserError(f"no file matches {pattern!r}")
        self._root = os.path.commonpath([os.path.dirname(path) for path in self._paths])
        self._rows = sum(self._checked(path) for path in self._paths)
        names = Path(self._root, "labels.txt")
        self.label_names = tuple(names.read_text().splitlines()) if label_column and names.is_file() else ()

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[Example | Reject]:
        for path in self._paths:
            name = os.path.relpath(path, self._root)
            with pq.ParquetFile(path) as file:
                first = 0
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    yield from self._read_group(file, group, [f"{name}:{i}" for i in range(first, first + rows)])
                    first += rows

    def _checked(self, path: str) -> int:
        """Number of rows of a file with the right columns."""
        try:
            with pq.ParquetFile(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        for flag, column, fits, wanted in (
            ("image_column", self._image, _is_image, "an image (bytes, or a struct with bytes)"),
            ("caption_column", self._caption, _is_text, "text"),
            ("label_column", self._label, pa.types.is_integer, "an integer"),
        ):
            if flag != "image_column" and not column:
                continue
            if column not in schema.names:
                raise UserError(
                    f"--{flag}={column!r}: {path} has no such column; its columns: {', '.join(schema.names)}"
                )
            if not fits(schema.field(column).type):
                raise UserError(f"--{flag}={column!r}: {path} holds {schema.field(column).type} there, not {wanted}")
        return rows

    def _read_group(self, file: pq.ParquetFile, group: int, keys: list[str]) -> Iterator[Example | Reject]:
        done = 0
        try:
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=self._columns):
                for row in range(batch.num_rows):
                    yield self._item(keys[done], batch, row)
                    done += 1
        except (pa.ArrowException, OSError) as error:
            reason = f"unreadable row group: {error}"
            yield from (Reject(key, reason) for key in keys[done:])

    def _item(self, key: str, batch: pa.RecordBatch, row: int) -> Example | Reject:
        image = batch[self._image][row].as_py()
        if isinstance(image, dict):
            image = image["bytes"]
        if not image:
            return Reject(key, "missing image")
        caption, label = "", -1
        if self._caption:
            try:
                caption = (batch[self._caption][row].as_py() or "").strip()
            except UnicodeDecodeError:
                return Reject(key, "caption is not UTF-8")
            if not caption:
                return Reject(key, "empty caption")
        if self._label:
            label = batch[self._label][row].as_py()
            if label is None or label < 0:
                return Reject(key, "missing label")
            if self.label_names and label >= len(self.label_names):
                return Reject(key, f"label {label} is not one of the {len(self.label_names)} in labels.txt")
        return Example(key, image, caption, label)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
