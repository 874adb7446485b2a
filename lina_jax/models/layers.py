"""Patches, positions, linear maps and norms.

Parameters are float32; a module computes in its `dtype` and accumulates statistics in float32. Every variable carries
`axes`, the logical names of its axes (see `mesh.RULES`), and `decay=False` if weight decay must skip it. The kernel of
a linear map also carries `matrix`, its (contracted, output) axes, and `between_features` (see `Linear`).
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jax.nn.initializers import Initializer

from lina_jax.models.initializers import uniform
from lina_jax.platforms import one_cpu

NORM_EPS = 1e-5


class Frozen(nnx.Variable):
    """An array that training never changes: published frozen parameters and the text padding table."""


def over_variables(function: Callable[[nnx.Variable], object], state: nnx.State) -> nnx.State:
    """The state with each variable replaced by `function(variable)`, which sees the variable's metadata."""
    return jax.tree.map(function, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def multiply(x: jax.Array, kernel: jax.Array, contracted: int) -> jax.Array:
    """x (..., *inputs), kernel (*inputs, *outputs) -> (..., *outputs); `contracted` is the number of axes of inputs.

    On one CPU this is a matmul of two matrices: with several token axes, XLA writes a transposed copy for the kernel's
    gradient, a seventh of a training step of configs/bench.py. Elsewhere the axes stay separate, as a mesh may shard
    them.
    """
    if not one_cpu():
        return jnp.tensordot(x, kernel, contracted)
    rows = x.reshape(-1, math.prod(kernel.shape[:contracted]))
    matrix = kernel.reshape(rows.shape[-1], -1)
    y = _matmul_few_rows(rows, matrix) if len(rows) < min(matrix.shape) else rows @ matrix
    return y.reshape(*x.shape[: x.ndim - contracted], *kernel.shape[contracted:])


@jax.custom_vjp
def _matmul_few_rows(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """rows @ matrix. The gradient of rows is computed in columns, or XLA:CPU would transpose the whole matrix."""
    return rows @ matrix


def _few_rows_gradient(arrays: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, matrix = arrays
    columns = jax.lax.dot_general(matrix, gradient, (((1,), (1,)), ((), ())))
    columns = jax.lax.optimization_barrier(columns)  # otherwise XLA swaps the operands
    return columns.T, rows.T @ gradient


# The product is written out so that remat policies see it.
_matmul_few_rows.defvjp(lambda rows, matrix: (rows @ matrix, (rows, matrix)), _few_rows_gradient)


def broadcast_f32_grad(vector: jax.Array, tokens: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Broadcast a vector to the shape and dtype of `tokens` (..., *outputs), so that it can be added to them.

    The vector is (*outputs), or on meshes (B, 1, *outputs) with one for each image. Its gradient, a sum over many
    tokens, is accumulated in float32; JAX's own is not if tokens are bfloat16.
    """
    shape, dtype = tokens.shape, tokens.dtype

    @jax.custom_vjp
    def broadcast(vector):
        return jnp.broadcast_to(vector.astype(dtype), shape)

    broadcast.defvjp(
        lambda v: (broadcast(v), None), lambda _, g: (_sum_to_shape(g, vector.shape).astype(vector.dtype),)
    )
    return broadcast(vector)


@jax.custom_vjp
def multiply_f32_grad(tokens: jax.Array, vector: jax.Array) -> jax.Array:
    """tokens * vector, with the vector's gradient accumulated as in `broadcast_f32_grad`.

    Only the two arguments are kept for the gradient.
    """
    return tokens * vector.astype(tokens.dtype)


def _multiply_gradient(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    tokens, vector = kept
    return gradient * vector.astype(gradient.dtype), _sum_to_shape(gradient * tokens, vector.shape).astype(vector.dtype)


multiply_f32_grad.defvjp(
    lambda tokens, vector: (multiply_f32_grad(tokens, vector), (tokens, vector)), _multiply_gradient
)


def _sum_to_shape(tokens: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The sum of `tokens` over the axes along which an array of this shape would be broadcast to them.

    On one CPU, the sum over tokens is a matmul with ones, which takes a third of the time of XLA's sums; the result is
    then rounded to the dtype of `tokens`.
    """
    leading = tokens.ndim - len(shape)
    axes = (*range(leading), *(leading + i for i, n in enumerate(shape) if n != tokens.shape[leading + i]))
    if one_cpu() and axes and len(axes) == leading:
        rows = tokens.reshape(-1, math.prod(shape))
        return (jnp.ones((1, len(rows)), rows.dtype) @ rows).reshape(shape)
    return jnp.sum(tokens, axes, dtype=jnp.promote_types(tokens.dtype, jnp.float32)).reshape(shape)


class Linear(nnx.Module):
    """y = x W + b, contracting the last len(inputs) axes of x with the first of W.

    x (..., *inputs) -> (..., *outputs); W (*inputs, *outputs), b (*outputs). `axes` names the axes of W; an output axis
    "parts" holds several maps side by side. `between_features` says that x and y are both features of the network,
    neither data nor embeddings of data: Muon updates such matrices only.
    """

    def __init__(
        self,
        inputs: int | Sequence[int],
        outputs: int | Sequence[int],
        axes: Sequence[str | None],
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        kind: type[nnx.Variable] = nnx.Param,
        between_features: bool = True,
    ):
        inputs = (inputs,) if isinstance(inputs, int) else tuple(inputs)
        outputs = (outputs,) if isinstance(outputs, int) else tuple(outputs)
        default = uniform(math.prod(inputs))
        reads = tuple(range(len(inputs)))
        writes = tuple(i for i in range(len(inputs), len(axes)) if axes[i] != "parts")
        self.kernel = kind(
            (kernel_init or default)(rngs.params(), (*inputs, *outputs), jnp.float32),
            axes=tuple(axes),
            matrix=(reads, writes),
            between_features=between_features,
        )
        self.bias = kind((bias_init or default)(rngs.params(), outputs, jnp.float32), axes=tuple(axes)[len(inputs) :])
        self.contracted = len(inputs)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.matmul(x)
        return y + broadcast_f32_grad(self.bias[...], y)

    def matmul(self, x: jax.Array) -> jax.Array:
        """x W."""
        return multiply(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.contracted)

    def matmuls(self, x: jax.Array) -> list[jax.Array]:
        """x W of each part of the outputs along their first axis, (..., *outputs[1:]), each as a matmul of its own."""
        return [self._part_matmul(i, x) for i in range(self.kernel[...].shape[self.contracted])]

    def _part_matmul(self, part: int, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        kernel = jax.lax.index_in_dim(kernel, part, axis=self.contracted, keepdims=False)
        return multiply(x.astype(self.dtype), kernel, self.contracted)

    def _parts_first(self, y: jax.Array) -> jax.Array:
        """An output (..., *outputs) or the bias (images may have their own), with the axis of parts in front."""
        return jnp.moveaxis(y, self.contracted - self.kernel[...].ndim, 0)

    def part(self, part: int, x: jax.Array) -> jax.Array:
        """One part of the output alone, (..., *outputs[1:])."""
        product = self._part_matmul(part, x)
        return product + broadcast_f32_grad(self._parts_first(self.bias[...])[part], product)

    def split(self, x: jax.Array) -> list[jax.Array]:
        """All parts of the output, (..., *outputs[1:]) each.

        Splitting one matmul, and concatenating its gradient, costs more than it saves, except for few tokens on one
        CPU, where splitting the kernel costs more.
        """
        if one_cpu() and math.prod(x.shape[: -self.contracted]) < math.prod(x.shape[-self.contracted :]):
            return list(self._parts_first(self(x)))
        return [self.part(i, x) for i in range(self.kernel[...].shape[self.contracted])]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def standardize(x: jax.Array, eps: float) -> jax.Array:
    """Zero mean and unit (biased) variance over the last axis, statistics in float32. x (..., D) -> (..., D)."""
    return _standardize(x, eps)[0]


def _standardize(x: jax.Array, eps: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    y = (centred * factor).astype(x.dtype)
    return y, (y, factor)


def _standardize_gradient(_, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array]:
    """From the result and one number per row; jax.grad would keep and write float32 copies of whole arrays."""
    y, factor = kept
    wide, g = y.astype(jnp.float32), gradient.astype(jnp.float32)
    along = jnp.mean(g * wide, axis=-1, keepdims=True)
    return (((g - jnp.mean(g, axis=-1, keepdims=True) - wide * along) * factor).astype(y.dtype),)


standardize.defvjp(_standardize, _standardize_gradient)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU by erf: 14 vector operations on a TPU; jax.nn.gelu uses erfc, which takes 93."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_gradient(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    """From x alone; jax.grad would keep intermediate results in float32."""
    wide = x.astype(jnp.float32)
    slope = _normal_cdf(wide) + wide * jnp.exp(-0.5 * jnp.square(wide)) * (2 * math.pi) ** -0.5
    return ((slope * gradient).astype(x.dtype),)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_gradient)


class LayerNorm(nnx.Module):
    """Affine layer norm over the last axis."""

    def __init__(self, width: int, *, kind: type[nnx.Variable] = nnx.Param, eps: float = NORM_EPS):
        self.scale = kind(jnp.ones((width,)), axes=(None,), decay=False)
        self.bias = kind(jnp.zeros((width,)), axes=(None,), decay=False)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = standardize(x, self.eps)
        return multiply_f32_grad(y, self.scale[...]) + broadcast_f32_grad(self.bias[...], y)


class MLP(nnx.Module):
    """fc2(activation(fc1(x))). x (..., inputs) -> (..., outputs). `between_features` is that of fc1."""

    def __init__(
        self, inputs, hidden, outputs, activation,
        *, rngs, dtype, kernel_init=None, kind=nnx.Param, between_features=True,
    ):  # fmt: skip
        common = {"rngs": rngs, "dtype": dtype, "kind": kind, "kernel_init": kernel_init}
        self.fc1 = Linear(inputs, hidden, ("embed", "mlp"), between_features=between_features, **common)
        self.fc2 = Linear(hidden, outputs, ("inner", None), **common)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """x (B, H, W, C) -> (B, N, p*p*C), tokens in raster order, channels in (row, column, C) order."""
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens: jax.Array, grid: tuple[int, int], patch: int) -> jax.Array:
    """(B, N, p*p*C) -> (B, H, W, C), the inverse of `patchify`."""
    return rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=grid[0], w=grid[1], p=patch, q=patch)


def gather_tokens(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Tokens of each image by their indices: x (B, N, D), ids (B, K) in 0 .. N - 1 -> (B, K, D)."""
    return jnp.take_along_axis(x, ids[..., None], axis=1, mode="promise_in_bounds")


def position_table(grid: tuple[int, int], width: int) -> jax.Array:
    """2-D sine-cosine table (h*w, D): [sin column, cos column, sin row, cos row] at integer coordinates.

    Compiled programs contain the values of one row and one column only: for 256 x 256 tokens the whole table would be a
    constant of 400 MB.
    """
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))

    def along(length: int) -> jax.Array:
        angles = np.outer(np.arange(length), frequencies)
        return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)

    rows, columns = grid
    column_table = repeat(along(columns), "w d -> (h w) d", h=rows)
    row_table = repeat(along(rows), "h d -> (h w) d", w=columns)
    return jnp.concatenate([column_table, row_table], axis=1)


def grid_positions(grid: tuple[int, int], frames: int = 1) -> np.ndarray:
    """Integer (t, h, w) of every token in raster order, (T*h*w, 3); only tests of the published weights have T > 1."""
    return np.stack(np.meshgrid(np.arange(frames), *map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 3)


def rotary_angles(positions: jax.Array, head_width: int) -> jax.Array:
    """Angles (..., d/2) of integer (t, h, w) positions (..., 3): t gets d//8 dimensions, h and w (d - d//8)//2 each."""
    first = head_width // 8
    angles = []
    for axis, size in enumerate((first, (head_width - first) // 2, (head_width - first) // 2)):
        frequencies = (10_000.0 ** (-2 * np.arange(math.ceil(size / 2)) / size)).astype(np.float32)
        angles.append(positions[..., axis, None].astype(jnp.float32) * frequencies)
    return jnp.concatenate(angles, axis=-1)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate interleaved channel pairs (2i, 2i+1) of every head by +angle. x (B, N, H, d), angles (B or 1, N, d/2)."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    return rearrange([cos * even - sin * odd, sin * even + cos * odd], "two b n h d -> b n h (d two)").astype(x.dtype)
