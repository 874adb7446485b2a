"""Kernels for the core of linear attention; they read and write each array once, in the layout of the projections.

Without them, XLA runs small matmuls for each head of the core (feature map, gates, state, normalizer) and copies
queries, keys and values between token order and head order. The kernels are passes over tokens (see `tiles`):

    summarize   k, v, gates -> state = mean k v^T of each head, mean k (with subtraction also mean v)
    read        q, summaries -> out

The gradient of each is another pass. Between the two, means are summed over the shards of a sequence. A state is stored
as (B, d, H d): for each head, rows are features of keys and columns are features of values. Queries, keys and values
come before their biases are added, either as three arrays or side by side in one. The one array is then never split,
nor is its gradient concatenated.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lina_jax.models import sequence
from lina_jax.models.layers import broadcast_f32_grad
from lina_jax.models.tiles import Column, Parts, Tile, device, interpreted, matmul_f32, on_each_device, over_tokens


@dataclasses.dataclass(frozen=True)
class Core:
    """The variant that is computed, its constants and its device."""

    heads: int
    division: bool  # else subtraction
    relu_eps: float
    normalizer_eps: float
    device: str  # tpu | gpu
    interpret: bool

    def features(self, x: jax.Array) -> jax.Array:
        return jnp.maximum(x, 0.0) + self.relu_eps

    def run_pass(self, function, arrays: Parts, results: Parts, products: tuple[int, int]) -> Parts:
        """`tiles.over_tokens` with a function (core, tile, inputs) -> outputs."""
        how = {"heads": self.heads, "products": products, "device": self.device, "interpret": self.interpret}
        return over_tokens(functools.partial(function, self), arrays, results, **how)


def linear_attention(
    projected: Sequence[jax.Array],
    bias: jax.Array,
    gates: Sequence[jax.Array | None],
    valid: jax.Array | None = None,
    *,
    heads: int,
    division: bool,
    relu_eps: float,
    normalizer_eps: float,
) -> jax.Array:
    """`attention.division_attention` (or subtraction), including biases, feature maps and gates.

    `projected` is q, k and v, each (B, N, H d), or one array (B, N, 3, H d) of them. `bias` (1 or B, 3, H d) is not
    added to them yet. `gates` are those of keys, of values and, if it differs, of keys in the normalizer, each
    (1 or B, N, H or 1) or None. `valid` is (B, N) or None. Returns (B, N, H d).

    Raises UserError for heads that are too wide for GPUs.
    """
    batch, length = projected[0].shape[:2]
    dtype = projected[0].dtype
    key, value, normalizer = gates
    gates = [
        jnp.ones((batch, length, heads), dtype)
        if gate is None
        else broadcast_f32_grad(gate, jax.ShapeDtypeStruct((batch, length, heads), dtype))
        for gate in ((key, value) if normalizer is None else (key, value, normalizer))
    ]
    bias = jnp.broadcast_to(bias.astype(jnp.float32), (batch, *bias.shape[1:]))
    kernels = {"division": division, "relu_eps": relu_eps, "normalizer_eps": normalizer_eps}
    kernels |= {"device": device(), "interpret": bool(interpreted.value)}

    def attend_shard(projected, bias, gates, valid):
        images, tokens, own_heads = gates[0].shape
        projected = tuple(x.reshape(images, tokens, -1) for x in projected)
        if valid is not None:
            gates = [gate * valid[..., None].astype(gate.dtype) for gate in gates]
        share = jnp.reshape(sequence.share(valid, tokens), (-1, 1, 1))
        share = jnp.broadcast_to(share, (images, 1, bias.shape[2])).astype(jnp.float32)
        return attend(Core(own_heads, **kernels), projected, bias, jnp.concatenate(gates, axis=2), share)

    tokens = ("batch", "tokens", "heads")
    parts = [("batch", "tokens", *[None] * (x.ndim - 3), "heads") for x in projected]
    axes = [parts, ("batch", None, "heads"), [tokens] * len(gates), ("batch", "tokens")]
    return on_each_device(attend_shard, axes, tokens, images=batch)(list(projected), bias, gates, valid)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(core: Core, projected: tuple[jax.Array, ...], bias: jax.Array, gates: jax.Array, share: jax.Array):
    """Attention of one shard's queries to the keys and values of all shards: (B, N, H d).

    `projected` is q, k and v, each (B, N, H d), or one array (B, N, 3 H d). `bias` is (B, 3, H d) float32. `gates`
    (B, N, g H) are those of keys in the state, of values and, if it differs, of keys in the normalizer. `share`
    (B, 1, H d) is the weight of a token in a mean; it gets no gradient.
    """
    return _attend(core, projected, bias, gates, share)[0]


def _attend(core: Core, projected, bias, gates, share):
    q, k, v = _columns(projected)
    bias_q, bias_k, bias_v = jnp.split(bias, 3, axis=1)
    width = bias.shape[2]
    rows = (width // core.heads, 1) if core.division else (width // core.heads, 1, 1)
    sums = tuple(jax.ShapeDtypeStruct((len(bias), r, width), jnp.float32) for r in rows)
    arrays = Parts((k, v), (gates,), (share, bias_k, bias_v))
    summaries = sequence.psum(core.run_pass(_summarize, arrays, Parts(summaries=sums), (1, 0)).summaries)
    out = jax.ShapeDtypeStruct((*gates.shape[:2], width), q.array.dtype)
    out = core.run_pass(_read, Parts((q,), (), (bias_q, *summaries)), Parts((Column(out),)), (1, 1)).tokens[0].array
    return out, (projected, bias, gates, share, summaries)


def _attend_gradient(core: Core, kept, gradient):
    projected, bias, gates, share, summaries = kept
    q, k, v = _columns(projected)
    bias_q, bias_k, bias_v = jnp.split(bias, 3, axis=1)
    arrays = Parts((q, Column(gradient)), (), (bias_q, *summaries))
    results = Parts((q.like(),), (), tuple(map(_like, summaries)))
    outputs = core.run_pass(_read_gradient, arrays, results, (3, 2))
    first, d_summaries = outputs.tokens[0].array, outputs.summaries
    arrays = Parts((k, v), (gates,), (share, bias_k, bias_v, *sequence.psum(d_summaries)))
    # If q, k and v are columns of one array, so are their gradients: the second pass completes the array that the first
    # began.
    results = Parts((k.like(first), v.like(first)), (_like(gates),))
    outputs = core.run_pass(_summarize_gradient, arrays, results, (2, 0))
    d_k, d_v = (column.array for column in outputs.tokens)
    d_projected = (d_v,) if len(projected) == 1 else (first, d_k, d_v)
    d_bias = jnp.concatenate([jnp.sum(x, axis=1, dtype=jnp.float32, keepdims=True) for x in d_projected], axis=1)
    return d_projected, d_bias.reshape(bias.shape), *outputs.gates, jnp.zeros_like(share)


attend.defvjp(_attend, _attend_gradient)


def _columns(projected: tuple[jax.Array, ...]) -> list[Column]:
    """Queries, keys, values."""
    return [Column(x) for x in projected] if len(projected) == 3 else [Column(*projected, kind) for kind in range(3)]


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _summarize(core: Core, tile: Tile, inputs: Parts) -> Parts:
    share, *bias = inputs.summaries
    k, v = _with_bias(inputs.tokens, bias)
    keys, normalizer_keys, values = _gated_keys_values(core, k, v, inputs)
    sums = tile.state(matmul_f32(keys, values, (0, 0))), _sum(normalizer_keys), _sum(values)
    return Parts(summaries=tuple(x * share for x in sums[: 2 if core.division else 3]))


def _summarize_gradient(core: Core, tile: Tile, inputs: Parts) -> Parts:
    dtype = inputs.tokens[0].dtype
    _, (key, value, *normalizer), (share, bias_k, bias_v, *gradients) = inputs
    k, v = _with_bias(inputs.tokens, (bias_k, bias_v))
    state, mean_k, mean_v = (*(g * share for g in gradients), 0.0)[:3]
    keys, _, values = _gated_keys_values(core, k, v, inputs)
    square = tile.square(state).astype(dtype)
    d_values = matmul_f32(keys, square, (1, 0)) + mean_v
    d_keys = matmul_f32(values, square, (1, 1))
    features = core.features(k)
    if normalizer:
        d_features = d_keys * key + mean_k * normalizer[0]
        d_normalizer = (mean_k * features,)
    else:
        d_keys += mean_k
        d_features, d_normalizer = d_keys * key, ()
    return Parts(
        (jnp.where(k > 0, d_features, 0.0), d_values * value),
        (d_keys * features, d_values * v, *d_normalizer),
    )


def _with_bias(tokens: Sequence[jax.Array], bias: Sequence[jax.Array]) -> list[jax.Array]:
    return [x.astype(jnp.float32) + row for x, row in zip(tokens, bias, strict=True)]


def _gated_keys_values(core: Core, k: jax.Array, v: jax.Array, inputs: Parts) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys in the state, keys in the normalizer, values."""
    dtype, (key, value, *normalizer) = inputs.tokens[0].dtype, inputs.gates
    features = core.features(k)
    keys = (features * key).astype(dtype)
    normalizer_keys = (features * normalizer[0]).astype(dtype) if normalizer else keys
    return keys, normalizer_keys, (v * value).astype(dtype)


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x.astype(jnp.float32), axis=0, keepdims=True)


