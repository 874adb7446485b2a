"""Small random checkpoints in the directory layouts in which encoders are published."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from golden_case import by_published_names
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lina_jax import torch_layout
from lina_jax.models.text import Phi, PhiConfig
from lina_jax.models.vae import AutoencoderKL, VaeConfig

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
WORDS = ["a large red circle left of a small blue square", "two green triangles on a white background, Ünï 猫"]


def write_autoencoder(
    directory: Path,
    *,
    channels: tuple[int, ...] = (32, 64),
    layers_per_block: int = 1,
    latent_channels: int = 4,
    mar: bool = False,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    dtype: str = "float32",
    shards: int = 1,
    old_names: bool = False,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Write a diffusers AutoencoderKL (config.json, safetensors); returns its tensors by name.

    With `old_names`, attention has its tensor names of 2022.
    """
    config = VaeConfig(channels, layers_per_block, latent_channels, 1.0, 0.0, mar)
    table = list(torch_layout.autoencoder(config))
    tensors = _random(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0), dtype=np.float32), table, dtype, seed)
    content = {
        "_class_name": "AutoencoderKLMAR" if mar else "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(channels),
        "in_channels": 3,
        "latent_channels": latent_channels,
        "layers_per_block": layers_per_block,
        "norm_num_groups": 32,
        "out_channels": 3,
    }
    given = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    content |= {name: value for name, value in given.items() if value is not None}
    stored = {_old_name(name): array for name, array in tensors.items()} if old_names else tensors
    _write(directory, content, stored, "diffusion_pytorch_model", shards)
    return tensors


def write_phi(
    directory: Path,
    *,
    width: int = 32,
    layers: int = 2,
    heads: int = 4,
    vocab_size: int = 320,
    dtype: str = "bfloat16",
    shards: int = 1,
    tokenizer: bool = True,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Write a Hugging Face PhiForCausalLM (config.json, safetensors, tokenizer.json); returns its tensors by name."""
    config = PhiConfig(width, layers, heads, 4 * width, vocab_size, 0.5, 1e-5, 10_000.0)
    table = list(torch_layout.phi(config))
    tensors = _random(lambda: Phi(config, rngs=nnx.Rngs(0), dtype=np.float32), table, dtype, seed)
    content = {
        "architectures": ["PhiForCausalLM"],
        "hidden_act": "gelu_new",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "model_type": "phi",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "partial_rotary_factor": 0.5,
        "qk_layernorm": False,
        "rope_scaling": None,
        "rope_theta": 10_000.0,
        "torch_dtype": dtype,
        "vocab_size": vocab_size,
    }
    unused = {"lm_head.weight": np.zeros((vocab_size, width)), "lm_head.bias": np.zeros(vocab_size)}
    stored = tensors | {name: array.astype(DTYPES[dtype]) for name, array in unused.items()}
    _write(directory, content, stored, "model", shards)
    if tokenizer:
        write_tokenizer(directory / "tokenizer.json", vocab_size)
    return tensors


def write_tokenizer(path: Path, vocab_size: int = 320) -> None:
    """Write a byte-level BPE tokenizer like the one published with Phi, which encodes and decodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def _random(make, table, dtype: str, seed: int) -> dict[str, np.ndarray]:
    """Random tensors by their published names, at a scale that keeps activations of order 1."""
    rng = np.random.default_rng(seed)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make)))
    named = by_published_names(table, jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes))

    def drawn(name, shape):
        if len(shape) > 1:
            return rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return (1.0 if name.endswith("weight") else 0.0) + 0.1 * rng.standard_normal(shape)

    return {name: drawn(name, array.shape).astype(DTYPES[dtype]) for name, array in named.items()}


def _old_name(name: str) -> str:
    if "attentions" in name:
        for old, new in torch_layout.OLD_ATTENTION_NAMES.items():
            name = name.replace(f".{new}.", f".{old}.")
    return name


def _write(directory: Path, config: dict, tensors: dict[str, np.ndarray], stem: str, shards: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(tensors, directory / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    names, where = sorted(tensors), {}
    for i in range(shards):
        file, part = f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors", names[i::shards]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
