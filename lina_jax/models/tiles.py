"""Pallas kernels that pass over the tokens of images tile by tile, for TPUs (by Mosaic) and for GPUs (by Triton).

The rows of a tile are tokens; its lanes hold one head (GPUs) or several (TPUs, as many as fill whole registers;
products between different heads are masked). For B images of N tokens and H heads of width d, a pass reads and writes

    tokens      (B, N, p H d) features of each token, of p kinds one after the other; a pass names those that it needs
    gates       (B, N, g H)   numbers for each token and head, of g kinds one after the other
    summaries   (B, r, H d)   float32; r rows for each image, the last axis is that of the tokens
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lina_jax.errors import UserError
from lina_jax.mesh import batch_parts, spec
from lina_jax.platforms import platform, portable

LANES, ROW_MULTIPLE = 128, 16  # lanes and rows of a TPU's registers, in bfloat16
ROWS = 256  # most tokens in a tile on TPUs; twice as many take four times as long to compile
VMEM = 24 * 2**20  # bytes of VMEM for a kernel; with 64 MiB, too little is left for concurrent collectives

GPU_BYTES = 2**14  # bytes of a tile on GPUs; shared memory holds several tiles
GPU_WARPS = 8  # hold a state of 128 x 128 numbers in registers, 64 per thread
GPU_TOKENS = 512  # most tokens of an image for one program, so that few images still occupy the device
GPU_LANES = (16, 128)  # fewest and most: fewer give wrong products (jax 0.10.2), more do not fit


# Code traced inside interpreted("tpu") or interpreted("gpu") has that device's kernels, interpreted on CPUs (tests).
interpreted = jax.make_user_context(default_value="")


def device() -> str:
    """The device whose kernels traced code uses, tpu or gpu; empty where there are none."""
    return interpreted.value or ("" if platform() == "cpu" or portable.value else platform())


def on_each_device(function: Callable, in_axes: Sequence, out_axes: tuple[str | None, ...], *, images: int) -> Callable:
    """`function` applied to each device's shards of arrays, because compilers cannot shard what kernels work on.

    `in_axes` has the logical axes of each argument, or a list of them for a list of arrays. If the mesh does not divide
    a batch of `images` (the one unconditional image of guidance), the batch is whole on every device.
    """
    device_mesh = jax.sharding.get_abstract_mesh()
    if device_mesh.empty:
        return function
    whole = images % batch_parts(device_mesh) != 0

    def cut(axes):
        return spec(*(None if whole and name == "batch" else name for name in axes))

    in_specs = tuple(jax.tree.map(cut, list(in_axes), is_leaf=lambda axes: isinstance(axes, tuple)))
    # Kernels do not state along which mesh axes their results vary, so this cannot be checked.
    return jax.shard_map(function, in_specs=in_specs, out_specs=cut(out_axes), check_vma=False)


def cost_metadata(*, bytes_accessed: int, flops: int = 0, vector_ops: int = 0) -> dict[str, str]:
    """Costs of a GPU kernel for `hlo` to read: traffic, FLOPs of matmuls, and other vector operations."""
    return {"flops": str(flops), "vector_ops": str(vector_ops), "bytes_accessed": str(bytes_accessed)}


def bytes_of(*arrays: jax.Array | jax.ShapeDtypeStruct) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)


class Column(NamedTuple):
    """Tokens (B, N, H d): a whole array, or one kind of tokens in an array (B, N, p H d)."""

    array: Any
    kind: int = 0

    def like(self, begun: jax.Array | None = None) -> "Column":
        """The column for a result: kind 0 makes a new array, other kinds are written into the array `begun` (GPUs)."""
        return Column(begun if self.kind else jax.ShapeDtypeStruct(self.array.shape, self.array.dtype), self.kind)


class Parts(NamedTuple):
    """Arrays, their shapes or references to them, of a pass or of one of its tiles.

    A tile has each kind of gate as a separate array: on TPUs every lane of a head holds its gate, on GPUs there is one
    number per row.
    """

    tokens: tuple[Any, ...] = ()  # columns; in a tile, arrays
    gates: tuple[Any, ...] = ()  # none or one; in a tile, g
    summaries: tuple[Any, ...] = ()

    @property
    def flat(self) -> list[Any]:
        return [*self.token_arrays, *self.gates, *self.summaries]

    def with_arrays(self, flat: Sequence[Any]) -> "Parts":
        """These parts with the arrays of `flat` in place of their own."""
        mine = self.token_arrays
        places = {id(array): other for array, other in zip(mine, flat, strict=False)}
        rest = iter(flat[len(mine) :])
        gates, summaries = (tuple(next(rest) for _ in part) for part in (self.gates, self.summaries))
        return Parts(tuple(Column(places[id(c.array)], c.kind) for c in self.tokens), gates, summaries)

    @property
    def token_arrays(self) -> list[Any]:
        """The arrays of all columns, each object once."""
        return list({id(c.array): c.array for c in self.tokens}.values())


@dataclasses.dataclass(frozen=True)
class Tile:
    """The heads of a tile. In lanes after the last head, tokens are read as zeros and nothing is written."""

    heads: int
    width: int
    lanes: int

    def square(self, state: jax.Array) -> jax.Array:
        """The d x d matrices of all heads, (d, lanes), as one matrix (lanes, lanes) that is zero between heads."""
        return state if self.heads == 1 else jnp.concatenate([state] * self.heads) * self._same_head()

    def state(self, square: jax.Array) -> jax.Array:
        """The inverse of `square`; the matrix may have anything between heads."""
        if self.heads == 1:
            return square
        square = square * self._same_head()
        return sum(square[i * self.width : (i + 1) * self.width] for i in range(self.heads))

    def along(self, x: jax.Array, row: jax.Array) -> jax.Array:
        """x . row per head, for x (n, lanes) and row (1, lanes).

        The result is (n, lanes), equal in all lanes of a head, or (n, 1) if there is one head.
        """
        if self.heads == 1:
            return jnp.sum(x.astype(jnp.float32) * row.astype(x.dtype).astype(jnp.float32), axis=1, keepdims=True)
        return matmul_f32(x, (row * self._same_head()).astype(x.dtype), (1, 1))

    def _same_head(self) -> jax.Array:
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (self.lanes, self.lanes), i) // self.width for i in (0, 1))
        return (row == column).astype(jnp.float32)


def matmul_f32(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """Matmul of two matrices that contracts one axis of each, accumulated in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = tuple((axis,) for axis in contracted), ((), ())
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def over_tokens(
    function: Callable[[Tile, Parts], Parts],
    arrays: Parts,
    results: Parts,
    *,
    heads: int,
    products: tuple[int, int],
    device: str,
    interpret: bool,
) -> Parts:
    """Apply `function` to every tile; its tokens and gates are assembled, its summaries are summed.

    For a gate, `function` returns in each lane what is to be summed over the head. `results` are shapes or
    (`Column.like`) an array to complete. `products`, for estimates, counts the products that `function` computes per
    token: those with a matrix per head, and those with rows (`Tile.along`). `device` is tpu or gpu; on TPUs every array
    has tokens of one kind.

    Raises UserError for heads that are too wide for GPUs.
    """
    if device == "gpu":
        return _on_gpu(function, arrays, results, heads, products, interpret)
    return _on_tpu(function, arrays, results, heads, products, interpret)


