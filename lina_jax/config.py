"""The config of an experiment: all fields with their defaults, as frozen dataclasses.

`default()` returns the editable form (an `ml_collections.ConfigDict` with every field). `freeze()` validates it and
returns the dataclasses; every error names the field and its value. The defaults are the published class-conditional
model and its training settings (paper section 4; c2i, width 768), except for `ema` and `loss.mask_ratio_per`, which are
ours. The files in `configs/` change fields.
"""

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import ml_collections

from lina_jax import config_checks
from lina_jax.config_fields import build, editable, flatten
from lina_jax.errors import UserError

TIME_FEATURES = 256  # cosines and sines that encode a time, as published


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network. Sizes are in tokens, channels and layers."""

    condition: str = "class"  # class | text
    num_classes: int = 1000  # condition "class": number of classes
    text_encoder: str = "features"  # condition "text": features (vectors of a frozen encoder) | bytes (learned encoder)
    text_length: int = 256  # longest text, in tokens (features) or bytes (bytes); longer captions are truncated
    text_words: int = 64  # bytes: most words that the bytes of a text are gathered into
    text_dim: int = 2560  # channels of a text feature, or of a word (bytes)
    byte_layers: int = 2  # bytes: residual convolutions over the words
    mask_text_padding: bool = False  # True: padding of texts is not attended to; False: it is, as published
    latent_channels: int = 16  # channels of the autoencoder's latents; 3 for pixels
    patch_size: int = 1  # side of a token, in latents
    image_grid: tuple[int, int] = (16, 16)  # (rows, columns) of image tokens
    condition_grid: tuple[int, int] = (8, 8)  # (rows, columns) of learned condition tokens
    width: int = 768  # channels of the residual stream
    heads: int = 12  # attention heads
    condition_depth: int = 16  # blocks of the condition encoder
    image_depth: int = 32  # blocks of the encoder half and the decoder half together (see `halves`)
    mlp_ratio: int = 4  # hidden units of a block's MLP, as a multiple of `width`
    head_width: int = 768  # channels of the diffusion head
    head_depth: int = 6  # blocks of the diffusion head
    attention: str = "linear"  # linear | softmax | hybrid
    softmax_period: int = 8  # hybrid: one softmax block in so many (see `hybrid_period`)
    normalization: str = "division"  # division | subtraction: of linear attention
    depthwise_conv: bool = True  # add a depthwise convolution to the linear attention of the decoder half
    conv_kernel: int = 5  # side of that convolution's kernel; odd
    # none | head | shared | key | value | decoupled | dynamic: scales of keys and values in the linear attention of the
    # decoder half. head: learned for each token and head; shared: for each token; key, value: as head, but of only one
    # of the two; decoupled: as head, but keys have a second scale in the normalizer; dynamic: computed from the tokens.
    kv_gate: str = "head"
    rotary: bool = False  # rotary positions instead of position tables
    dtype: str = "bfloat16"  # bfloat16 | float32: of activations; parameters are always float32
    # The next three say how layers run, and change nothing beyond rounding. "auto" and None: chosen for the devices
    # (execution.py).
    remat: str = "auto"  # auto | none (keep all) | dots (keep results of matmuls) | full (keep only inputs of layers)
    scan_layers: bool | None = None  # False: unrolled; compiles slower, runs faster on GPUs (on CPUs with few layers)
    attention_kernel: str = "auto"  # auto | xla | pallas (on TPUs and GPUs): implementation of linear attention

    @property
    def halves(self) -> tuple[int, int]:
        """Number of blocks of the encoder half and of the decoder half, which gets the extra block of an odd depth."""
        return self.image_depth // 2, self.image_depth - self.image_depth // 2

    @property
    def hybrid_period(self) -> int:
        """The period of a hybrid's softmax blocks (`is_softmax_block`); 0 for other models."""
        return self.softmax_period if self.attention == "hybrid" else 0

    @property
    def image_tokens(self) -> int:
        return self.image_grid[0] * self.image_grid[1]

    @property
    def condition_tokens(self) -> int:
        return self.condition_grid[0] * self.condition_grid[1]

    @property
    def text_tokens(self) -> int:
        """Tokens of a text in the condition encoder."""
        return self.text_words if self.text_encoder == "bytes" else self.text_length

    @property
    def prompt_tokens(self) -> int:
        """Tokens of what an image is drawn from, in the condition encoder: those of its text, or one for its class."""
        return self.text_tokens if self.condition == "text" else 1

    @property
    def reads_text_features(self) -> bool:
        """Whether the model reads vectors of a frozen text encoder."""
        return self.condition == "text" and self.text_encoder == "features"

    @property
    def token_dim(self) -> int:
        """Channels of one patchified token, p * p * C."""
        return self.patch_size**2 * self.latent_channels

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.image_grid[0] * self.patch_size, self.image_grid[1] * self.patch_size


