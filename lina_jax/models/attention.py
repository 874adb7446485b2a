"""Linear and softmax attention in one module; config fields choose the variant (paper section 3.2).

Sequences are stored shard by shard (see `sequence`), which is the plain order unless the mesh shards them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lina_jax.mesh import LARGE_TABLE, constrain
from lina_jax.models import attention_kernel, sequence, tiles
from lina_jax.models.convolution import depthwise_convolution
from lina_jax.models.initializers import uniform
from lina_jax.models.layers import Linear, broadcast_f32_grad, multiply_f32_grad, rotate
from lina_jax.platforms import by_platform, one_cpu, platform, portable

RELU_EPS = 1e-6  # keeps q . k positive where every ReLU output is zero
NORMALIZER_EPS = 1e-6
CONVOLUTION = "convolution"  # name in remat policies
GATE_TEMPERATURE = 16.0  # of the data-dependent gate: sigmoid(.) ** (1 / 16)

Select = Callable[[jax.Array], jax.Array]  # selects tokens: (B, N, ...) -> (B, K, ...)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Settings of one attention layer.

    With a convolution or gates, its sequence is `condition_tokens` tokens followed by an (h, w) `grid` of image tokens.
    """

    width: int
    heads: int
    kind: str = "linear"  # linear | softmax
    kernel: str = "xla"  # xla | pallas (on TPUs and GPUs; elsewhere xla): how linear attention's core runs
    normalization: str = "division"  # division | subtraction
    conv_kernel: int = 0  # 0: no depthwise convolution
    gate: str = "none"  # none | head | shared | key | value | decoupled | dynamic
    condition_tokens: int = 0
    grid: tuple[int, int] = (0, 0)
    dtype: jnp.dtype = jnp.float32

    @property
    def tokens(self) -> int:
        return self.condition_tokens + self.grid[0] * self.grid[1]


