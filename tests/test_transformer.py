"""Stacks of blocks: their order, and what they keep for the backward pass."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lina_jax.models import attention
from lina_jax.models.attention import AttentionConfig
from lina_jax.models.transformer import Transformer

WIDTH = 32


def test_blocks_follow_each_other_by_their_numbers():
    """The names of a hundredth and later ones sort before those of others."""
    config, x = AttentionConfig(WIDTH, 4), jax.random.normal(jax.random.key(0), (1, 6, WIDTH))
    early, late = (Transformer(config, 6, 2, first=first, softmax_period=3, rngs=nnx.Rngs(1)) for first in (2, 98))
    names = ("from_98", "from_99", "from_101", "from_102"), ("from_02", "from_03", "from_05", "from_06")
    for ours, theirs in zip(*names, strict=True):
        nnx.update(late.runs[ours], nnx.state(early.runs[theirs]))
    assert np.array_equal(late(x), early(x))


def kept(depth: int, side: int, remat: str, scan: bool) -> tuple[int, int]:
    """(bytes that a gradient of `depth` blocks keeps of an image, its tokens)"""
    config = AttentionConfig(WIDTH, 4, conv_kernel=3, condition_tokens=4, grid=(side, side), dtype=jnp.bfloat16)
    model = nnx.eval_shape(lambda: Transformer(config, depth, 4, remat=remat, scan=scan, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    x = jax.ShapeDtypeStruct((1, config.tokens, WIDTH), config.dtype)

    def backward(params, x):
        return jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)[1]

    arrays = jax.tree.leaves(jax.eval_shape(backward, params, x))
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays), config.tokens


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    ("remat", "platform", "widths"), [("dots", "gpu", 10), ("dots", "tpu", 11), ("full", "gpu", 1), ("full", "tpu", 1)]
)
def test_a_block_keeps_its_products_of_each_token(remat, platform, widths, scan, monkeypatch):
    """As docs/performance.md counts: q, k, v; output projection; both layers of the perceptron (4 + 1); the stream."""
    monkeypatch.setattr(attention, "platform", lambda: platform)
    sizes = {(depth, side): kept(depth, side, remat, scan) for depth in (2, 4) for side in (4, 8)}

    def a_token(depth):
        (less, few), (more, many) = sizes[depth, 4], sizes[depth, 8]
        return (more - less) / (many - few)

    assert a_token(4) - a_token(2) == 2 * widths * WIDTH * 2
