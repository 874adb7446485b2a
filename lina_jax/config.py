"""What an experiment is: frozen dataclasses made once from a ConfigDict, every error naming field and value.

`default()` is the editable form (an `ml_collections.ConfigDict` with every field), `freeze()` the validated one. The
defaults are the published class-conditional model and its training settings (paper section 4; c2i, width 768); files in
`configs/` change fields. Ours, not published, are those of `ema` and `loss.mask_ratio_per`.
"""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import ml_collections

from lina_jax import config_checks
from lina_jax.config_fields import build, editable, flatten
from lina_jax.errors import UserError

TIME_FEATURES = 256  # cosines and sines by which a time is told, as published


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. Sizes are tokens, channels and layers; `image_grid` and `condition_grid` are (rows, columns)."""

    condition: str = "class"  # class | text
    num_classes: int = 1000
    text_encoder: str = "features"  # features (frozen encoder, given as vectors) | bytes (learned with the model)
    text_length: int = 256  # text features, or bytes
    text_words: int = 64  # bytes: words they are gathered into
    text_dim: int = 2560
    byte_layers: int = 2  # residual convolutions over the words
    mask_text_padding: bool = False  # published: padding tokens are attended
    latent_channels: int = 16
    patch_size: int = 1
    image_grid: tuple[int, int] = (16, 16)
    condition_grid: tuple[int, int] = (8, 8)
    width: int = 768
    heads: int = 12
    condition_depth: int = 16
    image_depth: int = 32  # see `halves`
    mlp_ratio: int = 4
    head_width: int = 768
    head_depth: int = 6
    attention: str = "linear"  # linear | softmax | hybrid
    softmax_period: int = 8  # hybrid: layer i is softmax when i % period == period - 1
    normalization: str = "division"  # division | subtraction
    depthwise_conv: bool = True
    conv_kernel: int = 5
    kv_gate: str = "head"  # none | head | shared | key | value | decoupled | dynamic
    rotary: bool = False
    dtype: str = "bfloat16"  # of activations; parameters are always float32
    # How layers run, which changes nothing beyond rounding; "auto" and None: as suits the devices (execution.py).
    remat: str = "auto"  # auto | none | dots (keep matrix products) | full (keep layer inputs)
    scan_layers: bool | None = None  # False unrolls them: slower to compile, faster on GPUs, and of few layers on CPUs
    attention_kernel: str = "auto"  # auto | xla | pallas (on TPUs and GPUs): the core of linear attention

    @property
    def halves(self) -> tuple[int, int]:
        """Blocks that encode visible tokens, and blocks that decode all, of an odd number the larger part."""
        return self.image_depth // 2, self.image_depth - self.image_depth // 2

    @property
    def image_tokens(self) -> int:
        return self.image_grid[0] * self.image_grid[1]

    @property
    def condition_tokens(self) -> int:
        return self.condition_grid[0] * self.condition_grid[1]

    @property
    def text_tokens(self) -> int:
        """Condition tokens that a text becomes."""
        return self.text_words if self.text_encoder == "bytes" else self.text_length

    @property
    def token_dim(self) -> int:
        """Channels of one patchified token, p * p * C."""
        return self.patch_size**2 * self.latent_channels

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.image_grid[0] * self.patch_size, self.image_grid[1] * self.patch_size


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Pixels to latents. `identity` trains on pixels in [-1, 1]; the others on latents."""

    kind: str = "mar"  # identity | mar | sdxl
    path: str = ""  # its diffusers directory: to draw pictures, and to train from pixels; cached latents need none
    tile: int = 0  # latents: larger images are decoded in tiles of this side (less memory, other pixels); 0: whole
    stride: int = 16
    scaling_factor: float = 0.2325
    shift_factor: float = 0.0


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """The frozen text encoder, where model.text_encoder is features."""

    path: str = ""  # its Hugging Face directory: to draw from prompts, and to train from captions


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where records come from and how they are read (docs/data.md)."""

    path: str = ""  # a directory or a bucket's URL; several as PATH=WEIGHT,PATH=WEIGHT
    train_split: str = "train"
    validation_split: str = "validation"
    short_caption: float = 0.5  # chance of the short caption, where a record has one
    flip: bool = False  # exchange left and right of half of the pictures
    resize: bool = False  # pictures of another size; without it they are bad records
    cache: str = ""  # directory into which shards are copied before they are read; none: read in place
    read_timeout: float = 60.0  # seconds without an answer after which a read is tried again
    threads: int = 4  # that read and decode, in each worker
    workers: int = 0  # processes that read and decode; 0: threads of the training process
    prefetch: int = 4  # batches kept ready
    device_prefetch: int = 2  # batches kept ready on the devices

    @property
    def datasets(self) -> tuple[tuple[str, Fraction], ...]:
        """(path, weight) of each dataset. Raises UserError where `path` cannot be read as such."""
        entries = [entry.strip() for entry in self.path.split(",")]
        if len(entries) == 1:
            return ((self.path, Fraction(1)),)
        try:
            pairs = [(path, Fraction(weight)) for path, _, weight in (entry.rpartition("=") for entry in entries)]
        except (ValueError, ZeroDivisionError):
            pairs = []
        if not pairs or not all(path and weight > 0 for path, weight in pairs):
            raise UserError(f"data.path={self.path!r}: several datasets are PATH=WEIGHT,PATH=WEIGHT with weights > 0")
        return tuple(pairs)

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """The part of the examples that comes from each dataset."""
        weights = [weight for _, weight in self.datasets]
        return tuple(weight / sum(weights) for weight in weights)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Random draws of one training step (paper section 3)."""

    repeat: int = 4
    mask_ratio_mean: float = 1.0
    mask_ratio_std: float = 0.25
    mask_ratio_min: float = 0.7
    mask_ratio_per: str = "example"  # example | step (published: one draw per GPU batch)
    condition_dropout: float = 0.1
    shift: float = 1.0


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (published) or Muon, and the schedule. `clip_norm` 0 means no clipping.

    Under Muon `b1`, `b2` and `eps` are those of the AdamW that has the other arrays.
    """

    name: str = "adamw"  # adamw | muon (for matrices between hidden features; AdamW for the rest)
    learning_rate: float = 8e-4
    schedule: str = "constant"  # constant | cosine (to `final_learning_rate` at `steps`)
    final_learning_rate: float = 0.0
    warmup_steps: int = 10_000
    warmup_factor: float = 0.001
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.02
    clip_norm: float = 0.0
    accumulate: int = 1  # micro-batches of one step
    max_skipped: int = 50  # steps in a row with a non-finite loss or gradient before training stops


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """Average of the parameters; published: decay 0.99, every 100, no warm-up."""

    decay: float = 0.9999
    every: int = 1
    warmup: bool = True  # decay is at most (1 + n) / (10 + n) after n updates


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Decoding. Guidance goes linearly from `guidance_min` to `guidance`, or stays constant; 1 and below is none."""

    steps: int = 64
    euler_steps: int = 25
    guidance: float = 2.5
    guidance_min: float = 1.0
    guidance_schedule: str = "linear"  # linear | constant
    temperature: float = 1.0
    annealing: str = "none"  # none | linear | cosine | two_stage: Euler steps of later decoding steps (DiSA)
    annealing_min: int = 5
    stages: int = 4  # padded sizes of the visible set, one compiled encoder each


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1 and takes what is left (docs/sharding.md)."""

    replica: int = 1  # whole groups of devices joined by slow links: TPU slices, GPU nodes
    data: int = -1
    fsdp: int = 1  # parameters, moments and EMA are cut over it, batches too; 0: chosen (mesh.build)
    sequence: int = 1  # rows of the token grid; 0: chosen (mesh.of)
    tensor: int = 1  # attention heads and hidden units


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves, and what it keeps."""

    every: int = 5_000  # steps
    keep_last: int = 3  # checkpoints
    keep_every: int = 0  # also keep each step divisible by this; 0: none
    timeout: float = 1800.0  # seconds of a save, or of reading one, that end the process, to be run again; 0: never


