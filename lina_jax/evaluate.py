"""Measure a model: validation loss by noise level, and how often scenes match their captions.

python -m lina_jax.evaluate --workdir=DIR [--raw] [--data=DIR] [--scenes=N] [--guidance=G] [--seed=0] [--out=DIR]
[--checkpoint=STEP]

Prints one JSON object and writes it to OUT/score.json (default: WORKDIR/evaluation/score.json). `--scenes` is for
models of the `shapes` data: it draws N captions, balanced over the categories, and checks each picture by rule (see
`scene_score`). The same code validates in the training loop.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from lina_jax import config_file, data, errors, hosts, pictures, places, sample, scene_score, shapes, state
from lina_jax import mesh as mesh_lib
from lina_jax.checkpoint import Checkpoints, load_config
from lina_jax.config import Config
from lina_jax.errors import UserError
from lina_jax.state import NOISE_LEVELS, Blueprint, Tree


class Validation:
    """Loss on fixed examples with fixed draws, whatever the checkpoint, the batch size or the mesh."""

    def __init__(self, config: Config, records: data.Records):
        self._count = min(config.eval.examples, len(records))
        self._batch = config.eval.batch_size or min(config.batch_size, self._count)
        self._examples = data.fixed_examples(records, self._count)
        self._step = None

    def both(self, plan: Blueprint, params: Tree, ema: Tree, frozen: Tree) -> dict[str, float]:
        """Losses of the parameters, and (names ending in _ema) of their EMA."""
        raw, ema = self.losses(plan, params, frozen), self.losses(plan, ema, frozen)
        return raw | {f"{name}_ema": value for name, value in ema.items()}

    def losses(self, plan: Blueprint, params: Tree, frozen: Tree) -> dict[str, float]:
        """'loss', and 'loss_sigma_LOW_HIGH' for each bin of noise levels."""
        self._step = self._step or state.make_eval_step(plan)
        size = mesh_lib.batch_parts(plan.mesh)
        batch = -(-self._batch // size) * size
        place = mesh_lib.sharding(plan.mesh, "batch")
        sums = np.zeros((2, NOISE_LEVELS))
        for start in range(0, self._count, batch):
            numbers = start + np.arange(batch)
            present = numbers < self._count
            rows = {name: array[np.minimum(numbers, self._count - 1)] for name, array in self._examples.items()}
            # Every process has all rows in memory, and gives its devices theirs.
            rows, numbers = jax.tree.map(
                lambda array: jax.make_array_from_callback(array.shape, place, array.__getitem__),
                (rows, np.where(present, numbers, -1)),
            )
            sums += multihost_utils.process_allgather(self._step(params, frozen, rows, numbers), tiled=True)
        total, weight = sums
        edges = np.linspace(0, 1, NOISE_LEVELS + 1)
        by_level = {
            f"loss_sigma_{low:.2f}_{high:.2f}": float(t / max(w, 1.0))
            for low, high, t, w in zip(edges, edges[1:], total, weight, strict=False)
        }
        return {"loss": float(total.sum() / max(weight.sum(), 1.0)), **by_level}


def scene_scores(sampler, params: Tree, frozen: Tree, count: int, seed: int) -> tuple[dict, np.ndarray, list[str]]:
    """(scores by category, images (N, H, W, 3), captions) of `count` captions of the `shapes` grammar."""
    captions = [caption for _, caption in shapes.evaluation_prompts(count, seed)]
    images = sampler(params, frozen, captions, seed)
    return scene_score.score(images, captions), images, captions


def main(argv: Sequence[str]) -> None:
    del argv
    with hosts.together(config_file.given_flags()):
        _main(flags.FLAGS)


def _main(values: flags.FlagValues) -> None:
    if not values.workdir:
        raise UserError("--workdir=DIR (a training directory) is needed")
    if values.scenes < 0:
        raise UserError(f"--scenes={values.scenes}: must not be negative")
    sample.check_seed(values.seed)
    workdir = Path(values.workdir).expanduser()
    out = Path(values.out).expanduser() if values.out else workdir / "evaluation"
    settings = sample.sample_settings(load_config(workdir), {"guidance": values.guidance})
    places.check("out", out)
    plan, ema, frozen, step = sample.load(workdir, step=values.checkpoint, axes=mesh_lib.parse(values.mesh))
    config = plan.config
    raw, _, _ = Checkpoints(workdir, config.checkpoint, create=False).restore_weights(plan, ema=False, step=step)
    if values.scenes and (config.model.condition != "text" or len(set(config.model.image_grid)) > 1):
        raise UserError("--scenes: the judge needs a model that draws square pictures from captions")
    if values.data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=values.data))
    result = {"step": step, "weights": "raw" if values.raw else "ema"}
    records = data.open_records(config, config.data.validation_split, plan.encoders.text)
    validation = Validation(config, records)
    result["validation"] = validation.both(plan, raw, ema, frozen)
    if values.scenes:
        sampler = sample.Sampler(plan, settings, sample.batch_for(plan, values.scenes))
        scores, images, captions = scene_scores(sampler, raw if values.raw else ema, frozen, values.scenes, values.seed)
        result = {**scores, **result, "sample": dataclasses.asdict(settings), "seed": values.seed}
        shown = min(len(images), 36)
    if jax.process_index() != 0:
        return
    if values.scenes:
        pictures.save(out / "samples.png", pictures.grid(images[:shown], captions[:shown]))
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "score.json.partial"
    partial.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(partial, out / "score.json")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "training directory")
    flags.DEFINE_string("data", None, "dataset to validate on; default: the config's")
    flags.DEFINE_integer("scenes", 0, "captions of the shapes grammar to draw and check")
    flags.DEFINE_float("guidance", None, "classifier-free guidance; default: the config's")
    flags.DEFINE_integer("seed", 0, "of captions, decoding order and noise")
    flags.DEFINE_bool("raw", False, "the parameters themselves instead of their average")
    flags.DEFINE_integer("checkpoint", None, "step to load; default: the latest")
    flags.DEFINE_string("out", None, "directory for the results; default: WORKDIR/evaluation")
    flags.DEFINE_string("mesh", "", sample.MESH_HELP)
    hosts.define_flags()
    errors.run(main)
