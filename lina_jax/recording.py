"""Turn items into records: decoded in threads and encoded on this process's accelerators, while others are written."""

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from einops import rearrange
from PIL import Image

from lina_jax import encoders, images, records
from lina_jax.errors import UserError
from lina_jax.models import vae
from lina_jax.sources.base import Example, Reject

TEXT_LENGTH = 256  # tokens kept per caption, as published
_TEXT_ROWS = 80  # typical number for both captions together; used to size the shards of latents
_BUCKET = 64  # text is padded to a multiple of this many tokens: few programs, little padding

T = TypeVar("T")
Record = dict[str, Any]


class Recorder(Protocol):
    batch_size: int
    ahead: int  # further batches to start before waiting for a batch
    record_bytes: int  # approximate; used to divide the collection into units of one shard
    truncated: int  # captions truncated to the text encoder's length

    def features(self, label_names: Sequence[str]) -> tfds.features.FeaturesDict: ...

    def image(self, image: Image.Image) -> bytes | np.ndarray:
        """The form in which a decoded image is kept; called in a thread."""

    def start(self, examples: Sequence[Example]) -> Any:
        """Start the devices' work on at most `batch_size` examples, and return at once."""

    def finish(self, examples: Sequence[Example], started: Any) -> list[Record | Reject]: ...


class PixelRecorder:
    """Records of pixels: PNG if `quality` is 0, else JPEG."""

    batch_size = 256
    ahead = 1
    truncated = 0

    def __init__(self, resolution: int, quality: int):
        self._quality = quality
        self.record_bytes = resolution**2 * 3 // (6 if quality else 2)

    def features(self, label_names: Sequence[str]) -> tfds.features.FeaturesDict:
        return records.pixel_features(label_names, "jpeg" if self._quality else "png")

    def image(self, image: Image.Image) -> bytes:
        return images.encode(image, self._quality)

    def start(self, examples: Sequence[Example]) -> None:
        del examples

    def finish(self, examples: Sequence[Example], started: None) -> list[Record]:
        del started
        return [example._asdict() for example in examples]


