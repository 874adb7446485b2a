"""Published model directories: JSON files, and safetensors whole or in shards, read tensor by tensor."""

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


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of safetensors files, by name; each is read when it is asked for and kept by nobody."""

    def __init__(self, files: Mapping[str, tuple[Any, str]]):
        self._files = dict(files)  # name -> (open file, name in it)

    def __getitem__(self, name: str) -> np.ndarray:
        file, stored = self._files[name]
        return file.get_tensor(stored)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def renamed(self, rename: Callable[[str], str | None]) -> "Tensors":
        """The same tensors under the names that `rename` gives; without those to which it gives None."""
        return Tensors({new: file for name, file in self._files.items() if (new := rename(name)) is not None})


def open_tensors(directory: Path) -> Tensors:
    """All tensors of a model directory. Raises UserError naming what is absent or cannot be read."""
    indices = sorted(directory.glob("*.safetensors.index.json"))
    single = [path for name in WEIGHT_FILES if (path := directory / name).is_file()]
    if single:
        file = _opened(single[0])
        return Tensors({name: (file, name) for name in file.keys()})  # noqa: SIM118 (not a mapping)
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
    files = {name: _opened(index.parent / name) for name in names}
    held = {name: set(file.keys()) for name, file in files.items()}
    if lost := [tensor for tensor, name in where.items() if tensor not in held[name]]:
        raise UserError(f"{index}: {len(lost)} tensors are not in their files, first {lost[0]} in {where[lost[0]]}")
    return Tensors({tensor: (files[name], tensor) for tensor, name in where.items()})


def _opened(path: Path) -> Any:
    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    for name in file.keys():  # noqa: SIM118 (not a mapping)
        dtype = file.get_slice(name).get_dtype()
        if dtype not in FLOATS:
            raise UserError(f"{path}: tensor {name} is {dtype}, not one of {', '.join(FLOATS)}")
    return file