def heads_at_once(heads: int, width: int) -> int:
    """The number of heads in a tile on TPUs: the fewest that fill whole registers, or all."""
    together = LANES // math.gcd(LANES, width)
    return together if heads % together == 0 else heads


def _on_tpu(function, arrays: Parts, results: Parts, heads: int, products: tuple[int, int], interpret: bool) -> Parts:
    batch, length, features = arrays.tokens[0].array.shape
    dtype, width = arrays.tokens[0].array.dtype, features // heads
    together = heads_at_once(heads, width)
    tile = Tile(together, width, together * width)
    steps, groups = pl.cdiv(length, ROWS), heads // together
    kinds = sum(gates.shape[2] // heads for gates in arrays.gates)
    # Tiles as even as registers allow; a single tile may have any number of rows.
    rows = length if steps == 1 else pl.cdiv(length, steps * ROW_MULTIPLE) * ROW_MULTIPLE
    # Sums stay on chip while the last grid index runs: gates are summed over groups of heads, summaries over tokens.
    over_groups = bool(results.gates)

    def indices(place):
        """The index map of a block at `place` (image, step, group), in the order of the grid."""
        return lambda image, i, j: place(image, *((i, j) if over_groups else (j, i)))

    def kernel(*refs):
        in_refs = arrays.with_arrays(refs[: len(arrays.flat)])
        out_refs = results.with_arrays(refs[len(arrays.flat) :])
        step, group = (pl.program_id(i) for i in ((1, 2) if over_groups else (2, 1)))

        def existing(x):
            """x with zeros in rows beyond the image, which the last tile may have."""
            if length % rows == 0:
                return x
            row = step * rows + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
            return jnp.where(row < length, x, jnp.zeros_like(x))

        @pl.when(pl.program_id(2) == 0)
        def _():
            for ref in (*out_refs.gates, *out_refs.summaries):
                ref[...] = jnp.zeros_like(ref)

        owners = [_owner(heads, kinds, kind, tile, group).astype(dtype) for kind in range(kinds)]
        inputs = Parts(
            tuple(existing(column.array[0]) for column in in_refs.tokens),
            tuple(matmul_f32(existing(ref[0]), owner, (1, 0)) for ref in in_refs.gates for owner in owners),
            tuple(ref[0] for ref in in_refs.summaries),
        )
        outputs = function(tile, inputs)
        for column, x in zip(out_refs.tokens, outputs.tokens, strict=True):
            column.array[0] = x.astype(column.array.dtype)
        for ref, x in zip(out_refs.summaries, outputs.summaries, strict=True):
            ref[0] += x
        for ref in out_refs.gates:
            pairs = zip(outputs.gates, owners, strict=True)
            ref[0] += sum(matmul_f32(x.astype(dtype), owner, (1, 1)) for x, owner in pairs).astype(ref.dtype)

    def blocks(parts: Parts):
        shape = (1, rows, tile.lanes)
        tokens = [
            pl.BlockSpec(shape, indices(lambda image, step, group: (image, step, group))) for _ in parts.token_arrays
        ]
        gates = [
            pl.BlockSpec((1, rows, array.shape[2]), indices(lambda image, step, group: (image, step, 0)))
            for array in parts.gates
        ]
        summaries = [
            pl.BlockSpec((1, array.shape[1], tile.lanes), indices(lambda image, step, group: (image, 0, group)))
            for array in parts.summaries
        ]
        return [*tokens, *gates, *summaries]

    outputs = pl.pallas_call(
        kernel,
        grid=(batch, steps, groups) if over_groups else (batch, groups, steps),
        in_specs=blocks(arrays),
        out_specs=blocks(results),
        out_shape=results.flat,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * sum(products) * batch * steps * rows * features * tile.lanes,
            bytes_accessed=_bytes(arrays, features) + _bytes(results, features),
            transcendentals=0,
        ),
        interpret=interpret,
    )(*arrays.flat)
    return results.with_arrays(outputs)


