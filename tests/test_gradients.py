"""Functions with custom gradients, compared with what jax.grad derives from their plain definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from lina_jax.models import attention
from lina_jax.models.convolution import depthwise_convolution
from lina_jax.models.layers import gelu, standardize


def plain_standardize(x):
    return (x - jnp.mean(x, axis=-1, keepdims=True)) / jnp.sqrt(jnp.var(x, axis=-1, keepdims=True) + 1e-5)


def plain_convolution(rows, kernel):
    padded = jnp.pad(rows, ((0, 0), (0, 0), (kernel.shape[1] // 2,) * 2, (0, 0)))
    weights = kernel[:, :, None]  # (k, k, 1, D): one input channel for each group
    return jax.lax.conv_general_dilated(
        padded, weights, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=rows.shape[-1]
    )


def plain_convolutions(rows, kernels):
    return jnp.concatenate([plain_convolution(*pair) for pair in zip(rows[:, None], kernels[:, 0], strict=True)])


def convolution_of_gpus(rows, kernel):
    return depthwise_convolution(rows, kernel, "compiled" if jax.default_backend() == "gpu" else "interpreted")


def state(k, v):
    """The state of linear attention from keys and values (B, H, N, d), computed in the current order of axes."""
    return attention._outer_sum(*(rearrange(a, f"b h n d -> b {attention.layout()} d") for a in (k, v))).astype(k.dtype)


def plain_state(k, v):
    return jnp.einsum("b h n d, b h n e -> b h d e", k, v)


CASES = {
    "standardize": (lambda x: standardize(x, 1e-5), plain_standardize, [(3, 7, 40)]),
    "gelu": (gelu, lambda x: jax.nn.gelu(x, approximate=False), [(5, 33)]),
    "convolution 3": (depthwise_convolution, plain_convolution, [(2, 6, 5, 4), (3, 3, 4)]),
    "convolution 5": (depthwise_convolution, plain_convolution, [(2, 8, 4, 3), (5, 5, 3)]),
    "convolution, one for each image": (depthwise_convolution, plain_convolutions, [(2, 6, 5, 4), (2, 1, 3, 3, 4)]),
    "convolution 3, GPUs": (convolution_of_gpus, plain_convolution, [(2, 6, 5, 4), (3, 3, 4)]),
    # More tokens and channels than one program of the kernel takes.
    "convolution 5, GPUs": (convolution_of_gpus, plain_convolutions, [(2, 24, 20, 40), (2, 1, 5, 5, 40)]),
    "state, h n": (state, plain_state, [(2, 3, 7, 5), (2, 3, 7, 4)]),
    "state, n h": (state, plain_state, [(2, 3, 7, 5), (2, 3, 7, 4)]),
}


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    name, _, order = request.param.partition(", ")
    if name == "state":
        monkeypatch.setattr(attention, "layout", lambda: order)
    return CASES[request.param]


def outcome(function, inputs, direction):
    """The result, and the gradient with respect to each input."""

    @jax.jit
    def both(inputs, direction):
        result, pull = jax.vjp(function, *inputs)
        return result, *pull(direction)

    return both(inputs, direction)


def test_gradients_are_those_of_the_definition(case):
    ours, plain, shapes = case
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):  # so that a wrong formula shows, but rounding does not
        inputs = [jnp.asarray(2 * rng.standard_normal(shape)) for shape in shapes]
        direction = jnp.asarray(rng.standard_normal(jax.eval_shape(plain, *inputs).shape))
        for a, b in zip(outcome(ours, inputs, direction), outcome(plain, inputs, direction), strict=True):
            # Statistics are float32 whatever the dtype of the input.
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.abs(b).max()))


def test_bfloat16_is_rounded_once(case):
    ours, plain, shapes = case
    rng = np.random.default_rng(1)
    inputs = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    direction = jnp.asarray(rng.standard_normal(jax.eval_shape(plain, *inputs).shape), jnp.bfloat16)
    *wide, direction_wide = (x.astype(jnp.float32) for x in (*inputs, direction))
    for a, b in zip(outcome(ours, inputs, direction), outcome(plain, wide, direction_wide), strict=True):
        assert a.dtype == jnp.bfloat16
        distance = jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
        assert distance < 0.0025, distance  # one rounding to 8 bits: 0.0017
