"""The core of linear attention as kernels: every array is read and written once, where the projections made it.

XLA makes small products for each head of the core (feature map, gates, state, normaliser), between which queries, keys
and values are copied from the order of tokens to that of heads and back. Here it is passes over tokens (see `tiles`):

    summarize   k, v, gates -> state = mean k v^T of each head, mean k (of subtraction also mean v)
    read        q, summaries -> out

each with a pass of its own for the gradient; between the two, means are added up over the shards of a sequence. A state
is kept as (B, d, H d): the rows are features of keys, the columns those of values, of each head.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange

from lina_jax.mesh import batch_parts, platform, portable, spec
from lina_jax.models import sequence
from lina_jax.models.tiles import Parts, Tile, over_tokens, product


@dataclasses.dataclass(frozen=True)
class Core:
    """What is computed, and on what."""

    heads: int
    division: bool  # else subtraction
    relu_eps: float
    normalizer_eps: float
    device: str  # tpu | gpu
    interpret: bool

    def features(self, x: jax.Array) -> jax.Array:
        return jnp.maximum(x.astype(jnp.float32), 0.0) + self.relu_eps

    def passing(self, function, arrays: Parts, results: Parts, products: int) -> Parts:
        """`tiles.over_tokens` of a function (core, tile, given) -> made."""
        how = {"heads": self.heads, "products": products, "device": self.device, "interpret": self.interpret}
        return over_tokens(functools.partial(function, self), arrays, results, **how)


# interpreted("tpu") or ("gpu"): what is traced inside has the kernels of that device, interpreted on CPUs (tests).
interpreted = jax.make_user_context(default_value="")


def available() -> bool:
    """Whether what is traced is meant for devices that have kernels."""
    return bool(interpreted.value) or (platform() != "cpu" and not portable.value)


def linear_attention(
    q, k, v, gates, valid=None, *, division: bool, relu_eps: float, normalizer_eps: float
) -> jax.Array:
    """`attention.division_attention` (or subtraction) of the features of q and k and what the gates leave of k and v.

    q, k, v (B, N, H, d); `gates` of keys in the state, of keys in the normaliser (the same object where they are the
    same) and of values, (1 or B, N, H or 1) or None; `valid` (B, N) or None. -> (B, N, H, d).

    Raises UserError for heads that are too wide for GPUs.
    """
    shape = q.shape[:3]
    key, normalizer, value = gates
    gates = [
        jnp.ones(shape, q.dtype) if gate is None else jnp.broadcast_to(gate.astype(q.dtype), shape)
        for gate in ((key, value) if normalizer is key else (key, value, normalizer))
    ]
    device, interpret = interpreted.value or platform(), bool(interpreted.value)

    def of_shard(q, k, v, valid, *gates):
        shape = q.shape
        core = Core(shape[2], division, relu_eps, normalizer_eps, device, interpret)
        q, k, v = (rearrange(x, "b n h d -> b n (h d)") for x in (q, k, v))
        if valid is not None:
            gates = [gate * valid[..., None].astype(gate.dtype) for gate in gates]
        gates = jnp.concatenate(gates, axis=2)
        share = jnp.reshape(sequence.share(valid, q.shape[1]), (-1, 1, 1))
        share = jnp.broadcast_to(share, (len(q), 1, q.shape[2])).astype(jnp.float32)
        return read(core, q, sequence.total(summarize(core, k, v, gates, share))).reshape(shape)

    arrays = (q, k, v, valid, *gates)
    grid = jax.sharding.get_abstract_mesh()
    if grid.empty:
        return of_shard(*arrays)
    # The one image of the condition that guidance contrasts with is whole on every device.
    images = "batch" if shape[0] % batch_parts(grid) == 0 else None
    tokens = spec(images, "tokens", "heads", None)
    specs = (tokens, tokens, tokens, spec(images, "tokens"), *[spec(images, "tokens", "heads")] * len(gates))
    # Kernels do not say along which axes of the mesh their results vary, so that this cannot be checked.
    return jax.shard_map(of_shard, in_specs=specs, out_specs=tokens, check_vma=False)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def summarize(core: Core, k: jax.Array, v: jax.Array, gates: jax.Array, share: jax.Array) -> tuple[jax.Array, ...]:
    """State (B, d, H d) and mean k (B, 1, H d); of subtraction also mean v (B, 1, H d).

    k, v (B, N, H d); gates (B, N, g H), of keys in the state, of values and, where it is another, of keys in the
    normaliser. `share` (B, 1, H d) is the weight of a token in a mean; it has no gradient.
    """
    rows = (k.shape[2] // core.heads, 1) if core.division else (k.shape[2] // core.heads, 1, 1)
    results = Parts(summaries=tuple(jax.ShapeDtypeStruct((len(k), r, k.shape[2]), jnp.float32) for r in rows))
    return core.passing(_summarize, Parts((k, v), (gates,), (share,)), results, products=1).summaries


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def read(core: Core, q: jax.Array, summaries: Sequence[jax.Array]) -> jax.Array:
    """What queries (B, N, H d) find in the summaries that `summarize` made. (B, N, H d)."""
    return core.passing(_read, Parts((q,), (), tuple(summaries)), Parts((_like(q),)), products=2).tokens[0]


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _summarize(core: Core, tile: Tile, given: Parts) -> Parts:
    keys, normalizer_keys, values = _gated(core, given)
    (share,) = given.summaries
    sums = tile.state(product(keys, values, (0, 0))), _sum(normalizer_keys), _sum(values)
    return Parts(summaries=tuple(x * share for x in sums[: 2 if core.division else 3]))


def _summarize_gradient(core: Core, tile: Tile, given: Parts) -> Parts:
    (k, v), (key, value, *normalizer), (share, *gradients) = given
    state, mean_k, mean_v = (*(g * share for g in gradients), 0.0)[:3]
    keys, _, values = _gated(core, given)
    square = tile.square(state).astype(k.dtype)
    of_values = product(keys, square, (1, 0)) + mean_v
    of_keys = product(values, square, (1, 1))
    features = core.features(k)
    if normalizer:
        of_features = of_keys * key + mean_k * normalizer[0]
        of_normalizer = (mean_k * features,)
    else:
        of_keys += mean_k
        of_features, of_normalizer = of_keys * key, ()
    return Parts(
        (jnp.where(k > 0, of_features, 0.0), of_values * value),
        (of_keys * features, of_values * v.astype(jnp.float32), *of_normalizer),
    )


def _gated(core: Core, given: Parts) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys in the state, keys in the normaliser, values."""
    (k, v), (key, value, *normalizer), _ = given
    features = core.features(k)
    keys = (features * key).astype(k.dtype)
    normalizer_keys = (features * normalizer[0]).astype(k.dtype) if normalizer else keys
    return keys, normalizer_keys, (v.astype(jnp.float32) * value).astype(v.dtype)


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x.astype(jnp.float32), axis=0, keepdims=True)


