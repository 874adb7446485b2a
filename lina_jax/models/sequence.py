"""Sequence parallelism: the tokens of an image are sharded by rows over the mesh axis `sequence`.

A sequence of condition and image tokens is stored shard by shard: each of S shards has its Nc / S condition tokens,
then its N / S image tokens, which are whole rows of the grid. With S = 1 that is the plain order. Only attention, its
convolution and the selection of visible tokens depend on shards, and only the functions here communicate between
devices: sums by all-reduce, rows at the edges by collective-permute. Tokens themselves are never gathered (except for
softmax attention).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from lina_jax.mesh import batch_parts
from lina_jax.models.layers import gather_tokens
from lina_jax.platforms import platform, portable

T = TypeVar("T")

AXIS = "sequence"

# A shard has capacity for this many standard deviations more visible tokens than the mean, which a normal variable
# exceeds once in 1e9 draws.
DEVIATIONS = 6.0
TILE = 8  # compilers want matrices whose number of rows is a multiple of this
RARELY = "rarely"  # scope of the branch that runs when a shard has more; estimates leave it out


def shards() -> int:
    """S of the current mesh; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def join_tokens(condition: jax.Array, image: jax.Array) -> jax.Array:
    """condition (B, Nc, ...), image (B, N, ...) -> (B, Nc + N, ...), shard by shard."""
    s = shards()
    condition, image = (rearrange(x, "b (s n) ... -> b s n ...", s=s) for x in (condition, image))
    return rearrange(jnp.concatenate([condition, image], axis=2), "b s n ... -> b (s n) ...")


