"""Linear maps and vectors applied to tokens: all ways, chosen by size and shape, give equal values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lina_jax import mesh
from lina_jax.config import MeshConfig
from lina_jax.models.layers import Linear, broadcast_f32_grad, multiply_f32_grad

WIDTH, PARTS = 16, 3


def outcome(function, *arrays):
    """Values, and the gradients of one fixed sum over them."""

    def summed(*arrays):
        found = function(*arrays)
        return jnp.sum(jnp.sin(found)), found

    (_, found), gradients = jax.jit(jax.value_and_grad(summed, range(len(arrays)), has_aux=True))(*arrays)
    return [found, *gradients]


def assert_equal(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


@pytest.fixture(scope="module")
def linear():
    return Linear(WIDTH, (PARTS, WIDTH), ("embed", "parts", "heads"), rngs=nnx.Rngs(0), dtype=jnp.float32)


@pytest.mark.parametrize("tokens", [WIDTH // 4, 4 * WIDTH])
def test_parts_of_few_and_of_many_tokens_are_those_of_the_whole(tokens, linear):
    graph, state = nnx.split(linear)
    x = jax.random.normal(jax.random.key(0), (2, tokens // 2, WIDTH))

    def whole(state, x):
        return nnx.merge(graph, state)(x)

    def split(state, x):
        return jnp.stack(nnx.merge(graph, state).split(x), axis=2)

    def each(state, x):
        return jnp.stack([nnx.merge(graph, state).part(i, x) for i in range(PARTS)], axis=2)

    wanted = jax.tree.leaves(outcome(whole, state, x))
    for way in (split, each):
        assert_equal(jax.tree.leaves(outcome(way, state, x)), wanted)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 1, 5)], ids=["one", "of tokens", "of images"])
def test_vectors_are_added_and_multiplied_as_broadcasting_says(shape):
    keys = jax.random.split(jax.random.key(0))
    vector, tokens = (jax.random.normal(key, shape) for key, shape in zip(keys, (shape, (2, 3, 5)), strict=True))
    assert_equal(
        outcome(lambda v, x: x + broadcast_f32_grad(v, x), vector, tokens),
        outcome(lambda v, x: x + v, vector, tokens),
    )
    assert_equal(
        outcome(lambda v, x: multiply_f32_grad(x, v), vector, tokens), outcome(lambda v, x: x * v, vector, tokens)
    )


@pytest.mark.parametrize("way", ["added", "multiplied"])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("shape", [(6,), (2, 1, 6), (1, 2048, 1)], ids=["one", "of images", "of tokens"])
def test_gradients_of_vectors_are_rounded_once(shape, devices, way):
    """Sums over thousands of bfloat16 tokens would be off by 2 to 20 % if they were accumulated in bfloat16."""
    tokens = jnp.zeros((2, 2048, 6), jnp.bfloat16)
    direction = jax.random.uniform(jax.random.key(0), tokens.shape).astype(tokens.dtype)
    with jax.set_mesh(mesh.build(MeshConfig(tensor=devices), jax.devices()[:devices])):
        ways = {
            "added": lambda v: broadcast_f32_grad(v, tokens),
            "multiplied": lambda v: multiply_f32_grad(tokens + 1, v),
        }
        (found,) = jax.jit(lambda v: jax.vjp(ways[way], v)[1](direction))(jnp.ones(shape))
    axes = tuple(axis for axis, n in enumerate((1,) * (3 - len(shape)) + shape) if n == 1)
    wanted = np.sum(np.asarray(direction, np.float64), axes).reshape(shape)
    np.testing.assert_allclose(found, wanted, rtol=0.004)
