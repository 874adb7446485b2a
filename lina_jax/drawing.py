"""Drawing as all commands do it: which weights, encoders and settings, then image after image.

Commands, previews and reports share it; `generate` has the decoding loop itself.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils

from lina_jax import config_checks, decode, encoders, kernel_check, platforms, preemption, progress, state
from lina_jax import mesh as mesh_lib
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import Config, MeshConfig, SampleConfig, TextEncoderConfig
from lina_jax.encoders import TextEncoder
from lina_jax.errors import UserError
from lina_jax.generate import DecodingState, Stepper
from lina_jax.state import Blueprint, Tree
from lina_jax.workdir import load_config


class Sampler:
    """Draws images of any number of conditions, step by step, in batches of one size."""

    def __init__(self, blueprint: Blueprint, settings: SampleConfig, batch_size: int, stepper: Stepper | None = None):
        """`stepper` is one of this blueprint, to reuse programs that it has compiled."""
        self.blueprint, self.batch_size = blueprint, batch_size
        self.stepper = stepper or Stepper(blueprint)
        self.schedule = self.stepper.schedule(settings)

    def __call__(self, params: Tree, frozen: Tree, conditions: Sequence[str] | Sequence[int], seed: int) -> np.ndarray:
        """uint8 images (N, H, W, 3) of captions or class numbers; image i has number i of this seed."""
        images = []
        with progress.bar(len(conditions), leave=False) as bar:
            for states in self.batches(params, frozen, conditions, seed):
                (last,) = collections.deque(states, maxlen=1)
                images.append(multihost_utils.process_allgather(self.stepper.pixels(last), tiled=True))
                bar.update(min(self.batch_size, len(conditions) - bar.n))
                preemption.raise_if_preempted()
        return np.concatenate(images)[: len(conditions)]

    def batches(
        self, params: Tree, frozen: Tree, conditions: Sequence[str] | Sequence[int], seed: int
    ) -> list[Iterator[DecodingState]]:
        """Each batch's states, computed on demand; the last batch is padded with its last condition."""
        config, made = self.blueprint.config, []
        for start in range(0, len(conditions), self.batch_size):
            chunk = list(conditions[start : start + self.batch_size])
            padded = chunk + [chunk[-1]] * (self.batch_size - len(chunk))
            condition = encode_conditions(config, padded, self.blueprint.encoders.text)
            numbers = start + np.arange(self.batch_size)
            made.append(self.stepper(params, frozen, condition, numbers, seed, self.schedule))
        return made


def encode_conditions(
    config: Config, conditions: Sequence[str] | Sequence[int], text_encoder: TextEncoder | None = None
) -> dict[str, np.ndarray]:
    """The condition of the sampler for captions or class numbers (B,). Raises UserError for an unknown class."""
    model = config.model
    if model.condition == "class":
        for label in conditions:
            if not 0 <= label <= model.num_classes:
                raise UserError(f"label {label}: expected 0 to {model.num_classes - 1} ({model.num_classes}: no class)")
        return {"label": np.asarray(conditions, np.int32)}
    if model.text_encoder == "bytes":
        text, length = decode.encode_text(conditions, model.text_length)
        unit, cut = "bytes", [len(prompt.encode()) > model.text_length for prompt in conditions]
    else:
        unit, (text, length, cut) = "tokens", text_encoder.tokenize(conditions)
    if jax.process_index() == 0:
        for prompt in dict.fromkeys(itertools.compress(conditions, cut)):
            logging.warning("only the first %d %s of prompt %.60r are read", text.shape[1], unit, prompt)
    return {"text": text, "text_length": length}


def batch_for(blueprint: Blueprint, wanted: int, most: int = 64) -> int:
    """The smaller of `wanted` and `most`, rounded up so that devices share a batch evenly."""
    return mesh_lib.round_up_batch(blueprint.mesh, min(wanted, most))


def load(
    workdir: Path,
    config: Config | None = None,
    *,
    ema: bool = True,
    step: int | None = None,
    mesh_config: MeshConfig | None = None,
) -> tuple[Blueprint, Tree, Tree, int]:
    """(blueprint over all devices, parameters, frozen arrays, step) of a training directory.

    `config` replaces the directory's own, for example to draw with other encoders. By default of `mesh_config`, every
    device draws images of its own. Raises UserError if the model cannot be sharded over the mesh.
    """
    config = dataclasses.replace(config or load_config(workdir), mesh=mesh_config or mesh_lib.parse(""))
    platforms.cache_programs(workdir / "compiled")
    mesh = mesh_lib.build(config.mesh)
    mesh_lib.check_model(config.model, mesh)
    config = kernel_check.resolve_kernel(config, mesh)
    blueprint = state.make_blueprint(config, mesh, encoders.load_encoders(config, mesh))
    checkpoints = Checkpoints(workdir, config.checkpoint, create=False)
    params, frozen, step = checkpoints.restore_weights(blueprint, ema=ema, step=step)
    return blueprint, params, frozen, step


