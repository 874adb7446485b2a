"""Published PyTorch state dicts: tables of names and layouts, for import and export."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from lina_jax.config import ModelConfig
from lina_jax.errors import UserError
from lina_jax.models.attention import GATE_NAMES
from lina_jax.models.text import PhiConfig
from lina_jax.models.transformer import layer_runs
from lina_jax.models.vae import VaeConfig

KeyPath = tuple[str, ...]
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published tensor: its array in our tree, the layer and part of the array that it fills, its layout."""

    key: str
    path: KeyPath
    layout: str = "same"
    layer: int | None = None
    part: tuple[int, slice] | None = None  # (axis, slice), for tensors that we store as one array
    patch: int = 1  # side of a patch, in the "patches" layout

    def within(self, array: np.ndarray) -> np.ndarray:
        """The view of our whole array that this tensor fills."""
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
        if self.layout == "convolution":  # (out, in, k, k)
            return rearrange(tensor, "o i p q -> p q i o")
        return tensor.reshape(shape)

    def published_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The published shape of this tensor, given the shape of our whole array."""
        return self.to_torch(np.broadcast_to(np.float32(0), shape)).shape  # takes no memory

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """This tensor in the published layout, from our whole array (all layers, all parts)."""
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
        if self.layout == "convolution":
            return rearrange(view, "p q i o -> o i p q")
        if self.layout == "row":
            return view[None]
        return view.reshape(-1) if self.layout == "flat" else view


def linear(
    key: str, path: KeyPath, layer: int | None = None, layout: str = "linear", patch: int = 1
) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", (*path, "kernel"), layout, layer, patch=patch)
    yield Entry(f"{key}.bias", (*path, "bias"), "flat", layer)


def joined(key: str, path: KeyPath, parts: Mapping[str, slice], layer: int | None = None) -> Iterator[Entry]:
    """Published linear maps key.PART that are slices of one of ours."""
    for name, where in parts.items():
        yield Entry(f"{key}.{name}.weight", (*path, "kernel"), "linear", layer, (1, where))
        yield Entry(f"{key}.{name}.bias", (*path, "bias"), "flat", layer, (0, where))


def norm(key: str, path: KeyPath, layer: int | None = None) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", (*path, "scale"), "same", layer)
    yield Entry(f"{key}.bias", (*path, "bias"), "same", layer)


def mlp(key: str, path: KeyPath, layer: int | None = None, names: tuple[str, str] = ("fc1", "fc2")) -> Iterator[Entry]:
    for theirs, ours in zip(names, ("fc1", "fc2"), strict=True):
        yield from linear(f"{key}.{theirs}", (*path, ours), layer)


def attention(key: str, path: KeyPath, layer: int | None, *, split_q: bool, conv: bool, gate: str) -> Iterator[Entry]:
    """One attention layer; with `split_q`, as in the subtraction variants, q is separate from k and v."""
    if split_q:
        yield from joined(key, (*path, "qkv"), {"q": slice(0, 1), "kv": slice(1, 3)}, layer)
    else:
        yield from linear(f"{key}.qkv", (*path, "qkv"), layer)
    yield from linear(f"{key}.proj", (*path, "proj"), layer)
    if conv:
        yield Entry(f"{key}.dw_conv.weight", (*path, "conv_kernel"), "depthwise", layer)
        yield Entry(f"{key}.dw_conv.bias", (*path, "conv_bias"), "same", layer)
    for name in GATE_NAMES.get(gate, {}).values():
        yield Entry(f"{key}.{name}", (*path, name), "gate", layer)
    if gate == "dynamic":
        yield from linear(f"{key}.key_gate", (*path, "key_gate"), layer)
        yield from linear(f"{key}.value_gate", (*path, "value_gate"), layer)


def block(key: str, path: KeyPath, layer: int | None, **variant) -> Iterator[Entry]:
    yield from norm(f"{key}.norm1", (*path, "norm1"), layer)
    yield from attention(f"{key}.attn", (*path, "attention"), layer, **variant)
    yield from norm(f"{key}.norm2", (*path, "norm2"), layer)
    yield from mlp(f"{key}.mlp", (*path, "mlp"), layer)


def diffusion_block(key: str, path: KeyPath, layer: int | None = None) -> Iterator[Entry]:
    yield from linear(f"{key}.norm1.proj", (*path, "norm1", "proj"), layer)
    yield from mlp(f"{key}.proj", (*path, "mlp"), layer)
    yield from norm(f"{key}.norm2", (*path, "norm2"), layer)


def time_condition(key: str, path: KeyPath) -> Iterator[Entry]:
    yield from mlp(f"{key}timestep_proj", (*path, "time_mlp"))
    yield from mlp(f"{key}condition_proj", (*path, "condition_mlp"))


def diffusion_head(key: str, path: KeyPath, depth: int, patch: int) -> Iterator[Entry]:
    yield from linear(f"{key}patch_embed.proj", (*path, "patch_embed"), layout="patches", patch=patch)
    yield from time_condition(f"{key}time_cond_embed.", (*path, "embed"))
    for i in range(depth):
        yield from diffusion_block(f"{key}blocks.{i}", (*path, "blocks"), i)
    yield from linear(f"{key}norm.proj", (*path, "norm", "proj"))
    yield from linear(f"{key}head", (*path, "out"))


def time_embed(key: str, path: KeyPath) -> Iterator[Entry]:
    yield from mlp(f"{key}time_proj", (*path, "mlp"), names=("0", "2"))
    yield from norm(f"{key}norm", (*path, "norm"))


def label_embed(key: str, path: KeyPath) -> Iterator[Entry]:
    yield Entry(f"{key}weight", (*path, "table"))
    yield from norm(f"{key}norm", (*path, "norm"))


def text_embed(key: str, path: KeyPath) -> Iterator[Entry]:
    yield Entry(f"{key}weight", (*path, "padding"))
    yield from linear(f"{key}proj", (*path, "proj"))
    yield from norm(f"{key}norm", (*path, "norm"))


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of the whole model."""
    c, (encoders, decoders) = config, config.halves
    linear_kind = c.attention != "softmax"
    variant = {"split_q": linear_kind and c.normalization == "subtraction", "conv": False, "gate": "none"}
    gated = {**variant, "conv": c.depthwise_conv, "gate": c.kv_gate}
    softmax = {"split_q": False, "conv": False, "gate": "none"}

    yield from linear(
        "video_encoder.patch_embed.proj", ("video_patch_embed",), layout="patches", patch=2 * c.patch_size
    )
    for theirs, ours, first, depth, kind in (
        ("video_encoder", "condition_encoder", 0, c.condition_depth, variant),
        ("image_encoder", "encoder", 0, encoders, variant),
        ("image_encoder", "decoder", encoders, decoders, gated),
    ):
        for name, is_softmax, layers in layer_runs(first, depth, c.hybrid_period):
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