def _bytes(parts: Parts, features: int) -> int:
    """Bytes of all parts; a column counts `features` numbers per token."""
    columns = sum(math.prod(c.array.shape[:2]) * features * c.array.dtype.itemsize for c in parts.tokens)
    return columns + bytes_of(*parts.gates, *parts.summaries)


def _owner(heads: int, kinds: int, kind: int, tile: Tile, group: jax.Array) -> jax.Array:
    """Which of the g H gates belongs to each lane of a group's tile, for one kind of gate: (g H, lanes) bool."""
    gate, lane = (jax.lax.broadcasted_iota(jnp.int32, (kinds * heads, tile.lanes), i) for i in (0, 1))
    return gate == kind * heads + group * tile.heads + lane // tile.width


def _on_gpu(function, arrays: Parts, results: Parts, heads: int, products: tuple[int, int], interpret: bool) -> Parts:
    from jax.experimental.pallas import triton  # deprecated since jax 0.11; only GPUs need it

    tokens = arrays.tokens[0].array
    batch, length = tokens.shape[:2]
    width = (arrays.summaries or results.summaries)[0].shape[2] // heads
    fewest, most = GPU_LANES
    if width > most:
        raise UserError(f"model.attention_kernel=pallas: heads have {width} channels; at most {most} on GPUs")
    tile = Tile(1, width, max(fewest, pl.next_power_of_2(width)))
    tile_rows = max(16, min(64, GPU_BYTES // (tile.lanes * tokens.dtype.itemsize)))
    programs = pl.cdiv(length, GPU_TOKENS)  # per image; each has its own summaries
    tiles = pl.cdiv(length, programs * tile_rows)
    summaries = tuple(jax.ShapeDtypeStruct((batch, programs, *s.shape[1:]), s.dtype) for s in results.summaries)
    results = results._replace(summaries=summaries)
    completed = [i for i, x in enumerate(results.flat) if isinstance(x, jax.Array)]

    def kernel(*refs):
        in_refs = arrays.with_arrays(refs[: len(arrays.flat)])
        out_refs = results.with_arrays(refs[len(refs) - len(results.flat) :])
        image, head, program = (pl.program_id(i) for i in range(3))
        lanes = jnp.arange(tile.lanes)[None]
        features = head * width + lanes

        def summary_index(ref):
            """Rows of a summary, one or as many as lanes, and a mask of the numbers that exist."""
            rows = jnp.arange(1 if ref.shape[-2] == 1 else tile.lanes)[:, None]
            return rows, (rows < ref.shape[-2]) & (lanes < width)

        loaded = []
        for ref in in_refs.summaries:
            rows, exist = summary_index(ref)
            loaded.append(triton.load(ref.at[image, rows, features], mask=exist, other=0.0))

        def tile_body(i, totals):
            rows = (program * tiles + i) * tile_rows + jnp.arange(tile_rows)[:, None]
            exist = (rows < length) & (lanes < width)

            def row_refs(column):
                return column.array.at[image, rows, column.kind * heads * width + features]

            def gates(refs):
                return [
                    ref.at[image, rows, kind * heads + head] for ref in refs for kind in range(ref.shape[2] // heads)
                ]

            outputs = function(
                tile,
                Parts(
                    tuple(triton.load(row_refs(column), mask=exist, other=0.0) for column in in_refs.tokens),
                    tuple(triton.load(gate, mask=rows < length, other=0.0) for gate in gates(in_refs.gates)),
                    tuple(loaded),
                ),
            )
            for column, x in zip(out_refs.tokens, outputs.tokens, strict=True):
                triton.store(row_refs(column), x.astype(column.array.dtype), mask=exist)
            for ref in out_refs.gates:
                for gate, x in zip(gates([ref]), outputs.gates, strict=True):
                    triton.store(gate, jnp.sum(x, axis=1, keepdims=True).astype(ref.dtype), mask=rows < length)
            return tuple(total + x for total, x in zip(totals, outputs.summaries, strict=True))

        start = tuple(jnp.zeros((len(summary_index(ref)[0]), tile.lanes), jnp.float32) for ref in out_refs.summaries)
        for ref, total in zip(out_refs.summaries, jax.lax.fori_loop(0, tiles, tile_body, start), strict=True):
            rows, exist = summary_index(ref)
            triton.store(ref.at[image, program, rows, features], total, mask=exist)

    outputs = pl.pallas_call(
        kernel,
        grid=(batch, heads, programs),
        out_shape=results.flat,
        compiler_params=triton.CompilerParams(num_warps=GPU_WARPS, num_stages=2),
        input_output_aliases={len(arrays.flat) + i: place for i, place in enumerate(completed)},
        metadata=cost_metadata(
            bytes_accessed=_bytes(arrays, heads * width) + _bytes(results, heads * width),
            flops=2 * products[0] * batch * programs * tiles * tile_rows * heads * tile.lanes**2,
        ),
        interpret=interpret,
    )(*arrays.flat, *(results.flat[i] for i in completed))
    outputs = results.with_arrays(outputs)
    return outputs._replace(summaries=tuple(jnp.sum(s, axis=1) for s in outputs.summaries))
