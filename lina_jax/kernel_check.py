"""Checks, before a run relies on attention kernels, that they compute the same as XLA's matmuls on this device."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lina_jax import execution
from lina_jax.config import Config, ModelConfig
from lina_jax.errors import UserError, first_line
from lina_jax.models import tiles
from lina_jax.models.attention import Attention, AttentionConfig

TOLERANCE = 0.03  # relative to the norm of the result or gradient; measured with bfloat16: 0.005 at most
SMALL = 0.01  # share of the norm of all gradients added to that of each: some nearly cancel, and are mostly rounding
CONDITION, SIDE = 64, 24  # enough tokens that several programs of a GPU share an image


def resolve_kernel(config: Config, mesh: Mesh) -> Config:
    """The config, without kernels if it leaves them open and they fail on the devices of any process (logged).

    The same in all processes. Raises UserError if kernels that the config asks for fail.
    """
    reason = _fault(execution.resolve(config, mesh).model)
    if not np.any(multihost_utils.process_allgather(np.array(bool(reason)))):
        return config
    reason = reason or "fails in another process"
    if config.model.attention_kernel not in execution.OPEN:
        raise _refusal(reason)
    logging.warning("attention runs in plain XLA: on %s the kernel %s", jax.local_devices()[0].device_kind, reason)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention_kernel="xla"))


def check(model: ModelConfig) -> None:
    """Raises UserError if the model's kernels fail on the devices of this process."""
    if reason := _fault(model):
        raise _refusal(reason)


def _fault(model: ModelConfig) -> str:
    """What is wrong with the model's kernels on the devices of this process; "" if nothing, or if it uses none.

    Compares the results and gradients of a small layer with and without kernels.
    """
    if model.attention_kernel != "pallas" or model.attention == "softmax" or not tiles.device():
        return ""
    heads = math.gcd(model.heads, 4)  # four heads of 96 channels share a tile of a TPU
    layer = AttentionConfig(
        width=heads * (model.width // model.heads),
        heads=heads,
        kernel="pallas",
        normalization=model.normalization,
        conv_kernel=model.conv_kernel if model.depthwise_conv else 0,
        gate=model.kv_gate,
        condition_tokens=CONDITION,
        grid=(SIDE, SIDE),
        dtype=jnp.dtype(model.dtype),
    )
    expected = _outcome(dataclasses.replace(layer, kernel="xla"), rotary=model.rotary)
    try:
        actual = _outcome(layer, rotary=model.rotary)
    except UserError:
        raise
    except Exception as error:  # Pallas and compilers raise many types for what they cannot lower
        return f"does not compile or run: {first_line(error)}"
    sizes = [np.linalg.norm(part) for part in expected]
    small = SMALL * np.linalg.norm(sizes[1:])
    errors = [np.linalg.norm(a - b) / (size + small) for a, b, size in zip(actual, expected, sizes, strict=True)]
    if not all(error < TOLERANCE for error in errors):  # NaN does not pass either
        return f"differs from plain XLA by {np.max(errors):.1%}"
    return ""


def _refusal(reason: str) -> UserError:
    kind = jax.local_devices()[0].device_kind
    return UserError(f"model.attention_kernel=pallas: on {kind} it {reason} (use --config.model.attention_kernel=xla)")


def _outcome(layer: AttentionConfig, *, rotary: bool) -> list[np.ndarray]:
    """Result and gradients of a layer on noise, with some tokens absent; each flat and float32."""
    graph, weights = nnx.split(Attention(layer, rngs=nnx.Rngs(0)))
    shape = 2, layer.tokens, layer.width
    x, direction = (jax.random.normal(jax.random.key(i), shape).astype(layer.dtype) for i in (1, 2))
    valid = jnp.arange(layer.tokens)[None] < jnp.array([[layer.tokens], [layer.tokens - CONDITION]])
    pairs = layer.width // layer.heads // 2
    angles = jax.random.normal(jax.random.key(3), (1, layer.tokens, pairs)) if rotary else None

    @jax.jit
    def both(weights, x):
        def result(weights, x):
            return nnx.merge(graph, weights)(x, valid=valid, angles=angles) * valid[..., None]

        made, pull = jax.vjp(result, weights, x)
        return jax.tree.leaves((made, pull(direction)))

    return [np.asarray(part, np.float32).ravel() for part in both(weights, x)]