def is_softmax_block(index: int, period: int) -> bool:
    """Whether a block is one of a hybrid's softmax blocks, the last of each `period`; never if that is 0."""
    return period > 0 and index % period == period - 1


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The frozen autoencoder between pixels and latents."""

    kind: str = "mar"  # identity (train on pixels in [-1, 1]) | mar | sdxl (train on latents)
    path: str = ""  # its diffusers directory; needed to draw pictures and to train from pixels, not for stored latents
    tile: int = 0  # decode larger images in tiles of this side, in latents (less memory, other pixels); 0: never
    stride: int = 16  # pixels per side of a latent; 1 for identity
    scaling_factor: float = 0.2325  # of latents; 1 for identity
    shift_factor: float = 0.0  # of latents; 0 for identity


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """The frozen text encoder, used if model.text_encoder is "features"."""

    path: str = ""  # its Hugging Face directory; needed to draw from prompts and to train from captions


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where records come from and how they are read (docs/data.md)."""

    path: str = ""  # a directory or a bucket's URL; several as PATH=WEIGHT,PATH=WEIGHT
    train_split: str = "train"  # split to train on, or a part of one: train[500:]
    validation_split: str = "validation"  # split of the validation losses
    short_caption: float = 0.5  # probability of using the short caption of a record that has one
    flip: bool = False  # mirror pictures left to right with probability 1/2; only for records of pixels
    resize: bool = False  # resize and center-crop pictures of another size; False: they count as bad records
    cache: str = ""  # local directory that shards are copied into before they are read; "": read in place
    read_timeout: float = 60.0  # seconds after which a read that got no answer is tried again
    threads: int = 4  # threads that read and decode, in each worker
    workers: int = 0  # processes that read and decode; 0: threads of the training process do
    prefetch: int = 4  # batches kept ready in the host's memory
    device_prefetch: int = 2  # batches kept ready on the devices

    @property
    def datasets(self) -> tuple[tuple[str, Fraction], ...]:
        """(path, weight) of each dataset. Raises UserError if `path` is malformed."""
        entries = [entry.strip() for entry in self.path.split(",")]
        if len(entries) == 1:
            return ((self.path, Fraction(1)),)
        try:
            pairs = [(path, _weight(text)) for path, _, text in (entry.rpartition("=") for entry in entries)]
        except (ValueError, ZeroDivisionError):
            pairs = []
        if not pairs or not all(path and weight > 0 for path, weight in pairs):
            raise UserError(f"data.path={self.path!r}: expected PATH, or PATH=WEIGHT,PATH=WEIGHT with weights > 0")
        return tuple(pairs)

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """The share of the examples that comes from each dataset."""
        weights = [weight for _, weight in self.datasets]
        return tuple(weight / sum(weights) for weight in weights)


