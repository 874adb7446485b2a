"""Frozen encoders from local directories: published autoencoders and text encoders, on any mesh.

Each is a pair: a static description, which is hashable and usable inside `jax.jit`, and a tree of parameters.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from tokenizers import Tokenizer

from lina_jax import mesh as mesh_lib
from lina_jax import torch_layout
from lina_jax.config import Config
from lina_jax.errors import UserError
from lina_jax.models import vae
from lina_jax.models.text import Phi, PhiConfig
from lina_jax.models.vae import AutoencoderKL, VaeConfig
from lina_jax.torch_files import Tensors, open_tensors, read_json

Tree = dict[str, Any]

# Fields of config.json for which our modules support one value only.
VAE_FIXED = {
    "in_channels": 3, "out_channels": 3, "act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True,
    "mid_block_add_attention": True, "latents_mean": None, "latents_std": None,
}  # fmt: skip
PHI_FIXED = {
    "model_type": "phi", "hidden_act": "gelu_new", "qk_layernorm": False, "rope_scaling": None, "rope_type": "default",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A KL autoencoder without its parameters."""

    config: VaeConfig
    graphdef: nnx.GraphDef

    @property
    def stride(self) -> int:
        """Pixels per latent, along each axis."""
        return self.config.stride

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def encode(self, params: Tree, images: jax.Array) -> jax.Array:
        """Images (B, H, W, 3) in [-1, 1] -> moments (B, h, w, 2C) float32 of unscaled latents."""
        return nnx.merge(self.graphdef, params).encode(images)

    def decode(self, params: Tree, latents: jax.Array) -> jax.Array:
        """Scaled latents (B, h, w, C) -> images (B, H, W, 3) float32, near [-1, 1]."""
        return nnx.merge(self.graphdef, params).decode(vae.unscale(self.config, latents))

    def decode_tiled(self, params: Tree, latents: jax.Array, tile: int, overlap: int) -> jax.Array:
        """Nearly `decode`, with the memory use of tile x tile latents; see AutoencoderKL.decode_tiled."""
        return nnx.merge(self.graphdef, params).decode_tiled(vae.unscale(self.config, latents), tile, overlap)