@dataclasses.dataclass(frozen=True)
class InitFromConfig:
    """Weights that a new run starts from, and which of them (init_rules.py, docs/checkpoints.md).

    Patterns as in a shell (* is anything) go by names of arrays like decoder/runs/from_16/attention/key_scale, and are
    added to those of the named rules.
    """

    path: str = ""  # a workdir, trained or imported; none: the run starts from its own random draw
    checkpoint: int = -1  # step; -1: the latest
    ema: bool = True  # their average, or the parameters themselves
    rules: str = "all"  # all | nova | resolution (published) | interpolate (ours)
    include: tuple[str, ...] = ()  # all, if none are given
    exclude: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()  # stay as this run draws them
    recompute: tuple[str, ...] = ()  # gates: interpolated from their grid to this one
    unfit: str = "refuse"  # refuse | skip: arrays that are not there, or in another shape, or only there


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Measuring in the loop, always the same examples and draws; a cadence of 0 means at the end only."""

    every: int = 5_000  # validation losses
    examples: int = 2_048
    batch_size: int = 0  # 0: that of training
    images: int = 0  # that the EMA weights draw for FID and its kin (docs/evaluation.md); 0: none
    images_every: int = 0
    inception: str = ""  # file with the FID weights of Inception v3
    reference: str = ""  # ADM's npz file, or one that `lina_jax.evaluate` has made
    per_device: int = 16  # images that each device works on at once
    timeout: float = 21_600.0  # seconds of measuring, previews too, that end the process, to be run again; 0: never


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run tells while it runs; a cadence of 0 means at the end only. No `preview_images`, no previews."""

    every: int = 50
    preview_every: int = 5_000
    preview_prompts: tuple[str, ...] = ()  # text models; class models preview classes 0, 1, 2, ...
    preview_images: int = 16
    profile_start: int = 0
    profile_steps: int = 0
    peak_flops: float = 0.0  # of one device, for MFU; 0: as in chips.CHIPS


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    seed: int = 3
    steps: int = 2_500_000
    batch_size: int = 2_048  # global, in images
    step_timeout: float = 1800.0  # seconds after which a stalled step ends the process, to be run again; 0: never
    model: ModelConfig = ModelConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    sample: SampleConfig = SampleConfig()
    mesh: MeshConfig = MeshConfig()
    init_from: InitFromConfig = InitFromConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()