def thirds(*names: str) -> dict[str, slice]:
    """The parts of a joined array for queries, keys and values, which are separate when published."""
    return {name: slice(i, i + 1) for i, name in enumerate(names)}


def phi(config: PhiConfig) -> Iterator[Entry]:
    """Every tensor of a PhiForCausalLM that features depend on."""
    yield Entry("model.embed_tokens.weight", ("table",))
    for i in range(config.num_hidden_layers):
        key, path = f"model.layers.{i}", ("blocks",)
        yield from norm(f"{key}.input_layernorm", (*path, "norm"), i)
        yield from joined(f"{key}.self_attn", (*path, "qkv"), thirds("q_proj", "k_proj", "v_proj"), i)
        yield from linear(f"{key}.self_attn.dense", (*path, "proj"), i, "from_heads")
        yield from mlp(f"{key}.mlp", (*path, "mlp"), i)
    yield from norm("model.final_layernorm", ("norm",))


def convolution(key: str, path: KeyPath) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", (*path, "kernel"), "convolution")
    yield Entry(f"{key}.bias", (*path, "bias"))


def residual_block(key: str, path: KeyPath, shortcut: bool = False) -> Iterator[Entry]:
    for i in "12":
        yield from norm(f"{key}.norm{i}", (*path, f"norm{i}"))
        yield from convolution(f"{key}.conv{i}", (*path, f"conv{i}"))
    if shortcut:
        yield from convolution(f"{key}.conv_shortcut", (*path, "shortcut"))


def spatial_attention(key: str, path: KeyPath) -> Iterator[Entry]:
    yield from norm(f"{key}.group_norm", (*path, "norm"))
    yield from joined(key, (*path, "qkv"), thirds("to_q", "to_k", "to_v"))
    yield from linear(f"{key}.to_out.0", (*path, "proj"))


