"""Draw images from a trained model.

python -m lina_jax.sample --workdir=DIR (--prompt=TEXT | --prompts_file=FILE | --label=K) --out=DIR
    [--num=4] [--seed=0] [--guidance=G] [--steps=K] [--euler_steps=E] [--temperature=T] [--raw] [--checkpoint=STEP]
    [--batch_size=64]

Writes 00000.png, ..., settings.json, and grid.png of the first 100. Image i is a function of (weights, settings,
prompt, seed, i). If OUT is from an earlier call, the pictures that its settings.json lists are replaced, and surplus
ones removed. Another number of pictures (up to --batch_size) compiles anew; WORKDIR/compiled keeps the programs.
"""

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils

from lina_jax import (
    config_checks,
    config_file,
    decode,
    encoders,
    entry,
    hosts,
    kernel_check,
    metrics,
    output_files,
    pictures,
    preemption,
    progress,
    state,
)
from lina_jax import mesh as mesh_lib
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import Config, MeshConfig, SampleConfig, TextEncoderConfig
from lina_jax.encoders import TextEncoder
from lina_jax.errors import UserError
from lina_jax.generate import DecodingState, Stepper
from lina_jax.state import Blueprint, Tree
from lina_jax.workdir import kind_of_weights, load_config

_GRID, _SETTINGS = "grid.png", "settings.json"  # beside the pictures
_GRID_PICTURES = 100  # a grid of thousands would not fit in memory


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


class Previews:
    """Pictures drawn by a run's EMA weights, with the same conditions, seed and settings every time."""

    def __init__(self, blueprint: Blueprint, workdir: Path):
        config = blueprint.config
        self._workdir = workdir
        self._conditions: list = list(range(min(config.log.preview_images, config.model.num_classes)))
        if config.model.condition == "text":
            prompts = preview_prompts(config)
            self._conditions = [prompts[i % len(prompts)] for i in range(config.log.preview_images)]
        self._sampler = Sampler(blueprint, config.sample, batch_for(blueprint, len(self._conditions)))

    def draw(self, step: int, train_state: state.TrainState, writer: metrics.Writer) -> None:
        """Draw, and write the picture to `preview_path` and to TensorBoard."""
        images = self._sampler(train_state.ema, train_state.frozen, self._conditions, seed=0)
        if jax.process_index() == 0:
            picture = pictures.grid(images, [str(condition) for condition in self._conditions])
            pictures.save(preview_path(self._workdir, step), picture)
            writer.image(step, "preview", picture)


def preview_prompts(config: Config) -> Sequence[str]:
    """The prompts in previews and reports of a text-conditional model."""
    return config.log.preview_prompts or ("a picture",)


def preview_path(workdir: Path, step: int) -> Path:
    return workdir / "previews" / f"{step:08d}.png"


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


def batch_for(blueprint: Blueprint, wanted: int, most: int = 64) -> int:
    """The smaller of `wanted` and `most`, rounded up so that devices share a batch evenly."""
    return mesh_lib.round_up_batch(blueprint.mesh, min(wanted, most))


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
    mesh_lib.cache_programs(workdir / "compiled")
    mesh = mesh_lib.build(config.mesh)
    mesh_lib.check_model(config.model, mesh)
    config = kernel_check.resolve_kernel(config, mesh)
    blueprint = state.make_blueprint(config, mesh, encoders.load_encoders(config, mesh))
    checkpoints = Checkpoints(workdir, config.checkpoint, create=False)
    params, frozen, step = checkpoints.restore_weights(blueprint, ema=ema, step=step)
    return blueprint, params, frozen, step


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


def requested(
    config: Config, prompts: Sequence[str], prompts_file: str | None, labels: Sequence[int], num: int
) -> list:
    """`num` copies of each condition given. Raises UserError if there is none, or one of the wrong kind."""
    check_num(num)
    prompts = [*prompts, *(read_prompts(prompts_file) if prompts_file else [])]
    if config.model.condition == "text":
        if labels or not prompts:
            raise UserError("this model draws from text: give --prompt or --prompts_file, and no --label")
        for prompt in prompts:
            check_prompt(config, prompt)
    elif prompts or not labels:
        last = config.model.num_classes - 1
        raise UserError(f"this model draws {last + 1} classes: give --label=0 to --label={last}, and no prompt")
    return [condition for condition in prompts or labels for _ in range(num)]


def check_num(num: int) -> None:
    if num < 1:
        raise UserError(f"--num={num}: must be at least 1")