def with_encoders(config: Config, autoencoder: str, text_encoder: str) -> Config:
    """The config with these directories of frozen encoders; "" leaves the config's own.

    Raises UserError for an encoder that the model does not use.
    """
    if autoencoder and config.autoencoder.kind == "identity":
        raise UserError(f"--autoencoder={autoencoder}: this model generates pixels and needs no autoencoder")
    if text_encoder and not config.model.reads_text_features:
        raise UserError(f"--text_encoder={text_encoder}: this model does not read features of a text encoder")
    if autoencoder:
        config = dataclasses.replace(config, autoencoder=dataclasses.replace(config.autoencoder, path=autoencoder))
    return dataclasses.replace(config, text_encoder=TextEncoderConfig(text_encoder)) if text_encoder else config


def drawable_config(workdir: Path, autoencoder: str, text_encoder: str) -> Config:
    """`with_encoders` of a training directory's config. Raises UserError if an encoder to draw with is missing."""
    config = with_encoders(load_config(workdir), autoencoder, text_encoder)
    if missing := missing_encoder(config):
        raise UserError(missing)
    return config


def missing_encoder(config: Config) -> str | None:
    """Which frozen encoder the config does not name, so that the model cannot draw pictures yet; None if it can."""
    if config.autoencoder.kind != "identity" and not config.autoencoder.path:
        return "the model generates latents, but has no autoencoder: give --autoencoder=DIR (autoencoder.path)"
    if config.model.reads_text_features and not config.text_encoder.path:
        return "the model reads text features, but has no text encoder: give --text_encoder=DIR (text_encoder.path)"
    return None


def settings_of_flags(config: Config, values: flags.FlagValues) -> SampleConfig:
    """`sample_settings` with the flags of `define_settings_flags`."""
    names = ("steps", "euler_steps", "guidance", "temperature")
    return sample_settings(config, {name: values[name].value for name in names})


def sample_settings(config: Config, overrides: dict[str, object]) -> SampleConfig:
    """The config's settings with these overrides (None: not given). Raises UserError for impossible ones."""
    given = {name: value for name, value in overrides.items() if value is not None}
    settings = dataclasses.replace(config.sample, **given)
    if "guidance" in given:  # a ramp must not start above the guidance that was asked for
        settings = dataclasses.replace(settings, guidance_min=min(settings.guidance_min, settings.guidance))
    for name in ("steps", "euler_steps"):
        if not 1 <= (value := getattr(settings, name)) <= config_checks.MOST_STEPS:
            raise UserError(f"--{name}={value}: expected 1 to {config_checks.MOST_STEPS}")
    for name in ("guidance", "temperature"):
        value = getattr(settings, name)
        if not 0 <= value <= config_checks.LARGEST:
            raise UserError(f"--{name}={value}: must be in [0, {config_checks.LARGEST:.3g}]")
    if settings.annealing != "none" and settings.annealing_min > settings.euler_steps:
        raise UserError(
            f"--euler_steps={settings.euler_steps}: must be at least sample.annealing_min={settings.annealing_min}"
        )
    return settings


def check_prompt(config: Config, prompt: str) -> None:
    """Raises UserError unless the model can read all of it."""
    if not prompt.strip():
        raise UserError(f"prompt {prompt!r} is blank: say what to draw")
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise UserError(f"prompt {prompt!r} is not UTF-8") from error
    if config.model.text_encoder == "bytes" and size > config.model.text_length:
        raise UserError(f"prompt {prompt!r} has {size} bytes, more than model.text_length={config.model.text_length}")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed={seed}: must be in [0, 2**31)")


def check_num(num: int) -> None:
    if num < 1:
        raise UserError(f"--num={num}: must be at least 1")


def define_weights_flags() -> None:
    """Define the flags that say which weights draw, and on which mesh."""
    flags.DEFINE_string("workdir", None, "training directory")
    flags.DEFINE_bool("raw", False, "use the raw parameters instead of the EMA")
    flags.DEFINE_integer("checkpoint", None, "step to load; default: the latest")
    flags.DEFINE_string("autoencoder", "", "directory of the autoencoder; default: the config's autoencoder.path")
    flags.DEFINE_string("text_encoder", "", "directory of the text encoder; default: the config's text_encoder.path")
    mesh_help = "devices along each axis, such as fsdp=2,sequence=4; default: each device draws its own images"
    flags.DEFINE_string("mesh", "", mesh_help)


def define_settings_flags() -> None:
    """Define the flags of `sample_settings`."""
    flags.DEFINE_float("guidance", None, "classifier-free guidance; 1 = none; default: the config's")
    flags.DEFINE_integer("steps", None, "decoding steps; default: the config's")
    flags.DEFINE_integer("euler_steps", None, "Euler steps of each decoding step; default: the config's")
    flags.DEFINE_float("temperature", None, "scale of the noise; default: the config's")