class LatentRecorder:
    """Records of latents: moments of a KL autoencoder, features of a text encoder, both float16."""

    def __init__(self, autoencoder: str, text_encoder: str, resolution: int, batch_size: int, dtype: str):
        """`text_encoder` "": there is none. Raises UserError if an encoder cannot be loaded or does not fit."""
        self.batch_size = batch_size
        self.truncated = 0
        self._autoencoder, vae_params = encoders.load_autoencoder(autoencoder, dtype=dtype)
        stride = self._autoencoder.stride
        if resolution % stride:
            raise UserError(f"--resolution={resolution}: not a multiple of the autoencoder's stride {stride}")
        self._moments = (2 * self._autoencoder.latent_channels, resolution // stride, resolution // stride)
        self._encode_images = jax.jit(lambda params, pixels: self._autoencoder.encode(params, vae.from_uint8(pixels)))
        self._text, phi_params = None, {}
        if text_encoder:
            self._text, phi_params = encoders.load_text_encoder(text_encoder, length=TEXT_LENGTH, dtype=dtype)
            self._encode_text = jax.jit(self._text.features)
        self._text_dim = self._text.dim if self._text else 0
        self.record_bytes = 2 * (int(np.prod(self._moments)) + _TEXT_ROWS * self._text_dim)
        # The devices take turns with whole batches, so that records do not depend on the number of devices.
        devices = jax.local_devices()
        self.ahead = len(devices)
        self._replicas = itertools.cycle([(d, *jax.device_put((vae_params, phi_params), d)) for d in devices])

    def features(self, label_names: Sequence[str]) -> tfds.features.FeaturesDict:
        return records.latent_features(self._moments, self._text_dim, label_names)

    def image(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image)

    def start(self, examples: Sequence[Example]) -> dict[str, tuple[jax.Array, np.ndarray | None]]:
        """Moments (B, h, w, 2C) and features (B, L, D) with the numbers of real tokens (B,)."""
        device, vae_params, phi_params = next(self._replicas)

        def text(captions: Sequence[str]) -> tuple[jax.Array, np.ndarray]:
            tokens = self._text.tokenize(captions)
            self.truncated += int(tokens.cut.sum())
            # The encoder is causal: real tokens do not attend to the padding after them.
            rows = min(TEXT_LENGTH, _BUCKET * max(1, -(-int(tokens.lengths.max()) // _BUCKET)))
            return self._encode_text(phi_params, self._placed(tokens.ids[:, :rows], device)), tokens.lengths

        pixels = self._placed(np.stack([example.image for example in examples]), device)
        started = {"moments": (self._encode_images(vae_params, pixels), None)}
        if self._text:
            started["text"] = text([example.caption for example in examples])
            started["short_text"] = text([example.short_caption for example in examples])
        return started

    def finish(self, examples: Sequence[Example], started) -> list[Record | Reject]:
        arrays = {name: (np.asarray(array, np.float32), lengths) for name, (array, lengths) in started.items()}
        moments, _ = arrays.pop("moments")
        items: list[Record | Reject] = []
        for i, example in enumerate(examples):
            halves = {"moments": _half(rearrange(moments[i], "h w c -> c h w"))}
            halves |= {name: _half(features[i, : lengths[i]]) for name, (features, lengths) in arrays.items()}
            fields = example._asdict()
            del fields["image"]
            finite = all(np.all(np.isfinite(array)) for array in halves.values())
            items.append(fields | halves if finite else Reject(example.key, "not finite as float16 when encoded"))
        return items

    def pixels(self, moments: np.ndarray) -> np.ndarray:
        """uint8 images (N, H, W, 3) decoded from the means of stored moments (N, 2C, h, w)."""
        _, params, _ = next(self._replicas)
        decode = jax.jit(lambda params, latents: vae.to_uint8(self._autoencoder.decode(params, latents)))
        mean, _ = jnp.split(rearrange(jnp.asarray(moments, jnp.float32), "n c h w -> n h w c"), 2, axis=-1)
        scaled = vae.scale(self._autoencoder.config, mean)
        return np.concatenate([decode(params, latents[None]) for latents in scaled])

    def _placed(self, array: np.ndarray, device: jax.Device) -> jax.Array:
        """The array on a device; a short batch is padded with copies of its last row."""
        full = np.concatenate([array, np.repeat(array[-1:], self.batch_size - len(array), axis=0)])
        return jax.device_put(full, device)


def make_records(
    items: Iterable[Example | Reject], recorder: Recorder, resolution: int, min_size: int, max_caption_bytes: int
) -> Iterator[Record | Reject]:
    """Yield a record or a reject for each item, in order; a few batches are in progress at a time."""

    def prepared(item: Example | Reject) -> Example | Reject:
        # File and member names may be any bytes; records and rejects hold text.
        item = item._replace(key=item.key.encode(errors="backslashreplace").decode())
        if isinstance(item, Reject):
            return item
        if max(len(item.caption.encode()), len(item.short_caption.encode())) > max_caption_bytes:
            return Reject(item.key, f"caption longer than {max_caption_bytes} bytes")
        try:
            image = images.resize_and_crop(images.decode(item.image, min_size), resolution)
        except images.BadImage as reason:
            return Reject(item.key, str(reason))
        return item._replace(image=recorder.image(image))

    def started(batch: Sequence[Example | Reject]):
        good = [item for item in batch if isinstance(item, Example)]
        return batch, good, recorder.start(good) if good else None

    items = iter(items)
    batches = iter(lambda: list(itertools.islice(items, recorder.batch_size)), [])
    pool = ThreadPoolExecutor(images.cpus())  # threads are enough: Pillow releases the GIL while it decodes and scales
    try:
        decoding = ([pool.submit(prepared, item) for item in batch] for batch in batches)
        decoded = ([future.result() for future in batch] for batch in _ahead(decoding))
        for batch, good, work in _ahead(map(started, decoded), recorder.ahead):
            finished = iter(recorder.finish(good, work) if good else ())
            yield from (next(finished) if isinstance(item, Example) else item for item in batch)
    finally:  # at the end, or when nobody wants the images that are still in the queue
        pool.shutdown(wait=False, cancel_futures=True)


def _ahead(started: Iterable[T], count: int = 1) -> Iterator[T]:
    """Yield each thing, but only after the next `count` have been started."""
    before: collections.deque[T] = collections.deque()
    for thing in started:
        before.append(thing)
        if len(before) > count:
            yield before.popleft()
    yield from before


def _half(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # the caller checks for infinities
        return np.ascontiguousarray(array, np.float16)
