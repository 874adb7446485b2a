"""Previews: images that a run draws of the same conditions, from time to time."""

from collections.abc import Sequence
from pathlib import Path

import jax

from lina_jax import metrics, pictures, state
from lina_jax.config import Config
from lina_jax.drawing import Sampler, batch_for
from lina_jax.state import Blueprint


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
