"""Set-by-set decoding, as one compiled program from conditions to images or one per step (paper section 3.1)."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lina_jax.config import ModelConfig, SampleConfig
from lina_jax.decoding_schedule import Schedule, StepInputs, StepShape, make_schedule
from lina_jax.mesh import constrain
from lina_jax.models import flow, vae
from lina_jax.models.draws import root_key
from lina_jax.models.layers import gather_tokens, unpatchify
from lina_jax.models.lina import LINA, Condition, unconditional
from lina_jax.state import Blueprint, Program, Tree


class DecodingInputs(NamedTuple):
    """What is the same in all decoding steps of B images."""

    cond: jax.Array  # encoded conditions (B, ...); guided: (2B, ...), each followed by the unconditional one
    order: jax.Array  # (B, N), a permutation of the tokens of each image
    rank: jax.Array  # (B, N), the inverse of `order`
    noise: jax.Array  # (B, N, p*p*C), what tokens are denoised from; drawn once, as each token is drawn once


def prepare(model: LINA, condition: Condition, order: jax.Array, noise: jax.Array, *, guided: bool) -> DecodingInputs:
    """Encode the conditions of B images, and if `guided` the unconditional one; order and noise as in the result."""
    cond = model.encode_condition(condition)
    if guided:
        batch = order.shape[0]
        other = model.encode_condition(unconditional(model.config, condition))
        # Interleaved, not concatenated, so that an image's two conditions are on the device that has the image.
        cond = jnp.stack([cond, jnp.broadcast_to(other, cond.shape)], axis=1).reshape(2 * batch, *cond.shape[1:])
    return DecodingInputs(cond, order, jnp.argsort(order, axis=1), noise)


def advance(
    model: LINA, tokens: jax.Array, decoding_inputs: DecodingInputs, inputs: StepInputs, shape: StepShape
) -> jax.Array:
    """Tokens (B, N, p*p*C) after one more step; those not drawn yet are zero."""
    cond, order, rank, noise = decoding_inputs
    num_visible, predicted, guidance, euler, sigmas = inputs
    copies = 2 if shape.guided else 1

    def both(x):
        return jnp.repeat(x, copies, axis=0)

    # Slices of the order may run past its end; the padding there is never used.
    padded = jnp.pad(order, ((0, 0), (0, shape.predicted)))
    ids = jax.lax.dynamic_slice_in_dim(padded, num_visible, shape.predicted, axis=1)
    z = model.encode_image(both(tokens), both(rank >= num_visible), shape.visible, cond, token_ids=both(ids))
    z = model.head.embed.condition(z)
    times = model.head.embed.time(flow.TRAIN_TIMESTEPS * sigmas[:-1]).astype(model.dtype)

    def euler_step(j, x):
        velocity = model.head(both(x), times[j], z).astype(jnp.float32)
        if shape.guided:
            with_condition, without = velocity[::2], velocity[1::2]
            velocity = without + guidance * (with_condition - without)
        return flow.euler_step(x, velocity, sigmas[j], sigmas[j + 1])

    # A known number of trips, where there is one: GPUs would ask their host before each trip.
    denoised = jax.lax.fori_loop(0, shape.euler_steps or euler, euler_step, gather_tokens(noise, ids))
    # A gather: for a scatter, XLA's partitioner would collect the images of all devices.
    offset = rank - num_visible
    drawn_now = (offset >= 0) & (offset < predicted)
    return jnp.where(drawn_now[..., None], gather_tokens(denoised, jnp.clip(offset, 0, shape.predicted - 1)), tokens)


def decode(model: LINA, condition: Condition, order: jax.Array, noise: jax.Array, schedule: Schedule) -> jax.Array:
    """Image tokens (B, N, p*p*C); `order` and `noise` as in `DecodingInputs`, but the noise without temperature.

    After step i, but the last, the image is where(argsort(order) < visible[i + 1], tokens, 0).
    """
    decoding_inputs = prepare(model, condition, order, schedule.temperature * noise, guided=schedule.guided)
    tokens = jnp.zeros_like(noise)

    def step(shape, tokens, inputs):
        return advance(model, tokens, decoding_inputs, inputs, shape), None

    for stage in schedule.stages:
        inputs = jax.tree.map(jnp.asarray, schedule.inputs(stage))
        tokens, _ = jax.lax.scan(functools.partial(step, schedule.shape(stage)), tokens, inputs)
    return tokens


def image_draws(seed: jax.Array, images: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Decoding order (B, N) and noise (B, N, p*p*C) of image numbers (B,), each a function of (seed, number)."""

    def one(image):
        order, noise = jax.random.split(jax.random.fold_in(root_key(seed), image))
        uniforms = jax.random.uniform(order, (config.image_tokens,))
        return jnp.argsort(uniforms), jax.random.normal(noise, (config.image_tokens, config.token_dim))

    order, noise = jax.vmap(one)(images)
    return constrain(order, "batch", None), constrain(noise, "batch", None, None)


def _sampling_inputs(
    blueprint: Blueprint, weights: Tree, condition: Condition, images: jax.Array, seed: jax.Array
) -> tuple[Condition, jax.Array, jax.Array]:
    """The condition that the model reads, decoding order and noise of image numbers (B,)."""
    order, noise = image_draws(seed, images, blueprint.config.model)
    return blueprint.condition(weights, condition), order, noise


