"""Published PyTorch state dicts: one table of names and layouts that drives both directions (spec section 15)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from lina_jax.config import ModelConfig
from lina_jax.errors import UserError
from lina_jax.models.attention import GATE_NAMES
from lina_jax.models.transformer import layer_runs

Path = tuple[str, ...]
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published tensor: its place in our tree, its layer of a stack, the part of an axis it fills, its layout."""

    key: str
    path: Path
    layout: str = "same"
    layer: int | None = None
    part: tuple[int, slice] | None = None  # (axis, where), for tensors that we keep joined
    patch: int = 1  # of the "patches" layout

    def within(self, array: np.ndarray) -> np.ndarray:
        """The view of our array that this tensor fills."""
        view = array if self.layer is None else array[self.layer]
        if self.part:
            axis, where = self.part
            view = view[(slice(None),) * axis + (where,)]
        return view

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The published tensor in our layout and shape."""
        if self.layout in ("linear", "from_heads"):  # (out, in)
            return tensor.T.reshape(shape)
        if self.layout == "patches":  # (D, C, p, p)
            return rearrange(tensor, "d c p q -> (p q c) d")
        if self.layout == "gate":  # (1, H, T, 1)
            return rearrange(tensor, "1 h t 1 -> t h")
        if self.layout == "depthwise":  # (D, 1, k, k)
            return rearrange(tensor, "d 1 p q -> p q d")
        return tensor.reshape(shape)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Our whole array (all layers, all parts) to this tensor in the published layout."""
        view = self.within(array)
        if self.layout == "linear":
            return view.reshape(view.shape[0], -1).T
        if self.layout == "from_heads":  # (H, d, out)
            return view.reshape(-1, view.shape[-1]).T
        if self.layout == "patches":
            return rearrange(view, "(p q c) d -> d c p q", p=self.patch, q=self.patch)
        if self.layout == "gate":
            return rearrange(view, "t h -> 1 h t 1")
        if self.layout == "depthwise":
            return rearrange(view, "p q d -> d 1 p q")
        if self.layout == "row":
            return view[None]
        return view.reshape(-1) if self.layout == "flat" else view


def linear(key: str, path: Path, layer: int | None = None, layout: str = "linear", patch: int = 1) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", (*path, "kernel"), layout, layer, patch=patch)
    yield Entry(f"{key}.bias", (*path, "bias"), "flat", layer)


def norm(key: str, path: Path, layer: int | None = None) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", (*path, "scale"), "same", layer)
    yield Entry(f"{key}.bias", (*path, "bias"), "same", layer)


def mlp(key: str, path: Path, layer: int | None = None, names: tuple[str, str] = ("fc1", "fc2")) -> Iterator[Entry]:
    for theirs, ours in zip(names, ("fc1", "fc2"), strict=True):
        yield from linear(f"{key}.{theirs}", (*path, ours), layer)


def attention(key: str, path: Path, layer: int | None, *, split_q: bool, conv: bool, gate: str) -> Iterator[Entry]:
    """`split_q`: the subtraction variants keep q apart from k and v."""
    if split_q:
        for theirs, where in (("q", slice(0, 1)), ("kv", slice(1, 3))):
            yield Entry(f"{key}.{theirs}.weight", (*path, "qkv", "kernel"), "linear", layer, (1, where))
            yield Entry(f"{key}.{theirs}.bias", (*path, "qkv", "bias"), "flat", layer, (0, where))
    else:
        yield from linear(f"{key}.qkv", (*path, "qkv"), layer)
    yield from linear(f"{key}.proj", (*path, "proj"), layer, "from_heads")
    if conv:
        yield Entry(f"{key}.dw_conv.weight", (*path, "conv_kernel"), "depthwise", layer)
        yield Entry(f"{key}.dw_conv.bias", (*path, "conv_bias"), "same", layer)
    for name in GATE_NAMES.get(gate, ()):
        yield Entry(f"{key}.{name}", (*path, name), "gate", layer)
    if gate == "dynamic":
        yield from linear(f"{key}.key_gate", (*path, "key_gate"), layer)
        yield from linear(f"{key}.value_gate", (*path, "value_gate"), layer)


def block(key: str, path: Path, layer: int | None, **variant) -> Iterator[Entry]:
    yield from norm(f"{key}.norm1", (*path, "norm1"), layer)
    yield from attention(f"{key}.attn", (*path, "attention"), layer, **variant)
    yield from norm(f"{key}.norm2", (*path, "norm2"), layer)
    yield from mlp(f"{key}.mlp", (*path, "mlp"), layer)


def diffusion_block(key: str, path: Path, layer: int | None = None) -> Iterator[Entry]:
    yield from linear(f"{key}.norm1.proj", (*path, "norm1", "proj"), layer)
    yield from mlp(f"{key}.proj", (*path, "mlp"), layer)
    yield from norm(f"{key}.norm2", (*path, "norm2"), layer)