def split_tokens(x: jax.Array, num_conditions: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of `join_tokens`, for `num_conditions` = Nc tokens."""
    s = shards()
    x = rearrange(x, "b (s n) ... -> b s n ...", s=s)
    parts = x[:, :, : num_conditions // s], x[:, :, num_conditions // s :]
    return tuple(rearrange(part, "b s n ... -> b (s n) ...") for part in parts)


def table_per_shard(table: jax.Array, num_conditions: int) -> jax.Array:
    """Tables (B or 1, Nc + N, ...) with a row for each token, sharded as `join_tokens` stores tokens.

    Every shard holds the whole table and takes its own rows. The table's gradient is whole too, a sum over shards.
    """
    s = shards()
    if s == 1:
        return table

    def own(table):
        def part(rows):
            count = rows.shape[1] // s
            return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(AXIS) * count, count, axis=1)

        return jnp.concatenate([part(table[:, :num_conditions]), part(table[:, num_conditions:])], axis=1)

    return per_shard(own, replicated=(0,))(table)


def padded(x: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """x (B, N, D) with zeros up to a multiple of S tokens, and which tokens exist: `valid` (B, N), None for all."""
    missing = -x.shape[1] % shards()
    if not missing:
        return x, valid
    valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0))), jnp.pad(valid, ((0, 0), (0, missing)))


def per_shard(function: Callable, *, replicated: tuple[int, ...] = (), out_replicated: bool = False) -> Callable:
    """`function` applied to each shard's own tokens, axis 1 of its arguments and of its results.

    Arguments whose positions are in `replicated` are not sharded. An `out_replicated` result is the same on all shards.
    """
    if shards() == 1:
        return function

    def call(*args):
        specs = tuple(PartitionSpec() if i in replicated else PartitionSpec(None, AXIS) for i in range(len(args)))
        out = PartitionSpec() if out_replicated else PartitionSpec(None, AXIS)
        return jax.shard_map(function, in_specs=specs, out_specs=out, axis_names={AXIS})(*args)

    return call


def psum(x):
    """The sum over shards, inside `per_shard`."""
    return jax.lax.psum(x, AXIS) if shards() > 1 else x


def share(valid: jax.Array | None, tokens: int) -> jax.Array | float:
    """The weight of a token in a mean over all shards, inside `per_shard`.

    A number, or with `valid` (B, tokens) an array (B,) of weights of valid tokens. `tokens` is the number on one shard.
    """
    if valid is None:
        return 1.0 / psum(tokens)
    return 1.0 / jnp.maximum(psum(jnp.sum(valid, axis=1, dtype=jnp.float32)), 1.0)


def replicate(x: jax.Array) -> jax.Array:
    """x, equal on all shards, as a copy for each shard, inside `per_shard`; gradients of the copies are summed."""
    return jax.lax.pcast(x, AXIS, to="varying") if shards() > 1 else x


def with_edges(rows: jax.Array, edge: int) -> jax.Array:
    """The rows of a shard with its neighbours' edge rows, inside `per_shard`; beyond the image they are zeros.

    rows (B, h, w, D) -> (B, edge + h + edge, w, D).
    """
    s = shards()
    if s == 1:
        return jnp.pad(rows, ((0, 0), (edge, edge), (0, 0), (0, 0)))
    down = [(i, i + 1) for i in range(s - 1)]  # shards that receive nothing get zeros
    above = jax.lax.ppermute(rows[:, rows.shape[1] - edge :], AXIS, down)
    below = jax.lax.ppermute(rows[:, :edge], AXIS, [(to, source) for source, to in down])
    return jnp.concatenate([above, rows, below], axis=1)


def take(x: jax.Array, ids: jax.Array) -> jax.Array:
    """A few tokens by their raster indices: x (B, N, D), ids (B, K) -> (B, K, D), the same on all shards."""

    def own(x, numbers, ids):
        if shards() == 1:
            return gather_tokens(x, ids)
        local = ids - numbers[0, 0]
        here = (local >= 0) & (local < x.shape[1])
        mine = gather_tokens(x, jnp.clip(local, 0, x.shape[1] - 1))
        return psum(jnp.where(here[..., None], mine, 0))

    # Not jax.lax.axis_index: inside a block of a decoding step XLA refuses its PartitionId (jax 0.10).
    return per_shard(own, replicated=(2,), out_replicated=True)(x, jnp.arange(x.shape[1])[None], ids)


def capacity(tokens: int, visible: int) -> int:
    """Places for visible tokens in a shard of an image of `tokens`, at most `visible` of which are visible, at random.

    The number in a shard is hypergeometric. It practically never exceeds this bound, and cannot where the bound is
    `max_in_shard`.
    """
    s, share = shards(), visible / tokens
    deviation = math.sqrt(tokens / s * share * (1 - share) * (1 - 1 / s))
    wanted = math.ceil((visible / s + DEVIATIONS * deviation) / TILE) * TILE
    return min(wanted, max_in_shard(tokens, visible))


def max_in_shard(tokens: int, visible: int) -> int:
    """The most of `visible` tokens that one shard of an image of `tokens` can have."""
    return min(visible, tokens // shards())


def _whole_tiles(places: int, mask: jax.Array) -> int:
    """`places` of a shard, on GPUs rounded up so that all images of a device have a multiple of TILE in total.

    XLA:GPU multiplies padded copies of matrices with other numbers of rows. The number of condition tokens, the other
    rows, is nearly always such a multiple. mask (B, N).
    """
    if platform() != "gpu" or portable.value:
        return places
    images = max(1, mask.shape[0] // batch_parts(jax.sharding.get_abstract_mesh()))
    step = TILE // math.gcd(TILE, images)
    return min(-(-places // step) * step, mask.shape[1] // shards())


class Visible(NamedTuple):
    """The visible tokens of each shard, in raster order, in K places per shard; the last places may be empty."""

    ids: jax.Array  # (B, S * K), which token of its shard is in a place; in an empty place, some hidden token
    exists: jax.Array  # (B, S * K), False where a place is empty
    hidden: jax.Array  # (B, N), the tokens that are in no place


def on_visible(function: Callable[[Visible], T], hidden: jax.Array, visible: int) -> T:
    """function(chosen) with `capacity` places in each shard, or `max_in_shard` if a draw needs more.

    Where the two are equal, as they are without sequence sharding, GPUs may use a few more (`_whole_tiles`).
    hidden (B, N) is False for at most `visible` > 0 tokens of each image.
    """
    tokens, s = hidden.shape[1], shards()

    def with_capacity(places: int, hidden: jax.Array) -> T:
        def choose(hidden):
            ids = jnp.argsort(hidden, axis=1, stable=True)[:, :places]
            return ids, jnp.arange(places) < jnp.sum(~hidden, axis=1, keepdims=True)

        return function(Visible(*per_shard(choose)(hidden), hidden))

    usual, full = capacity(tokens, visible), max_in_shard(tokens, visible)
    if usual == full:
        return with_capacity(_whole_tiles(full, hidden), hidden)
    fits = jnp.max(jnp.sum(rearrange(~hidden, "b (s n) -> b s n", s=s), axis=2)) <= usual

    # Memory for what a branch keeps for its gradient is allocated and cleared whichever branch runs, so this one keeps
    # nothing.
    @jax.checkpoint
    @jax.named_scope(RARELY)
    def at_full_length(hidden):
        return with_capacity(full, hidden)

    return jax.lax.cond(fits, functools.partial(with_capacity, usual), at_full_length, hidden)


def pick(x: jax.Array, chosen: Visible) -> jax.Array:
    """The visible tokens of x (B, N, D), in their places (B, S * K, D).

    The gradient is a gather, too (`put_back` is the inverse). JAX's own would be a scatter, which accelerators do row
    by row or, adding by atomics, in random order. The gradient of an empty place is taken to be zero.
    """
    return per_shard(_pick)(x, chosen.ids, chosen.exists, chosen.hidden)


def put_back(x: jax.Array, picked: jax.Array, chosen: Visible) -> jax.Array:
    """x (B, N, D) with its visible tokens replaced by `picked` (B, S * K, D), which has them in their places."""
    visible = per_shard(_put_back)(picked, chosen.ids, chosen.exists, chosen.hidden)
    return jnp.where(chosen.hidden[..., None], x, visible)


@jax.custom_vjp
def _pick(x: jax.Array, ids: jax.Array, exists: jax.Array, hidden: jax.Array) -> jax.Array:
    del exists, hidden
    return gather_tokens(x, ids)


@jax.custom_vjp
def _put_back(picked: jax.Array, ids: jax.Array, exists: jax.Array, hidden: jax.Array) -> jax.Array:
    """(B, N, D) from (B, K, D) of one shard, zero where a token is hidden."""
    del ids, exists
    place = jnp.clip(jnp.cumsum(~hidden, axis=1) - 1, 0, picked.shape[1] - 1)
    return jnp.where(hidden[..., None], 0, gather_tokens(picked, place))


def _pick_gradient(chosen, gradient):
    return _put_back(gradient, *chosen), None, None, None


def _put_back_gradient(chosen, gradient):
    _, exists, _ = chosen
    return jnp.where(exists[..., None], _pick(gradient, *chosen), 0), None, None, None


_pick.defvjp(lambda x, *chosen: (_pick(x, *chosen), chosen), _pick_gradient)
_put_back.defvjp(lambda picked, *chosen: (_put_back(picked, *chosen), chosen), _put_back_gradient)
