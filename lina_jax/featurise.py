"""Images to features on all devices of all hosts, in the order of their numbers; finished chunks survive a kill.

Each device works on the same number of images at once, however many devices there are. It therefore runs the same
program alone as among a thousand, and the features are the same to the bit.
"""

import functools
import hashlib
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lina_jax import hosts, inception_weights, output_files, preemption, progress
from lina_jax import mesh as mesh_lib
from lina_jax.errors import UserError
from lina_jax.image_sources import Source
from lina_jax.models.inception import Features
from lina_jax.state import Tree

CHUNK = 500  # images whose features are reduced and stored together
_PORTION = 2**26  # most bytes of images that are replicated on each device at once, on their way to the hosts


class Chunk(NamedTuple):
    """Features of images start, start + 1, ...; `images` holds those that are kept."""

    start: int
    features: Features  # NumPy arrays
    images: np.ndarray  # (M, H, W, 3) uint8

    def split(self, size: int, images: int) -> tuple["Chunk", "Chunk"]:
        """The first `size` features with the first `images` images, and the rest."""
        head = Chunk(self.start, Features(*(part[:size] for part in self.features)), self.images[:images])
        rest = Features(*(part[size:] for part in self.features))
        return head, Chunk(self.start + size, rest, self.images[images:])


class Network:
    """Inception v3 with weights from a file, replicated on every device of a mesh."""

    def __init__(self, path: Path, mesh: Mesh):
        graphdef, weights = inception_weights.load(path)
        whole = mesh_lib.sharding(mesh)
        self._weights = jax.tree.map(
            lambda array: jax.make_array_from_callback(array.shape, whole, array.__getitem__), weights
        )
        self.mesh = mesh
        self.digest = _digest(weights)

        def program(weights, images):
            features = nnx.merge(graphdef, weights)(mesh_lib.constrain(images, "batch", None, None, None))
            return jax.tree.map(lambda part: mesh_lib.constrain(part, "batch", None), features)

        self._program = jax.jit(program)

    @functools.cached_property
    def widths(self) -> Features:
        """The number of features of each kind."""
        image = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.uint8)
        return Features(*(part.shape[-1] for part in jax.eval_shape(self._program, self._weights, image)))

    def __call__(self, images: jax.Array) -> Features:
        with jax.set_mesh(self.mesh):
            return self._program(self._weights, images)