class Tokens(NamedTuple):
    """Captions as a text encoder reads them."""

    ids: np.ndarray  # (B, L) int32, zeros after the end
    lengths: np.ndarray  # (B,) int32
    cut: np.ndarray  # (B,) bool, whether the caption was truncated


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A text encoder and its tokenizer, without parameters."""

    config: PhiConfig
    graphdef: nnx.GraphDef
    length: int  # tokens of a caption; longer ones are truncated
    tokenizer: Tokenizer = dataclasses.field(compare=False, repr=False)

    @property
    def dim(self) -> int:
        return self.config.hidden_size

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Tokenize captions without special tokens; "" has length 0."""
        tokens = Tokens(
            np.zeros((len(captions), self.length), np.int32),
            np.zeros(len(captions), np.int32),
            np.zeros(len(captions), bool),
        )
        for i, encoding in enumerate(self.tokenizer.encode_batch(list(captions), add_special_tokens=False)):
            tokens.lengths[i] = len(encoding.ids)
            tokens.ids[i, : len(encoding.ids)] = encoding.ids
            tokens.cut[i] = bool(encoding.overflowing)
        return tokens

    def features(self, params: Tree, ids: jax.Array) -> jax.Array:
        """ids (B, L) -> the last hidden states (B, L, D) float32; rows past a caption's length are meaningless."""
        return nnx.merge(self.graphdef, params)(ids)


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The frozen encoders that a run loads, with their parameters; None for those that it does not need.

    Methods take the parameters separately, so that compiled programs receive them as arguments.
    """

    autoencoder: Autoencoder | None = None
    text: TextEncoder | None = None
    tile: int = 0  # side of a tile in latents: larger images are decoded in tiles; 0: never
    weights: Tree = dataclasses.field(default_factory=dict, repr=False)

    def moments(self, weights: Tree, images: jax.Array) -> jax.Array:
        """Images (B, H, W, 3) in [-1, 1] -> moments (B, h, w, 2C); without an autoencoder the images themselves."""
        return self.autoencoder.encode(weights["autoencoder"], images) if self.autoencoder else images

    def pixels(self, weights: Tree, latents: jax.Array) -> jax.Array:
        """Scaled latents (B, h, w, C) -> images (B, H, W, 3) near [-1, 1]; without an autoencoder the latents."""
        if not self.autoencoder:
            return latents
        if self.tile:
            decode = functools.partial(self.autoencoder.decode_tiled, tile=self.tile, overlap=self.tile // 4)
        else:
            decode = self.autoencoder.decode
        return _one_at_a_time(decode, weights["autoencoder"], latents)


def _one_at_a_time(decode: Callable[[Tree, jax.Array], jax.Array], params: Tree, latents: jax.Array) -> jax.Array:
    """decode(params, latents), (B, h, w, C) -> (B, H, W, 3), one image per device at a time.

    An image's feature maps are a thousand times the size of its latents: those of many images would not fit. A batch
    that the mesh does not divide is decoded at once.
    """
    if not isinstance(latents.shape[0], int):  # a program for any batch size, on one device
        return jax.lax.map(lambda one: decode(params, one[None])[0], latents)
    parts = mesh_lib.batch_parts(jax.sharding.get_abstract_mesh())
    rounds, rest = divmod(len(latents), parts)
    if rounds <= 1 or rest:
        return decode(params, latents)
    params = jax.tree.map(lambda x: mesh_lib.constrain(x, *[None] * x.ndim), params)  # gathered once, not each round
    by_round = jnp.swapaxes(latents.reshape(parts, rounds, *latents.shape[1:]), 0, 1)
    by_round = mesh_lib.constrain(by_round, None, "batch", None, None, None)
    images = jax.lax.map(functools.partial(decode, params), by_round)
    images = jnp.swapaxes(mesh_lib.constrain(images, None, "batch", None, None, None), 0, 1)
    return images.reshape(len(latents), *images.shape[2:])


def load_encoders(config: Config, mesh: Mesh) -> Encoders:
    """The encoders whose directories the config names. Raises UserError if they cannot be loaded or do not fit it."""
    ours, weights, autoencoder, text = config.autoencoder, {}, None, None
    if ours.path and ours.kind != "identity":
        autoencoder, weights["autoencoder"] = load_autoencoder(ours.path, mesh=mesh, dtype=config.model.dtype)
        theirs = autoencoder.config
        for name, wanted, there in (
            ("autoencoder.stride", ours.stride, theirs.stride),
            ("model.latent_channels", config.model.latent_channels, theirs.latent_channels),
            ("autoencoder.scaling_factor", ours.scaling_factor, theirs.scaling_factor),
            ("autoencoder.shift_factor", ours.shift_factor, theirs.shift_factor),
        ):
            if wanted != there:
                raise UserError(f"{name}={wanted}: the autoencoder in {ours.path} has {there}")
    if config.text_encoder.path and config.model.reads_text_features:
        text, weights["text"] = load_text_encoder(
            config.text_encoder.path, length=config.model.text_length, mesh=mesh, dtype=config.model.dtype
        )
        if text.dim != config.model.text_dim:
            raise UserError(
                f"model.text_dim={config.model.text_dim}: the encoder in {config.text_encoder.path} has {text.dim}"
            )
    return Encoders(autoencoder, text, ours.tile, weights)


def load_autoencoder(
    directory: str | Path, *, mesh: Mesh | None = None, dtype: str = "bfloat16"
) -> tuple[Autoencoder, Tree]:
    """A diffusers AutoencoderKL: config.json and safetensors. Raises UserError naming what is wrong and where.

    Parameters are stored in `dtype`, norms in float32. Without a scaling_factor in config.json, the published one is
    used.
    """
    directory = _existing(directory, "a diffusers AutoencoderKL directory")
    raw, tensors = read_json(directory / "config.json"), open_tensors(directory)
    tensors = tensors.renamed(torch_layout.current_name)
    config = _vae_config(directory / "config.json", raw, tensors)
    module = nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    graphdef, params = _load(directory, module, list(torch_layout.autoencoder(config)), tensors, mesh, dtype)
    return Autoencoder(config, graphdef), params


def describe_autoencoder(directory: Path) -> VaeConfig:
    """The config of a diffusers AutoencoderKL, without its weights. Raises UserError naming what is wrong and where."""
    tensors = open_tensors(directory).renamed(torch_layout.current_name)
    return _vae_config(directory / "config.json", read_json(directory / "config.json"), tensors)


def load_text_encoder(
    directory: str | Path,
    *,
    length: int = 256,
    mesh: Mesh | None = None,
    dtype: str = "bfloat16",
) -> tuple[TextEncoder, Tree]:
    """A Hugging Face PhiForCausalLM: config.json and safetensors. Raises UserError naming what is wrong and where.

    Its tokenizer.json is in the directory, or in `tokenizer/` beside it. Parameters are stored in `dtype`, norms in
    float32.
    """
    directory = _existing(directory, "a Hugging Face PhiForCausalLM directory")
    config = _phi_config(directory / "config.json", read_json(directory / "config.json"))
    words = _tokenizer(directory, length, config.vocab_size)
    tensors = open_tensors(directory).renamed(lambda name: None if name.startswith("lm_head.") else name)
    module = nnx.eval_shape(lambda: Phi(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    graphdef, params = _load(directory, module, list(torch_layout.phi(config)), tensors, mesh, dtype)
    return TextEncoder(config, graphdef, length, words), params


def _existing(directory: str | Path, expected: str) -> Path:
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected {expected}")
    return directory


def _load(
    directory: Path,
    module: nnx.Module,
    table: list[torch_layout.Entry],
    tensors: Tensors,
    mesh: Mesh | None,
    dtype: str,
) -> tuple[nnx.GraphDef, Tree]:
    """The graph of an abstract module and its parameters, each placed in its sharding as soon as it is read."""
    graphdef, shapes = abstract(module, mesh, dtype)
    leaves = flatten_dict(shapes)

    def place(path, array):
        if mesh is None:
            return jnp.asarray(array)
        return jax.make_array_from_callback(array.shape, leaves[path].sharding, lambda where: array[where])

    try:
        return graphdef, torch_layout.from_torch(table, tensors, shapes, place)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error


def abstract(module: nnx.Module, mesh: Mesh | None, dtype: str) -> tuple[nnx.GraphDef, Tree]:
    """The graph of an abstract module and abstract parameters: in `dtype`, norms in float32, sharded over any mesh."""
    graphdef, state = nnx.split(module)

    def one(path, variable):
        shape = variable.get_value().shape
        norm = any(str(name).startswith("norm") for name in path)
        axes = mesh and mesh_lib.sharding(mesh, *_cuttable(mesh, shape, variable.get_metadata("axes")))
        return jax.ShapeDtypeStruct(shape, jnp.float32 if norm else jnp.dtype(dtype), sharding=axes)

    return graphdef, unflatten_dict({path: one(path, variable) for path, variable in nnx.to_flat_state(state)})


def _cuttable(mesh: Mesh, shape: tuple[int, ...], names: Sequence[str | None]) -> tuple[str | None, ...]:
    """Logical names of all axes, None for those that the mesh does not divide (it is chosen for the trained model)."""
    names = (None,) * (len(shape) - len(names)) + tuple(names)  # the leading axis of stacked layers is never sharded

    def parts(name):
        return math.prod(mesh.shape[axis] for axis in mesh_lib.RULES[name])

    return tuple(name if name and size % parts(name) == 0 else None for name, size in zip(names, shape, strict=True))


def _vae_config(path: Path, raw: Mapping[str, Any], tensors: Tensors) -> VaeConfig:
    _refuse_others(path, raw, VAE_FIXED)
    channels = raw.get("block_out_channels")
    if not (
        isinstance(channels, list)
        and channels
        and all(isinstance(c, int) and c > 0 and c % vae.GROUPS == 0 for c in channels)
    ):
        raise UserError(f"{path}: block_out_channels={channels!r} is not a list of multiples of {vae.GROUPS}")
    mar = any(name.startswith(f"encoder.down_blocks.{len(channels) - 1}.attentions.") for name in tensors)
    if raw.get("scaling_factor") is None:
        raw = {**raw, "scaling_factor": vae.PUBLISHED["mar" if mar else "sdxl"].scaling_factor}
    return VaeConfig(
        block_out_channels=tuple(channels),
        layers_per_block=_positive(path, raw, "layers_per_block", int),
        latent_channels=_positive(path, raw, "latent_channels", int),
        scaling_factor=_positive(path, raw, "scaling_factor", float),
        shift_factor=_number(path, {"shift_factor": raw.get("shift_factor") or 0.0}, "shift_factor", float),
        last_level_attention=mar,
    )


def _phi_config(path: Path, raw: Mapping[str, Any]) -> PhiConfig:
    rope = raw.get("rope_parameters")  # newer files keep the fields of rotary embeddings here
    raw = {**raw, **rope} if isinstance(rope, dict) else raw
    _refuse_others(path, raw, PHI_FIXED)
    config = PhiConfig(
        **{field.name: _positive(path, raw, field.name, field.type) for field in dataclasses.fields(PhiConfig)}
    )
    heads = config.num_attention_heads
    if raw.get("num_key_value_heads") not in (None, heads):
        raise UserError(f"{path}: num_key_value_heads={raw['num_key_value_heads']} is not num_attention_heads={heads}")
    if config.hidden_size % heads:
        raise UserError(f"{path}: hidden_size={config.hidden_size} is not divisible by num_attention_heads={heads}")
    width = config.rotary_width
    if width % 2 or not 0 < width <= config.head_width:
        given = f"partial_rotary_factor={config.partial_rotary_factor}"
        raise UserError(f"{path}: {given} rotates {width} of {config.head_width} channels; it must be an even number")
    return config


def _refuse_others(path: Path, raw: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for name, supported in fixed.items():
        if raw.get(name, supported) != supported:
            raise UserError(f"{path}: {name}={raw[name]!r} is not supported, only {supported!r}")


def _number(path: Path, raw: Mapping[str, Any], name: str, kind: type) -> Any:
    value = raw.get(name)
    allowed = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, allowed) or not math.isfinite(value):
        raise UserError(f"{path}: {name}={value!r} is not a number of type {kind.__name__}")
    return kind(value)


def _positive(path: Path, raw: Mapping[str, Any], name: str, kind: type) -> Any:
    value = _number(path, raw, name, kind)
    if value <= 0:
        raise UserError(f"{path}: {name}={value} is not positive")
    return value


def _tokenizer(directory: Path, length: int, vocabulary: int) -> Tokenizer:
    places = [directory / "tokenizer.json", directory.parent / "tokenizer" / "tokenizer.json"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UserError(f"no tokenizer: expected {' or '.join(map(str, places))}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: not a tokenizer of the tokenizers library ({error})") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocabulary:
        raise UserError(f"{path}: token {largest} is beyond vocab_size={vocabulary} of {directory / 'config.json'}")
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return tokenizer
