"""Decode the fields of records into the rows of a batch.

A column makes a few arrays of the batch, and fills one row of them from the fields of a record.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps

from lina_jax.buffer_pool import BufferPool
from lina_jax.encoders import TextEncoder

Arrays = dict[str, np.ndarray]
Fields = Mapping[str, memoryview | int | None]


class Variant(NamedTuple):
    """Which form of a record is used."""

    short: bool = False  # the short caption, where there is one
    flip: bool = False  # mirrored, left to right


class Column(Protocol):
    def empty(self, count: int) -> Arrays:
        """Arrays for `count` examples."""

    def fill(self, arrays: Arrays, row: int, fields: Fields, variant: Variant) -> bool:
        """Write one row, and return whether a text was truncated. Raises ValueError, or what Pillow raises, if bad."""


@dataclasses.dataclass(frozen=True)
class Pixels:
    """image: uint8 (B, H, W, 3). Images of another size are bad records, or with `resize` scaled and center-cropped."""

    size: tuple[int, int]
    resize: bool = False
    _memory: BufferPool = dataclasses.field(default_factory=BufferPool, compare=False)

    def empty(self, count: int) -> Arrays:
        shape = count, *self.size, 3
        return {"image": self._memory.bytes(math.prod(shape)).reshape(shape)}

    def fill(self, arrays: Arrays, row: int, fields: Fields, variant: Variant) -> bool:
        image = Image.open(io.BytesIO(_field(fields, "image"))).convert("RGB")
        wanted = self.size[1], self.size[0]
        if image.size != wanted:
            if not self.resize:
                raise ValueError(f"the image is {image.size[::-1]}, expected {self.size}")
            image = ImageOps.fit(image, wanted, Image.Resampling.BICUBIC)
        pixels = np.asarray(image)
        arrays["image"][row] = pixels[:, ::-1] if variant.flip else pixels
        return False


@dataclasses.dataclass(frozen=True)
class Moments:
    """moments: float16 (B, 2C, H, W), mean and log variance of the autoencoder."""

    shape: tuple[int, int, int]

    def empty(self, count: int) -> Arrays:
        return {"moments": np.empty((count, *self.shape), np.float16)}

    def fill(self, arrays: Arrays, row: int, fields: Fields, variant: Variant) -> bool:
        _copy(arrays["moments"][row], _field(fields, "moments"))
        return False


@dataclasses.dataclass(frozen=True)
class Label:
    """label: int32 (B,), in [0, classes) if there are classes."""

    classes: int | None = None

    def empty(self, count: int) -> Arrays:
        return {"label": np.empty(count, np.int32)}

    def fill(self, arrays: Arrays, row: int, fields: Fields, variant: Variant) -> bool:
        label = fields["label"]
        if self.classes is not None and label < 0:
            raise ValueError("it has no label, which model.condition=class needs")
        if self.classes is not None and not label < self.classes:
            raise ValueError(f"the label is {label}, expected 0 to {self.classes - 1}")
        arrays["label"][row] = label
        return False


@dataclasses.dataclass(frozen=True)
class Caption:
    """text: UTF-8 bytes uint8 (B, L), padded with zeros; text_length: int32 (B,)."""

    length: int

    def empty(self, count: int) -> Arrays:
        return {"text": np.zeros((count, self.length), np.uint8), "text_length": np.empty(count, np.int32)}

    def fill(self, arrays: Arrays, row: int, fields: Fields, variant: Variant) -> bool:
        caption = _caption(fields, variant)
        text, length = encode_text([caption], self.length)
        arrays["text"][row], arrays["text_length"][row] = text[0], length[0]
        return len(caption.encode()) > self.length


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """text: int32 (B, L), token ids of the caption for a text encoder inside the step; text_length: int32 (B,)."""

    encoder: TextEncoder

    def empty(self, count: int) -> Arrays:
        return {"text": np.empty((count, self.encoder.length), np.int32), "text_length": np.empty(count, np.int32)}

    def fill(self, arrays: Arrays, row: int, fields: Fields, variant: Variant) -> bool:
        caption = _caption(fields, variant)
        tokens = self.encoder.tokenize([caption])
        arrays["text"][row], arrays["text_length"][row] = tokens.ids[0], tokens.lengths[0]
        return bool(tokens.cut[0])


@dataclasses.dataclass(frozen=True)
class Features:
    """text: float16 (B, L, D), the rows of the real tokens, then zeros; text_length: int32 (B,), how many are real.

    A later batch reuses the memory of both, and `text_length` says which of its rows to zero: do not change it.
    """

    length: int
    dim: int
    _memory: BufferPool = dataclasses.field(default_factory=BufferPool, compare=False)

    def empty(self, count: int) -> Arrays:
        text = count * self.length * self.dim * 2
        memory = self._memory.bytes(text + 4 * count)
        shape = count, self.length, self.dim
        return {"text": memory[:text].view(np.float16).reshape(shape), "text_length": memory[text:].view(np.int32)}

    def fill(self, arrays: Arrays, row: int, fields: Fields, variant: Variant) -> bool:
        features = _field(fields, "text")
        if variant.short:
            features = _field(fields, "short_text") or features
        rows, rest = divmod(len(features), 2 * self.dim)
        if rest or not rows:
            raise ValueError(f"{len(features)} bytes of text features, expected a positive multiple of {2 * self.dim}")
        text, kept = arrays["text"][row], min(rows, self.length)
        _copy(text[:kept], features[: kept * 2 * self.dim])
        # The previous contents of this row had `text_length` tokens; everything beyond is zero already.
        text[kept : arrays["text_length"][row]] = 0
        arrays["text_length"][row] = kept
        return rows > self.length


def empty(columns: Sequence[Column], count: int) -> Arrays:
    return {name: array for column in columns for name, array in column.empty(count).items()}


def fill(columns: Sequence[Column], arrays: Arrays, row: int, fields: Fields, variant: Variant) -> bool:
    """Write one row of every column, and return whether a text was truncated."""
    return any([column.fill(arrays, row, fields, variant) for column in columns])


def encode_text(captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Captions (B,) -> UTF-8 bytes uint8 (B, L), truncated or padded with zeros, and their lengths int32 (B,)."""
    text = np.zeros((len(captions), length), np.uint8)
    lengths = np.zeros(len(captions), np.int32)
    for i, caption in enumerate(captions):
        encoded = caption.encode()[:length]
        text[i, : len(encoded)] = np.frombuffer(encoded, np.uint8)
        lengths[i] = len(encoded)
    return text, lengths


def _caption(fields: Fields, variant: Variant) -> str:
    caption = str(_field(fields, "caption"), "utf-8")
    if variant.short:
        short = str(_field(fields, "short_caption"), "utf-8")
        caption = short if short.strip() else caption
    if not caption.strip():
        raise ValueError("the caption is empty")
    return caption


def _field(fields: Fields, name: str) -> memoryview:
    if name not in fields:
        raise ValueError(f"it has no {name}")
    value = fields[name]
    return memoryview(b"") if value is None else value


def _copy(target: np.ndarray, source: memoryview) -> None:
    """Copy as bytes: values within a record are not aligned, and NumPy would copy them one by one."""
    if len(source) != target.nbytes:
        raise ValueError(f"{len(source)} bytes, expected {target.nbytes} for an array of shape {target.shape}")
    target.reshape(-1).view(np.uint8)[:] = np.frombuffer(source, np.uint8)
