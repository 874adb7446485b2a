"""Checks of a config's values; each message names the field, its value and what is allowed."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lina_jax import init_rules
from lina_jax.errors import UserError

if TYPE_CHECKING:
    from lina_jax.config import AutoencoderConfig, Config, MeshConfig, ModelConfig

CHOICES = {
    "model.condition": ("class", "text"),
    "model.text_encoder": ("features", "bytes"),
    "model.attention": ("linear", "softmax", "hybrid"),
    "model.normalization": ("division", "subtraction"),
    "model.attention_kernel": ("auto", "xla", "pallas"),
    "model.kv_gate": ("none", "head", "shared", "key", "value", "decoupled", "dynamic"),
    "model.dtype": ("bfloat16", "float32"),
    "model.remat": ("auto", "none", "dots", "full"),
    "autoencoder.kind": ("identity", "mar", "sdxl"),
    "loss.mask_ratio_per": ("example", "step"),
    "optim.name": ("adamw", "muon"),
    "optim.schedule": ("constant", "cosine"),
    "sample.guidance_schedule": ("linear", "constant"),
    "init_from.rules": tuple(init_rules.SETS),
    "init_from.unfit": init_rules.UNFIT,
    "sample.annealing": ("none", "linear", "cosine", "two_stage"),
}

# Fields that may be zero; every other number must be positive (or negative, see below).
MAY_BE_ZERO = frozenset({
    "seed", "autoencoder.shift_factor", "autoencoder.tile",
    "loss.mask_ratio_min", "loss.condition_dropout", "optim.final_learning_rate",
    "optim.warmup_steps", "optim.warmup_factor", "optim.weight_decay", "optim.clip_norm", "optim.b1", "optim.b2",
    "ema.decay", "sample.temperature", "sample.guidance", "sample.guidance_min",
    "checkpoint.keep_every", "checkpoint.timeout", "eval.every", "eval.batch_size", "eval.images", "eval.images_every",
    "eval.timeout",
    "log.every", "log.preview_every", "log.preview_images", "log.profile_start", "log.profile_steps", "log.peak_flops",
    "data.short_caption", "data.workers", "step_timeout",
})  # fmt: skip
MAY_BE_NEGATIVE = frozenset({
    "mesh.replica", "mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor",
    "autoencoder.shift_factor", "loss.mask_ratio_mean", "init_from.checkpoint",
})  # fmt: skip

SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
LONGEST_S = 1e9  # about the longest time that threads can wait
PADDING_ROWS = 512  # of the text padding table, as published
MOST_STEPS = 100_000  # of decoding, and of Euler in each, as schedules are arrays

COUNTED_BY_HOSTS = ("checkpoint.", "eval.", "log.")  # all other numbers reach programs, which count in 32 bits


def check_value(name: str, value: Any) -> None:
    """Raises UserError unless a single field, by its full name, has an allowed value."""
    if name in CHOICES and value not in CHOICES[name]:
        raise UserError(f"{name}={value!r}: expected one of {', '.join(CHOICES[name])}")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{name}={value!r}: must be finite")
        in_programs = not name.startswith(COUNTED_BY_HOSTS)
        if isinstance(number, float) and number and in_programs and not SMALLEST <= abs(number) <= LARGEST:
            raise UserError(f"{name}={value!r}: out of the range of float32, in which programs compute")
        if isinstance(number, int) and abs(number) >= 2**31 and in_programs:
            raise UserError(f"{name}={value!r}: must be below 2**31")
        if name.endswith("timeout") and number > LONGEST_S:
            raise UserError(f"{name}={value!r}: must be at most {LONGEST_S:.0e} s")
        if name in ("sample.steps", "sample.euler_steps") and number > MOST_STEPS:
            raise UserError(f"{name}={value!r}: must be at most {MOST_STEPS}")
        if number < 0 and name not in MAY_BE_NEGATIVE:
            raise UserError(f"{name}={value!r}: must not be negative")
        if number == 0 and name not in MAY_BE_ZERO and name not in MAY_BE_NEGATIVE:
            raise UserError(f"{name}={value!r}: must be positive")


def check_model(model: "ModelConfig", autoencoder: "AutoencoderConfig") -> None:
    """Raises UserError unless sizes fit each other and variants are compatible."""

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise UserError(message)

    require(model.width % model.heads == 0, f"model.width={model.width} is not divisible by model.heads={model.heads}")
    require(model.width % 4 == 0, f"model.width={model.width}: position tables need a multiple of 4")
    require(model.image_depth > 1, f"model.image_depth={model.image_depth}: must be at least 2, a block for each half")
    require(model.conv_kernel % 2 == 1, f"model.conv_kernel={model.conv_kernel}: must be odd")
    h, w = model.image_grid
    if autoencoder.kind == "identity":
        require(
            model.latent_channels == 3 and autoencoder.stride == 1,
            f"model.latent_channels={model.latent_channels}, autoencoder.stride={autoencoder.stride}: "
            "pixels (autoencoder.kind=identity) have 3 channels and stride 1",
        )
        require(
            autoencoder.scaling_factor == 1.0 and autoencoder.shift_factor == 0.0,
            f"autoencoder.scaling_factor={autoencoder.scaling_factor}, shift_factor={autoencoder.shift_factor}: "
            "pixels (autoencoder.kind=identity) are not scaled (1.0, 0.0)",
        )
    if model.attention == "softmax":
        require(
            not model.depthwise_conv and model.kv_gate == "none",
            f"model.attention=softmax takes neither model.depthwise_conv={model.depthwise_conv} nor "
            f"model.kv_gate={model.kv_gate}: set them to False and none",
        )
    if model.attention == "hybrid":
        deepest = max(model.condition_depth, model.image_depth)
        require(
            model.softmax_period <= deepest,
            f"model.attention=hybrid with model.softmax_period={model.softmax_period}: "
            f"no stack has that many blocks (at most {deepest}), so none would be softmax",
        )
    if model.rotary:
        head = model.width // model.heads
        require(
            model.normalization == "division" or model.attention == "softmax",
            f"model.rotary=True with model.normalization={model.normalization}: rotary linear attention needs division",
        )
        pairs = sum(math.ceil(r / 2) for r in (head // 8, *[(head - head // 8) // 2] * 2))
        require(2 * pairs == head, f"model.rotary=True: head width {head} (= width / heads) must be a multiple of 32")
    if model.condition == "text":
        name = "text_words" if model.text_encoder == "bytes" else "text_length"
        require(
            model.text_tokens <= PADDING_ROWS,
            f"model.{name}={model.text_tokens}: the padding table has only {PADDING_ROWS} rows",
        )
    require(h * w > 1, f"model.image_grid={model.image_grid}: needs more than one token")


def check_run(config: "Config") -> None:
    """Raises UserError unless the settings of training and sampling fit each other."""
    loss, optim = config.loss, config.optim
    if not 0 <= loss.condition_dropout < 1:
        raise UserError(f"loss.condition_dropout={loss.condition_dropout}: must be in [0, 1)")
    if not 0 <= loss.mask_ratio_min < 1:
        raise UserError(f"loss.mask_ratio_min={loss.mask_ratio_min}: must be in [0, 1)")
    far = 4 * loss.mask_ratio_std
    if not loss.mask_ratio_min - far <= loss.mask_ratio_mean <= 1 + far:  # draws in float32 do not reach the tails
        raise UserError(
            f"loss.mask_ratio_mean={loss.mask_ratio_mean}: must be within 4 * loss.mask_ratio_std="
            f"{loss.mask_ratio_std} of the range from loss.mask_ratio_min={loss.mask_ratio_min} to 1"
        )
    if config.data.short_caption > 1:
        raise UserError(f"data.short_caption={config.data.short_caption}: must be in [0, 1]")
    _ = config.data.datasets  # raises if data.path is malformed
    for name, decay in (("optim.b1", optim.b1), ("optim.b2", optim.b2), ("ema.decay", config.ema.decay)):
        if np.float32(decay) >= 1:
            raise UserError(f"{name}={decay}: must be in [0, 1), also when rounded to float32")
    if config.init_from.checkpoint < -1:
        raise UserError(f"init_from.checkpoint={config.init_from.checkpoint}: must be a step, or -1 for the latest")
    if config.eval.images == 1:
        raise UserError("eval.images=1: must be at least 2, or 0 for none")
    if config.eval.images and not config.eval.inception:
        raise UserError(f"eval.images={config.eval.images}: set eval.inception to the weights of Inception v3")
    sample = config.sample
    if sample.annealing != "none" and sample.annealing_min > sample.euler_steps:
        raise UserError(
            f"sample.annealing_min={sample.annealing_min}: must be at most sample.euler_steps={sample.euler_steps}"
        )
    check_micro_batches(config)
    if optim.schedule == "cosine" and config.steps <= optim.warmup_steps:
        raise UserError(
            f"steps={config.steps}: a cosine schedule must be longer than optim.warmup_steps={optim.warmup_steps}"
        )
    check_mesh(config.mesh)


def check_mesh(mesh: "MeshConfig") -> None:
    """Raises UserError if more than one axis is to be inferred."""
    if len(inferred := [f"mesh.{axis}" for axis, size in vars(mesh).items() if size == -1]) > 1:
        raise UserError(f"{' and '.join(inferred)} are -1: only one axis can be inferred")


def check_micro_batches(config: "Config") -> None:
    """Raises UserError unless the batch divides into micro-batches; also for a batch chosen after the config."""
    accumulate = config.optim.accumulate
    if config.batch_size % accumulate:
        raise UserError(f"batch_size={config.batch_size} is not divisible by optim.accumulate={accumulate}")