def _digest(weights: Tree) -> str:
    """A digest of the weights that does not depend on their file's format."""
    digest = hashlib.sha256()
    for name, array in sorted(flatten_dict(weights, sep="/").items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


class ChunkStore:
    """The finished chunks of one measurement, in a directory of process 0."""

    def __init__(self, directory: Path | None, facts: Mapping[str, Any]):
        """`facts` identify the measurement; chunks of another one are removed, with a message.

        With `directory` None, no chunks are kept.
        """
        self._directory, self.count = directory, 0
        if directory and jax.process_index() == 0:
            self._open(directory, json.dumps({**facts, "chunk": CHUNK}, indent=2, sort_keys=True))
        # Only process 0 looks for files, and it may have just written a reference: a collective would time out.
        hosts.barrier("what is done is known")
        # The other processes may not see the directory.
        self.count = int(multihost_utils.broadcast_one_to_all(np.int32(self.count)))

    def _open(self, directory: Path, facts: str) -> None:
        about = directory / "facts.json"
        if directory.exists() and not (about.exists() and about.read_text() == facts):
            print(f"{directory} is from another evaluation, which did not finish: replacing it", file=sys.stderr)
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with output_files.new_file(about) as partial:
            partial.write_text(facts)
        while self._file(self.count).exists():
            self.count += 1

    def _file(self, number: int) -> Path:
        return self._directory / f"{number:06d}.npz"

    def __iter__(self) -> Iterator[Chunk]:
        """The finished chunks, in order; only in process 0."""
        for number in range(self.count):
            try:
                with np.load(self._file(number)) as arrays:
                    features = Features(arrays["pool"], arrays["spatial"], arrays["logits"])
                    yield Chunk(number * CHUNK, features, arrays["images"])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise UserError(f"{self._file(number)} is damaged ({error}): remove it to recompute it") from error

    def add(self, chunk: Chunk) -> None:
        if self._directory:
            with output_files.new_file(self._file(chunk.start // CHUNK)) as partial, partial.open("wb") as file:
                np.savez(file, **chunk.features._asdict(), images=chunk.images)
            self.count += 1


def chunks(
    source: Source,
    network: Network | None,
    mesh: Mesh,
    per_device: int,
    store: ChunkStore,
    *,
    count: int,
    kept: int,
    name: str,
) -> Iterator[Chunk]:
    """Yield the chunks of the first `count` images, finished ones first; processes other than 0 take part but get none.

    Each device works on `per_device` images at a time. The first `kept` images come with their features; without a
    network, there are only images. `name` labels the progress bar.
    """
    first, leader = min(store.count * CHUNK, count), jax.process_index() == 0
    if leader:
        if first:
            print(f"{name}: {first} of {count} already done", file=sys.stderr)
        yield from store
    hosts.barrier("what is done is added")  # while process 0 reduced the finished chunks
    kept = min(kept, count)
    waiting = Chunk(first, Features(*[np.zeros((0, 0), np.float32)] * 3), np.zeros((0, 0, 0, 3), np.uint8))
    with progress.bar(count, done=first, name=name) as bar:
        for rows, features, images in _batches(source, network, mesh, per_device, range(first, count), kept):
            bar.update(rows)
            preemption.raise_if_preempted()
            if not leader:
                continue
            waiting = Chunk(
                waiting.start,
                Features(*(_joined(pair) for pair in zip(waiting.features, features, strict=True))),
                _joined((waiting.images, images)),
            )
            while (size := min(CHUNK, count - waiting.start)) and len(waiting.features.pool) >= size:
                chunk, waiting = waiting.split(size, max(0, min(size, kept - waiting.start)))
                store.add(chunk)
                yield chunk


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The parts, concatenated; empty ones may have other shapes."""
    return np.concatenate([part for part in parts if len(part)] or [parts[-1]])


def _batches(
    source: Source, network: Network | None, mesh: Mesh, per_device: int, numbers: range, kept: int
) -> Iterator[tuple[int, Features, np.ndarray]]:
    """Yield (number of images, their features, the images numbered below `kept`) of each batch.

    A batch is gathered while the next one is computed.
    """
    size = per_device * mesh_lib.batch_parts(mesh)

    def start(at: int):
        wanted = np.minimum(np.arange(at, at + size), numbers.stop - 1)  # padded with the last one
        images = source.batch(wanted)
        return at, network(images) if network else None, images if at < kept else None

    def finish(at: int, features: Features | None, images: jax.Array | None) -> tuple[int, Features, np.ndarray]:
        rows = min(size, numbers.stop - at)
        if features is None:
            seen = Features(*[np.zeros((rows, 0), np.float32)] * 3)
        else:
            seen = Features(*(part[:rows] for part in multihost_utils.process_allgather(features, tiled=True)))
        if images is None:
            return rows, seen, np.zeros((0, 0, 0, 3), np.uint8)
        return rows, seen, _first(images, mesh, min(rows, kept - at))

    before = None
    for at in range(numbers.start, numbers.stop, size):
        started = start(at)
        if before:
            yield finish(*before)
        before = started
    if before:
        yield finish(*before)


def _first(images: jax.Array, mesh: Mesh, count: int) -> np.ndarray:
    """The first `count` images of a batch (B, H, W, 3) on every host."""
    if images.is_fully_addressable:
        return np.asarray(images)[:count]
    return _gathered(images, mesh, count)


def _gathered(images: jax.Array, mesh: Mesh, count: int) -> np.ndarray:
    """`_first`, replicated on the devices in portions: the whole batch of a pod would not fit on one of them."""
    size = min(count, max(1, _PORTION * len(images) // images.nbytes))
    portions = []
    for start in range(0, count, size):
        wanted = np.minimum(np.arange(start, start + size, dtype=np.int32), count - 1)  # one program for all portions
        portions.append(np.asarray(_gatherer(mesh)(images, wanted)))
    return np.concatenate(portions)[:count]


@functools.cache
def _gatherer(mesh: Mesh) -> Callable[[jax.Array, np.ndarray], jax.Array]:
    """The program that takes the images in rows (N,) of a batch and replicates them on each device."""
    # By index: for a slice, the compiler would all-gather the whole batch first.
    return jax.jit(
        lambda images, wanted: jnp.take(images, wanted, 0, mode="clip"), out_shardings=mesh_lib.sharding(mesh)
    )