def _read(core: Core, tile: Tile, inputs: Parts) -> Parts:
    return Parts((_recompute_read(core, tile, inputs)[1],))


def _read_gradient(core: Core, tile: Tile, inputs: Parts) -> Parts:
    (_, gradient), (_, _, mean_k, *mean_v) = inputs.tokens, inputs.summaries
    q, out, queries, square, normalizer = _recompute_read(core, tile, inputs)
    dtype = queries.dtype
    g = gradient.astype(jnp.float32)
    if core.division:
        g = g / normalizer
        d_normalizer = -tile.along((g * out).astype(dtype), jnp.ones_like(mean_k))
        d_mean_v = ()
    else:
        d_normalizer = -tile.along(gradient, mean_v[0])
        d_mean_v = (_sum(g * (1.0 - normalizer)),)
    g = g.astype(dtype)
    d_queries = (matmul_f32(g, square, (1, 1)) + d_normalizer * mean_k) * _scale(core, tile)
    d_mean_k = _sum(queries.astype(jnp.float32) * d_normalizer)
    return Parts(
        (jnp.where(q > 0, d_queries, 0.0),),
        summaries=(tile.state(matmul_f32(queries, g, (0, 0))), d_mean_k, *d_mean_v),
    )


def _recompute_read(core: Core, tile: Tile, inputs: Parts) -> tuple[jax.Array, ...]:
    """q with its bias, the output, features of queries, the state as a square matrix, the normalizer."""
    dtype, (bias, state, mean_k, *mean_v) = inputs.tokens[0].dtype, inputs.summaries
    (q,) = _with_bias(inputs.tokens[:1], (bias,))
    queries = (core.features(q) * _scale(core, tile)).astype(dtype)
    square = tile.square(state).astype(dtype)
    numerator, normalizer = matmul_f32(queries, square, (1, 0)), tile.along(queries, mean_k)
    if core.division:
        normalizer += core.normalizer_eps
        return q, numerator / normalizer, queries, square, normalizer
    return q, numerator + (1.0 - normalizer) * mean_v[0], queries, square, normalizer


def _scale(core: Core, tile: Tile) -> float:
    return 1.0 if core.division else tile.width**-0.5
