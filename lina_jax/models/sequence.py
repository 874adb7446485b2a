"""Sequence parallelism: the tokens of an image cut by rows over the mesh axis `sequence`.

A sequence of condition and image tokens is stored shard by shard: each of S shards has its Nc / S condition tokens,
then its N / S image tokens, which are whole rows of the grid. With S = 1 that is the plain order. Only attention, its
convolution and the choice of visible tokens know of shards, and only these functions talk to other devices: sums by
all-reduce, rows at the edges by collective-permute. Tokens themselves are never gathered (softmax attention excepted).
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from lina_jax.mesh import batch_parts, platform, portable

T = TypeVar("T")

AXIS = "sequence"

# Standard deviations above the mean up to which a shard has room for visible tokens. A normal variable is larger once
# in 1e9 draws.
SPREAD = 6.0
TILE = 8  # rows of a matrix, of which compilers want multiples
RARELY = "rarely"  # scope of what runs when that happens; estimates leave it out


def shards() -> int:
    """S, of the mesh in use; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def arrange(condition: jax.Array, image: jax.Array) -> jax.Array:
    """condition (B, Nc, ...), image (B, N, ...) -> (B, Nc + N, ...), shard by shard."""
    s = shards()
    condition, image = (rearrange(x, "b (s n) ... -> b s n ...", s=s) for x in (condition, image))
    return rearrange(jnp.concatenate([condition, image], axis=2), "b s n ... -> b (s n) ...")


