"""Export the sampling program as StableHLO with its weights, which JAX runs without this package."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from safetensors.numpy import save_file

from lina_jax.errors import UserError
from lina_jax.generate import make_sampler
from lina_jax.platforms import portable
from lina_jax.state import Blueprint, Tree

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, WEIGHTS, ARGUMENTS = "sample.stablehlo", "weights.safetensors", "arguments.json"


def write_program(
    directory: Path,
    blueprint: Blueprint,
    params: Tree,
    frozen: Tree,
    metadata: dict[str, str],
    platforms: Sequence[str],
) -> None:
    """Write sample.stablehlo, weights.safetensors and arguments.json into a directory.

    The program is (weights, condition, image numbers (b,) int32, seed () int32) -> uint8 images (b, H, W, 3) for any b;
    `weights` are the arrays of the file by name. The config's sampling settings are compiled in. Raises UserError for
    weights that are not finite.
    """
    trees = {"params": params, "frozen": frozen, "encoders": blueprint.encoders.weights}
    arrays = {"/".join(path): np.asarray(array) for path, array in flatten_dict(trees).items()}
    for name, array in arrays.items():
        if not np.all(np.isfinite(array)):
            raise UserError(f"{name} has values that are not finite")
    sampler = make_sampler(blueprint, blueprint.config.sample)

    def program(weights, condition, images, seed):
        trees = {"params": {}, "frozen": {}, "encoders": {}}
        trees |= unflatten_dict({tuple(name.split("/")): array for name, array in weights.items()})
        return sampler.jitted(trees["params"], trees["frozen"], condition, images, seed, trees["encoders"])

    (batch,) = export.symbolic_shape("b")
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
    condition = _condition(blueprint, batch)
    arguments = (shapes, condition, _int32(batch), _int32())
    with jax.set_mesh(blueprint.mesh), portable(True):
        exported = export.export(jax.jit(program), platforms=platforms)(*arguments)
    (directory / PROGRAM).write_bytes(exported.serialize())
    save_file(arrays, directory / WEIGHTS, metadata)
    (directory / WEIGHTS).chmod(0o644)  # save_file makes it unreadable for other users
    described = {
        "condition": {name: [str(x.dtype), [str(n) for n in x.shape]] for name, x in condition.items()},
        "images": ["int32", ["b"]],
        "seed": ["int32", []],
        "platforms": list(platforms),
        "sample": dataclasses.asdict(blueprint.config.sample),
    }
    (directory / ARGUMENTS).write_text(json.dumps(described, indent=2) + "\n")


def _condition(blueprint: Blueprint, batch) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract class numbers, or texts (bytes, or token ids of the text encoder) with their lengths."""
    model = blueprint.config.model
    if model.condition == "class":
        return {"label": _int32(batch)}
    text = _int32(batch, model.text_length)
    if model.text_encoder == "bytes":
        text = jax.ShapeDtypeStruct(text.shape, jnp.uint8)
    return {"text": text, "text_length": _int32(batch)}


def _int32(*shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
