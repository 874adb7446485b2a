"""The kernels of linear attention, interpreted: equal to the plain path, value and gradient, on each kind of device.

They are also compiled for TPUs and GPUs that are not there, where the compilers are installed.
"""

import importlib.util
import itertools

import golden_parts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_case import GOLDEN, Case

from lina_jax import mesh, topology
from lina_jax.models import attention, attention_kernel
from lina_jax.models.attention_kernel import Core

# Largest difference, as a share of the largest number: sums in another order. Measured 1.0e-6 at most.
TOLERANCE = 4e-6
HEADS = 4


def core_of(division=True, decoupled=False, gpu=False):
    relu_eps = attention.RELU_EPS if division else 0.0
    return Core(HEADS, division, relu_eps, attention.NORMALIZER_EPS, decoupled, gpu, interpret=True)


def kernels(core, q, k, v, gates):
    batch, length, _, _ = q.shape
    q, k, v = (x.reshape(batch, length, -1) for x in (q, k, v))
    scale = jnp.full((batch, 1, q.shape[2]), 1 / length)
    summaries = attention_kernel.summarize(core, k, v, gates.reshape(batch, length, -1), scale)
    return attention_kernel.read(core, q, summaries)


def plain(core, q, k, v, gates):
    q, k = jax.nn.relu(q) + core.relu_eps, jax.nn.relu(k) + core.relu_eps
    k_normalizer = k * gates[:, :, 2, :, None] if core.decoupled else None
    function = attention.division_attention if core.division else attention.subtraction_attention
    result = function(q, k * gates[:, :, 0, :, None], k_normalizer, v * gates[:, :, 1, :, None])
    return result.reshape(*q.shape[:2], -1)


def inputs(core, length, width, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, length, HEADS, width)), dtype) for _ in range(3))
    gates = jnp.asarray(rng.uniform(0.5, 1.5, (2, length, 2 + core.decoupled, HEADS)), dtype)
    return (q, k, v, gates), jnp.asarray(rng.standard_normal((2, length, HEADS * width)), dtype)


def outcome(function, core, arguments, direction):
    """The result and the gradient of each argument."""
    result, pull = jax.vjp(lambda *a: function(core, *a), *arguments)
    return result, *pull(direction)


@pytest.mark.parametrize("gpu", [False, True], ids=["tpu", "gpu"])
@pytest.mark.parametrize(("division", "decoupled"), itertools.product([True, False], repeat=2))
def test_a_kernel_is_the_plain_path_in_value_and_gradient(division, decoupled, gpu):
    core = core_of(division, decoupled, gpu)
    arguments, direction = inputs(core, 40, 16)
    found = outcome(kernels, core, arguments, direction)
    for a, b in zip(found, outcome(plain, core, arguments, direction), strict=True):
        assert np.abs(a - b).max() < TOLERANCE * np.abs(b).max()


@pytest.mark.parametrize("gpu", [False, True], ids=["tpu", "gpu"])
@pytest.mark.parametrize("length", [600, 1024], ids=["ragged", "whole tiles"])
def test_tokens_of_many_tiles_add_up(length, gpu):
    """Widths of the large presets, more tokens than a tile has, so that on GPUs several programs share an image."""
    core = core_of(gpu=gpu)
    arguments, direction = inputs(core, length, 96)
    found = outcome(kernels, core, arguments, direction)
    for a, b in zip(found, outcome(plain, core, arguments, direction), strict=True):
        assert np.abs(a - b).max() < TOLERANCE * np.abs(b).max()


@pytest.mark.parametrize("gpu", [False, True], ids=["tpu", "gpu"])
def test_bfloat16_is_as_near_to_float32_as_the_plain_path(gpu):
    core = core_of(gpu=gpu)
    arguments, direction = inputs(core, 96, 32, jnp.bfloat16)
    wide = outcome(plain, core, [x.astype(jnp.float32) for x in arguments], direction.astype(jnp.float32))

    def distance(results):
        return [
            float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
            for a, b in zip(results, wide, strict=True)
        ]

    ours, others = (distance(outcome(function, core, arguments, direction)) for function in (kernels, plain))
    for a, b in zip(ours, others, strict=True):
        assert a < 1.25 * b, (ours, others)


LINEAR = sorted(p.stem for p in GOLDEN.glob("attn_*.json") if "softmax" not in p.stem)


@pytest.mark.parametrize("name", LINEAR)
def test_fixtures_hold_with_the_kernel(name):
    case = Case(name)
    golden_parts.attention(case, kernel="pallas")
    assert not case.left


PLACES = {
    "v5e": ("v5e:2x2", "libtpu"),
    "v5p": ("v5p:2x2x1", "libtpu"),
    "v6e": ("v6e:2x2", "libtpu"),
    "h200": ("h200:4", "jax_cuda12_plugin"),
}


@pytest.mark.parametrize("place", PLACES)
def test_compilers_take_the_kernels(place):
    """A gated layer of the large presets, forward and backward, in bfloat16: four kernels, and no product of heads."""
    name, compiler = PLACES[place]
    if not importlib.util.find_spec(compiler):
        pytest.skip(f"needs {compiler}")
    where = topology.parse(name)
    grid = mesh.build(mesh.MeshConfig(data=2, sequence=2), topology.devices(where))
    config = attention.AttentionConfig(1536, 16, "linear", "pallas", "division", 5, "head", 64, (16, 16), jnp.bfloat16)
    graph, state = nnx.split(nnx.eval_shape(lambda: attention.Attention(config, rngs=nnx.Rngs(0))))
    x = jax.ShapeDtypeStruct((4, 320, 1536), jnp.bfloat16, sharding=mesh.sharding(grid, "batch", "tokens", None))

    def loss(state, x):
        return jnp.sum(nnx.merge(graph, state)(x).astype(jnp.float32))

    with jax.set_mesh(grid):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(state, x)
        program = lowered.compile(compiler_options=topology.compiler_options(where)).as_text()
    target = "tpu_custom_call" if where.chip.torus else "__gpu$xla.gpu.triton"
    assert program.count(f'custom_call_target="{target}"') == 4
    assert "bhde" not in program