def autoencoder(config: VaeConfig) -> Iterator[Entry]:
    """Every tensor of a diffusers AutoencoderKL."""
    down, depth = config.block_out_channels, config.layers_per_block
    last = len(down) - 1
    for half, levels, resampler, channels, blocks, attention in (
        ("encoder", "down_blocks", "downsamplers", down, depth, config.last_level_attention),
        ("decoder", "up_blocks", "upsamplers", down[::-1], depth + 1, False),
    ):
        yield from convolution(f"{half}.conv_in", (half, "conv_in"))
        for i in range(last + 1):
            key, path = f"{half}.{levels}.{i}", (half, "levels", f"{i}")
            for j in range(blocks):
                shortcut = j == 0 and channels[max(i - 1, 0)] != channels[i]
                yield from residual_block(f"{key}.resnets.{j}", (*path, "blocks", f"{j}"), shortcut)
                if attention and i == last:
                    yield from spatial_attention(f"{key}.attentions.{j}", (*path, "attentions", f"{j}"))
            if i < last:
                yield from convolution(f"{key}.{resampler}.0.conv", (*path, "conv"))
        yield from residual_block(f"{half}.mid_block.resnets.0", (half, "middle", "block1"))
        yield from spatial_attention(f"{half}.mid_block.attentions.0", (half, "middle", "attention"))
        yield from residual_block(f"{half}.mid_block.resnets.1", (half, "middle", "block2"))
        yield from norm(f"{half}.conv_norm_out", (half, "norm"))
        yield from convolution(f"{half}.conv_out", (half, "conv_out"))
    yield from convolution("quant_conv", ("encoder", "moments"))
    yield from convolution("post_quant_conv", ("decoder", "latents"))


OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_name(key: str) -> str:
    """The name that `autoencoder` uses for a tensor, which may have another name in old checkpoints."""
    *block, name, kind = key.split(".")
    if "attentions" in block and name in OLD_ATTENTION_NAMES:
        return ".".join([*block, OLD_ATTENTION_NAMES[name], kind])
    return key


def from_torch(
    table: list[Entry],
    tensors: Mapping[str, np.ndarray],
    shapes: Tree,
    place: Callable[[KeyPath, np.ndarray], Any] = lambda path, array: array,
) -> Tree:
    """Our tree of arrays with the given shapes and dtypes, filled from published tensors.

    Arrays are filled one after the other, and each is passed to `place` as soon as it is complete. If `tensors` reads
    on access, host memory for one array suffices. Raises UserError listing every missing, unexpected and misshaped
    tensor, before any is read if `tensors` has `shapes` (torch_files.Tensors).
    """
    given = tensors.shapes if hasattr(tensors, "shapes") else {key: np.shape(t) for key, t in tensors.items()}
    if problems := mismatches(table, given, shapes):
        raise UserError("weights do not fit the model: " + "; ".join(problems))
    sources = defaultdict(list)
    for entry in table:
        sources[entry.path].append(entry)
    leaves, tree = flatten_dict(shapes), {}
    for path, entries_of_array in sources.items():
        array = np.zeros(leaves[path].shape, leaves[path].dtype)
        for entry in entries_of_array:
            target = entry.within(array)
            target[...] = entry.to_ours(np.asarray(tensors[entry.key]), target.shape)
        tree[path] = place(path, array)
    return unflatten_dict(tree)


def published_shapes(table: list[Entry], shapes: Tree) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of our tree. Every array must have an entry."""
    leaves = flatten_dict(shapes)
    return {entry.key: entry.published_shape(leaves[entry.path].shape) for entry in table}


def mismatches(table: list[Entry], given: Mapping[str, tuple[int, ...]], shapes: Tree) -> list[str]:
    """Why published tensors of the `given` shapes do not fill our tree, a line for each tensor."""
    wanted = published_shapes(table, shapes)
    problems = [f"unexpected: {key}" for key in sorted(given.keys() - wanted.keys())]
    problems += [f"without a published counterpart: {name}" for name in unpublished(table, shapes)]
    for key, shape in wanted.items():
        if key not in given:
            problems.append(f"missing: {key}")
        elif tuple(given[key]) != shape:
            problems.append(f"misshaped: {key} is {tuple(given[key])}, the model has {shape}")
    return problems


def unpublished(table: list[Entry], shapes: Tree) -> list[str]:
    """The names of our arrays that have no published counterpart."""
    return sorted("/".join(path) for path in flatten_dict(shapes).keys() - {entry.path for entry in table})
