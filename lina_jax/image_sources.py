"""Images to measure, by number: drawn by a model, or read from a folder, an ADM npz file or a prepared dataset.

A source places the images with any given numbers on the mesh, as one uint8 batch (B, H, W, 3). Each process draws or
reads the rows of its own devices. Which image has which number does not depend on the batch or the mesh.
"""

import dataclasses
import hashlib
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh

from lina_jax import data, drawing, execution, generate, images, pictures, reading, tf_example
from lina_jax import mesh as mesh_lib
from lina_jax.config import Config, DataConfig, SampleConfig
from lina_jax.data import Records
from lina_jax.decode import Column, Moments, Pixels
from lina_jax.errors import UserError
from lina_jax.models import vae
from lina_jax.sources import base
from lina_jax.state import Blueprint, Program, Tree

_THREADS = 16  # threads that read a folder; they mostly wait for storage
IMAGE_GROUPS = ("model", "autoencoder", "text_encoder")  # groups of a config that images depend on
Conditions = Callable[[np.ndarray], Mapping[str, np.ndarray]]  # image numbers (B,) -> rows of a batch's condition


class Source(Protocol):
    @property
    def count(self) -> int:
        """The number of images."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the images depend on, in JSON types."""

    def batch(self, numbers: np.ndarray) -> jax.Array:
        """The images with these numbers (B,), sharded over the mesh."""


class GeneratedImages:
    """Images drawn by a model: image i is a function of (weights, condition i, seed, i)."""

    def __init__(
        self,
        blueprint: Blueprint,
        settings: SampleConfig,
        conditions: Conditions,
        count: int,
        seed: int,
        facts: Mapping,
    ):
        """`facts` identify weights and conditions. Set `weights` (parameters, frozen) before the first batch."""
        self.count, self._seed, self._blueprint, self._conditions = count, seed, blueprint, conditions
        self._program = generate.make_sampler(blueprint, settings)
        # A workdir and a step alone do not say which autoencoder decodes, or how.
        made_by = {name: dataclasses.asdict(getattr(blueprint.config, name)) for name in IMAGE_GROUPS}
        made_by["model"] = {k: v for k, v in made_by["model"].items() if k not in execution.FIELDS}
        self.facts = {"seed": seed, "sample": vars(settings), "shift": blueprint.config.loss.shift, **made_by, **facts}
        self.weights: tuple[Tree, Tree] = ({}, {})

    def batch(self, numbers: np.ndarray) -> jax.Array:
        numbers = numbers.astype(np.int32)
        rows = place_rows(self._blueprint.mesh, numbers, lambda part: {**self._conditions(part), "number": part})
        number = rows.pop("number")
        return self._program(*self.weights, rows, number, np.int32(self._seed))


class StoredImages:
    """Images of one size that `read` returns by number, or that `decode` makes from what it returns.

    `shuffled` numbers them in a fixed random order: collections are often sorted by class, but the first few images,
    and each consecutive part, should represent all of them.
    """

    def __init__(
        self,
        mesh: Mesh,
        count: int,
        read: Callable[[np.ndarray], np.ndarray],
        facts: Mapping,
        decode: Callable[[jax.Array], jax.Array] = lambda images: images,
        *,
        shuffled: bool,
    ):
        self.count, self.facts, self._mesh = count, {**facts, "shuffled": shuffled}, mesh
        self._read, self._decode = read, decode
        self._order = np.random.default_rng(0).permutation(count) if shuffled else np.arange(count)

    def batch(self, numbers: np.ndarray) -> jax.Array:
        rows = place_rows(self._mesh, numbers, lambda part: {"rows": self._read(self._order[part])})
        return self._decode(rows["rows"])


def place_rows(
    mesh: Mesh, numbers: np.ndarray, read: Callable[[np.ndarray], Mapping[str, np.ndarray]]
) -> dict[str, jax.Array]:
    """The arrays that `read` returns for numbers (B,), sharded by row over the mesh. Each process reads its rows."""
    rows = mesh_lib.local_rows(mesh, len(numbers))
    return mesh_lib.make_global_batch(mesh, len(numbers), rows, read(numbers[rows]))