def separate(x: jax.Array, conditions: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of `arrange`, for `conditions` = Nc tokens."""
    s = shards()
    x = rearrange(x, "b (s n) ... -> b s n ...", s=s)
    parts = x[:, :, : conditions // s], x[:, :, conditions // s :]
    return tuple(rearrange(part, "b s n ... -> b (s n) ...") for part in parts)


def rows(table: jax.Array, conditions: int) -> jax.Array:
    """Tables (B or 1, Nc + N, ...) with a row for each token, as `arrange` stores them.

    A table is whole on every shard and so is its gradient, a sum over shards.
    """
    s = shards()
    if s == 1:
        return table

    def own(table):
        def part(rows):
            count = rows.shape[1] // s
            return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(AXIS) * count, count, axis=1)

        return jnp.concatenate([part(table[:, :conditions]), part(table[:, conditions:])], axis=1)

    return by_shard(own, whole=(0,))(table)


def padded(x: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """x (B, N, D) with zeros up to a multiple of S tokens, and which of them exist: `valid` (B, N), None for all."""
    missing = -x.shape[1] % shards()
    if not missing:
        return x, valid
    valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0))), jnp.pad(valid, ((0, 0), (0, missing)))


def by_shard(function: Callable, *, whole: tuple[int, ...] = (), summed: bool = False) -> Callable:
    """`function` on each shard's own tokens, axis 1 of its arguments and of what it returns.

    Arguments whose numbers are in `whole` come as they are; a `summed` result is the same on all shards.
    """
    if shards() == 1:
        return function

    def call(*args):
        specs = tuple(PartitionSpec() if i in whole else PartitionSpec(None, AXIS) for i in range(len(args)))
        out = PartitionSpec() if summed else PartitionSpec(None, AXIS)
        return jax.shard_map(function, in_specs=specs, out_specs=out, axis_names={AXIS})(*args)

    return call


def total(x):
    """The sum over shards, inside `by_shard`."""
    return jax.lax.psum(x, AXIS) if shards() > 1 else x


def share(valid: jax.Array | None, tokens: int) -> jax.Array | float:
    """The weight of a token in a mean over all shards, inside `by_shard`: a number, or (B,) of those that are `valid`.

    `tokens` are a shard's own, `valid` (B, tokens).
    """
    if valid is None:
        return 1.0 / total(tokens)
    return 1.0 / jnp.maximum(total(jnp.sum(valid, axis=1, dtype=jnp.float32)), 1.0)


def everywhere(x: jax.Array) -> jax.Array:
    """x, the same on all shards, as each shard's own, inside `by_shard`: gradients of the shards' copies are summed."""
    return jax.lax.pcast(x, AXIS, to="varying") if shards() > 1 else x


def with_edges(rows: jax.Array, edge: int) -> jax.Array:
    """rows (B, h, w, D) of a shard, inside `by_shard` -> (B, edge + h + edge, w, D), zeros beyond the image."""
    s = shards()
    if s == 1:
        return jnp.pad(rows, ((0, 0), (edge, edge), (0, 0), (0, 0)))
    down = [(i, i + 1) for i in range(s - 1)]  # who receives nothing has zeros
    above = jax.lax.ppermute(rows[:, rows.shape[1] - edge :], AXIS, down)
    below = jax.lax.ppermute(rows[:, :edge], AXIS, [(to, source) for source, to in down])
    return jnp.concatenate([above, rows, below], axis=1)


def take(x: jax.Array, ids: jax.Array) -> jax.Array:
    """A few tokens by their raster indices: x (B, N, D), ids (B, K) -> (B, K, D), the same on all shards."""

    def own(x, numbers, ids):
        if shards() == 1:
            return jnp.take_along_axis(x, ids[..., None], axis=1)
        local = ids - numbers[0, 0]
        here = (local >= 0) & (local < x.shape[1])
        mine = jnp.take_along_axis(x, jnp.clip(local, 0, x.shape[1] - 1)[..., None], axis=1)
        return total(jnp.where(here[..., None], mine, 0))

    # Not jax.lax.axis_index: inside a block of a decoding step XLA refuses its PartitionId (jax 0.10).
    return by_shard(own, whole=(2,), summed=True)(x, jnp.arange(x.shape[1])[None], ids)


def room(tokens: int, visible: int) -> int:
    """Places for visible tokens in a shard of an image of `tokens`, of which at most `visible` are, chosen at random.

    Their number is hypergeometric; it is larger than this as good as never, and never where this is all there can be.
    """
    s, share = shards(), visible / tokens
    deviation = math.sqrt(tokens / s * share * (1 - share) * (1 - 1 / s))
    wanted = math.ceil((visible / s + SPREAD * deviation) / TILE) * TILE
    return min(wanted, max_in_shard(tokens, visible))


def max_in_shard(tokens: int, visible: int) -> int:
    """The most of `visible` tokens that one shard of an image of `tokens` can have."""
    return min(visible, tokens // shards())


def _whole_tiles(places: int, mask: jax.Array) -> int:
    """`places` of a shard, rounded up on GPUs until those of a device's images together are a multiple of TILE.

    XLA:GPU multiplies padded copies of matrices with other numbers of rows. Condition tokens, the other rows, nearly
    always are such a multiple. mask (B, N).
    """
    if platform() != "gpu" or portable.value:
        return places
    images = max(1, mask.shape[0] // batch_parts(jax.sharding.get_abstract_mesh()))
    step = TILE // math.gcd(TILE, images)
    return min(-(-places // step) * step, mask.shape[1] // shards())


def on_visible(function: Callable[[jax.Array, jax.Array], T], mask: jax.Array, visible: int) -> T:
    """function(ids, exists) over visible tokens: of each shard `room` places, or `max_in_shard` if a draw needs more.

    On GPUs images that are not cut may have a few more (`_whole_tiles`). mask (B, N), True where a token is hidden; at
    most `visible` > 0 are not. ids (B, S * K) are places within each shard, those of visible tokens first, in raster
    order; `exists` says which of them are visible.
    """
    tokens, s = mask.shape[1], shards()

    def with_room(places: int, mask: jax.Array) -> T:
        def choose(mask):
            ids = jnp.argsort(mask, axis=1, stable=True)[:, :places]
            return ids, jnp.arange(places) < jnp.sum(~mask, axis=1, keepdims=True)

        return function(*by_shard(choose)(mask))

    few, many = room(tokens, visible), max_in_shard(tokens, visible)
    if few == many:
        return with_room(_whole_tiles(many, mask), mask)
    fits = jnp.max(jnp.sum(rearrange(~mask, "b (s n) -> b s n", s=s), axis=2)) <= few

    # What a branch keeps for its gradient has room, and is cleared, whichever runs: this one keeps nothing.
    @jax.checkpoint
    @jax.named_scope(RARELY)
    def at_full_length(mask):
        return with_room(many, mask)

    return jax.lax.cond(fits, functools.partial(with_room, few), at_full_length, mask)


def pick(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Tokens at places within their shards: x (B, N, D), ids (B, K) as of `on_visible` -> (B, K, D)."""

    def own(x, ids):
        return jnp.take_along_axis(x, ids[..., None], axis=1)

    return by_shard(own)(x, ids)


def put_back(x: jax.Array, picked: jax.Array, mask: jax.Array) -> jax.Array:
    """x (B, N, D) with its visible tokens replaced by `picked` (B, K, D), which stand as `on_visible` chose them."""

    def own(x, picked, mask):
        place = jnp.clip(jnp.cumsum(~mask, axis=1) - 1, 0, picked.shape[1] - 1)
        return jnp.where(mask[..., None], x, jnp.take_along_axis(picked, place[..., None], axis=1))

    return by_shard(own)(x, picked, mask)
