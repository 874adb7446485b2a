"""Whether kernels find on this device what XLA's products find: asked once, before a run relies on them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lina_jax.config import ModelConfig
from lina_jax.errors import UserError
from lina_jax.models import tiles
from lina_jax.models.attention import Attention, AttentionConfig

TOLERANCE = 0.03  # of the norm of the result, and of each gradient; measured with bfloat16: 0.005 at most
SMALL = 0.01  # of the norm of all gradients, added to that of each: those that nearly cancel are all rounding
CONDITION, SIDE = 64, 24  # so many tokens that several programs of a GPU share an image


def check(model: ModelConfig) -> None:
    """Raises UserError where a layer with the model's kernels differs from one without, in value or gradient.

    Or where they do not compile. Nothing happens where the model has no kernels, or this process' devices.
    """
    if model.attention_kernel != "pallas" or model.attention == "softmax" or not tiles.device():
        return
    heads = math.gcd(model.heads, 4)  # as many of 96 channels share a tile of a TPU
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
        found = _outcome(layer, rotary=model.rotary)
    except jax.errors.JaxRuntimeError as error:
        raise _refusal(f"does not compile or run: {str(error).splitlines()[0]}") from error
    sizes = [np.linalg.norm(part) for part in expected]
    small = SMALL * np.linalg.norm(sizes[1:])
    errors = [np.linalg.norm(a - b) / (size + small) for a, b, size in zip(found, expected, sizes, strict=True)]
    if not all(error < TOLERANCE for error in errors):  # so is NaN refused
        raise _refusal(f"differs from XLA's products by {np.max(errors):.1%}")


def _refusal(reason: str) -> UserError:
    kind = jax.local_devices()[0].device_kind
    return UserError(
        f"model.attention_kernel=pallas: on {kind} it {reason} (--config.model.attention_kernel=xla does without)"
    )


def _outcome(layer: AttentionConfig, *, rotary: bool) -> list[np.ndarray]:
    """Result and gradients of a layer on noise, some of whose tokens do not exist; each flat and float32."""
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
