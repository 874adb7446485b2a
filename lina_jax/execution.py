"""How layers run: remat, scans and kernels that a config leaves open, as planned fastest on its devices; their memory.

Remat, scans and kernels change nothing beyond rounding, so a run may resume with other choices.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lina_jax import chips
from lina_jax.chips import Chip
from lina_jax.config import Config, ModelConfig
from lina_jax.models import tiles
from lina_jax.models.draws import max_visible

FIELDS = ("remat", "scan_layers", "attention_kernel")  # of ModelConfig
OPEN = ("auto", None)  # values of these that leave the choice open
RECOMPUTED = {"none": 0.0, "dots": 0.05, "full": 1 / 3}  # share of a step's FLOPs that is recomputed
# KEPT: how many arrays of a token's width a block keeps for the backward pass. "dots" keeps the results of matmuls
# (query, key, value, projection, four of the hidden layer, one more) and of convolutions, and the block's input; "none"
# also keeps what lies between them. WORKING: how many such arrays are live at once inside the widest block. All are for
# the published mlp_ratio, 4.
KEPT, WORKING = {"none": 26, "dots": 11, "full": 1}, 52
# The same with kernels in unrolled layers, fitted to plans for GPUs. In scanned layers kernels save nothing on TPUs and
# less on GPUs, which is not counted.
KEPT_WITH_KERNELS, WORKING_WITH_KERNELS = {"none": 15, "dots": 8, "full": 1}, 26
FULL = 0.92  # share of the memory that an estimate may fill; compilers need some room


def resolve(config: Config, mesh: Mesh, encoders: float = 0.0) -> Config:
    """The config with a choice for each of FIELDS that it leaves open, for the devices of a mesh.

    `encoders`: bytes per device of frozen encoders. GPUs keep as many activations for the backward pass as are
    estimated to fit. TPUs, and GPUs whose memory is unknown, keep the results of matmuls. CPUs keep everything.
    """
    device = mesh.devices.flat[0]
    platform = device.platform
    config = _filled(config, **scan_and_kernel_options(config.model, platform, chips.of_kind(device.device_kind))[0])
    memory = _memory(mesh) if platform == "gpu" else 0.0
    if not memory:
        return _filled(config, remat="none" if platform == "cpu" else "dots")
    tensor = mesh.shape["tensor"]
    parts, images = mesh.shape["fsdp"] * tensor, config.batch_size / (mesh.size / tensor)
    room = FULL * memory - encoders - _state_bytes(config.model) / parts
    trials = [_filled(config, remat=remat) for remat in RECOMPUTED]
    return next((trial for trial in trials if step_bytes(trial, images, parts) < room), trials[-1])


def for_inference(config: Config, mesh: Mesh) -> Config:
    """`resolve`, but GPUs also scan layers: unrolled, sampling takes 2 % less time, compiling five times as long."""
    return resolve(_filled(config, scan_layers=True), mesh)


def for_all_platforms(config: Config) -> Config:
    """The config with the choices for a program that runs on any platform."""
    return _filled(config, remat="none", **scan_and_kernel_options(config.model, "cpu")[0])


def scan_and_kernel_options(model: ModelConfig, platform: str, chip: Chip | None = None) -> list[dict[str, Any]]:
    """Choices of scan_layers and attention_kernel for a platform, the best first, which keep what the model sets.

    `chip` is None if it is unknown.
    """
    kernels = ["pallas", "xla"] if _kernels_pay(model, platform, chip) else ["xla"]
    if model.attention_kernel not in OPEN:
        kernels = [model.attention_kernel]
    scan = platform != "gpu" if model.scan_layers in OPEN else model.scan_layers
    return [{"scan_layers": scan, "attention_kernel": kernel} for kernel in kernels]


def _kernels_pay(model: ModelConfig, platform: str, chip: Chip | None) -> bool:
    channels, bfloat16 = model.width // model.heads, model.dtype == "bfloat16"
    if model.attention == "softmax":
        return False
    if platform == "gpu":  # more float32 channels exceed the shared memory of an A100
        return channels <= (tiles.GPU_LANES[1] if bfloat16 else tiles.GPU_LANES[1] // 2)
    # Products of more heads at once are mostly masked; those of float32 are exact, and slower than XLA's.
    return chip is not None and chip.kernels and bfloat16 and tiles.heads_at_once(model.heads, channels) <= 4


def policies(model: ModelConfig) -> list[str]:
    """The choices of remat: that of the model, or all if it leaves it open."""
    return list(RECOMPUTED) if model.remat in OPEN else [model.remat]


def described(remat: str, scan_layers: bool, attention_kernel: str) -> str:
    return f"remat {remat}, layers {'scanned' if scan_layers else 'unrolled'}, attention kernel {attention_kernel}"


def choices_of(model: Any) -> dict[str, Any]:
    """{name: value} of FIELDS of a model, or of anything that has them."""
    return {name: getattr(model, name) for name in FIELDS}


def step_bytes(config: Config, images: float, parts: int, gathered: float = 1.0) -> float:
    """Estimated bytes per device beside its shard of the state.

    Gradients, sharded into `parts` like the state; activations of `images` images; the share `gathered` of all blocks'
    matrices.
    """
    gradients = 4 * _matrix_parameters(config.model) / parts
    return gradients + activation_bytes(config, images) + gathered * gathered_bytes(config.model)


def activation_bytes(config: Config, images: float) -> float:
    """Estimated bytes of activations with this many images per device: what blocks keep, and what the widest works on.

    Each of S devices that share an image over `sequence` counts 1 / S of it. Savings by `tensor` are not counted: it
    shards hidden units and heads, but not the residual stream or the results of projections.
    """
    model, size = config.model, jnp.dtype(config.model.dtype).itemsize
    condition, image = model.condition_tokens, model.image_tokens
    text = model.prompt_tokens
    visible, (encoders, decoders) = max_visible(config.loss, image), model.halves
    stacks = (
        (model.condition_depth, text + condition),
        (encoders, condition + visible),
        (decoders, condition + image),
    )
    width = model.width * size
    head = config.loss.repeat * image * model.head_width * size
    saving = model.attention_kernel != "xla" and not model.scan_layers
    kept, working = (KEPT_WITH_KERNELS, WORKING_WITH_KERNELS) if saving else (KEPT, WORKING)
    blocks = sum(depth * tokens for depth, tokens in stacks) * width
    total = kept[model.remat] * (blocks + model.head_depth * head)
    alive = working * max((condition + max(image, text)) * width, head)
    if model.attention != "linear":  # scores of softmax, in the model's dtype and in float32
        score = model.heads * (size + 4)
        if model.remat == "none":
            layers = 1 if model.attention == "softmax" else 1 / model.softmax_period
            total += layers * sum(depth * tokens**2 for depth, tokens in stacks) * score
        else:
            alive += (condition + max(image, text)) ** 2 * score
    return images * (total + alive) / config.optim.accumulate


def gathered_bytes(model: ModelConfig) -> float:
    """Bytes of all blocks' matrices when gathered."""
    return jnp.dtype(model.dtype).itemsize * _matrix_parameters(model)


def _state_bytes(model: ModelConfig) -> float:
    """Bytes of the state of blocks' matrices, float32: parameters, two moments, EMA."""
    return 4 * 4 * _matrix_parameters(model)


def _matrix_parameters(model: ModelConfig) -> float:
    return (4 + 2 * model.mlp_ratio) * model.width**2 * (model.condition_depth + model.image_depth)


def _memory(mesh: Mesh) -> float:
    """Bytes of a GPU's memory for programs: from the device or, for absent ones, from `chips`; 0: unknown."""
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    try:
        stats = own[0].memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # an absent device
        stats = {}
    chip = chips.of_kind(own[0].device_kind)
    return stats.get("bytes_limit", chip.memory if chip else 0.0)


def _filled(config: Config, **choices: Any) -> Config:
    """The config with these choices for fields of the model that it leaves open."""
    choices = {name: value for name, value in choices.items() if getattr(config.model, name) in OPEN}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **choices))
