"""Files of published models: JSON, safetensors (whole or in shards, tensor by tensor), PyTorch's .bin."""

import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lina_jax.errors import UserError

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
BIN_FILES = ("diffusion_pytorch_model.bin", "pytorch_model.bin")
OWN_NAMES = "lina_jax"  # "format" in the metadata of files whose arrays have our names, not published ones
COUNTER = ".num_batches_tracked"  # integer counters of batch norms in training, which no computation here needs
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

T = TypeVar("T", bound=Mapping[str, Any])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError naming the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor is stored, with the shape and dtype in its file's header."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, F16, BF16


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of safetensors files, by name; each is read on access and not cached.

    A file is open, and mapped into memory, only while one of its tensors is read.
    """

    def __init__(self, stored: Mapping[str, Stored], metadata: Mapping[str, str] | None = None):
        self._stored = dict(stored)
        self.metadata = dict(metadata or {})  # free text, from the files' headers

    def __getitem__(self, name: str) -> np.ndarray:
        stored = self._stored[name]
        with safe_open(stored.path, framework="numpy") as file:
            return file.get_tensor(stored.name)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors; none of them is read."""
        return {name: stored.shape for name, stored in self._stored.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: stored.dtype for name, stored in self._stored.items()}

    def stored(self, name: str) -> Stored:
        return self._stored[name]

    def renamed(self, rename: Callable[[str], str | None]) -> "Tensors":
        """The same tensors under the names that `rename` returns, without those for which it returns None."""
        renamed = {new: stored for name, stored in self._stored.items() if (new := rename(name)) is not None}
        return Tensors(renamed, self.metadata)


def open_tensors(directory: Path) -> Tensors:
    """All tensors of a model directory's safetensors. Raises UserError naming what is absent or cannot be read."""
    single = [path for name in WEIGHT_FILES if (path := directory / name).is_file()]
    if single:
        return open_file(single[0])
    index = _index(directory, "*.safetensors.index.json")
    if index is None:
        raise UserError(f"{directory}: no weights; expected {' or '.join(WEIGHT_FILES)}, or *.safetensors.index.json")
    where, files = _open_indexed(index, open_file)
    first = next(iter(files.values()))
    return Tensors({tensor: files[name].stored(tensor) for tensor, name in where.items()}, first.metadata)


def open_weights(directory: Path) -> "Tensors | Pickled":
    """All tensors of a model directory, from .bin files if there are no safetensors.

    Raises UserError if it has neither, or they are damaged, incomplete or not as their index says.
    """
    if any(directory.glob("*.safetensors*")):
        return open_tensors(directory)
    if single := [path for name in BIN_FILES if (path := directory / name).is_file()]:
        return open_bin(single[0])
    index = _index(directory, "*.bin.index.json")
    if index is None:
        expected = ", ".join((*WEIGHT_FILES, *BIN_FILES))
        raise UserError(
            f"{directory}: no weights; expected {expected}, or *.safetensors.index.json or *.bin.index.json"
        )
    where, files = _open_indexed(index, _load_bin)
    return Pickled(index, {tensor: files[name][tensor] for tensor, name in where.items()})


def _index(directory: Path, pattern: str) -> Path | None:
    indices = sorted(directory.glob(pattern))
    if len(indices) > 1:
        raise UserError(f"{directory}: several weight indices: {', '.join(path.name for path in indices)}")
    return indices[0] if indices else None


def _open_indexed(index: Path, open_one: Callable[[Path], T]) -> tuple[dict[str, str], dict[str, T]]:
    """Names of tensors -> names of their files, and the files, opened, by name. Raises UserError if they do not fit."""
    where = _weight_map(index)
    files = {name: open_one(index.parent / name) for name in sorted(set(where.values()))}
    _check_members(index, where, files)
    return where, files


