"""Set-by-set decoding: one compiled program from conditions to images, or one a step (paper section 3.1)."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lina_jax.config import ModelConfig, SampleConfig
from lina_jax.mesh import constrain
from lina_jax.models import flow, vae
from lina_jax.models.draws import root_key
from lina_jax.models.layers import gather_tokens, unpatchify
from lina_jax.models.lina import LINA, Condition, unconditional
from lina_jax.state import Blueprint, Program, Tree


class StepInputs(NamedTuple):
    """The numbers of a decoding step, or of several along a first axis."""

    visible: np.ndarray | jax.Array  # tokens that exist before it
    predicted: np.ndarray | jax.Array  # tokens that it makes
    guidance: np.ndarray | jax.Array  # at least 1, which is none
    euler_steps: np.ndarray | jax.Array
    sigmas: np.ndarray | jax.Array  # (E + 1,) noise levels of its Euler steps


class StepShape(NamedTuple):
    """What a step's program is compiled for: bounds on the tokens that exist before it and that it makes; guidance."""

    visible: int
    predicted: int
    guided: bool


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What each of K decoding steps does, known before anything runs."""

    visible: np.ndarray  # (K,) tokens that exist before the step
    predicted: np.ndarray  # (K,) tokens that it makes
    guidance: np.ndarray  # (K,)
    euler_steps: np.ndarray  # (K,)
    sigmas: np.ndarray  # (K, E + 1) noise levels of its Euler steps, padded with zeros
    stages: tuple[slice, ...]  # steps that share one padded size
    temperature: float

    @property
    def guided(self) -> bool:
        return bool(np.any(self.guidance > 1))

    def inputs(self, steps: slice | int) -> StepInputs:
        guidance = np.maximum(self.guidance, 1)  # below 1 is none, as published
        return StepInputs(self.visible[steps], self.predicted[steps], guidance[steps], self.euler_steps[steps],
                          self.sigmas[steps])  # fmt: skip

    def shape(self, stage: slice) -> StepShape:
        return StepShape(int(self.visible[stage].max()), int(self.predicted[stage].max()), self.guided)


def schedule(config: SampleConfig, tokens: int, shift: float) -> Schedule:
    """Of images of so many tokens; `shift` is that of the noise levels. Steps that make no token are left out."""
    predicted = flow.cosine_schedule(tokens, config.steps)
    predicted = predicted[predicted > 0]
    steps = len(predicted)
    euler = flow.annealed_steps(config.annealing, steps, config.euler_steps, config.annealing_min)
    sigmas = np.zeros((steps, int(euler.max()) + 1), np.float32)
    for row, count in zip(sigmas, euler, strict=True):
        row[: count + 1] = flow.euler_sigmas(count, shift)
    groups = np.array_split(np.arange(steps), min(config.stages, steps))
    return Schedule(
        visible=np.cumsum(predicted) - predicted,
        predicted=predicted,
        guidance=flow.guidance_schedule(config.guidance_schedule, config.guidance_min, config.guidance, steps),
        euler_steps=euler,
        sigmas=sigmas,
        stages=tuple(slice(int(g[0]), int(g[-1]) + 1) for g in groups),
        temperature=config.temperature,
    )


class DecodingInputs(NamedTuple):
    """What stays the same through all decoding steps of B images."""

    c: jax.Array  # encoded condition (B, ...); guided: (2B, ...), each image's before its unconditional one
    order: jax.Array  # (B, N), a permutation of the tokens per image
    rank: jax.Array  # (B, N), its inverse
    noise: jax.Array  # (B, N, p*p*C), what each token is denoised from: drawn once, since each token is made once


def prepare(model: LINA, condition: Condition, order: jax.Array, noise: jax.Array, *, guided: bool) -> DecodingInputs:
    """Encode the conditions of B images, and if `guided` the unconditional one; order and noise as in the result."""
    c = model.encode_condition(condition)
    if guided:
        batch = order.shape[0]
        other = model.encode_condition(unconditional(model.config, condition))
        # Neighbours, not halves: so each image and its copy stay on the device that has the image.
        c = jnp.stack([c, jnp.broadcast_to(other, c.shape)], axis=1).reshape(2 * batch, *c.shape[1:])
    return DecodingInputs(c, order, jnp.argsort(order, axis=1), noise)


def advance(model: LINA, tokens: jax.Array, fixed: DecodingInputs, inputs: StepInputs, shape: StepShape) -> jax.Array:
    """Tokens (B, N, p*p*C) after one more step; those that are not made yet are zero."""
    c, order, rank, noise = fixed
    count, predicted, guidance, euler, sigmas = inputs
    copies = 2 if shape.guided else 1

    def both(x):
        return jnp.repeat(x, copies, axis=0)

    # Slices of the order may run past its end; what lies there is never used.
    padded = jnp.pad(order, ((0, 0), (0, shape.predicted)))
    ids = jax.lax.dynamic_slice_in_dim(padded, count, shape.predicted, axis=1)
    z = model.encode_image(both(tokens), both(rank >= count), shape.visible, c, only=both(ids))
    z = model.head.embed.condition(z)
    times = model.head.embed.time(flow.TRAIN_TIMESTEPS * sigmas[:-1]).astype(model.dtype)

    def euler_step(j, x):
        velocity = model.head(both(x), times[j], z).astype(jnp.float32)
        if shape.guided:
            with_condition, without = velocity[::2], velocity[1::2]
            velocity = without + guidance * (with_condition - without)
        return flow.euler_step(x, velocity, sigmas[j], sigmas[j + 1])

    made = jax.lax.fori_loop(0, euler, euler_step, gather_tokens(noise, ids))
    # By gathering: of a scatter XLA's partitioner would gather the images of all devices.
    place = rank - count
    fresh = (place >= 0) & (place < predicted)
    return jnp.where(fresh[..., None], gather_tokens(made, jnp.clip(place, 0, shape.predicted - 1)), tokens)


def decode(model: LINA, condition: Condition, order: jax.Array, noise: jax.Array, steps: Schedule) -> jax.Array:
    """Image tokens (B, N, p*p*C); order and noise as in `DecodingInputs`, but for the temperature.

    The image after step i is where(argsort(order) < visible[i + 1], tokens, 0).
    """
    fixed = prepare(model, condition, order, steps.temperature * noise, guided=steps.guided)
    tokens = jnp.zeros_like(noise)

    def step(shape, tokens, inputs):
        return advance(model, tokens, fixed, inputs, shape), None

    for stage in steps.stages:
        inputs = jax.tree.map(jnp.asarray, steps.inputs(stage))
        tokens, _ = jax.lax.scan(functools.partial(step, steps.shape(stage)), tokens, inputs)
    return tokens


def image_draws(seed: jax.Array, images: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Decoding order (B, N) and noise (B, N, p*p*C) of each image number (B,), functions of (seed, number)."""

    def one(image):
        order, noise = jax.random.split(jax.random.fold_in(root_key(seed), image))
        uniforms = jax.random.uniform(order, (config.image_tokens,))
        return jnp.argsort(uniforms), jax.random.normal(noise, (config.image_tokens, config.token_dim))

    order, noise = jax.vmap(one)(images)
    return constrain(order, "batch", None), constrain(noise, "batch", None, None)


