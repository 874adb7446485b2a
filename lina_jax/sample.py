"""Draw images from a trained model.

python -m lina_jax.sample --workdir=DIR (--prompt=TEXT | --prompts_file=FILE | --label=K) --out=DIR
    [--num=4] [--seed=0] [--guidance=G] [--steps=K] [--euler_steps=E] [--temperature=T] [--raw] [--checkpoint=STEP]
    [--batch_size=64]

Writes 00000.png, ..., settings.json, and grid.png of the first 100. Image i is a function of (weights, settings,
prompt, seed, i). If OUT is from an earlier call, the pictures that its settings.json lists are replaced, and surplus
ones removed. Another number of pictures (up to --batch_size) compiles anew; WORKDIR/compiled keeps the programs.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from lina_jax import config_file, drawing, entry, hosts, output_files, pictures
from lina_jax import mesh as mesh_lib
from lina_jax.config import Config
from lina_jax.errors import UserError
from lina_jax.workdir import kind_of_weights

_GRID_PICTURES = 100  # a grid of thousands would not fit in memory


def requested(
    config: Config, prompts: Sequence[str], prompts_file: str | None, labels: Sequence[int], num: int
) -> list:
    """`num` copies of each condition given. Raises UserError if there is none, or one of the wrong kind."""
    drawing.check_num(num)
    prompts = [*prompts, *(read_prompts(prompts_file) if prompts_file else [])]
    if config.model.condition == "text":
        if labels or not prompts:
            raise UserError("this model draws from text: give --prompt or --prompts_file, and no --label")
        for prompt in prompts:
            drawing.check_prompt(config, prompt)
    elif prompts or not labels:
        last = config.model.num_classes - 1
        raise UserError(f"this model draws {last + 1} classes: give --label=0 to --label={last}, and no prompt")
    return [condition for condition in prompts or labels for _ in range(num)]


def read_prompts(prompts_file: str) -> list[str]:
    """The lines of a file that are not blank. Raises UserError if it cannot be read or has none."""
    try:
        text = Path(prompts_file).expanduser().read_text(encoding="utf-8-sig")  # some editors write a BOM
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts_file={prompts_file}: {error}") from error
    if not (prompts := [line.strip() for line in text.split("\n") if line.strip()]):
        raise UserError(f"--prompts_file={prompts_file}: it contains no prompt")
    return prompts


def earlier_pictures(out: Path, count: int) -> list[Path]:
    """The pictures that settings.json in `out` lists.

    Raises UserError if `out` has files of another origin where `count` pictures are to go.
    """
    settings = out / pictures.SETTINGS
    if (out / "config.json").exists():
        raise UserError(f"--out={out}: this is a training directory, choose another place")
    earlier = 0
    if settings.exists():
        try:
            earlier = len(json.loads(settings.read_text())["conditions"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--out={out}: settings.json is not from an earlier call, choose another place") from error
    added = [_picture(out, i) for i in range(earlier, count)] + [out / pictures.GRID] * (not settings.exists())
    if other := next((path for path in added if path.exists()), None):
        raise UserError(f"--out={out}: {other.name} is not from an earlier call, choose another place")
    return [_picture(out, i) for i in range(earlier)]


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
    config = drawing.drawable_config(workdir, values.autoencoder, values.text_encoder)
    drawing.check_seed(values.seed)
    if values.batch_size < 1:
        raise UserError(f"--batch_size={values.batch_size}: must be at least 1")
    output_files.check("out", out)
    conditions = requested(config, values.prompt, values.prompts_file, values.label, values.num)
    earlier = earlier_pictures(out, len(conditions))
    settings = drawing.settings_of_flags(config, values)
    blueprint, params, frozen, step = drawing.load(
        workdir, config, ema=not values.raw, step=values.checkpoint, mesh_config=mesh_lib.parse(values.mesh)
    )
    sampler = drawing.Sampler(blueprint, settings, drawing.batch_for(blueprint, len(conditions), values.batch_size))
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
    for old in (*earlier, out / pictures.GRID):
        old.unlink(missing_ok=True)
    output_files.write_json(out / pictures.SETTINGS, record)
    for i, image in enumerate(images):
        pictures.save(_picture(out, i), image)
    shown = [str(condition) for condition in conditions[:_GRID_PICTURES]]
    pictures.save(out / pictures.GRID, pictures.grid(images[:_GRID_PICTURES], shown))
    together = f"the first {_GRID_PICTURES} as a grid" if len(images) > _GRID_PICTURES else "as a grid"
    print(f"{len(images)} image{'s' * (len(images) > 1)} in {out}, {together} in {out / pictures.GRID}")


if __name__ == "__main__":
    drawing.define_weights_flags()
    drawing.define_settings_flags()
    flags.DEFINE_multi_string("prompt", [], "text to draw; may be given several times")
    flags.DEFINE_string("prompts_file", None, "file with one prompt per line")
    flags.DEFINE_multi_integer("label", [], "class to draw; may be given several times")
    flags.DEFINE_integer("num", 4, "images per prompt or label")
    flags.DEFINE_integer("seed", 0, "seed of decoding order and noise")
    flags.DEFINE_integer("batch_size", 64, "images drawn at once")
    flags.DEFINE_string("out", None, "directory for the pictures")
    hosts.define_flags()
    for module in (drawing, hosts):
        flags.adopt_module_key_flags(module)  # listed by --help
    entry.run(main)
