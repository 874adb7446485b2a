"""Stacks of blocks: their order, what they keep for the backward pass, and when gradients are reduced."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lina_jax.models import attention, transformer
from lina_jax.models.attention import Attention, AttentionConfig, Select
from lina_jax.models.transformer import Transformer

WIDTH = 32


def test_blocks_follow_each_other_by_their_numbers():
    """The names of blocks from 100 on sort before those of earlier ones."""
    config, x = AttentionConfig(WIDTH, 4), jax.random.normal(jax.random.key(0), (1, 6, WIDTH))
    early, late = (Transformer(config, 6, 2, first=first, softmax_period=3, rngs=nnx.Rngs(1)) for first in (2, 98))
    names = ("from_98", "from_99", "from_101", "from_102"), ("from_02", "from_03", "from_05", "from_06")
    for ours, theirs in zip(*names, strict=True):
        nnx.update(late.runs[ours], nnx.state(early.runs[theirs]))
    assert np.array_equal(late(x), early(x))


@pytest.mark.parametrize("normalization", ["division", "subtraction"])
@pytest.mark.parametrize("gate", ["none", "head", "shared", "decoupled", "dynamic"])
def test_heads_or_tokens_first_is_the_same(gate, normalization, monkeypatch):
    """CPUs use one order of axes, accelerators the other: `attention.layout`."""
    config = AttentionConfig(
        WIDTH, 4, normalization=normalization, gate=gate, conv_kernel=3, condition_tokens=4, grid=(3, 3)
    )
    graph, params = nnx.split(Attention(config, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape), params)
    x = jax.random.normal(jax.random.key(2), (2, config.tokens, WIDTH))
    valid = jnp.arange(config.tokens) < jnp.array([[13], [9]])
    found = []
    for order in ("h n", "n h"):
        monkeypatch.setattr(attention, "layout", lambda order=order: order)

        def loss(params, x):
            return jnp.sum(jnp.sin(nnx.merge(graph, params)(x, valid=valid)) * valid[..., None])

        found.append(jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)))
    for a, b in zip(*found, strict=True):
        assert jnp.linalg.norm(a - b) < 1e-6 * jnp.linalg.norm(b)


def kept(depth: int, side: int, remat: str, scan: bool, select: Select | None = None) -> tuple[int, int]:
    """(bytes that `depth` blocks keep of an image for the backward pass, number of its tokens)"""
    config = AttentionConfig(WIDTH, 4, conv_kernel=3, condition_tokens=4, grid=(side, side), dtype=jnp.bfloat16)
    model = nnx.eval_shape(lambda: Transformer(config, depth, 4, remat=remat, scan=scan, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    x = jax.ShapeDtypeStruct((1, config.tokens, WIDTH), config.dtype)

    def backward(params, x):
        return jax.vjp(lambda params, x: nnx.merge(graph, params)(x, select=select), params, x)[1]

    arrays = jax.tree.leaves(jax.eval_shape(backward, params, x))
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays), config.tokens


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    ("remat", "platform", "widths"), [("dots", "gpu", 10), ("dots", "tpu", 11), ("full", "gpu", 1), ("full", "tpu", 1)]
)
def test_a_block_keeps_its_products_of_each_token(remat, platform, widths, scan, monkeypatch):
    """See docs/performance.md: q, k, v; output projection; both MLP layers (4 + 1); the stream; convolution on TPUs."""
    monkeypatch.setattr(attention, "platform", lambda: platform)
    sizes = {(depth, side): kept(depth, side, remat, scan) for depth in (2, 4) for side in (4, 8)}

    def a_token(depth):
        (less, few), (more, many) = sizes[depth, 4], sizes[depth, 8]
        return (more - less) / (many - few)

    assert a_token(4) - a_token(2) == 2 * widths * WIDTH * 2


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_the_block_of_chosen_tokens_keeps_what_others_do(remat, scan):
    whole, few = (kept(3, 16, remat, scan, select)[0] for select in (None, lambda x: x[:, :200]))
    assert few < 1.01 * whole  # 1.3 and 2.8 times as much if it is not recomputed


def test_overlapped_reductions_are_of_the_layers_three_behind(monkeypatch):
    class Numbers(nnx.Module):
        def __init__(self):
            self.number = nnx.Param(jnp.arange(5.0))

    def body(x, layer):
        return layer.number[...]  # x of a layer is the number of the one before

    waited = []

    def record(x, later):
        waited.append((float(x) + 1, float(later.number[...])))
        return x, later

    monkeypatch.setattr(transformer, "_wait_for_reduction", record)
    with transformer.overlap_grad_reduction(True):
        transformer.apply_layers(body, jnp.float32(-1), Numbers(), scan=False, remat="none", last=body)
    assert waited == [(0, 3), (1, 4)]


def test_overlapped_reductions_change_no_number():
    depth = transformer.REDUCTION_LAG + 2
    graph, params = nnx.split(Transformer(AttentionConfig(WIDTH, 4), depth, 2, scan=False, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (1, WIDTH, WIDTH))  # gradients of fewer rows have barriers of their own

    def lowered(overlap):
        def loss(params, x):
            with transformer.overlap_grad_reduction(overlap):
                return jnp.sum(jnp.sin(nnx.merge(graph, params)(x)))

        return jax.jit(jax.grad(loss, (0, 1))).lower(params, x)

    programs = [lowered(overlap) for overlap in (False, True)]
    assert [program.as_text().count("optimization_barrier") for program in programs] == [0, 2]
    for a, b in zip(*(jax.tree.leaves(program.compile()(params, x)) for program in programs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())