def balanced_classes(config: Config) -> Conditions:
    """Image i has class i modulo the number of classes: 50,000 images are 50 of each of 1000 classes."""
    return lambda numbers: {"label": (numbers % config.model.num_classes).astype(np.int32)}


def captions_of(records: Records, count: int) -> Conditions:
    """Image i has the caption of the i-th of `count` evenly spaced records; if there are fewer, they repeat."""
    wanted = records.evenly_spaced(min(count, len(records)))

    def rows(numbers: np.ndarray) -> dict[str, np.ndarray]:
        arrays, report = records.read([wanted[number % len(wanted)] for number in numbers])
        records.record(report)
        return {name: np.array(arrays[name]) for name in ("text", "text_length")}

    return rows


def prompts(blueprint: Blueprint, texts: Sequence[str]) -> Conditions:
    """Image i has text i."""
    return lambda numbers: drawing.encode_conditions(
        blueprint.config, [texts[number] for number in numbers], blueprint.encoders.text
    )


def generated_images(
    blueprint: Blueprint,
    settings: SampleConfig,
    records: Records | None,
    count: int,
    *,
    seed: int,
    facts: Mapping[str, Any],
) -> GeneratedImages:
    """Images that a model draws: of all classes in turn, or of the captions of `records`.

    Raises UserError for a text-to-image model without records.
    """
    if blueprint.config.model.condition == "class":
        conditions = balanced_classes(blueprint.config)
    elif records is None:
        raise UserError("a text-to-image model draws from the captions of a dataset: give --data=DIR")
    else:
        conditions = captions_of(records, count)
        facts = {**facts, "captions": records.manifest, "mixture": records.mixture}
    return GeneratedImages(blueprint, settings, conditions, count, seed, facts)


def open_images(
    path: Path, mesh: Mesh, split: str = "train", blueprint: Blueprint | None = None, *, in_order: bool = True
) -> StoredImages:
    """Open a folder of images, an npz file (arr_0), or a split of a prepared dataset.

    `in_order` concerns npz files, which ADM's suite reads in their own order; all else is shuffled. The autoencoder of
    `blueprint` decodes the means of latents. Raises UserError for anything else; reading raises it if sizes differ.
    """
    if path.is_dir() and (path / "features.json").is_file():
        return _dataset(path, mesh, split, blueprint)
    if path.is_dir():
        return _folder(path, mesh)
    if path.is_file() and path.suffix == ".npz":
        array = npz_array(path, "arr_0")
        if array is None or array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8:
            found = "no arr_0" if array is None else f"arr_0 is {array.shape} {array.dtype}"
            raise UserError(f"{path}: {found}, expected uint8 images (N, H, W, 3) in arr_0")
        facts = _file_facts(path, len(array))
        return StoredImages(mesh, len(array), lambda numbers: np.asarray(array[numbers]), facts, shuffled=not in_order)
    raise UserError(f"{path}: not a folder of pictures, an .npz file or a prepared dataset")


def _folder(path: Path, mesh: Mesh) -> StoredImages:
    fs, root = base.filesystem(str(path))
    sizes = {Path(name): size for name, size in base.files_below(fs, root).items()}
    found = [file for file in sorted(sizes) if file.suffix.lower().removeprefix(".") in base.IMAGES]
    shown = [file for file in found if not base.is_hidden(file.relative_to(root).as_posix())]
    files = [file for file in shown if not pictures.is_grid(file)]
    if not files:
        raise UserError(f"{path}: no pictures in it ({', '.join(f'.{name}' for name in base.IMAGES)})")

    def one(number: int) -> np.ndarray:
        try:
            return np.asarray(images.decode(files[number].read_bytes()))
        except images.BadImage as error:
            raise UserError(f"{files[number]}: {error}") from error

    shape, pool = one(0).shape, ThreadPoolExecutor(_THREADS)

    def read(numbers: np.ndarray) -> np.ndarray:
        made = list(pool.map(one, numbers))
        for number, image in zip(numbers, made, strict=True):
            if image.shape != shape:
                sides = [f"{s[1]} x {s[0]}" for s in (image.shape, shape)]
                there = f"{files[number]} is {sides[0]}, {files[0].name} is {sides[1]}"
                raise UserError(f"{there}: all pictures must have the same size (lina_jax.prepare resizes them)")
        return np.stack(made)

    # With the times, as pictures that are drawn anew may have the same names and sizes.
    lines = (f"{file.relative_to(root)} {sizes[file]} {file.stat().st_mtime_ns}" for file in files)
    state = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape"))
    return StoredImages(mesh, len(files), read, {"folder": str(path), "files": state.hexdigest()[:16]}, shuffled=True)