def _weight(text: str) -> Fraction:
    """Raises ValueError unless it is a positive number that a float can hold: a fraction has all digits of 1e400."""
    if "/" not in text and not 0 < float(text) < math.inf:
        raise ValueError(text)
    return Fraction(text)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The random draws of a training step (paper section 3)."""

    repeat: int = 4  # draws of noise level and noise for each token
    mask_ratio_mean: float = 1.0  # mean of the normal (truncated to [mask_ratio_min, 1]) of the share of hidden tokens
    mask_ratio_std: float = 0.25  # standard deviation of that normal, before it is truncated
    mask_ratio_min: float = 0.7  # smallest share of hidden tokens
    mask_ratio_per: str = "example"  # example: a share for each | step: one per batch (published: one per GPU's batch)
    condition_dropout: float = 0.1  # probability of training an example without its condition, for guidance
    shift: float = 1.0  # of noise levels, in training and sampling; above 1: towards noise; 1: none


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = "adamw"  # adamw (published) | muon (for matrices between hidden features; AdamW for the rest)
    learning_rate: float = 8e-4  # after the warm-up
    schedule: str = "constant"  # after the warm-up: constant | cosine (to `final_learning_rate` at `steps`)
    final_learning_rate: float = 0.0  # cosine: learning rate at the end
    warmup_steps: int = 10_000  # updates of linear warm-up
    warmup_factor: float = 0.001  # the warm-up starts near this times `learning_rate`
    b1: float = 0.9  # AdamW's decay of the first moment; under Muon, of the arrays left to AdamW (as `b2` and `eps`)
    b2: float = 0.95  # AdamW's decay of the second moment
    eps: float = 1e-8  # AdamW's epsilon
    weight_decay: float = 0.02  # decoupled, times the learning rate; none for scales and biases of layer norms
    clip_norm: float = 0.0  # largest norm of the whole gradient; 0: no clipping
    accumulate: int = 1  # micro-batches per step
    max_skipped: int = 50  # stop after this many steps in a row with a non-finite loss or gradient


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """The exponential moving average of the parameters. Published: decay 0.99, every 100, no warm-up."""

    decay: float = 0.9999  # share of itself that the average keeps at each of its updates
    every: int = 1  # updates of the parameters per update of the average
    warmup: bool = True  # limit the decay to (1 + n) / (10 + n) at parameter update n, counted from 1


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Sampling: of previews, of quality during training, and by default of all commands that draw."""

    steps: int = 64  # decoding steps, each of which draws a set of tokens
    euler_steps: int = 25  # Euler steps of each decoding step
    guidance: float = 2.5  # classifier-free guidance at the last decoding step; 1 and below: none
    guidance_min: float = 1.0  # linear: where guidance starts
    guidance_schedule: str = "linear"  # linear (from `guidance_min` to `guidance`) | constant (`guidance`)
    temperature: float = 1.0  # scale of the noise
    annealing: str = "none"  # none | linear | cosine | two_stage: fewer Euler steps for later tokens (DiSA)
    annealing_min: int = 5  # annealing: Euler steps at the end
    stages: int = 4  # groups of decoding steps; the visible tokens of a group are padded to one size, compiled once


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; one axis may be -1 and takes the rest (docs/sharding.md)."""

    replica: int = 1  # groups of devices between which links are slow (TPU slices, GPU nodes); shards batches
    data: int = -1  # shards batches
    fsdp: int = 1  # shards batches, and also parameters, moments and EMA; 0: chosen (mesh.build)
    sequence: int = 1  # shards the tokens of each image, by rows; 0: chosen (mesh.from_config)
    tensor: int = 1  # shards attention heads and hidden units


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves checkpoints, and which it keeps."""

    every: int = 5_000  # steps between checkpoints; the last step is always saved
    keep_last: int = 3  # number of latest checkpoints to keep
    keep_every: int = 0  # also keep the checkpoints of steps divisible by this; 0: none
    # Seconds that a save, or reading weights at the start, may take; then the process ends with exit code 75, to be run
    # again. 0: no limit.
    timeout: float = 1800.0


