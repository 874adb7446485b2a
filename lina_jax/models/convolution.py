"""Depthwise convolution of grids of tokens; its gradient in the way measured (CPUs) or planned as fastest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from lina_jax.models import sequence
from lina_jax.models.tiles import bytes_of, cost_metadata
from lina_jax.platforms import by_platform

# For one GPU program: tokens and channels that it sums at a time, and the most tokens of an image that it takes.
GPU_TILE, GPU_LANES, GPU_TOKENS = 128, 32, 256


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_convolution(rows: jax.Array, kernel: jax.Array, triton: str = "") -> jax.Array:
    """Cross-correlation with zero padding of columns: rows (B, h + k - 1, w, D) -> (B, h, w, D).

    kernel (k, k, D), or (B, 1, k, k, D) where each image has its own. The result is a sum of shifted products in
    float32, which compilers fuse into one pass; XLA's grouped convolution takes minutes on CPUs. With `triton`,
    "compiled" or "interpreted", a Triton kernel computes the gradient of `kernel`.
    """
    wide = kernel.astype(jnp.float32)
    total = sum(part * wide[..., None, i, j, :] for (i, j), part in _shifted(rows, kernel.shape[-2]).items())
    return total.astype(jnp.promote_types(rows.dtype, kernel.dtype))


def _shifted(rows: jax.Array, size: int) -> dict[tuple[int, int], jax.Array]:
    """The inputs of each tap (i, j): rows (B, h + k - 1, w, D) -> (B, h, w, D) for each."""
    h, w = rows.shape[1] - size + 1, rows.shape[2]
    padded = jnp.pad(rows, ((0, 0), (0, 0), (size // 2, size // 2), (0, 0)))
    return {(i, j): padded[:, i : i + h, j : j + w] for i, j in np.ndindex(size, size)}


def _gradient(triton: str, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One pass for the gradient of the rows, like the forward pass; jax.grad would sum a padded array for every tap."""
    rows, kernel = kept
    size = kernel.shape[-2]
    padded = jnp.pad(gradient, ((0, 0), (size - 1, size - 1), (0, 0), (0, 0)))
    d_rows = depthwise_convolution(padded, kernel[..., ::-1, ::-1, :])
    if triton:
        d_kernel = _kernel_grad_by_triton(size, rows, gradient, interpret=triton == "interpreted")
    else:
        ways = {"cpu": functools.partial(_kernel_grad_by_row, size), "default": functools.partial(_kernel_grad, size)}
        d_kernel = by_platform(rows, gradient, **ways)
    d_kernel = jnp.sum(d_kernel, axis=0) if kernel.ndim == 3 else d_kernel[:, None]
    return d_rows, d_kernel.astype(kernel.dtype)


def _kernel_grad(size: int, rows: jax.Array, gradient: jax.Array) -> jax.Array:
    """Gradient of the kernel, (B, k, k, D) float32: for each tap, the sum of its inputs times the gradient."""
    wide = gradient.astype(jnp.float32)
    sums = [jnp.sum(part * wide, axis=(1, 2)) for part in _shifted(rows, size).values()]
    return jnp.stack(sums, axis=1).reshape(len(rows), size, size, -1)


def _kernel_grad_by_row(size: int, rows: jax.Array, gradient: jax.Array) -> jax.Array:
    """`_kernel_grad`, row by row of the image; tap by tap, XLA:CPU takes four to eight times as long."""
    height, width = gradient.shape[1:3]
    rows, gradient = rows.astype(jnp.float32), gradient.astype(jnp.float32)
    padded = jnp.pad(rows, ((0, 0), (0, 0), (size // 2, size // 2), (0, 0)))

    def add_row(i, total):
        seen = jax.lax.dynamic_slice_in_dim(padded, i, size, axis=1)
        row = jax.lax.dynamic_slice_in_dim(gradient, i, 1, axis=1)
        return total + sum(seen[:, :, j : j + size] * row[:, :, j : j + 1] for j in range(width))

    start = jnp.zeros((len(rows), size, size, rows.shape[3]), jnp.float32)
    return jax.lax.fori_loop(0, height, add_row, sequence.replicate(start))


def _kernel_grad_by_triton(size: int, rows: jax.Array, gradient: jax.Array, *, interpret: bool) -> jax.Array:
    """`_kernel_grad` for GPUs, all taps in one pass; XLA:GPU makes one for every two or three."""
    from jax.experimental.pallas import triton as pallas_triton  # deprecated since jax 0.11; only GPUs need it

    batch, height, width, features = gradient.shape
    length = height * width
    programs = pl.cdiv(length, GPU_TOKENS)  # per image; each has its own sums
    tiles = pl.cdiv(length, programs * GPU_TILE)
    taps = list(np.ndindex(size, size))

    def program_body(rows, gradient, sums):
        image, group, program = (pl.program_id(i) for i in range(3))
        lanes = group * GPU_LANES + jnp.arange(GPU_LANES)[None]

        def add_tile(i, totals):
            token = (program * tiles + i) * GPU_TILE + jnp.arange(GPU_TILE)[:, None]
            exist = (token < length) & (lanes < features)
            g = pallas_triton.load(gradient.at[image, token, lanes], mask=exist, other=0.0).astype(jnp.float32)

            def seen(row, column):
                row, column = token // width + row, token % width + column - size // 2
                inside = exist & (column >= 0) & (column < width)
                return pallas_triton.load(rows.at[image, row * width + column, lanes], mask=inside, other=0.0)

            return tuple(
                total + jnp.sum(seen(*tap).astype(jnp.float32) * g, axis=0, keepdims=True)
                for total, tap in zip(totals, taps, strict=True)
            )

        start = (jnp.zeros((1, GPU_LANES), jnp.float32),) * len(taps)
        for tap, total in enumerate(jax.lax.fori_loop(0, tiles, add_tile, start)):
            place = sums.at[image, program, tap + jnp.zeros((1, 1), jnp.int32), lanes]
            pallas_triton.store(place, total, mask=lanes < features)

    shape = jax.ShapeDtypeStruct((batch, programs, len(taps), features), jnp.float32)
    arrays = [x.reshape(batch, -1, features) for x in (rows, gradient)]
    sums = pl.pallas_call(
        program_body,
        grid=(batch, pl.cdiv(features, GPU_LANES), programs),
        out_shape=shape,
        compiler_params=pallas_triton.CompilerParams(num_warps=4, num_stages=1),
        metadata=cost_metadata(bytes_accessed=bytes_of(*arrays, shape), vector_ops=len(taps) * gradient.size),
        interpret=interpret,
    )(*arrays)
    return jnp.sum(sums, axis=1).reshape(batch, size, size, features)


depthwise_convolution.defvjp(lambda rows, kernel, _: (depthwise_convolution(rows, kernel), (rows, kernel)), _gradient)