def _read(core: Core, tile: Tile, given: Parts) -> Parts:
    return Parts((_found(core, tile, given.tokens[0], given.summaries)[0],))


def _read_gradient(core: Core, tile: Tile, given: Parts) -> Parts:
    (q, gradient), (_, mean_k, *mean_v) = given.tokens, given.summaries
    found, queries, square, normalizer = _found(core, tile, q, given.summaries)
    g = gradient.astype(jnp.float32)
    if core.division:
        g = g / normalizer
        of_normalizer = -tile.along((g * found).astype(q.dtype), jnp.ones_like(mean_k))
        of_mean_v = ()
    else:
        of_normalizer = -tile.along(gradient, mean_v[0])
        of_mean_v = (_sum(g * (1.0 - normalizer)),)
    g = g.astype(q.dtype)
    of_queries = (product(g, square, (1, 1)) + of_normalizer * mean_k) * _scale(core, tile)
    of_mean_k = _sum(queries.astype(jnp.float32) * of_normalizer)
    return Parts(
        (jnp.where(q > 0, of_queries, 0.0),),
        summaries=(tile.state(product(queries, g, (0, 0))), of_mean_k, *of_mean_v),
    )


def _found(core: Core, tile: Tile, q: jax.Array, summaries) -> tuple[jax.Array, ...]:
    """What is found, queries, the state's square, the normaliser."""
    state, mean_k, *mean_v = summaries
    queries = (core.features(q) * _scale(core, tile)).astype(q.dtype)
    square = tile.square(state).astype(q.dtype)
    numerator, normalizer = product(queries, square, (1, 0)), tile.along(queries, mean_k)
    if core.division:
        normalizer += core.normalizer_eps
        return numerator / normalizer, queries, square, normalizer
    return numerator + (1.0 - normalizer) * mean_v[0], queries, square, normalizer


def _scale(core: Core, tile: Tile) -> float:
    return 1.0 if core.division else tile.width**-0.5


def _summarize_backward(core: Core, kept, gradients):
    k, v, gates, share = kept
    results = Parts((_like(k), _like(v)), (_like(gates),))
    made = core.passing(_summarize_gradient, Parts((k, v), (gates,), (share, *gradients)), results, products=2)
    return *made.tokens, *made.gates, jnp.zeros_like(share)


def _read_backward(core: Core, kept, gradient):
    q, summaries = kept
    arrays, results = Parts((q, gradient), (), summaries), Parts((_like(q),), (), tuple(map(_like, summaries)))
    made = core.passing(_read_gradient, arrays, results, products=5)
    return made.tokens[0], made.summaries


summarize.defvjp(lambda core, *kept: (summarize(core, *kept), kept), _summarize_backward)
read.defvjp(lambda core, *kept: (read(core, *kept), kept), _read_backward)