def _dataset(path: Path, mesh: Mesh, split: str, blueprint: Blueprint | None) -> StoredImages:
    defaults = DataConfig()
    opened = reading.open_split(str(path), split, cache="", timeout=defaults.read_timeout, threads=defaults.threads)
    facts = {"dataset": str(path), "split": split, "manifest": opened.manifest}

    def reader(name: str, column: Column) -> Callable[[np.ndarray], np.ndarray]:
        records = data.Records([opened], [column], threads=defaults.threads)

        def read(numbers: np.ndarray) -> np.ndarray:
            arrays, report = records.read([data.RowRef(0, int(number)) for number in numbers])
            if report.bad:  # another record was read instead
                raise UserError(f"{path}: {report.bad[0][2]}")
            return np.array(arrays[name])

        return read

    if not len(opened):
        raise UserError(f"{path}: split {split!r} is empty")
    if opened.layout.moments:
        decode = _decoder(path, opened.layout.moments, blueprint)
        facts |= {"reconstructed_by": blueprint.config.autoencoder.path, "tile": blueprint.config.autoencoder.tile}
        return StoredImages(
            mesh, len(opened), reader("moments", Moments(opened.layout.moments)), facts, decode, shuffled=True
        )
    try:
        first = images.decode(bytes(tf_example.parse(opened[0])["image"]))
    except (OSError, RuntimeError, ValueError, images.BadImage) as error:  # of the file, or of the record
        raise UserError(f"{opened.location(0)}: {error}") from error
    return StoredImages(mesh, len(opened), reader("image", Pixels(first.size[::-1])), facts, shuffled=True)


def _decoder(path: Path, shape: tuple[int, int, int], blueprint: Blueprint | None) -> Program:
    """The program moments (B, 2C, h, w) -> uint8 images (B, H, W, 3), decoded from the means.

    Raises UserError unless the blueprint has an autoencoder with C channels.
    """
    if blueprint is None or blueprint.encoders.autoencoder is None:
        raise UserError(
            f"{path} holds latents: they are decoded as --reference with --workdir, by that run's autoencoder "
            "(autoencoder.path of its config, or --autoencoder=DIR); otherwise use a dataset of pixels"
        )
    channels = blueprint.encoders.autoencoder.latent_channels
    if shape[0] != 2 * channels:
        raise UserError(f"{path} holds latents of shape {shape}, but the autoencoder has {channels} channels")

    def program(moments, weights):
        means = rearrange(moments[:, :channels].astype(jnp.float32), "b c h w -> b h w c")
        return vae.to_uint8(blueprint.encoders.pixels(weights, vae.scale(blueprint.config.autoencoder, means)))

    return blueprint.jit(program, blueprint.encoders.weights)


def _file_facts(path: Path, count: int) -> dict[str, Any]:
    about = path.stat()
    return {"file": str(path), "bytes": about.st_size, "modified": about.st_mtime_ns, "images": count}


def npz_array(path: Path, name: str) -> np.ndarray | None:
    """An array of an npz file, memory-mapped unless it is compressed; None if absent.

    Raises UserError if the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            with np.load(path) as arrays:
                return arrays[name]
        with path.open("rb") as file:
            file.seek(member.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2")  # of the name and the extra field, which end the local header
            file.seek(member.header_offset + 30 + int(lengths.sum()))
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, kind = header(file)
            if kind.hasobject:
                raise ValueError("it holds Python objects")
            return np.memmap(path, kind, "r", file.tell(), shape, "F" if fortran else "C")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a complete .npz file ({error})") from error
