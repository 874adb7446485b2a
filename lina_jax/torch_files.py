"""Published model directories: JSON files, and safetensors whole or in shards, read tensor by tensor."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lina_jax.errors import UserError

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
FLOATS = ("F32", "F16", "BF16")


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
    """Where one tensor lies, and what its file says of it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, F16, BF16


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of safetensors files, by name; each is read when it is asked for and kept by nobody.

    A file is open only while one of its tensors is read: what is mapped into memory is never more than that.
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
        """Of all tensors; none of them is read."""
        return {name: stored.shape for name, stored in self._stored.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: stored.dtype for name, stored in self._stored.items()}

    def stored(self, name: str) -> Stored:
        return self._stored[name]

    def renamed(self, rename: Callable[[str], str | None]) -> "Tensors":
        """The same tensors under the names that `rename` gives; without those to which it gives None."""
        renamed = {new: stored for name, stored in self._stored.items() if (new := rename(name)) is not None}
        return Tensors(renamed, self.metadata)


def open_tensors(directory: Path) -> Tensors:
    """All tensors of a model directory. Raises UserError naming what is absent or cannot be read."""
    indices = sorted(directory.glob("*.safetensors.index.json"))
    single = [path for name in WEIGHT_FILES if (path := directory / name).is_file()]
    if single:
        return open_file(single[0])
    if not indices:
        raise UserError(f"{directory}: no weights; expected {' or '.join(WEIGHT_FILES)}, or *.safetensors.index.json")
    if len(indices) > 1:
        raise UserError(f"{directory}: several indices of weights: {', '.join(path.name for path in indices)}")
    return _sharded(indices[0])


def _sharded(index: Path) -> Tensors:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f'{index}: expected "weight_map", an object of tensor names and file names')
    names = sorted(set(where.values()))
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(f"{index}: {len(absent)} of {len(names)} files are absent: {', '.join(absent)}")
    files = {name: open_file(index.parent / name) for name in names}
    if lost := [tensor for tensor, name in where.items() if tensor not in files[name]]:
        raise UserError(f"{index}: {len(lost)} tensors are not in their files, first {lost[0]} in {where[lost[0]]}")
    return Tensors({tensor: files[name].stored(tensor) for tensor, name in where.items()}, files[names[0]].metadata)


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors file. Raises UserError unless it is whole and holds floating-point numbers."""
    stored = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                view = file.get_slice(name)
                stored[name] = Stored(path, name, tuple(view.get_shape()), view.get_dtype())
            metadata = file.metadata()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"{path}: tensor {name} is {tensor.dtype}, not one of {', '.join(FLOATS)}")
    return Tensors(stored, metadata)
