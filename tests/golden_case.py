"""Read a fixture, and build a module with its published weights.

A fixture consists of `CASE.json` (description, sizes, tolerances) and `CASE.safetensors` (inputs, published weights,
outputs, gradients).
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from lina_jax import torch_layout
from lina_jax.models import layers
from lina_jax.models.layers import Frozen

GOLDEN = Path(os.environ.get("LINA_GOLDEN_DIR") or Path(__file__).parent / "golden")


class Case:
    """One fixture; `check` compares an array with the recorded one, and `left` holds those not yet checked."""

    def __init__(self, name: str):
        self.name = name
        self.manifest = json.loads((GOLDEN / f"{name}.json").read_text())
        self.config = self.manifest["config"]
        self.arrays = load_file(GOLDEN / self.manifest["file"])
        self.weights = self.group("weights.")
        if "weights_file" in self.manifest:
            shared = load_file(GOLDEN / self.manifest["weights_file"])
            ignored = tuple(self.manifest.get("weights_ignore", ()))
            named = {k.removeprefix("weights."): v for k, v in shared.items() if k.startswith("weights.")}
            self.weights |= {k: v for k, v in named.items() if not (ignored and k.startswith(ignored))}
        self.left = {name for name in self.arrays if name.startswith(("outputs.", "grads."))}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[f"inputs.{name}"]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def check(self, name: str, got) -> None:
        want, got = self.arrays[name], np.asarray(got)
        assert got.shape == want.shape, f"{name}: {got.shape}, recorded {want.shape}"
        self.left.discard(name)
        want, got = want.astype(np.float64), got.astype(np.float64)
        assert np.all(np.isfinite(got)), f"{name}: not finite"
        error = np.max(np.abs(got - want), initial=0.0)
        largest = np.max(np.abs(want), initial=0.0)
        tolerance = self.manifest["tolerance"][name]
        for metric in tolerance.keys() - {"atol"}:
            if metric == "exact":
                value, bound = error, 0.0
            elif metric == "max_abs":
                value, bound = error, tolerance[metric]
            elif metric == "rel_to_max":
                value, bound = error / (largest or 1.0), tolerance[metric]
            elif metric == "rel_l2":
                value, bound = np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0), tolerance[metric]
            elif metric == "elementwise_rel":
                value = np.max(np.abs(got - want) - tolerance["atol"] - tolerance[metric] * np.abs(want))
                bound = 0.0
            else:
                raise AssertionError(f"{name}: unknown metric {metric}")
            assert value <= bound, f"{name}: {metric} {value:.3g} > {bound:.3g}"

    def check_grads(self, table: list[torch_layout.Entry], grads) -> None:
        """Check the recorded gradients of the weights in `table`."""
        named = by_published_names(table, grads)
        for key in [name.removeprefix("grads.") for name in self.left if name.startswith("grads.")]:
            if key.endswith(".weight_rows"):
                self.check(f"grads.{key}", named[key.removesuffix("_rows")][self["label_ids"]])
            elif key in named:
                self.check(f"grads.{key}", named[key])


def parts(module: nnx.Module):
    """(graphdef, trained, frozen) as plain dicts."""
    graphdef, trained, frozen = nnx.split(module, nnx.Param, Frozen)
    return graphdef, nnx.to_pure_dict(trained), nnx.to_pure_dict(frozen)


def loaded(make, table, weights):
    """The module that make(rngs) builds, with published weights: (graphdef, tree of all arrays)."""
    graphdef, trained, frozen = parts(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    shapes = flatten_dict(trained) | flatten_dict(frozen)
    return graphdef, torch_layout.from_torch(table, weights, unflatten_dict(shapes))


def module(make, table, weights):
    graphdef, tree = loaded(make, table, weights)
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, tree))


def by_published_names(table: list[torch_layout.Entry], tree) -> dict[str, np.ndarray]:
    """The arrays of our tree by their published names, in published layouts."""
    flat = flatten_dict(tree)
    return {entry.key: entry.to_torch(np.asarray(flat[entry.path])) for entry in table}


def tokens_of(latents: np.ndarray, patch: int) -> jax.Array:
    return layers.patchify(jnp.asarray(rearrange(latents, "b c h w -> b h w c")), patch)
