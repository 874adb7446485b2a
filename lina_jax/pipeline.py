"""A published model as it is stored: a diffusers pipeline directory, or parts of one, opened but not read."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lina_jax.errors import UserError
from lina_jax.torch_files import OWN_NAMES, Pickled, Tensors, open_bin, open_file, open_weights, read_json


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A published model, opened but not read; parts that are absent are empty or None."""

    source: Path  # of the weights
    tensors: Tensors | Pickled
    transformer: Mapping[str, Any]  # config.json
    index: Mapping[str, Any]  # model_index.json
    scheduler: Mapping[str, Any]
    vae: Path | None
    text_encoder: Path | None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The config in the metadata of our own exports; empty for other files."""
        try:
            config = json.loads(self.tensors.metadata.get("config", "{}"))
        except ValueError:
            config = {}  # written by other software
        groups = ("model", "autoencoder")
        return config if isinstance(config, dict) and all(isinstance(config.get(g), dict) for g in groups) else {}


def open_pipeline(path: Path) -> Pipeline:
    """Open a pipeline directory, its `transformer/`, or a bare file of weights.

    Raises UserError if it is none of these, is damaged, or has our own names of arrays.
    """
    if path.is_file():
        opened = {".safetensors": open_file, ".bin": open_bin}.get(path.suffix)
        if not opened:
            raise UserError(f"{path}: expected a .safetensors or .bin file, or a directory")
        source, folder, tensors = path, path.parent, opened(path)
    elif path.is_dir():
        source = folder = path / "transformer" if (path / "transformer").is_dir() else path
        tensors = open_weights(folder)
    else:
        raise UserError(f"{path}: no such file or directory")
    if tensors.metadata.get("format") == OWN_NAMES:
        raise UserError(f"{source}: has our own names (--to_safetensors); only --to_torch exports can be imported")
    root = folder.parent if folder.name == "transformer" else folder

    def content(path: Path) -> Mapping[str, Any]:
        return read_json(path) if path.is_file() else {}

    def part(name: str) -> Path | None:
        return (root / name).resolve() if (root / name / "config.json").is_file() else None

    return Pipeline(
        source,
        tensors,
        content(folder / "config.json"),
        content(root / "model_index.json"),
        content(root / "scheduler" / "scheduler_config.json"),
        part("vae"),
        part("text_encoder"),
    )