def time_condition(key: str, path: Path) -> Iterator[Entry]:
    yield from mlp(f"{key}timestep_proj", (*path, "time_mlp"))
    yield from mlp(f"{key}condition_proj", (*path, "condition_mlp"))


def diffusion_head(key: str, path: Path, depth: int, patch: int) -> Iterator[Entry]:
    yield from linear(f"{key}patch_embed.proj", (*path, "patch_embed"), layout="patches", patch=patch)
    yield from time_condition(f"{key}time_cond_embed.", (*path, "embed"))
    for i in range(depth):
        yield from diffusion_block(f"{key}blocks.{i}", (*path, "blocks"), i)
    yield from linear(f"{key}norm.proj", (*path, "norm", "proj"))
    yield from linear(f"{key}head", (*path, "out"))


def time_embed(key: str, path: Path) -> Iterator[Entry]:
    yield from mlp(f"{key}time_proj", (*path, "mlp"), names=("0", "2"))
    yield from norm(f"{key}norm", (*path, "norm"))


def label_embed(key: str, path: Path) -> Iterator[Entry]:
    yield Entry(f"{key}weight", (*path, "table"))
    yield from norm(f"{key}norm", (*path, "norm"))


def text_embed(key: str, path: Path) -> Iterator[Entry]:
    yield Entry(f"{key}weight", (*path, "padding"))
    yield from linear(f"{key}proj", (*path, "proj"))
    yield from norm(f"{key}norm", (*path, "norm"))


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of the whole model, ours against theirs."""
    c, half = config, config.image_depth // 2
    linear_kind = c.attention != "softmax"
    variant = {"split_q": linear_kind and c.normalization == "subtraction", "conv": False, "gate": "none"}
    gated = {**variant, "conv": c.depthwise_conv, "gate": c.kv_gate}
    softmax = {"split_q": False, "conv": False, "gate": "none"}
    period = c.softmax_period if c.attention == "hybrid" else 0

    yield from linear(
        "video_encoder.patch_embed.proj", ("video_patch_embed",), layout="patches", patch=2 * c.patch_size
    )
    for theirs, ours, first, depth, kind in (
        ("video_encoder", "condition_encoder", 0, c.condition_depth, variant),
        ("image_encoder", "encoder", 0, half, variant),
        ("image_encoder", "decoder", half, half, gated),
    ):
        for name, is_softmax, layers in layer_runs(first, depth, period):
            for layer in layers:
                chosen = softmax if is_softmax else kind
                yield from block(f"{theirs}.blocks.{layer}", (ours, "runs", name), layer - layers[0], **chosen)
    yield from norm("video_encoder.norm", ("condition_norm",))
    yield from norm("image_encoder.norm", ("image_norm",))
    yield from linear("image_encoder.patch_embed.proj", ("patch_embed",), layout="patches", patch=c.patch_size)
    yield from diffusion_head("image_decoder.", ("head",), c.head_depth, c.patch_size)
    yield Entry("mask_embed.bos_token", ("bos_token",), "row")
    yield Entry("mask_embed.mask_token", ("mask_token",), "row")
    if c.condition == "class":
        yield from label_embed("label_embed.", ("label_embed",))
    else:
        yield from text_embed("text_embed.", ("text_embed",))
    if not c.rotary:
        yield from time_embed("video_pos_embed.", ("time_embed",))


def from_torch(table: list[Entry], tensors: Mapping[str, np.ndarray], shapes: Tree) -> Tree:
    """Our tree of float32 arrays with the given shapes, filled from published tensors.

    Raises UserError listing every missing, unexpected and misshaped tensor.
    """
    flat_shapes = {path: tuple(leaf.shape) for path, leaf in flatten_dict(shapes).items()}
    arrays = {path: np.zeros(shape, np.float32) for path, shape in flat_shapes.items()}
    problems = [f"unexpected: {key}" for key in sorted(tensors.keys() - {e.key for e in table})]
    unnamed = sorted(flat_shapes.keys() - {e.path for e in table})
    problems += [f"without a published counterpart: {'/'.join(path)}" for path in unnamed]
    for entry in table:
        if entry.key not in tensors:
            problems.append(f"missing: {entry.key}")
            continue
        tensor, expected = np.asarray(tensors[entry.key], np.float32), entry.to_torch(arrays[entry.path]).shape
        if tensor.shape != expected:
            problems.append(f"misshaped: {entry.key} is {tensor.shape}, the model has {expected}")
            continue
        target = entry.within(arrays[entry.path])
        target[...] = entry.to_ours(tensor, target.shape)
    if problems:
        raise UserError("weights do not fit the model:\n  " + "\n  ".join(problems))
    return unflatten_dict(arrays)


def to_torch(table: list[Entry], tree: Tree) -> dict[str, np.ndarray]:
    """Published names and layouts of our tree."""
    flat = flatten_dict(tree)
    return {entry.key: entry.to_torch(np.asarray(flat[entry.path])) for entry in table}
