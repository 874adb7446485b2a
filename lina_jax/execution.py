"""How layers run: what a config leaves open becomes what plans best on its devices, and what each way takes.

Remat, scans and kernels change nothing beyond rounding, so that a run may go on in another way.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lina_jax import chips
from lina_jax.config import Config, ModelConfig
from lina_jax.models import tiles
from lina_jax.models.draws import max_visible

FIELDS = ("remat", "scan_layers", "attention_kernel")  # of the model
OPEN = ("auto", None)  # of these: as suits the devices
RECOMPUTED = {"none": 0.0, "dots": 0.05, "full": 1 / 3}  # the share of a step's FLOPs that a policy computes twice
# KEPT: arrays of a token's width that a block keeps for the backward pass. dots keeps what matrix products (query, key,
# value, projection, four of the hidden layer, one more) and convolutions give, and the block's input; none also what
# lies between them. WORKING: such arrays that are alive at once inside the widest block.
KEPT, WORKING = {"none": 26, "dots": 11, "full": 1}, 52
# The same with kernels, fitted to what is planned for GPUs.
KEPT_WITH_KERNELS, WORKING_WITH_KERNELS = {"none": 15, "dots": 8, "full": 1}, 26
FULL = 0.92  # of the memory: what an estimate may fill; compilers need some room


def resolved(config: Config, mesh: Mesh, encoders: float = 0.0) -> Config:
    """The config with a choice for each of FIELDS that it leaves open, for the devices of a mesh.

    `encoders` are bytes that each device holds of frozen ones. GPUs keep for the gradient as much as by estimate fits.
    TPUs keep what matrix products give, and so do GPUs that do not tell their memory; CPUs keep everything.
    """
    platform = mesh.devices.flat[0].platform
    config = _filled(config, **ways(config.model, platform)[0])
    memory = _memory(mesh) if platform == "gpu" else 0.0
    if not memory:
        return _filled(config, remat="none" if platform == "cpu" else "dots")
    tensor = mesh.shape["tensor"]
    parts, images = mesh.shape["fsdp"] * tensor, config.batch_size / (mesh.size / tensor)
    room = FULL * memory - encoders - _state_bytes(config.model) / parts
    trials = [_filled(config, remat=remat) for remat in RECOMPUTED]
    return next((trial for trial in trials if step_bytes(trial, images, parts) < room), trials[-1])


def for_inference(config: Config, mesh: Mesh) -> Config:
    """`resolved`, but GPUs scan, too: unrolled, what samples takes 2 % less time and five times as much to compile."""
    return _filled(_filled(config, scan_layers=True), **of(resolved(config, mesh).model))


def for_all_platforms(config: Config) -> Config:
    """The config with the choices of a program that runs anywhere."""
    return _filled(config, remat="none", **ways(config.model, "cpu")[0])


def ways(model: ModelConfig, platform: str) -> list[dict[str, Any]]:
    """Choices of scan_layers and attention_kernel for a platform, best first, that agree with what the model sets."""
    channels = model.width // model.heads
    # More of float32 exceeds the shared memory of an A100.
    most = tiles.GPU_LANES[1] if model.dtype == "bfloat16" else tiles.GPU_LANES[1] // 2
    kernels = ["pallas"] if platform == "gpu" and model.attention != "softmax" and channels <= most else []
    kernels = [*kernels, "xla"] if model.attention_kernel in OPEN else [model.attention_kernel]
    scan = platform != "gpu" if model.scan_layers in OPEN else model.scan_layers
    return [{"scan_layers": scan, "attention_kernel": kernel} for kernel in kernels]


def policies(model: ModelConfig) -> list[str]:
    """Of remat, those that agree with what the model sets."""
    return list(RECOMPUTED) if model.remat in OPEN else [model.remat]


def described(remat: str, scan_layers: bool, attention_kernel: str) -> str:
    return f"remat {remat}, layers {'scanned' if scan_layers else 'unrolled'}, attention by {attention_kernel}"


def of(model: Any) -> dict[str, Any]:
    """FIELDS of a model, or of anything that has them."""
    return {name: getattr(model, name) for name in FIELDS}


def step_bytes(config: Config, images: float, parts: int, gathered: float = 1.0) -> float:
    """Bytes that a device needs beside its part of the state, by estimate.

    Gradients, as the state cut into `parts`; activations of so many images; the share `gathered` of blocks' matrices.
    """
    gradients = 4 * _matrix_parameters(config.model) / parts
    return gradients + activation_bytes(config, images) + gathered * gathered_bytes(config.model)


def activation_bytes(config: Config, images: float) -> float:
    """Bytes of a device with so many images of a batch, by estimate: what blocks keep, and what the widest works on.

    Of S devices that share an image by `sequence`, each counts as having 1 / S of it. What `tensor` saves is not
    counted: it shards hidden units and heads, but neither the stream nor the results of projections.
    """
    model, size = config.model, jnp.dtype(config.model.dtype).itemsize
    condition, image = model.condition_tokens, model.image_tokens
    text = model.text_tokens if model.condition == "text" else 1
    visible, (encoders, decoders) = max_visible(config.loss, image), model.halves
    stacks = (
        (model.condition_depth, text + condition),
        (encoders, condition + visible),
        (decoders, condition + image),
    )
    width = model.width * size
    head = config.loss.repeat * image * model.head_width * size
    kept, working = (KEPT, WORKING) if model.attention_kernel == "xla" else (KEPT_WITH_KERNELS, WORKING_WITH_KERNELS)
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
    """Bytes of all blocks' matrices as they are gathered."""
    return jnp.dtype(model.dtype).itemsize * _matrix_parameters(model)


def _state_bytes(model: ModelConfig) -> float:
    """Of blocks' matrices, float32: parameters, two moments, EMA."""
    return 4 * 4 * _matrix_parameters(model)


def _matrix_parameters(model: ModelConfig) -> float:
    return 12 * model.width**2 * (model.condition_depth + model.image_depth)


def _memory(mesh: Mesh) -> float:
    """Bytes that programs of a GPU have: as the device says, or where it is not there, as `chips` does; 0: unknown."""
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    try:
        told = own[0].memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # of a device that is not there
        told = {}
    chip = chips.of_kind(own[0].device_kind)
    return told.get("bytes_limit", chip.memory if chip else 0.0)


def _filled(config: Config, **choices: Any) -> Config:
    """The config with these choices for fields of the model that are open."""
    choices = {name: value for name, value in choices.items() if getattr(config.model, name) in OPEN}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **choices))