# A run may be resumed with other values of these; all other fields change the function, the optimiser or the data
# order.
FREE_ON_RESUME = (
    "steps", "mesh", "checkpoint", "eval", "log", "sample", "data.path", "data.threads", "data.prefetch",
    "data.workers", "data.device_prefetch", "data.read_timeout", "data.cache", "data.validation_split",
    "autoencoder.path", "autoencoder.tile", "text_encoder.path", "model.remat", "model.scan_layers",
    "model.attention_kernel",
    "optim.accumulate", "optim.max_skipped", "step_timeout", "init_from",
)  # fmt: skip


def default() -> ml_collections.ConfigDict:
    """Every field with its default, as the locked ConfigDict that a file in `configs/` edits and flags override."""
    return ml_collections.ConfigDict(editable(Config()), convert_dict=True).lock()


def freeze(given: Mapping[str, Any]) -> Config:
    """The validated config. Raises UserError naming the field, its value and what is allowed."""
    config = build(Config, given)
    for name, value in flatten(config).items():
        config_checks.check_value(name, value)
    config_checks.check_model(config.model, config.autoencoder)
    config_checks.check_run(config)
    return config


def differences(old: Config, new: Config) -> list[str]:
    """'model.width: 768 -> 1024' for each field that a resumed run must not change."""
    before, after = flatten(old), flatten(new)
    changed = [n for n in after if before[n] != after[n] and not free_on_resume(n)]
    # A cosine schedule ends at `steps`, so there the number of steps is part of the optimiser.
    if new.optim.schedule == "cosine" and old.steps != new.steps:
        changed.append("steps")
    # Datasets may move, their shares may not change.
    if old.data.shares != new.data.shares:
        changed.append("data.path")
    return [f"{name}: {before[name]!r} -> {after[name]!r}" for name in changed]


def free_on_resume(name: str) -> bool:
    """Whether a field ('mesh.data') changes neither the function, nor the optimiser, nor the data order."""
    return any(name == free or name.startswith(free + ".") for free in FREE_ON_RESUME)
