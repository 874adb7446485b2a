"""How layers run: what a config leaves open becomes what plans best on its devices, and what each way takes.

Remat, scans and kernels change nothing beyond rounding, so that a run may go on in another way.
"""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from lina_jax import chips
from lina_jax.chips import Chip
from lina_jax.config import Config, ModelConfig
from lina_jax.models import tiles
from lina_jax.models.draws import most_visible

FIELDS = ("remat", "scan_layers", "attention_kernel")  # of the model
OPEN = ("auto", None)  # of these: as suits the devices
RECOMPUTED = {"none": 0.0, "dots": 0.05, "full": 1 / 3}  # of the work, done again in the backward pass
# Arrays of a token's width that a block keeps for the backward pass, and that there are beside them: dots keeps what
# matrix products (query, key, value, projection, four of the hidden layer, one more) and convolutions give, and the
# block's input; none also what lies between them. With kernels: fitted to what is planned for GPUs.
KEPT, WORKING = {"none": 26, "dots": 11, "full": 1}, 52
KEPT_WITH_KERNELS, WORKING_WITH_KERNELS = {"none": 15, "dots": 8, "full": 1}, 26
FULL = 0.92  # of the memory: what an estimate may fill; compilers need some room


def settled(config: Config, mesh: Mesh) -> Config:
    """The config with a choice for each of FIELDS that it leaves open, for the devices of a mesh.

    GPUs keep for the gradient as much as by estimate fits. TPUs, and GPUs that `chips` does not know, keep what matrix
    products give, CPUs everything.
    """
    device = mesh.devices.flat[0]
    chip = chips.of_kind(device.device_kind)
    config = _filled(config, **ways(config.model, chip)[0])
    if device.platform == "gpu" and chip:
        sharded = mesh.shape["fsdp"] * mesh.shape["tensor"]
        held = _state_bytes(config.model) / sharded + weights(config.model)
        trials = [_filled(config, remat=remat) for remat in RECOMPUTED]
        images = config.batch_size / mesh.size
        return next((c for c in trials if held + activations(c, images) < FULL * chip.memory), trials[-1])
    return _filled(config, remat="none" if device.platform == "cpu" else "dots")


def for_sampling(config: Config, mesh: Mesh) -> Config:
    """`settled`, but GPUs scan, too: unrolled, what samples takes 2 % less time and five times as much to compile."""
    return _filled(_filled(config, scan_layers=True), **of(settled(config, mesh).model))


def for_all_platforms(config: Config) -> Config:
    """The config with the choices of a program that runs anywhere."""
    return _filled(config, remat="none", **ways(config.model, None)[0])


def ways(model: ModelConfig, chip: Chip | None) -> list[dict[str, Any]]:
    """Choices of scan_layers and attention_kernel for a chip, best first, that agree with what the model sets."""
    gpu = chip is not None and chip.platform == "cuda"
    kernels = ["xla"]
    if gpu and model.attention != "softmax" and model.width // model.heads <= tiles.GPU_LANES[1]:
        kernels = ["pallas", "xla"]
    if model.attention_kernel not in OPEN:
        kernels = [model.attention_kernel]
    scan = not gpu if model.scan_layers in OPEN else model.scan_layers
    return [{"scan_layers": scan, "attention_kernel": kernel} for kernel in kernels]


def described(remat: str, scan_layers: bool, attention_kernel: str) -> str:
    return f"remat {remat}, layers {'scanned' if scan_layers else 'unrolled'}, attention by {attention_kernel}"


def of(model: Any) -> dict[str, Any]:
    """FIELDS of a model, or of anything that has them."""
    return {name: getattr(model, name) for name in FIELDS}


def activations(config: Config, images: float) -> float:
    """Bytes of a device with so many images of a batch, by estimate: what blocks keep, and what the widest works on.

    Nothing is saved by `tensor` and `sequence`: they cut hidden units and heads, or tokens, but each device of a group
    has a part of all the group's images.
    """
    model, width = config.model, config.model.width * 2
    condition, image = model.condition_tokens, model.image_tokens
    text = model.text_tokens if model.condition == "text" else 1
    encoded = 2 * condition + most_visible(config.loss, image) + image  # by both halves
    blocks = model.condition_depth * (text + condition) + model.image_depth // 2 * encoded
    head = config.loss.repeat * image * model.head_width * 2
    kept, working = (KEPT, WORKING) if model.attention_kernel == "xla" else (KEPT_WITH_KERNELS, WORKING_WITH_KERNELS)
    kept = kept[model.remat] * (blocks * width + model.head_depth * head)
    return images * (kept + working * max((condition + max(image, text)) * width, head)) / config.optim.accumulate


def weights(model: ModelConfig) -> float:
    """Bytes of all blocks' matrices as they are gathered."""
    return 2 * 12 * model.width**2 * (model.condition_depth + model.image_depth)


def _state_bytes(model: ModelConfig) -> float:
    """Of blocks' matrices, float32: parameters, gradients, two moments, EMA."""
    return 5 * 2 * weights(model)


def _filled(config: Config, **choices: Any) -> Config:
    """The config with these choices for fields of the model that are open."""
    choices = {name: value for name, value in choices.items() if getattr(config.model, name) in OPEN}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **choices))
