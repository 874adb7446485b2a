"""Sums over independent tokens, computed with their gradient in chunks that fit a CPU's caches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any

TOKENS = 256  # per chunk, each with its repeats


def max_count(rows: int) -> int:
    """The number of chunks if all `rows` are chosen."""
    return -(-rows // TOKENS)


def total(function: Callable, shared: Tree, rows: jax.Array, chosen: jax.Array) -> jax.Array:
    """The sum over the `chosen` rows of function(shared, rows[ids], ids) (len(ids),); other rows are not computed.

    rows (M, D), chosen (M,) bool. `function` must treat rows independently. The gradient, for `shared` and `rows` only,
    is computed with the value, chunk by chunk: nothing is kept for a backward pass and nothing is computed twice.
    """
    size = min(TOKENS, len(rows))
    order = jnp.argsort(~chosen, stable=True)
    places = jnp.pad(order, (0, -len(rows) % size))
    count = jnp.sum(chosen)

    def with_gradient(shared: Tree, rows: jax.Array):
        def chunk(i, carried):
            value, d_shared, d_rows = carried
            exists = i * size + jnp.arange(size) < count
            ids = jax.lax.dynamic_slice(places, (i * size,), (size,))
            ids = jnp.where(exists, ids, ids[0])  # rows that are not chosen may hold NaN

            def part(shared, rows):
                return jnp.sum(function(shared, rows, ids), where=exists)

            more, gradients = jax.value_and_grad(part, argnums=(0, 1))(shared, rows[ids])
            d_rows = jax.lax.dynamic_update_slice(d_rows, gradients[1], (i * size, 0))
            return value + more, jax.tree.map(jnp.add, d_shared, gradients[0]), d_rows

        nothing = jax.tree.map(jnp.zeros_like, shared), jnp.zeros((len(places), rows.shape[1]), rows.dtype)
        value, d_shared, d_rows = jax.lax.fori_loop(0, (count + size - 1) // size, chunk, (jnp.zeros(()), *nothing))
        return value, (d_shared, d_rows[jnp.argsort(order)])

    made = with_gradient(*jax.lax.stop_gradient((shared, rows)))
    return _attach_gradient(*made, (shared, rows))


@jax.custom_vjp
def _attach_gradient(value: jax.Array, gradient: Tree, arguments: Tree) -> jax.Array:
    """The value, with `gradient` as its gradient with respect to `arguments`."""
    del gradient, arguments
    return value


_attach_gradient.defvjp(
    lambda value, gradient, arguments: (value, gradient),
    # Narrowed last: rounding the factor first would rescale all gradients by the same error.
    lambda gradient, factor: (factor, None, jax.tree.map(lambda x: (factor * x).astype(x.dtype), gradient)),
)
