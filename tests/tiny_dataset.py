"""A dataset of a few pixel records, for tests of writing and reading."""

import io

import numpy as np
from PIL import Image

from lina_jax import records


def png(value: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(data, "PNG")
    return data.getvalue()


def captions(text: str) -> dict[str, str]:
    return {"caption": text, "short_caption": ""}


def write(directory, count=5, label_names=("cat", "dog")):
    with records.create(directory, "tiny", records.pixel_features(label_names)) as writer:
        for i in range(count):
            writer.write("train", image=png(i), label=i % 3 - 1, key=f"file:{i}", **captions(f"nº {i}"))
        writer.write("validation", image=png(99), label=-1, key="file:last", **captions(""))
    return directory