def to_pixels(tokens: jax.Array, plan: Blueprint, weights: Tree) -> jax.Array:
    """Tokens (B, N, p*p*C) -> uint8 images (B, H, W, 3): decoded, scaled, clamped, truncated."""
    model = plan.config.model
    latents = unpatchify(tokens.astype(jnp.float32), model.image_grid, model.patch_size)
    return vae.to_uint8(plan.encoders.pixels(weights, latents))


def make_sampler(plan: Blueprint, sample: SampleConfig) -> Program:
    """The jitted program (params, frozen, condition, image numbers (B,), seed ()) -> uint8 images (B, H, W, 3).

    The condition is as in a training batch: with the frozen text encoder in the plan, `text` may be token ids.
    """
    config = plan.config
    steps = schedule(sample, config.model.image_tokens, config.loss.shift)

    def program(params, frozen, condition, images, seed, weights):
        order, noise = image_draws(seed, images, config.model)
        condition = plan.condition(weights, condition)
        model = plan.inference(plan.sampling_params(params, frozen), frozen)
        return to_pixels(decode(model, condition, order, noise, steps), plan, weights)

    return plan.jit(program, plan.encoders.weights)


class DecodingState(NamedTuple):
    """B images after one of their decoding steps."""

    step: int  # the first is 1
    tokens: jax.Array  # (B, N, p*p*C); those that are not made yet are zero
    rank: jax.Array  # (B, N), when each token is made