def read_prompts(prompts_file: str) -> list[str]:
    """The lines of a file that are not blank. Raises UserError if it cannot be read or has none."""
    try:
        text = Path(prompts_file).expanduser().read_text(encoding="utf-8-sig")  # some editors write a BOM
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts_file={prompts_file}: {error}") from error
    if not (prompts := [line.strip() for line in text.split("\n") if line.strip()]):
        raise UserError(f"--prompts_file={prompts_file}: it contains no prompt")
    return prompts


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


def earlier_pictures(out: Path, count: int) -> list[Path]:
    """The pictures that settings.json in `out` lists.

    Raises UserError if `out` has files of another origin where `count` pictures are to go.
    """
    settings = out / _SETTINGS
    if (out / "config.json").exists():
        raise UserError(f"--out={out}: this is a training directory, choose another place")
    earlier = 0
    if settings.exists():
        try:
            earlier = len(json.loads(settings.read_text())["conditions"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--out={out}: settings.json is not from an earlier call, choose another place") from error
    added = [_picture(out, i) for i in range(earlier, count)] + [out / _GRID] * (not settings.exists())
    if other := next((path for path in added if path.exists()), None):
        raise UserError(f"--out={out}: {other.name} is not from an earlier call, choose another place")
    return [_picture(out, i) for i in range(earlier)]


def is_grid(path: Path) -> bool:
    """Whether a file is the grid of an earlier call."""
    return path.name == _GRID and (path.parent / _SETTINGS).is_file()


def _picture(out: Path, number: int) -> Path:
    return out / f"{number:05d}.png"


def main(argv: Sequence[str]) -> None:
    del argv
    with hosts.distributed_run(config_file.given_flags()):
        _main(flags.FLAGS)


def _main(values: flags.FlagValues) -> None:
    if not values.workdir or not values.out:
        raise UserError("--workdir=DIR (a training directory) and --out=DIR are both needed")
    workdir, out = Path(values.workdir).expanduser(), Path(values.out).expanduser()
    config = drawable_config(workdir, values.autoencoder, values.text_encoder)
    check_seed(values.seed)
    if values.batch_size < 1:
        raise UserError(f"--batch_size={values.batch_size}: must be at least 1")
    output_files.check("out", out)
    conditions = requested(config, values.prompt, values.prompts_file, values.label, values.num)
    earlier = earlier_pictures(out, len(conditions))
    settings = settings_of_flags(config, values)
    blueprint, params, frozen, step = load(
        workdir, config, ema=not values.raw, step=values.checkpoint, mesh_config=mesh_lib.parse(values.mesh)
    )
    sampler = Sampler(blueprint, settings, batch_for(blueprint, len(conditions), values.batch_size))
    images = sampler(params, frozen, conditions, values.seed)
    if jax.process_index() != 0:
        return
    record = {
        "workdir": str(workdir),
        "checkpoint": step,
        "weights": kind_of_weights(workdir / "checkpoints" / str(step), ema=not values.raw),
        "seed": values.seed,
        "conditions": conditions,
        "sample": dataclasses.asdict(settings),
    }
    # In this order, a call that is killed never leaves a picture beside settings that it was not drawn with.
    for old in (*earlier, out / _GRID):
        old.unlink(missing_ok=True)
    output_files.write_json(out / _SETTINGS, record)
    for i, image in enumerate(images):
        pictures.save(_picture(out, i), image)
    shown = [str(condition) for condition in conditions[:_GRID_PICTURES]]
    pictures.save(out / _GRID, pictures.grid(images[:_GRID_PICTURES], shown))
    together = f"the first {_GRID_PICTURES} as a grid" if len(images) > _GRID_PICTURES else "as a grid"
    print(f"{len(images)} image{'s' * (len(images) > 1)} in {out}, {together} in {out / _GRID}")


if __name__ == "__main__":
    define_weights_flags()
    define_settings_flags()
    flags.DEFINE_multi_string("prompt", [], "text to draw; may be given several times")
    flags.DEFINE_string("prompts_file", None, "file with one prompt per line")
    flags.DEFINE_multi_integer("label", [], "class to draw; may be given several times")
    flags.DEFINE_integer("num", 4, "images per prompt or label")
    flags.DEFINE_integer("seed", 0, "seed of decoding order and noise")
    flags.DEFINE_integer("batch_size", 64, "images drawn at once")
    flags.DEFINE_string("out", None, "directory for the pictures")
    hosts.define_flags()
    flags.adopt_module_key_flags(hosts)  # listed by --help
    entry.run(main)
