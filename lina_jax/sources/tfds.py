"""Datasets that TFDS has prepared as ArrayRecord."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from lina_jax import reading
from lina_jax.errors import UserError
from lina_jax.sources import base
from lina_jax.sources.base import Example, Fields, Reject, Unit


class TfdsSource:
    """The records of one split, `DIRECTORY` or `DIRECTORY:SPLIT` (default: train), keyed `SPLIT:NUMBER`.

    Raises UserError if the directory is not a TFDS dataset stored as ArrayRecord, or the split or a feature is missing.
    """

    def __init__(self, place: str, fields: Fields, unit_items: int):
        self.name = place
        directory, split = place, ""
        before, _, after = place.rpartition(":")
        if before and "/" not in after and base.path_type(*base.filesystem(place)) != "directory":
            directory, split = before, after
        self._split = split or "train"
        self._fields = fields
        try:
            builder = tfds.builder_from_directory(directory)
        except Exception as error:  # TFDS raises errors of many types for what is not a dataset
            raise UserError(f"--input={place}: not a TFDS dataset directory: {error}") from error
        features = builder.info.features
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise UserError(
                f"--input={place} is stored as {builder.info.file_format.value}; only array_record can be read "
                f"without TensorFlow: prepare it with `tfds build {builder.info.name} --file_format=array_record`"
            )
        if self._split not in builder.info.splits:
            raise UserError(f"--input={place}: no split {self._split!r}; its splits: {', '.join(builder.info.splits)}")
        for name, feature in fields._asdict().items():
            if feature and feature not in features:
                raise UserError(f"--{name}_column={feature!r}: records have {', '.join(features)}")
        label = features[fields.label] if fields.label else None
        self.label_names = tuple(label.names or ()) if isinstance(label, tfds.features.ClassLabel) else ()
        self._builder, self._decoders = builder, {fields.image: tfds.decode.SkipDecoding()}
        files = builder.info.splits[self._split].filepaths
        self.contents = [(file.name, file.stat().length) for file in files]
        self.units = base.ranges(place, builder.info.splits[self._split].num_examples, unit_items)

    @contextlib.contextmanager
    def open(self, unit: Unit) -> Iterator[tuple[int, Iterator[Example | Reject]]]:
        # One data source per unit, as it keeps open all shards that it has read from.
        records = self._builder.as_data_source(self._split, decoders=self._decoders)
        yield unit.count, (self._item(records, i) for i in range(unit.start, unit.stop))

    def _item(self, records: Sequence[dict[str, Any]], i: int) -> Example | Reject:
        key = f"{self._split}:{i}"
        try:
            record = records[i]
        except Exception as error:  # the readers of shards and of protos each raise error types of their own
            if number := reading.errno_of(error):  # too many open files, for example
                raise OSError(number, str(error)) from error
            return Reject(key, f"unreadable record: {type(error).__name__}")
        values = (record[feature] if feature else None for feature in self._fields)
        return base.checked(key, self._fields, *values, len(self.label_names))