def to_pixels(tokens: jax.Array, blueprint: Blueprint, weights: Tree) -> jax.Array:
    """Tokens (B, N, p*p*C) -> uint8 images (B, H, W, 3): decoded, scaled, clamped, truncated."""
    model = blueprint.config.model
    latents = unpatchify(tokens.astype(jnp.float32), model.image_grid, model.patch_size)
    pixels = vae.to_uint8(blueprint.encoders.pixels(weights, latents))
    return constrain(pixels, "batch", None, None, None)  # whole images, also where their tokens are sharded


def make_sampler(blueprint: Blueprint, sample: SampleConfig) -> Program:
    """The jitted program (params, frozen, condition, image numbers (B,), seed ()) -> uint8 images (B, H, W, 3).

    The condition is as in a training batch; if the blueprint has a frozen text encoder, `text` may be token ids.
    """
    schedule = make_schedule(blueprint.config, sample)

    def program(params, frozen, condition, images, seed, weights):
        condition, order, noise = _sampling_inputs(blueprint, weights, condition, images, seed)
        model = blueprint.inference(blueprint.sampling_params(params, frozen), frozen)
        return to_pixels(decode(model, condition, order, noise, schedule), blueprint, weights)

    return blueprint.jit(program, blueprint.encoders.weights)


class DecodingState(NamedTuple):
    """B images after a decoding step."""

    step: int  # counted from 1
    tokens: jax.Array  # (B, N, p*p*C); those not drawn yet are zero
    rank: jax.Array  # (B, N), the place of each token in the order of drawing


class Stepper:
    """The images of `make_sampler`, one program call per decoding step, so that they can be shown as they form.

    Programs depend on shapes alone: other prompts, seeds, temperatures and guidances (except switching guidance off)
    reuse them; another number of images or steps compiles anew. With the quickstart's model on two CPU cores, images
    were bit-identical to those of `make_sampler`, and the time was within a tenth of its time (1, 4 and 36 images).
    """

    def __init__(self, blueprint: Blueprint):
        weights = blueprint.encoders.weights

        def begin(guided, params, frozen, condition, images, seed, temperature, weights):
            condition, order, noise = _sampling_inputs(blueprint, weights, condition, images, seed)
            model, tokens = blueprint.inference(params, frozen), constrain(jnp.zeros_like(noise), "batch", None, None)
            decoding_inputs = prepare(model, condition, order, temperature * noise, guided=guided)
            return tokens, decoding_inputs, blueprint.sampling_params(params, frozen)

        def step(shape, params, frozen, tokens, decoding_inputs, inputs):
            tokens = advance(blueprint.inference(params, frozen), tokens, decoding_inputs, inputs, shape)
            return constrain(tokens, "batch", None, None)

        self._config = blueprint.config
        self._begin = blueprint.jit(begin, weights, static_argnums=0)
        self._step = blueprint.jit(step, static_argnums=0)
        self._pixels = blueprint.jit(lambda tokens, weights: to_pixels(tokens, blueprint, weights), weights)

    def schedule(self, sample: SampleConfig) -> Schedule:
        return make_schedule(self._config, sample)

    def __call__(
        self, params: Tree, frozen: Tree, condition: dict, images: np.ndarray, seed: int, schedule: Schedule
    ) -> Iterator[DecodingState]:
        """The states of the images with these numbers (B,), one per step; the last holds the finished images."""
        which = images.astype(np.int32), np.int32(seed), np.float32(schedule.temperature)
        tokens, decoding_inputs, params = self._begin(schedule.guided, params, frozen, condition, *which)
        for stage in schedule.stages:
            shape = schedule.shape(stage)
            for i in range(stage.start, stage.stop):
                tokens = self._step(shape, params, frozen, tokens, decoding_inputs, schedule.inputs(i))
                yield DecodingState(i + 1, tokens, decoding_inputs.rank)

    def pixels(self, state: DecodingState) -> jax.Array:
        """uint8 images (B, H, W, 3)."""
        return self._pixels(state.tokens)


def make_progress_strips(blueprint: Blueprint, sample: SampleConfig, shown: int) -> Program:
    """A program like that of `make_sampler` -> uint8 images (S, B, H, W, 3) of the pictures as they form.

    S is at most `shown`: the first step, evenly spaced ones, and the last. Tokens not drawn yet are zero.
    """
    schedule = make_schedule(blueprint.config, sample)
    at = np.unique(np.linspace(0, len(schedule.predicted) - 1, shown).round().astype(int))
    counts = jnp.asarray((schedule.visible + schedule.predicted)[at])

    def program(params, frozen, condition, images, seed, weights):
        condition, order, noise = _sampling_inputs(blueprint, weights, condition, images, seed)
        model = blueprint.inference(blueprint.sampling_params(params, frozen), frozen)
        tokens = decode(model, condition, order, noise, schedule)
        rank = jnp.argsort(order, axis=1)[..., None]
        return jax.lax.map(lambda count: to_pixels(jnp.where(rank < count, tokens, 0), blueprint, weights), counts)

    return blueprint.jit(program, blueprint.encoders.weights)