class Stepper:
    """What `make_sampler` makes, a step at a time, so that images can be seen while they are made.

    Programs are compiled for shapes alone: prompts, seeds, temperatures and guidances (but none) share them; numbers of
    images and of steps do not. With the quickstart's model on two CPU cores the bits were those of the one program, and
    the time was within a tenth of its own (1, 4 and 36 images).
    """

    def __init__(self, plan: Blueprint):
        config, weights = plan.config, plan.encoders.weights

        def begin(guided, params, frozen, condition, images, seed, temperature, weights):
            order, noise = image_draws(seed, images, config.model)
            condition = plan.condition(weights, condition)
            fixed = prepare(plan.inference(params, frozen), condition, order, temperature * noise, guided=guided)
            return constrain(jnp.zeros_like(noise), "batch", None, None), fixed, plan.sampling_params(params, frozen)

        def step(shape, params, frozen, tokens, fixed, inputs):
            tokens = advance(plan.inference(params, frozen), tokens, fixed, inputs, shape)
            return constrain(tokens, "batch", None, None)

        self._config = config
        self._begin = plan.jit(begin, weights, static_argnums=0)
        self._step = plan.jit(step, static_argnums=0)
        self._pixels = plan.jit(lambda tokens, weights: to_pixels(tokens, plan, weights), weights)

    def schedule(self, sample: SampleConfig) -> Schedule:
        return schedule(sample, self._config.model.image_tokens, self._config.loss.shift)

    def __call__(
        self, params: Tree, frozen: Tree, condition: dict, images: np.ndarray, seed: int, steps: Schedule
    ) -> Iterator[DecodingState]:
        """The states of images of these numbers (B,), one for each step; the last is of the finished images."""
        which = images.astype(np.int32), np.int32(seed), np.float32(steps.temperature)
        tokens, fixed, params = self._begin(steps.guided, params, frozen, condition, *which)
        for stage in steps.stages:
            shape = steps.shape(stage)
            for i in range(stage.start, stage.stop):
                tokens = self._step(shape, params, frozen, tokens, fixed, steps.inputs(i))
                yield DecodingState(i + 1, tokens, fixed.rank)

    def pixels(self, state: DecodingState) -> jax.Array:
        """uint8 images (B, H, W, 3)."""
        return self._pixels(state.tokens)


def make_strips(plan: Blueprint, sample: SampleConfig, shown: int) -> Program:
    """The jitted program as of `make_sampler`, -> uint8 images (S, B, H, W, 3) of the picture as it is being decoded.

    S is at most `shown`: after the first step, some evenly spread ones, and the last. Tokens that are not made yet are
    zero.
    """
    config = plan.config
    steps = schedule(sample, config.model.image_tokens, config.loss.shift)
    at = np.unique(np.linspace(0, len(steps.predicted) - 1, shown).round().astype(int))
    made = jnp.asarray((steps.visible + steps.predicted)[at])

    def program(params, frozen, condition, images, seed, weights):
        order, noise = image_draws(seed, images, config.model)
        condition = plan.condition(weights, condition)
        tokens = decode(plan.inference(plan.sampling_params(params, frozen), frozen), condition, order, noise, steps)
        rank = jnp.argsort(order, axis=1)[..., None]
        return jax.lax.map(lambda count: to_pixels(jnp.where(rank < count, tokens, 0), plan, weights), made)

    return plan.jit(program, plan.encoders.weights)
