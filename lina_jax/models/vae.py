"""KL autoencoders: images to moments of latents and back.

Images are float in [-1, 1] and latents unscaled unless a name says otherwise; both are NHWC. Weights are published and
never trained.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce, repeat
from flax import nnx

from lina_jax.config import AutoencoderConfig
from lina_jax.mesh import constrain
from lina_jax.models.attention import softmax_attention
from lina_jax.models.initializers import uniform
from lina_jax.models.layers import Frozen, Linear

GROUPS = 32  # of every group norm, whatever the published config says
GROUP_NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of an autoencoder; each level but the last halves the image."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    scaling_factor: float
    shift_factor: float = 0.0
    last_level_attention: bool = False  # attention after each residual block of the encoder's last level (MAR)

    @property
    def stride(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


PUBLISHED = {
    "sdxl": VaeConfig((128, 256, 512, 512), 2, latent_channels=4, scaling_factor=0.13025),
    "mar": VaeConfig(
        (128, 128, 256, 256, 512), 2, latent_channels=16, scaling_factor=0.2325, last_level_attention=True
    ),
}


class Conv(nnx.Module):
    """k x k convolution with zero padding. x (B, H, W, inputs) -> (B, H', W', outputs); kernel (k, k, in, out).

    At stride 1, padding keeps H and W. At stride 2, it is one row at the bottom and one column at the right, and H and
    W are halved. `axes` names the channel axes of the kernel.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        axes: tuple[str | None, str | None] = (None, "embed"),
        stride: int = 1,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        init = uniform(inputs * size * size)
        shape = (size, size, inputs, outputs)
        self.kernel = Frozen(init(rngs.params(), shape, jnp.float32), axes=(None, None, *axes))
        self.bias = Frozen(init(rngs.params(), (outputs,), jnp.float32), axes=axes[1:])
        self.stride, self.dtype = stride, dtype
        self.padding = ((size // 2,) * 2 if stride == 1 else (0, size // 2),) * 2

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...].astype(self.dtype)


class GroupNorm(nnx.Module):
    """Affine group norm of x (B, H, W, C); statistics in float32, result in the dtype of x."""

    def __init__(self, channels: int):
        self.scale = Frozen(jnp.ones((channels,)), axes=(None,), decay=False)
        self.bias = Frozen(jnp.zeros((channels,)), axes=(None,), decay=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        def group_mean(y):
            # Per channel first: splitting the last axis of a large array into groups costs a copy on accelerators.
            means = reduce(jnp.mean(y, axis=(1, 2)), "b (g c) -> b g", "mean", g=GROUPS)
            return repeat(means, "b g -> b 1 1 (g c)", c=y.shape[-1] // GROUPS)

        wide = x.astype(jnp.float32)
        centred = wide - group_mean(wide)
        normal = centred * jax.lax.rsqrt(group_mean(jnp.square(centred)) + GROUP_NORM_EPS)
        return (normal * self.scale[...] + self.bias[...]).astype(x.dtype)


class ResBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution of x where the channels differ."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.norm1 = GroupNorm(inputs)
        self.conv1 = Conv(inputs, outputs, 3, rngs=rngs, dtype=dtype)
        self.norm2 = GroupNorm(outputs)
        self.conv2 = Conv(outputs, outputs, 3, rngs=rngs, dtype=dtype)
        if inputs != outputs:
            self.shortcut = Conv(inputs, outputs, 1, rngs=rngs, dtype=dtype)
        self.same = inputs == outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return constrain((x if self.same else self.shortcut(x)) + y, "batch", None, None, None)


class SpatialAttention(nnx.Module):
    """x + softmax attention with one head over all H*W positions. x (B, H, W, C)."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        common = {"rngs": rngs, "dtype": dtype, "kind": Frozen}
        self.norm = GroupNorm(channels)
        self.qkv = Linear(channels, (3, channels), ("embed", "parts", None), **common)
        self.proj = Linear(channels, channels, (None, "embed"), **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = rearrange(self.norm(x), "b h w c -> b (h w) c")
        q, k, v = (part[:, :, None] for part in self.qkv.split(tokens))
        y = self.proj(softmax_attention(q, k, v)[:, :, 0])
        return constrain(x + rearrange(y, "b (h w) c -> b h w c", h=x.shape[1]), "batch", None, None, None)


class Level(nnx.Module):
    """Residual blocks of one resolution, then a resampling convolution ("down", "up") or none ("")."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        depth: int,
        resample: str,
        *,
        attention: bool = False,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        common = {"rngs": rngs, "dtype": dtype}
        channels = [inputs] + [outputs] * depth
        self.blocks = nnx.Dict({f"{i}": ResBlock(channels[i], channels[i + 1], **common) for i in range(depth)})
        if attention:
            self.attentions = nnx.Dict({f"{i}": SpatialAttention(outputs, **common) for i in range(depth)})
        if resample:
            self.conv = Conv(outputs, outputs, 3, stride=2 if resample == "down" else 1, **common)
        self.depth, self.resample, self.attention = depth, resample, attention

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):
            x = self.blocks[f"{i}"](x)
            if self.attention:
                x = self.attentions[f"{i}"](x)
        if self.resample == "up":
            x = repeat(x, "b h w c -> b (h p) (w q) c", p=2, q=2)
        return self.conv(x) if self.resample else x


class Middle(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.block1 = ResBlock(channels, channels, rngs=rngs, dtype=dtype)
        self.attention = SpatialAttention(channels, rngs=rngs, dtype=dtype)
        self.block2 = ResBlock(channels, channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block2(self.attention(self.block1(x)))


class Encoder(nnx.Module):
    """Images (B, H, W, 3) -> moments (B, h, w, 2C)."""

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        c, common = config, {"rngs": rngs, "dtype": dtype}
        channels, self.last = c.block_out_channels, len(c.block_out_channels) - 1
        self.conv_in = Conv(3, channels[0], 3, **common)
        self.levels = nnx.Dict()
        for i, (before, after) in enumerate(zip((channels[0], *channels), channels, strict=False)):
            attention, resample = c.last_level_attention and i == self.last, "down" if i < self.last else ""
            self.levels[f"{i}"] = Level(before, after, c.layers_per_block, resample, attention=attention, **common)
        self.middle = Middle(channels[-1], **common)
        self.norm = GroupNorm(channels[-1])
        self.conv_out = Conv(channels[-1], 2 * c.latent_channels, 3, axes=("embed", None), **common)
        self.moments = Conv(2 * c.latent_channels, 2 * c.latent_channels, 1, axes=(None, None), **common)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.conv_in(images)
        for i in range(self.last + 1):
            x = self.levels[f"{i}"](x)
        return self.moments(self.conv_out(jax.nn.silu(self.norm(self.middle(x)))))


class Decoder(nnx.Module):
    """Latents (B, h, w, C) -> images (B, H, W, 3)."""

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        c, common = config, {"rngs": rngs, "dtype": dtype}
        channels, self.last = c.block_out_channels[::-1], len(c.block_out_channels) - 1
        self.latents = Conv(c.latent_channels, c.latent_channels, 1, axes=(None, None), **common)
        self.conv_in = Conv(c.latent_channels, channels[0], 3, **common)
        self.middle = Middle(channels[0], **common)
        self.levels = nnx.Dict()
        for i, (before, after) in enumerate(zip((channels[0], *channels), channels, strict=False)):
            resample = "up" if i < self.last else ""
            self.levels[f"{i}"] = Level(before, after, c.layers_per_block + 1, resample, **common)
        self.norm = GroupNorm(channels[-1])
        self.conv_out = Conv(channels[-1], 3, 3, axes=("embed", None), **common)

    def __call__(self, latents: jax.Array) -> jax.Array:
        x = self.middle(self.conv_in(self.latents(latents)))
        for i in range(self.last + 1):
            x = self.levels[f"{i}"](x)
        return self.conv_out(jax.nn.silu(self.norm(x)))


class AutoencoderKL(nnx.Module):
    """The autoencoder of latent diffusion models; computes in `dtype`, takes and returns float32."""

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config, rngs=rngs, dtype=dtype)
        self.stride = config.stride

    def encode(self, images: jax.Array) -> jax.Array:
        """Images (B, H, W, 3) in [-1, 1] -> moments (B, h, w, 2C): means, then logarithms of variances."""
        return self.encoder(images).astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents (B, h, w, C) -> images (B, H, W, 3), near [-1, 1]."""
        return self.decoder(latents).astype(jnp.float32)

    def decode_tiled(self, latents: jax.Array, tile: int, overlap: int) -> jax.Array:
        """`decode` in tiles of tile x tile latents, one after the other, with the memory of one tile for any image.

        Neighbouring tiles share at least `overlap` latents, over which one fades into the other. The result differs
        from `decode`: group norms and attention see one tile instead of the whole image. With random weights and tiles
        of half an image's width, the difference was a tenth of the result's size on white-noise latents, and half of it
        on smooth ones, whose tiles differ most. So prefer `decode`, one image at a time if need be, while it fits. An
        image no larger than a tile goes through `decode`.
        """
        batch, *size = latents.shape[:3]
        if max(size) <= tile:
            return self.decode(latents)
        tiles = [_tiles(length, tile, overlap) for length in size]
        corners = np.stack(np.meshgrid(*(starts for starts, _ in tiles), indexing="ij"), axis=-1).reshape(-1, 2)
        extents = [extent for _, extent in tiles]
        fades = [_fade(extent * self.stride, overlap * self.stride) for extent in extents]
        weight = jnp.asarray(np.multiply.outer(*fades)[..., None], jnp.float32)

        def add(total, corner):
            images, weights = total
            part = jax.lax.dynamic_slice(latents, (0, *corner, 0), (batch, *extents, latents.shape[-1]))
            at = (*(corner * self.stride), 0)
            return (_added(images, weight * self.decode(part), (0, *at)), _added(weights, weight, at)), None

        height, width = (length * self.stride for length in size)
        start = (jnp.zeros((batch, height, width, 3)), jnp.zeros((height, width, 1)))
        images, weights = jax.lax.scan(add, start, jnp.asarray(corners))[0]
        return images / weights


def _tiles(length: int, tile: int, overlap: int) -> tuple[np.ndarray, int]:
    """(first latents of the tiles that cover an axis, their length); evenly spaced, sharing at least `overlap`."""
    if length <= tile:
        return np.zeros(1, np.int32), length
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap={overlap} is not in [0, tile={tile})")
    count = -(-(length - overlap) // (tile - overlap))
    return np.linspace(0, length - tile, count).astype(np.int32), tile


def _fade(length: int, overlap: int) -> np.ndarray:
    """Weights (length,) of a tile's pixels, falling linearly towards both ends."""
    distance = np.arange(length) + 0.5
    return np.minimum(1.0, np.minimum(distance, distance[::-1]) / max(overlap, 1))


def _added(total: jax.Array, part: jax.Array, at: tuple) -> jax.Array:
    there = jax.lax.dynamic_slice(total, at, part.shape)
    return jax.lax.dynamic_update_slice(total, there + part, at)


def draw_latents(moments: jax.Array, noise: jax.Array) -> jax.Array:
    """Latents from moments (.., 2C) and standard normal noise (.., C), in float32."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean + jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR_RANGE)) * noise.astype(jnp.float32)


def scale(config: VaeConfig | AutoencoderConfig, latents: jax.Array) -> jax.Array:
    """Latents (..., C) of the autoencoder -> shifted and scaled, as the model sees them."""
    return (latents - config.shift_factor) * config.scaling_factor


def unscale(config: VaeConfig, latents: jax.Array) -> jax.Array:
    """The inverse of `scale`."""
    return latents / config.scaling_factor + config.shift_factor


def from_uint8(images: jax.Array) -> jax.Array:
    """Images (...) of values 0..255 -> [-1, 1], float32."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
    """Images in [-1, 1] (other values are clamped) -> 0..255, truncated."""
    return jnp.clip(images * 127.5 + 127.5, 0, 255).astype(jnp.uint8)
