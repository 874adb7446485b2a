"""The diffusion head: an MLP per token that predicts the flow's velocity (paper section 3.1)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lina_jax.config import TIME_FEATURES
from lina_jax.mesh import constrain
from lina_jax.models.initializers import normal, zeros
from lina_jax.models.layers import MLP, LayerNorm, Linear, broadcast_f32_grad, standardize
from lina_jax.models.transformer import apply_layers, stacked

ADAPTIVE_NORM_EPS = 1e-6


def time_features(timesteps: jax.Array) -> jax.Array:
    """[cos(t f), sin(t f)] in float32. timesteps (...) in (0, 1000] -> (..., 256)."""
    count = TIME_FEATURES // 2
    frequencies = np.exp(-np.arange(count) * math.log(1e4) / count).astype(np.float32)
    angles = timesteps[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeCondition(nnx.Module):
    """Separate embeddings of timestep and condition, each computed once and reused; the head adds them."""

    def __init__(self, condition_width: int, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.time_mlp = MLP(
            TIME_FEATURES, width, width, jax.nn.silu,
            rngs=rngs, dtype=jnp.float32, kernel_init=normal(), between_features=False,
        )  # fmt: skip
        self.condition_mlp = MLP(condition_width, width, width, jax.nn.silu, rngs=rngs, dtype=dtype)

    def time(self, timesteps: jax.Array) -> jax.Array:
        """(...) -> (..., r), float32; exact on accelerators, too."""
        with jax.default_matmul_precision("float32"):
            return self.time_mlp(time_features(timesteps))

    def condition(self, z: jax.Array) -> jax.Array:
        """(..., D) -> (..., r)."""
        return self.condition_mlp(z)


class AdaptiveNorm(nnx.Module):
    """Norm without parameters, with a scale, a shift (and a gate) computed from the condition g; all start at zero."""

    def __init__(self, width: int, outputs: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.proj = Linear(
            width,
            (outputs, width),
            ("embed", "parts", "mlp"),
            rngs=rngs,
            dtype=dtype,
            kernel_init=zeros,
            bias_init=zeros,
        )

    def __call__(self, x: jax.Array, activated: jax.Array) -> tuple[jax.Array, ...]:
        """x, silu(g) (..., r) -> (modulated x, gate...)."""
        scale, shift, *gate = self.proj.split(activated)
        return standardize(x, ADAPTIVE_NORM_EPS) * (1 + scale) + shift, *gate


class DiffusionBlock(nnx.Module):
    """x + gate * LN(mlp(adaptive_norm(x)))."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.norm1 = AdaptiveNorm(width, 3, rngs=rngs, dtype=dtype)
        self.mlp = MLP(width, width, width, jax.nn.silu, rngs=rngs, dtype=dtype)
        self.norm2 = LayerNorm(width)

    def __call__(self, x: jax.Array, activated: jax.Array) -> jax.Array:
        h, gate = self.norm1(x, activated)
        return x + gate * self.norm2(self.mlp(h))


class DiffusionHead(nnx.Module):
    """Noisy tokens and g = condition + time -> velocity. Tokens do not interact."""

    def __init__(
        self, token_dim: int, condition_width: int, width: int, depth: int,
        *, rngs: nnx.Rngs, dtype: jnp.dtype, remat: str = "none", scan: bool = True,
    ):  # fmt: skip
        self.patch_embed = Linear(
            token_dim, width, (None, "embed"), rngs=rngs, dtype=dtype, bias_init=zeros, between_features=False
        )
        self.embed = TimeCondition(condition_width, width, rngs=rngs, dtype=dtype)
        self.blocks = stacked(lambda rngs: DiffusionBlock(width, rngs=rngs, dtype=dtype), depth, rngs)
        self.norm = AdaptiveNorm(width, 2, rngs=rngs, dtype=dtype)
        self.out = Linear(
            width, token_dim, ("embed", None),
            rngs=rngs, dtype=dtype, kernel_init=zeros, bias_init=zeros, between_features=False,
        )  # fmt: skip
        self.dtype, self.scan, self.remat = dtype, scan, remat

    def __call__(self, x: jax.Array, time: jax.Array, condition: jax.Array) -> jax.Array:
        """x (..., p*p*C), time and condition (..., r) as `embed` gives them (broadcast against x) -> (..., p*p*C)."""
        h = constrain_tokens(self.patch_embed(x))
        activated = constrain_tokens(jax.nn.silu(time + broadcast_f32_grad(condition, h)).astype(self.dtype))
        h = apply_layers(lambda h, block: block(h, activated), h, self.blocks, scan=self.scan, remat=self.remat)
        (h,) = self.norm(h, activated)
        return self.out(h)


def constrain_tokens(x: jax.Array) -> jax.Array:
    """Shard (repeat, B, N, r) or (B, N, r) over batch and tokens."""
    return constrain(x, *[None] * (x.ndim - 3), "batch", "tokens", None)
