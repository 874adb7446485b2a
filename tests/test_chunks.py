"""Sums taken chunk by chunk, over the chosen rows alone, have the value and gradient of the plain sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lina_jax.models import chunks

ROWS, WIDTH = 2 * chunks.TOKENS + 9, 4


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    weights = {"a": jax.random.normal(keys[0], (WIDTH, 3)), "b": jnp.ones((3,))}
    return weights, jax.random.normal(keys[1], (ROWS, WIDTH)), jax.random.uniform(keys[2], (ROWS,))


def summed(limits):
    def function(weights, rows, ids):
        return limits[ids] * jnp.sum(jnp.tanh(rows @ weights["a"] + weights["b"]), axis=-1)

    return function


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])  # of three chunks none, one, two and all run
def test_value_and_gradient_are_those_of_the_plain_sum(share, arrays):
    weights, rows, numbers = arrays
    chosen = numbers < share
    function = summed(numbers)

    def plain(weights, rows):
        return 3.0 * jnp.sum(function(weights, rows, jnp.arange(ROWS)), where=chosen)

    def by_chunks(weights, rows):
        return 3.0 * chunks.total(function, weights, rows, chosen)

    # With jit inside the gradient, what `function` closes over is traced as well.
    found, wanted = (jax.value_and_grad(jax.jit(f), argnums=(0, 1))(weights, rows) for f in (by_chunks, plain))
    # Measured: 3e-7, from summing 521 terms in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max()), found, wanted)


def test_rows_that_are_not_chosen_are_not_computed(arrays):
    weights, rows, numbers = arrays
    chosen = numbers < 0.4
    broken = jnp.where(chosen[:, None], rows, jnp.nan)
    value, gradient = jax.value_and_grad(lambda rows: chunks.total(summed(numbers), weights, rows, chosen))(broken)
    assert jnp.isfinite(value)
    assert jnp.all(gradient[~chosen] == 0)


def test_a_factor_is_not_narrowed(arrays):
    """In bfloat16, 1 / 1005.9 is off by 0.23 %, an error that all gradients would share."""
    weights, rows, numbers = arrays
    rows = rows.astype(jnp.bfloat16)

    def loss(rows, divisor):
        return chunks.total(summed(numbers), weights, rows, numbers < 0.5) / divisor

    plain, scaled = (jax.grad(loss)(rows, divisor).astype(jnp.float32) for divisor in (1.0, 1005.9))
    assert jnp.sum(jnp.abs(scaled)) * 1005.9 == pytest.approx(float(jnp.sum(jnp.abs(plain))), rel=5e-4)
