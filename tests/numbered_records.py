"""Datasets whose records follow from their index, and helpers that read them."""

import io
from itertools import islice

import numpy as np
from PIL import Image

from lina_jax import data, decode, reading, records

COUNT, SIZE, LENGTH = 20, (4, 6), 8


def png(value, size=SIZE):
    out = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def dataset(directory, **changed):
    """Write COUNT records that follow from their index; `changed` replaces fields: i3={"caption": "other"}."""
    with records.create(directory, "tiny", records.pixel_features()) as writer:
        for i in range(COUNT):
            record = {"image": png(i), "caption": f"nº {i}", "short_caption": "", "label": i, "key": str(i)}
            writer.write("train", **record | changed.get(f"i{i}", {}))
    return directory


COLUMNS = [decode.Label(), decode.Pixels(SIZE), decode.Caption(LENGTH)]


def open_records(*directories, num_classes=None, threads=2, **kwargs):
    columns = [decode.Label(num_classes), decode.Pixels(SIZE), decode.Caption(LENGTH)]
    splits = [reading.open_split(directory, "train") for directory in directories]
    return data.Records(splits, columns, threads=threads, **kwargs)


def one(source, index, **variant):
    """A single record."""
    arrays, report = source.read([data.RowRef(0, index, decode.Variant(**variant))])
    source.record(report)
    return {name: array[0] for name, array in arrays.items()}


def block(process, processes):
    """The rows of a batch of 8 that one of `processes` processes reads."""
    size = 8 // processes
    return range(process * size, (process + 1) * size)


def batches(source, steps, **kwargs):
    settings = {"global_batch": 8, "seed": 1, "start_step": 0, "prefetch": 4}
    return list(islice(data.training_batches(source, **settings | kwargs), steps))


def labels(source, steps, **kwargs):
    return [batch["label"].tolist() for batch in batches(source, steps, **kwargs)]
