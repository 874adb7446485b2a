"""Whether kernels find on this device what XLA's products find: asked once, before a run relies on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lina_jax.config import ModelConfig
from lina_jax.errors import UserError
from lina_jax.models import tiles
from lina_jax.models.attention import Attention, AttentionConfig

TOLERANCE = 0.05  # of the norm of the result and of each gradient; measured with bfloat16: 0.017 at most
HEADS, CONDITION, SIDE = 2, 64, 24  # so many tokens that several programs of a GPU share an image


def check(model: ModelConfig) -> None:
    """Raises UserError where a layer with the model's kernels differs from one without, in value or gradient.

    Nothing is compared where the model has none, or this process' devices.
    """
    if model.attention_kernel != "pallas" or model.attention == "softmax" or not tiles.device():
        return
    layer = AttentionConfig(
        width=HEADS * (model.width // model.heads),
        heads=HEADS,
        kernel="pallas",
        normalization=model.normalization,
        conv_kernel=model.conv_kernel if model.depthwise_conv else 0,
        gate=model.kv_gate,
        condition_tokens=CONDITION,
        grid=(SIDE, SIDE),
        dtype=jnp.dtype(model.dtype),
    )
    pairs = zip(_outcome(layer), _outcome(dataclasses.replace(layer, kernel="xla")), strict=True)
    distances = [float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)) for found, expected in pairs]
    if not all(distance < TOLERANCE for distance in distances):
        raise UserError(
            f"model.attention_kernel=pallas: on {jax.local_devices()[0].device_kind} its results differ from "
            f"XLA's by up to {np.max(distances):.1%}; --config.model.attention_kernel=xla does without"
        )


def _outcome(layer: AttentionConfig) -> list[jax.Array]:
    """Result and gradients of a layer of noise, each flat and float32."""
    graph, weights = nnx.split(Attention(layer, rngs=nnx.Rngs(0)))
    x, direction = (jax.random.normal(jax.random.key(i), (2, layer.tokens, layer.width), layer.dtype) for i in (1, 2))

    @jax.jit
    def both(weights, x):
        result, pull = jax.vjp(lambda weights, x: nnx.merge(graph, weights)(x), weights, x)
        return jax.tree.leaves((result, pull(direction)))

    return [part.astype(jnp.float32).ravel() for part in both(weights, x)]
