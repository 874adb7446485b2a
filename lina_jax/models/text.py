"""Frozen text encoders: token ids to features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lina_jax.mesh import constrain
from lina_jax.models.initializers import normal
from lina_jax.models.layers import MLP, Frozen, LayerNorm, Linear
from lina_jax.models.transformer import apply_layers, stacked


@dataclasses.dataclass(frozen=True)
class PhiConfig:
    """Sizes of a Phi decoder."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    partial_rotary_factor: float
    layer_norm_eps: float
    rope_theta: float

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """Channels of a head that rotate: its first ones."""
        return int(self.partial_rotary_factor * self.head_width)

    def angles(self, length: int) -> jax.Array:
        """Rotary angles (L, rotary_width / 2) of positions 0 .. length - 1, float32."""
        frequencies = self.rope_theta ** (-np.arange(0, self.rotary_width, 2) / self.rotary_width)
        return jnp.asarray(np.outer(np.arange(length), frequencies), jnp.float32)


def rotate_halves(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate channel pairs (i, i + r/2) of the first r channels of every head. x (B, L, H, d), angles (L, r/2)."""
    half = angles.shape[-1]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = (x[..., i * half : (i + 1) * half].astype(jnp.float32) for i in (0, 1))
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), x[..., 2 * half :]], axis=-1)


class PhiBlock(nnx.Module):
    """x + attention(n) + mlp(n) with a single n = LN(x). x (B, L, D) float32, angles (L, r/2)."""

    def __init__(self, config: PhiConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        c, common = config, {"rngs": rngs, "dtype": dtype, "kind": Frozen}
        heads = (c.num_attention_heads, c.head_width)
        self.norm = LayerNorm(c.hidden_size, kind=Frozen, eps=c.layer_norm_eps)
        self.qkv = Linear(c.hidden_size, (3, *heads), ("embed", "parts", "heads", None), **common)
        self.proj = Linear(heads, c.hidden_size, ("heads", None, "embed"), **common)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, c.hidden_size, _gelu, **common)

    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
        n = self.norm(x)
        q, k, v = (constrain(part, "batch", None, "heads", None) for part in self.qkv.split(n))
        q, k = rotate_halves(q, angles), rotate_halves(k, angles)
        y = self.proj(jax.nn.dot_product_attention(q, k, v, is_causal=True))
        return constrain(x + y + self.mlp(n), "batch", None, None)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


class Phi(nnx.Module):
    """Token ids (B, L) int32 -> the last hidden state after the final norm (B, L, D), float32.

    Causal and without a padding mask: rows before the first padding id do not depend on it. Products are computed in
    `dtype`; the residual stream, norms and softmax stay in float32.
    """

    def __init__(self, config: PhiConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        c = self.config = config
        self.table = Frozen(normal()(rngs.params(), (c.vocab_size, c.hidden_size)), axes=(None, "embed"))
        self.blocks = stacked(lambda rngs: PhiBlock(c, rngs=rngs, dtype=dtype), c.num_hidden_layers, rngs)
        self.norm = LayerNorm(c.hidden_size, kind=Frozen, eps=c.layer_norm_eps)

    def embed(self, ids: jax.Array) -> jax.Array:
        # Gathered: a lookup in a table sharded over its width would gather the features of the whole batch instead.
        table = constrain(self.table[...], None, None)
        return constrain(table[ids].astype(jnp.float32), "batch", None, None)

    def __call__(self, ids: jax.Array) -> jax.Array:
        angles = self.config.angles(ids.shape[1])
        x = apply_layers(
            lambda x, block: block(x, angles), self.embed(ids), self.blocks, scan=True, remat="none", ahead=False
        )
        return self.norm(x)
