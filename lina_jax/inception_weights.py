"""Weight files of Inception v3, as the PyTorch ports of FID have them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from einops import rearrange
from flax import nnx

from lina_jax import torch_files
from lina_jax.errors import UserError
from lina_jax.models import inception


def load(path: Path) -> tuple[nnx.GraphDef, dict]:
    """The network of a safetensors or .pth file, and its weights as NumPy arrays.

    Raises UserError if the file is absent, or if tensors are absent or have other shapes; it names the first three.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected the FID weights of Inception v3 as the PyTorch ports have them "
            "(pt_inception-2015-12-05-6726825d.pth), or the same tensors as safetensors"
        )
    tensors = torch_files.open_file(path) if path.suffix == ".safetensors" else torch_files.open_bin(path)
    first = tensors.shapes.get("Conv2d_1a_3x3.conv.weight", (0,))[0]
    thin = 32 // first if first in (1, 2, 4, 8, 16, 32) else 1
    table = inception.layers(thin)
    _check(path, table, thin, tensors)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: inception.Inception(thin)))
    weights = {"convs": {name: _conv(name, tensors) for name in table}}
    weights["classes"] = np.asarray(tensors["fc.weight"], np.float32).T
    return graphdef, weights


def _conv(name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    weight, bias, mean, variance = (
        np.asarray(tensors[f"{name}.bn.{part}"], np.float64)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / np.sqrt(variance + inception.NORM_EPS)
    return {
        "kernel": rearrange(np.asarray(tensors[f"{name}.conv.weight"], np.float32), "o i h w -> h w i o"),
        "scale": scale.astype(np.float32),
        "shift": (bias - mean * scale).astype(np.float32),
    }


def _check(path: Path, table: Mapping[str, inception.Layer], thin: int, tensors) -> None:
    """Raise UserError unless all tensors are present in their shapes; others (the classes' bias) are ignored."""
    wanted = {"fc.weight": (inception.CLASSES, 2048 // thin)}
    for name, layer in table.items():
        wanted[f"{name}.conv.weight"] = (layer.outputs, layer.inputs, *layer.size)
        norm = ("weight", "bias", "running_mean", "running_var")
        wanted |= {f"{name}.bn.{part}": (layer.outputs,) for part in norm}
    absent = [name for name in wanted if name not in tensors]
    wrong = [n for n in wanted if n in tensors and tensors.shapes[n] != wanted[n]]
    faults = [f"{name} is absent" for name in absent]
    faults += [f"{name} is {tensors.shapes[name]}, expected {wanted[name]}" for name in wrong]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{path}: not the FID weights of Inception v3: {'; '.join(faults[:3])}{more}")
