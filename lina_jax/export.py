"""Export the weights of a workdir: in the published layout, or as plain arrays under our names."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from lina_jax import mesh as mesh_lib
from lina_jax import output_files, published_names, state, torch_layout
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import Config
from lina_jax.errors import UserError
from lina_jax.torch_files import FLOATS, OWN_NAMES, write_file
from lina_jax.workdir import load_config

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
STEM = "diffusion_pytorch_model"


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of one checkpoint, for export."""

    config: Config
    arrays: Mapping[tuple[str, ...], object]  # trained and frozen arrays, by path
    step: int
    kind: str  # ema | raw

    @property
    def metadata(self) -> dict[str, str]:
        return metadata_of(self.config, self.step, self.kind)


def metadata_of(config: Config, step: int, kind: str) -> dict[str, str]:
    """Metadata for the header of a safetensors file, without paths of this machine."""
    fields = dataclasses.asdict(config)
    for group in ("autoencoder", "text_encoder", "data", "init_from"):
        fields[group]["path"] = ""
    fields["data"]["cache"] = ""
    for name in ("inception", "reference"):  # files that eval.images needs: only their names are exported
        fields["eval"][name] = Path(fields["eval"][name]).name
    return {"config": json.dumps(fields), "step": str(step), "weights": kind}


def load(workdir: Path, *, ema: bool = True, step: int | None = None) -> Weights:
    """The weights of a checkpoint, EMA by default; imported weights are returned whatever `ema` is."""
    config = load_config(workdir)
    checkpoints = Checkpoints(workdir, config.checkpoint, create=False)
    blueprint = state.make_blueprint(config, mesh_lib.mesh_for_weights(config.model))
    params, frozen, step = checkpoints.restore_weights(blueprint, ema=ema, step=step)
    return Weights(config, flatten_dict(params) | flatten_dict(frozen), step, checkpoints.kind(step, ema=ema))


def check_publishable(workdir: Path) -> None:
    """Raises UserError listing everything in a workdir's model that the published code does not support."""
    config = load_config(workdir)
    shapes = state.make_blueprint(config, mesh_lib.mesh_for_weights(config.model)).shapes
    table = list(torch_layout.entries(config.model))
    problems = list(published_names.unpublishable(config.model))
    problems += [
        f"{name}: has no published counterpart"
        for part in (shapes.params, shapes.frozen)
        for name in torch_layout.unpublished(table, part)
    ]
    if problems:
        raise UserError(
            f"{workdir}: the published code cannot load this model (--to_safetensors exports any model); "
            + "; ".join(problems)
        )


def write_torch(weights: Weights, directory: Path, dtype: str, max_shard_bytes: float) -> None:
    """Write the published layout into an empty directory: transformer/, scheduler/ and model_index.json."""
    transformer, config = directory / "transformer", weights.config
    transformer.mkdir()
    output_files.write_json(transformer / "config.json", published_names.transformer_config(config))
    table = {entry.key: entry for entry in torch_layout.entries(config.model)}
    shapes = {key: entry.published_shape(weights.arrays[entry.path].shape) for key, entry in table.items()}
    metadata = {"format": "pt", **weights.metadata}

    def tensor(key: str) -> np.ndarray:
        return table[key].to_torch(np.asarray(weights.arrays[table[key].path]))

    shards = _shards(shapes, FLOATS[DTYPES[dtype]].itemsize, max_shard_bytes)
    names = [f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{STEM}.safetensors"]
    for name, keys in zip(names, shards, strict=True):
        write_file(transformer / name, {key: shapes[key] for key in keys}, DTYPES[dtype], tensor, metadata)
    if len(shards) > 1:
        total = sum(int(np.prod(shape)) for shape in shapes.values()) * FLOATS[DTYPES[dtype]].itemsize
        where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        output_files.write_json(
            transformer / f"{STEM}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
        )
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": config.loss.shift,
    }
    (directory / "scheduler").mkdir()
    output_files.write_json(directory / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "NOVAC2IPipeline" if config.model.condition == "class" else "NOVAPipeline",
        "transformer": [published_names.module_of(config.model), "NOVATransformer3DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    output_files.write_json(directory / "model_index.json", index)


def write_safetensors(weights: Weights, path: Path, dtype: str) -> None:
    """Write all arrays, trained and frozen, to one file under the names that they have here."""
    arrays = {"/".join(name): array for name, array in sorted(weights.arrays.items())}
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    metadata = {"format": OWN_NAMES, **weights.metadata}
    write_file(path, shapes, DTYPES[dtype], lambda name: np.asarray(arrays[name]), metadata)


def _shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, most: float) -> list[list[str]]:
    """Names of tensors in order, split into files of at most `most` bytes (a larger tensor gets its own file)."""
    shards, size = [[]], 0
    for key, shape in shapes.items():
        bytes_of_tensor = int(np.prod(shape)) * itemsize
        if shards[-1] and size + bytes_of_tensor > most:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += bytes_of_tensor
    return shards