class Attention(nnx.Module):
    """Attention layer: x (B, N, D) -> (B, N, D).

    `valid` (B, N) marks the tokens that exist. Absent tokens contribute to no sum, means divide by the true count, and
    the outputs of absent tokens are unspecified. `angles` (B or 1, N, d/2) rotates queries and keys. `select` selects K
    tokens from arrays (B, N, ...): the layer then computes only their outputs, (B, K, D), the same on all shards of the
    sequence.
    """

    def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.qkv = Linear(c.width, (3, c.width), ("embed", "parts", "heads"), rngs=rngs, dtype=c.dtype)
        self.proj = Linear(c.width, c.width, ("inner", None), rngs=rngs, dtype=c.dtype)
        if c.conv_kernel:
            init = uniform(c.conv_kernel**2)
            self.conv_kernel = nnx.Param(
                init(rngs.params(), (c.conv_kernel, c.conv_kernel, c.width), jnp.float32), axes=(None, None, "embed")
            )
            self.conv_bias = nnx.Param(init(rngs.params(), (c.width,), jnp.float32), axes=(None,))
        if c.gate == "dynamic":
            self.key_gate = Linear(c.width, c.heads, ("embed", "heads"), rngs=rngs, dtype=c.dtype)
            self.value_gate = Linear(c.width, c.heads, ("embed", "heads"), rngs=rngs, dtype=c.dtype)
        for name in GATE_NAMES.get(c.gate, {}).values():
            shape = (c.tokens, 1 if c.gate == "shared" else c.heads)
            rows = "rows" if math.prod(shape) >= LARGE_TABLE else None
            setattr(self, name, nnx.Param(jnp.ones(shape), axes=(rows, None if c.gate == "shared" else "heads")))

    def __call__(
        self, x: jax.Array, *,
        valid: jax.Array | None = None, angles: jax.Array | None = None, select: Select | None = None,
    ) -> jax.Array:  # fmt: skip
        if self._kernel_device and not select:  # for few tokens, XLA's matmuls are enough
            out = self._by_kernels(x, valid, angles)
        else:
            q, k, v = self._projected(x, angles, select)
            if self.config.kind == "softmax":
                # Every query needs every key, so keys and values are gathered over the shards of the sequence.
                out = softmax_attention(q, *(constrain(a, "batch", None, "heads", None) for a in (k, v)), valid)
            else:
                out = self._linear(x, q, k, v, valid, selected=bool(select))
            out = rearrange(out, "b n h d -> b n (h d)")
        if self.config.conv_kernel:
            convolved = select(self._convolution(x)) if select else self._convolution(x)
            # Named for remat policies on TPUs only, where recomputing it is slow. On GPUs, if it is kept, XLA (without
            # the Triton kernel) sums the gradients of the taps one by one.
            out = out + (checkpoint_name(convolved, CONVOLUTION) if platform() == "tpu" else convolved)
        return self.proj(out)

    @property
    def _kernel_device(self) -> str:
        """The device whose kernels run, tpu or gpu; empty for XLA's matmuls."""
        return tiles.device() if self.config.kind == "linear" and self.config.kernel == "pallas" else ""

    def _projected(self, x, angles, select=None) -> list[jax.Array]:
        """q (B, N or K, H, d), k and v (B, N, H, d)."""

        def by_head(a, tokens="tokens"):
            return rearrange(constrain(a, "batch", tokens, "heads"), "b n (h d) -> b n h d", h=self.config.heads)

        q_angles = angles
        if select:
            q = by_head(self.qkv.part(0, select(x)), None)
            k, v = (by_head(self.qkv.part(i, x)) for i in (1, 2))
            q_angles = angles if angles is None else select(jnp.broadcast_to(angles, (x.shape[0], *angles.shape[1:])))
        else:
            q, k, v = map(by_head, self.qkv.split(x))
        return [q, k, v] if angles is None else [rotate(q, q_angles), rotate(k, angles), v]

    def _by_kernels(self, x, valid, angles):
        bias = self.qkv.bias[...].reshape(-1, 3, self.config.width)  # (1 or B, 3, D): `transformer.copy_per_image`
        if angles is not None:
            projected = [rearrange(a, "b n h d -> b n (h d)") for a in self._projected(x, angles)]
            bias = jnp.zeros_like(bias)  # the biases were added before the rotation
        elif self._kernel_device == "gpu":
            projected = [constrain(self.qkv.matmul(x), "batch", "tokens", None, "heads")]
        else:
            projected = [constrain(a, "batch", "tokens", "heads") for a in self.qkv.matmuls(x)]
        return attention_kernel.linear_attention(
            projected,
            bias,
            self._gates(x),
            valid,
            heads=self.config.heads,
            division=self.config.normalization == "division",
            relu_eps=self._relu_eps,
            normalizer_eps=NORMALIZER_EPS,
        )

    def _linear(self, x, q, k, v, valid, *, selected: bool):
        """Linear attention of q to k and v; queries of `selected` tokens are the same on all shards."""
        mapped = sequence.per_shard(self._core, replicated=(0,) if selected else (), out_replicated=selected)
        return mapped(q, k, v, self._gates(x), valid)

    def _core(self, q, k, v, gates, valid):
        """Attention over the tokens of one shard: q (B, N or K, H, d) -> the same shape.

        k and v (B, N, H, d), gates (1 or B, N, H or 1), valid (B, N) or None.
        """
        q, k, v = (rearrange(a, f"b n h d -> b {layout()} d") for a in (q, k, v))
        gates = Gates(*(g if g is None else rearrange(g, f"b n h -> b {layout()}") for g in gates))
        q, k = (jax.nn.relu(a) + self._relu_eps for a in (q, k))
        k_normalizer = None if gates.normalizer is None else _apply_gate(k, gates.normalizer)
        core = division_attention if self.config.normalization == "division" else subtraction_attention
        out = core(q, _apply_gate(k, gates.key), k_normalizer, _apply_gate(v, gates.value), valid)
        return rearrange(out, f"b {layout()} d -> b n h d")

    @property
    def _relu_eps(self) -> float:
        return RELU_EPS if self.config.normalization == "division" else 0.0

    def _gates(self, x: jax.Array) -> "Gates":
        """Gates as factors (1 or B, N, H or 1)."""
        kind = self.config.gate
        if kind == "dynamic":
            key, value = (
                jnp.exp(jax.nn.log_sigmoid(gate(x).astype(jnp.float32)) / GATE_TEMPERATURE)
                for gate in (self.key_gate, self.value_gate)
            )
            return Gates(key, value)
        names = GATE_NAMES.get(kind, {})
        return Gates(**{part: self._by_token(getattr(self, name)) for part, name in names.items()})

    def _by_token(self, gate: nnx.Param) -> jax.Array:
        """A learned gate with each row on its token's shard: (1 or B, Nc + N, H or 1).

        The parameter is (Nc + N, H or 1), or (B, 1, Nc + N, H or 1) after `transformer.copy_per_image`.
        """
        table = gate[...]
        return sequence.table_per_shard(table.reshape(-1, *table.shape[-2:]), self.config.condition_tokens)

    def _convolution(self, x: jax.Array) -> jax.Array:
        """k x k depthwise convolution of the image tokens' inputs; exactly zero on condition tokens. (B, N, D)."""
        dtype, size = self.config.dtype, self.config.conv_kernel
        triton = ""
        if self._kernel_device == "gpu":
            triton = "interpreted" if tiles.interpreted.value else "compiled"

        def own(x, kernel, bias):
            first = self.config.condition_tokens // sequence.shards()
            image = rearrange(x[:, first:], "b (h w) d -> b h w d", w=self.config.grid[1])
            y = depthwise_convolution(sequence.with_edges(image, size // 2), sequence.replicate(kernel), triton)
            y = rearrange(y, "b h w d -> b (h w) d")
            return jnp.pad(y + broadcast_f32_grad(sequence.replicate(bias), y), ((0, 0), (first, 0), (0, 0)))

        arrays = [x.astype(dtype), self.conv_kernel[...].astype(dtype), self.conv_bias[...]]
        if triton:
            # Channels are independent, so they are sharded like the attention output that this is added to.
            tokens = ("batch", "tokens", "heads")
            owner = ("batch",) if self.conv_bias[...].ndim > 1 else ()  # after `transformer.copy_per_image`
            axes = [tokens, *((*owner, *[None] * (a.ndim - len(owner) - 1), "heads") for a in arrays[1:])]
            return tiles.on_each_device(own, axes, tokens, images=len(x))(*arrays)
        return sequence.per_shard(own, replicated=(1, 2))(*arrays)


class Gates(NamedTuple):
    """Factors of each token; None where there is no gate."""

    key: jax.Array | None = None
    value: jax.Array | None = None
    normalizer: jax.Array | None = None  # of keys in the normalizer, if it differs from `key`


# For each kind of learned gates, their parameters, by their fields in `Gates`.
GATE_NAMES = {
    "head": {"key": "key_scale", "value": "value_scale"},
    "shared": {"key": "key_scale", "value": "value_scale"},
    "key": {"key": "key_scale"},
    "value": {"value": "value_scale"},
    "decoupled": {"key": "key_scale_gamma", "normalizer": "key_scale_tau", "value": "value_scale"},
}


def layout() -> str:
    """How the operands of linear attention, written (B, H, N, d) below, lie in memory: "h n" on CPUs, else "n h".

    Unless heads come first, XLA:CPU copies each operand, element by element. The compilers for TPUs and GPUs choose
    layouts themselves; with heads first, planned step times are longer (a stack on a v5e by 2 %, t2i 256 on h200:8
    by 1 %).
    """
    return "h n" if platform() == "cpu" and not portable.value else "n h"


def _token_axis() -> int:
    return 1 + layout().split().index("n")


def _apply_gate(x: jax.Array, gate: jax.Array | None) -> jax.Array:
    """x (B, H, N, d) times gate (.., H, N), whose H may be 1; both in `layout`."""
    return x if gate is None else multiply_f32_grad(x, gate[..., None])


def _einsum_f32(pattern: str, *arrays: jax.Array) -> jax.Array:
    """Einsum of arrays in `layout`, accumulated in float32. Accelerators multiply in the first array's dtype."""
    pattern = pattern.replace("h n", layout())

    def product(first, *others):
        others = (a.astype(first.dtype) for a in others)
        return jnp.einsum(pattern, first, *others, preferred_element_type=jnp.float32)

    def widened(*arrays):
        return jnp.einsum(pattern, *(a.astype(jnp.float32) for a in arrays))

    # XLA's CPU backend lacks some bfloat16 products with float32 results (seen in jax 0.10.2); widening is exact.
    return by_platform(*arrays, cpu=widened, default=product)


@jax.custom_vjp
def _outer_sum(k: jax.Array, v: jax.Array) -> jax.Array:
    """The sum over tokens of k v^T, float32: (B, H, N, d), (B, H, N, e) -> (B, H, d, e).

    Its gradients have the layout of the arguments. JAX's own, (B, H, d, N), would have to be transposed.
    """
    return _einsum_f32("b h n d, b h n e -> b h d e", k, v)


def _outer_sum_gradient(arrays, gradient):
    k, v = arrays
    return (
        _einsum_f32("b h n e, b h d e -> b h n d", v, gradient).astype(k.dtype),
        _einsum_f32("b h n d, b h d e -> b h n e", k, gradient).astype(v.dtype),
    )


_outer_sum.defvjp(lambda k, v: (_outer_sum(k, v), (k, v)), _outer_sum_gradient)


def _token_sum(x: jax.Array) -> jax.Array:
    """The sum over tokens, float32: (B, H, N, d) -> (B, H, d)."""
    if one_cpu():  # a matmul with ones, as in layers._sum_to_shape
        return _einsum_f32("b h n d, n -> b h d", x, jnp.ones(x.shape[_token_axis()], x.dtype))
    return jnp.sum(x, axis=_token_axis(), dtype=jnp.float32)


def _read_state(q: jax.Array, state: jax.Array) -> jax.Array:
    """Queries times a state, float32: (B, H, N, d), (B, H, d, e) -> (B, H, N, e)."""
    return _einsum_f32("b h n d, b h d e -> b h n e", q, state)


def _along(q: jax.Array, mean: jax.Array) -> jax.Array:
    """q . mean, float32: (B, H, N, d), (B, H, d) -> (B, H, N)."""
    return _einsum_f32("b h n d, b h d -> b h n", q, mean)


def _present(valid: jax.Array | None, k: jax.Array) -> tuple[jax.Array | float, jax.Array | None]:
    """1 / (number of tokens), to scale a (B, H, d) sum, and a factor that zeroes absent tokens.

    The factor broadcasts against (B, H, N, d); it is None if all tokens exist.
    """
    share = sequence.share(valid, k.shape[_token_axis()])
    if valid is None:
        return share, None
    factor = rearrange(valid, f"b n -> b {layout().replace('h', '1')} 1")
    return share[:, None, None], factor.astype(k.dtype)


def division_attention(
    q: jax.Array, k: jax.Array, k_normalizer: jax.Array | None, v: jax.Array, valid: jax.Array | None = None
) -> jax.Array:
    """o_n = q_n (mean k v^T) / (q_n . mean k' + eps), where k' is `k_normalizer`, or k if that is None.

    All arrays are (B, H, N, d) in `layout` and hold the tokens of one shard, of which `valid` (B, N) marks those that
    exist; means are over all shards. Only the decoupled gate has a k' of its own.
    """
    scale, present = _present(valid, k)
    if present is not None:
        k = k * present
        k_normalizer = None if k_normalizer is None else k_normalizer * present
    k_normalizer = k if k_normalizer is None else k_normalizer
    state, sum_k = sequence.psum((_outer_sum(k, v), _token_sum(k_normalizer)))
    state, mean_k = state * jnp.expand_dims(scale, -1), sum_k * scale
    normalizer = _along(q, mean_k.astype(q.dtype)) + NORMALIZER_EPS
    return (_read_state(q, state.astype(q.dtype)) / normalizer[..., None]).astype(q.dtype)


def subtraction_attention(
    q: jax.Array, k: jax.Array, k_normalizer: jax.Array | None, v: jax.Array, valid: jax.Array | None = None
) -> jax.Array:
    """o_n = s q_n (mean k v^T) + (1 - s q_n . mean k') mean v, s = d ** -0.5; otherwise like `division_attention`."""
    scale, present = _present(valid, k)
    if present is not None:
        k, v = k * present, v * present
        k_normalizer = None if k_normalizer is None else k_normalizer * present
    k_normalizer = k if k_normalizer is None else k_normalizer
    s = q.shape[-1] ** -0.5
    state, sum_k, sum_v = sequence.psum((_outer_sum(k, v), _token_sum(k_normalizer), _token_sum(v)))
    state, mean_k, mean_v = state * (s * jnp.expand_dims(scale, -1)), sum_k * (s * scale), sum_v * scale
    weight = 1.0 - _along(q, mean_k.astype(q.dtype))
    mean_v = jnp.expand_dims(mean_v, _token_axis())
    return (_read_state(q, state.astype(q.dtype)) + weight[..., None] * mean_v).astype(q.dtype)


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt d) v. All (B, N, H, d)."""
    mask = None if valid is None else valid[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)