@dataclasses.dataclass(frozen=True)
class InitFromConfig:
    """The weights that a new run starts from (init_rules.py, docs/checkpoints.md).

    The patterns are shell patterns (* matches anything) of names of arrays, like
    decoder/runs/from_16/attention/key_scale. They are added to those of the named rules. Arrays that `exclude`
    matches, or a non-empty `include` does not, are skipped. For others the first match of `restart` and `recompute`
    decides; the rest are loaded.
    """

    path: str = ""  # the other run's workdir, trained or imported; "": start from random weights
    checkpoint: int = -1  # step to load; -1: the latest
    ema: bool = True  # load the EMA; False: the parameters themselves
    rules: str = "all"  # named patterns: all | nova | resolution (published) | interpolate (ours)
    include: tuple[str, ...] = ()  # load only these arrays; (): all
    exclude: tuple[str, ...] = ()  # do not load these arrays
    restart: tuple[str, ...] = ()  # arrays that keep this run's random draw
    recompute: tuple[str, ...] = ()  # KV gates to interpolate from the other run's token grid to this one's
    unfit: str = "refuse"  # refuse | skip: arrays of another shape, or that only one of the two models has


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Measurements during training, always of the same examples and draws. The last step is always measured."""

    every: int = 5_000  # steps between validation losses; 0: only after the last step
    examples: int = 2_048  # validation examples, at most those of the split
    batch_size: int = 0  # global validation batch, rounded up to fill all devices; 0: as training, at most `examples`
    images: int = 0  # images that the EMA draws for FID and related metrics (docs/evaluation.md), at least 2; 0: none
    images_every: int = 0  # steps between these metrics; 0: only after the last step
    inception: str = ""  # file with the FID weights of Inception v3; needed for `images`
    reference: str = ""  # .npz file with reference statistics: ADM's, or one made by `lina_jax.evaluate`
    per_device: int = 16  # images that each device draws and measures at once
    # Seconds that all measurements after a step may take, previews included; then the process ends with exit code 75,
    # to be run again. 0: no limit.
    timeout: float = 21_600.0


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run reports. The last step is always reported."""

    every: int = 50  # steps between rows of metrics; 0: only after the last step
    preview_every: int = 5_000  # steps between previews; 0: only after the last step
    preview_prompts: tuple[str, ...] = ()  # for text models; class models preview classes 0, 1, 2, ...
    preview_images: int = 16  # pictures in a preview (class models: at most one per class); 0: no previews
    profile_start: int = 0  # first step to trace into WORKDIR/profile
    profile_steps: int = 0  # number of steps to trace; 0: none
    peak_flops: float = 0.0  # peak FLOP/s of one device, for MFU; 0: from chips.CHIPS


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    seed: int = 3  # of all randomness of a run: initial weights, order of records, draws
    steps: int = 2_500_000  # training steps (global batches)
    batch_size: int = 2_048  # global, in images
    step_timeout: float = 1800.0  # seconds a step may take; then the process ends with exit code 75; 0: no limit
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


# Fields that may change when a run resumes. All others change the function, the optimizer or the data order.
FREE_ON_RESUME = (
    "steps", "mesh", "checkpoint", "eval", "log", "sample", "data.path", "data.threads", "data.prefetch",
    "data.workers", "data.device_prefetch", "data.read_timeout", "data.cache", "data.validation_split",
    "autoencoder.path", "autoencoder.tile", "text_encoder.path", "model.remat", "model.scan_layers",
    "model.attention_kernel",
    "optim.accumulate", "optim.max_skipped", "step_timeout", "init_from",
)  # fmt: skip


def default() -> ml_collections.ConfigDict:
    """All fields with their defaults, as a locked ConfigDict that files in `configs/` edit and flags override."""
    return ml_collections.ConfigDict(editable(Config()), convert_dict=True).lock()


def freeze(given: Mapping[str, Any]) -> Config:
    """The validated config. Raises UserError that names the field, its value and what is allowed."""
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
    # A cosine schedule ends at `steps`, which makes the number of steps part of the optimizer.
    if new.optim.schedule == "cosine" and old.steps != new.steps:
        changed.append("steps")
    # Datasets may move, but their shares must not change.
    if old.data.shares != new.data.shares:
        changed.append("data.path")
    return [f"{name}: {before[name]!r} -> {after[name]!r}" for name in changed]


def free_on_resume(name: str) -> bool:
    """Whether a field ('mesh.data') may change when a run resumes."""
    return any(name == free or name.startswith(free + ".") for free in FREE_ON_RESUME)