def _weight_map(index: Path) -> dict[str, str]:
    """Names of tensors -> names of their files. Raises UserError if a file is absent."""
    where = read_json(index).get("weight_map")
    if isinstance(where, dict):
        where = {tensor: name for tensor, name in where.items() if not tensor.endswith(COUNTER)}
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f'{index}: expected "weight_map", an object of tensor names and file names')
    names = sorted(set(where.values()))
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(f"{index}: {len(absent)} of {len(names)} files are absent: {', '.join(absent)}")
    return where


def _check_members(index: Path, where: Mapping[str, str], files: Mapping[str, Mapping[str, Any]]) -> None:
    if lost := [tensor for tensor, name in where.items() if tensor not in files[name]]:
        raise UserError(f"{index}: {len(lost)} tensors are not in their files, first {lost[0]} in {where[lost[0]]}")
    held = [(tensor, name) for name, tensors in files.items() for tensor in tensors if not tensor.endswith(COUNTER)]
    if unlisted := [f"{tensor} of {name}" for tensor, name in held if where.get(tensor) != name]:
        raise UserError(f"{index}: does not list {len(unlisted)} tensors of its files, first {unlisted[0]}")


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors file. Raises UserError unless it is complete and all its dtypes are in FLOATS."""
    stored = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name.endswith(COUNTER):
                    continue
                view = file.get_slice(name)
                stored[name] = Stored(path, name, tuple(view.get_shape()), view.get_dtype())
            metadata = file.metadata()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error})") from error
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"{path}: tensor {name} is {tensor.dtype}, not one of {', '.join(FLOATS)}")
    return Tensors(stored, metadata)


class Pickled(Mapping[str, np.ndarray]):
    """The tensors of PyTorch .bin files, like `Tensors`; files in the zip format are memory-mapped instead of read."""

    def __init__(self, path: Path, tensors: Mapping[str, Any]):
        self._path, self._tensors, self.metadata = path, dict(tensors), {}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        names = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
        kinds = {name: str(tensor.dtype) for name, tensor in self._tensors.items()}
        if others := [f"{name} is {kind}" for name, kind in kinds.items() if kind not in names]:
            raise UserError(f"{path}: tensor {others[0]}, not one of {', '.join(FLOATS)}")
        self.dtypes = {name: names[kind] for name, kind in kinds.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name].detach().contiguous()
        if self.dtypes[name] != "BF16":
            return tensor.numpy()
        import torch  # torch cannot convert bfloat16 to numpy, so the bits are reinterpreted

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_bin(path: Path) -> Pickled:
    """A PyTorch state dict, read without running any code that the file may contain.

    Raises UserError without PyTorch, and for a file that is damaged or holds anything but named tensors.
    """
    return Pickled(path, _load_bin(path))


def _load_bin(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: reading it needs PyTorch (pip install torch), unlike .safetensors files") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # it raises many kinds for damaged files, with the advice to run their code
        raise UserError(
            f"{path}: cannot be loaded as PyTorch weights ({type(error).__name__}): damaged, or it holds objects other "
            "than tensors, which are never loaded"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise UserError(f"{path}: expected a state dict that holds only names and tensors")
    if odd := [name for name, tensor in state.items() if tensor.layout != torch.strided or tensor.is_meta]:
        raise UserError(f"{path}: {len(odd)} tensors are sparse or without values, first {odd[0]}")
    return {name: tensor for name, tensor in state.items() if not name.endswith(COUNTER)}


def write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file: each tensor(name) is computed, cast to `dtype` (F32, F16, BF16) and written in turn.

    Raises UserError naming a tensor with values that are not finite, before or after the cast.
    """
    kind, header, end = FLOATS[dtype], {"__metadata__": dict(metadata)}, 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * kind.itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, shape in shapes.items():
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(tensor(name), dtype=kind)
            if array.shape != tuple(shape):
                raise ValueError(f"{name}: {array.shape}, announced {shape}")
            if not np.all(np.isfinite(array)):
                raise UserError(f"{name} has values that are not finite in {kind}")
            file.write(array.tobytes() if kind.itemsize == 2 else array.data)
