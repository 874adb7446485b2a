"""The training step: loss and gradient of a global batch, one update of parameters, moments and EMA."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from lina_jax import mesh as mesh_lib
from lina_jax import optim, platforms, xla_flags
from lina_jax.config import Config, EmaConfig
from lina_jax.ema import averaged
from lina_jax.mesh import constrain
from lina_jax.models import flow, vae
from lina_jax.models.draws import draw, latent_noise
from lina_jax.models.layers import patchify
from lina_jax.models.lina import Condition, drop_conditions
from lina_jax.models.transformer import copy_per_image, gather_unstacked, overlap_grad_reduction
from lina_jax.state import Batch, Blueprint, Program, TrainState, Tree, key_of


def model_inputs(blueprint: Blueprint, weights: Tree, batch: Batch, noise_of: Callable) -> tuple[jax.Array, Condition]:
    """Data tokens (B, N, p*p*C) float32 in the space that is learned (latents or pixels), and the condition.

    Latents are drawn anew in each step: `noise_of(shape)` gives their noise (B, *shape). `weights` are those of the
    blueprint's encoders, for batches that have pixels or token ids instead of moments or features.
    """
    config = blueprint.config
    if "moments" in batch:
        moments = rearrange(batch["moments"], "b c h w -> b h w c")
    else:
        moments = blueprint.encoders.moments(weights, vae.from_uint8(batch["image"]))
    if config.autoencoder.kind == "identity":
        data = moments
    else:
        *size, channels = moments.shape[1:]
        data = vae.scale(config.autoencoder, vae.draw_latents(moments, noise_of((*size, channels // 2))))
    tokens = patchify(data, config.model.patch_size)
    return constrain(tokens, "batch", "tokens", None), blueprint.condition(weights, batch)


def make_train_step(blueprint: Blueprint) -> Program:
    """The jitted step (state, batch) -> (state, metrics): one global batch, one update. Donates the state.

    A step with a non-finite loss or gradient makes no update.
    """
    config, optimizer = blueprint.config, blueprint.optimizer
    sigmas = flow.training_sigmas(config.loss.shift)
    schedule = optim.learning_rate(config.optim, config.steps)
    # Not for hybrids, whose runs of equal layers are short.
    unrolled = not config.model.scan_layers and config.model.attention != "hybrid"
    overlap = unrolled and mesh_lib.sums_cross_nodes(blueprint.mesh)
    platform = blueprint.mesh.devices.flat[0].platform

    def loss_of(params, frozen, tokens, condition, draws, weight):
        model = copy_per_image(gather_unstacked(blueprint.model(params, frozen)), len(tokens))
        condition = drop_conditions(config.model, condition, draws.drop)
        with overlap_grad_reduction(overlap):
            return model.loss(tokens, condition, draws, sigmas) / weight

    def step(state: TrainState, batch: Batch, weights: Tree):
        key = key_of(config, state.step)
        examples = jnp.arange(config.batch_size)
        tokens, condition = model_inputs(blueprint, weights, batch, functools.partial(latent_noise, key, examples))
        draws = draw(key, examples, config.model, config.loss)
        # The mean is over the masked tokens of the whole batch, however many micro-batches it is split into.
        weight = config.loss.repeat * jnp.sum(draws.mask, dtype=jnp.float32) + 1e-5
        loss_and_grad = jax.value_and_grad(loss_of)
        if config.optim.accumulate == 1:
            loss, grads = loss_and_grad(state.params, state.frozen, tokens, condition, draws, weight)
        else:
            loss, grads = _accumulated(loss_and_grad, config, state, (tokens, condition, draws), weight)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        rate = schedule(state.updates)
        state = _select_or_cond(finite, functools.partial(apply_gradients, config.ema, optimizer), _skip, state, grads)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }
        return dataclasses.replace(state, step=state.step + 1), metrics

    return blueprint.jit(
        step,
        blueprint.encoders.weights,
        donate_argnums=0,
        out_shardings=(blueprint.shardings, None),
        compiler_options=xla_flags.training_options(platform, overlap_grad_reduction=overlap),
    )


def _select_or_cond(condition: jax.Array, function: Callable, other: Callable, *args) -> Tree:
    """function(*args) if the condition holds, else other(*args).

    This is a branch, except on GPUs, where the host would wait for the condition. GPUs select each element instead,
    which costs nothing, as an update reads the old values anyway; on CPUs it would move a tenth more bytes.
    """
    if platforms.platform() == "gpu":
        return jax.tree.map(functools.partial(jnp.where, condition), function(*args), other(*args))
    return jax.lax.cond(condition, function, other, *args)


def _accumulated(
    loss_and_grad: Callable, config: Config, state: TrainState, inputs: tuple, weight: jax.Array
) -> tuple[jax.Array, Tree]:
    """(loss (), gradients like the parameters), summed over the micro-batches.

    `inputs` are those of the whole batch: tokens (B, N, p*p*C), condition (each array (B, ...)) and `Draws`. `weight`
    () is that of the whole batch, too.
    """
    parts = config.optim.accumulate
    tokens, condition, draws = inputs
    axis = dataclasses.replace(jax.tree.map(lambda _: 0, draws), timestep=1, noise=1)

    def cut(x, batch_axis=0):
        # A micro-batch takes every parts-th example, so that examples stay on their devices.
        before, after = x.shape[:batch_axis], x.shape[batch_axis + 1 :]
        return jnp.moveaxis(x.reshape(*before, -1, parts, *after), batch_axis + 1, 0)

    micro = (cut(tokens), jax.tree.map(cut, condition), jax.tree.map(cut, draws, axis))

    def add(total, inputs):
        return jax.tree.map(jnp.add, total, loss_and_grad(state.params, state.frozen, *inputs, weight)), None

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    return jax.lax.scan(add, start, micro)[0]


def apply_gradients(ema_config: EmaConfig, optimizer, state: TrainState, grads: Tree) -> TrainState:
    """The state after one update of parameters, moments and EMA."""
    changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, changes)
    updates = state.updates + 1
    return dataclasses.replace(
        state,
        updates=updates,
        skipped_in_a_row=jnp.zeros_like(state.skipped_in_a_row),
        params=params,
        opt_state=opt_state,
        ema=averaged(ema_config, state.ema, params, updates),
    )


def _skip(state: TrainState, grads: Tree) -> TrainState:
    del grads
    return dataclasses.replace(state, skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1)
