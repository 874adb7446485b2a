"""What each decoding step does: tokens, guidance, Euler steps and noise levels (paper section 3.1)."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from lina_jax.config import Config, SampleConfig
from lina_jax.models import flow


class StepInputs(NamedTuple):
    """The values of one decoding step, or of K steps along a first axis."""

    visible: np.ndarray | jax.Array  # () or (K,) number of tokens that exist before it
    predicted: np.ndarray | jax.Array  # () or (K,) number of tokens that it draws
    guidance: np.ndarray | jax.Array  # () or (K,), at least 1, which means none
    euler_steps: np.ndarray | jax.Array  # () or (K,)
    sigmas: np.ndarray | jax.Array  # (E + 1,) or (K, E + 1) noise levels of its Euler steps


class StepShape(NamedTuple):
    """What a step's program is compiled for."""

    visible: int  # the most tokens that exist before it
    predicted: int  # the most tokens that it draws
    guided: bool
    euler_steps: int | None  # None if they differ between the steps that share the program


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What each of K decoding steps does, known before anything runs."""

    visible: np.ndarray  # (K,) number of tokens that exist before the step
    predicted: np.ndarray  # (K,) number of tokens that it draws
    guidance: np.ndarray  # (K,)
    euler_steps: np.ndarray  # (K,)
    sigmas: np.ndarray  # (K, E + 1) noise levels of its Euler steps, padded with zeros
    stages: tuple[slice, ...]  # groups of steps, each with one padded size
    temperature: float

    @property
    def guided(self) -> bool:
        return bool(np.any(self.guidance > 1))

    def inputs(self, steps: slice | int) -> StepInputs:
        """The values of one step, or of several along a first axis."""
        guidance = np.maximum(self.guidance, 1)  # below 1 means none, as published
        return StepInputs(self.visible[steps], self.predicted[steps], guidance[steps], self.euler_steps[steps],
                          self.sigmas[steps])  # fmt: skip

    def shape(self, stage: slice) -> StepShape:
        """The sizes that hold every step of a stage."""
        euler = np.unique(self.euler_steps[stage])
        return StepShape(
            int(self.visible[stage].max()),
            int(self.predicted[stage].max()),
            self.guided,
            int(euler[0]) if len(euler) == 1 else None,
        )


def make_schedule(config: Config, sample: SampleConfig | None = None) -> Schedule:
    """The schedule of a model's images, without steps that draw none; `sample`: settings to use, not the config's."""
    sample = sample or config.sample
    predicted = tokens_per_step(config.model.image_tokens, sample.steps)
    predicted = predicted[predicted > 0]
    steps = len(predicted)
    euler = annealed_steps(sample.annealing, steps, sample.euler_steps, sample.annealing_min)
    sigmas = np.zeros((steps, int(euler.max()) + 1), np.float32)
    for row, count in zip(sigmas, euler, strict=True):
        row[: count + 1] = flow.euler_sigmas(count, config.loss.shift)
    groups = np.array_split(np.arange(steps), min(sample.stages, steps))
    return Schedule(
        visible=np.cumsum(predicted) - predicted,
        predicted=predicted,
        guidance=guidance_schedule(sample.guidance_schedule, sample.guidance_min, sample.guidance, steps),
        euler_steps=euler,
        sigmas=sigmas,
        stages=tuple(slice(int(g[0]), int(g[-1]) + 1) for g in groups),
        temperature=sample.temperature,
    )


def tokens_per_step(tokens: int, steps: int) -> np.ndarray:
    """Tokens predicted at each of `steps` decoding steps (steps,), int32; sums to `tokens`, may hold zeros."""
    left = np.round(np.cos(np.pi / 2 * np.arange(steps + 1) / steps) * tokens).astype(np.int32)
    return left[:-1] - left[1:]


def guidance_schedule(kind: str, low: float, high: float, steps: int) -> np.ndarray:
    """Guidance of each decoding step (steps,): constant `high`, or low + (high - low) (i + 1) / steps."""
    if kind == "constant":
        return np.full(steps, high, np.float32)
    return (low + (high - low) * np.arange(1, steps + 1) / steps).astype(np.float32)


def annealed_steps(kind: str, steps: int, most: int, least: int) -> np.ndarray:
    """Euler steps of each decoding step (steps,), int32: fewer for later tokens (DiSA, arXiv 2505.20297)."""
    left = np.arange(steps)[::-1] / (steps - 1) if steps > 1 else np.ones(1)
    factor = {
        "none": np.ones(steps),
        "linear": left,
        "cosine": 0.5 * (1 - np.cos(np.pi * left)) + 1e-12,  # so that rounding costs exact ratios no step
        "two_stage": (left >= 0.5).astype(float),
    }[kind]
    # Rounded as in the published code, which computes int((K - 1 - i) / (K - 1) * (most - least) + least).
    return (factor * (most - least) + least).astype(np.int32)
