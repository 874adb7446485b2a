"""Training's view of the records: which ones make up the batch of a step is a function of (seed, step) alone.

Nothing about the position is saved, and any number of processes sees the same global batches.
"""

import io
import threading
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import logging
from PIL import Image

from lina_jax import records
from lina_jax.config import Config
from lina_jax.errors import UserError
from lina_jax.records import Split

_MAX_TRIES = 100  # that many bad records in a row are a broken dataset, not bad luck


def open_records(config: Config, split: str) -> "Records":
    """The records of a split as this config's model needs them. Raises UserError when they are not there."""
    if not config.data.path:
        raise UserError("data.path is empty: name a directory made by `python -m lina_jax.prepare`")
    text = config.model.condition == "text"
    return Records(
        records.open_split(config.data.path, split),
        image_size=config.model.latent_size,
        text_length=config.model.text_length,
        text_required=text,
        num_classes=None if text else config.model.num_classes,
    )


class Records:
    """Decoded records of a split, at random; one that cannot be used is replaced by the next good one.

    A record is dict(image uint8 (H, W, 3), label int32 (), text uint8 (L,), text_length int32 ()). The replacement of
    record i is the first good one of i+1, i+2, ... (modulo the length): the same in every process and every run.
    """

    def __init__(
        self,
        source: Split,
        *,
        image_size: tuple[int, int],
        text_length: int,
        text_required: bool = False,
        num_classes: int | None = None,
    ):
        """`image_size` is (H, W). Blank captions are bad if `text_required`, labels out of `num_classes` if given."""
        self._source = source
        self._image_size = tuple(image_size)
        self._text_length = text_length
        self._text_required = text_required
        self._num_classes = num_classes
        self._lock = threading.Lock()
        self._bad: set[int] = set()
        self._truncated = 0

    @property
    def skipped(self) -> int:
        """Bad records met so far, each counted once."""
        return len(self._bad)

    @property
    def truncated(self) -> int:
        """Captions cut to the text length so far, counted each time."""
        return self._truncated

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Raises UserError, naming shard and record, if no record from `index` on can be used."""
        tries = min(len(self), _MAX_TRIES)
        for offset in range(tries):
            candidate = (index + offset) % len(self)
            try:
                return self._decode(self._source[candidate])
            except Exception as error:  # the readers of shards, protos and images each raise their own kinds
                reason = f"{self._source.location(candidate)}: {error}"
                self._note_bad(candidate, reason)
        raise UserError(f"{tries} bad records in a row, the last one {reason}")

    def _decode(self, record: dict) -> dict[str, np.ndarray]:
        image = np.asarray(Image.open(io.BytesIO(record["image"])).convert("RGB"))
        if image.shape[:2] != self._image_size:
            raise ValueError(f"the image is {image.shape[:2]}, expected {self._image_size}")
        caption = record["caption"].decode()
        if self._text_required and not caption.strip():
            raise ValueError("the caption is empty")
        label = record["label"]
        if self._num_classes is not None and not 0 <= label < self._num_classes:
            raise ValueError(f"the label is {label}, expected 0 to {self._num_classes - 1}")
        if len(record["caption"]) > self._text_length:
            with self._lock:
                self._truncated += 1
        text, length = encode_text([caption], self._text_length)
        return {"image": image, "label": np.int32(label), "text": text[0], "text_length": length[0]}

    def _note_bad(self, index: int, reason: str) -> None:
        with self._lock:
            new = index not in self._bad
            self._bad.add(index)
        if new:
            logging.warning("skipping a bad record: %s", reason)


def encode_text(captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Captions (B,) -> UTF-8 bytes uint8 (B, L), cut or padded with zeros, and their number int32 (B,)."""
    text = np.zeros((len(captions), length), np.uint8)
    lengths = np.zeros(len(captions), np.int32)
    for i, caption in enumerate(captions):
        encoded = caption.encode()[:length]
        text[i, : len(encoded)] = np.frombuffer(encoded, np.uint8)
        lengths[i] = len(encoded)
    return text, lengths


def training_batches(
    records: Records,
    *,
    global_batch: int,
    seed: int,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int,
    prefetch: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of steps start_step, start_step + 1, ...: this process's contiguous block of each global batch.

    `threads` decode and `prefetch` batches are kept ready. Every epoch has an order of its own, and may end within a
    batch. Raises UserError if the global batch does not divide by the processes.
    """
    if global_batch % process_count:
        raise UserError(f"global batch {global_batch} is not divisible by {process_count} processes")
    local_batch = global_batch // process_count
    order = grain.MapDataset.source(records).shuffle(seed).repeat(None)
    # Of the global batch of step s, process p has block s * process_count + p. An endless order has no remainder to
    # drop, but when a block is one record grain 0.2.18 overflows unless told to.
    blocks = order.batch(local_batch, drop_remainder=True)[start_step * process_count + process_index :: process_count]
    return iter(blocks.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))


def fixed_examples(records: Records, count: int) -> dict[str, np.ndarray]:
    """The first `count` records, stacked. Raises UserError if there are fewer."""
    if count > len(records):
        raise UserError(f"{count} examples asked, but the split has only {len(records)}")
    examples = [records[i] for i in range(count)]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
