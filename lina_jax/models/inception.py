"""Inception v3 as FID uses it: the network of TensorFlow's 2015 graph (`classify_image_graph_def.pb`).

It differs from the published architecture in its resize (without half-pixel centers), in average pools that exclude the
padding, and in the max pool of its last block. Layers are named as in the PyTorch ports (pytorch-fid, torch-fidelity),
whose weight files `inception_weights.load` reads. Weights are never trained.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx

from lina_jax.models.layers import Frozen

SIDE = 299  # pixels, height and width of the network's input
SPATIAL_CHANNELS = 7  # of mixed_6/conv, for sFID
CLASSES = 1008
NORM_EPS = 1e-3
# Full float32 matmuls: TPUs round factors to bfloat16 by default, which changes the distance between two covariances.
_PRECISION = jax.lax.Precision.HIGHEST


class Features(NamedTuple):
    """Features of images that the metrics use, in float32."""

    pool: jax.Array  # (B, 2048), TensorFlow's pool_3: FID, precision, recall
    spatial: jax.Array  # (B, 17 * 17 * 7), the first channels of mixed_6/conv by row, column, channel: sFID
    logits: jax.Array  # (B, 1008), without the bias, as ADM's evaluation takes them: Inception score


class Layer(NamedTuple):
    """A convolution and its norm."""

    inputs: int
    outputs: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


def layers(thin: int = 1) -> dict[str, Layer]:
    """{'Mixed_5b.branch1x1': Layer(192, 64), ...}; `thin` divides all widths except the image's three channels."""
    table = {
        "Conv2d_1a_3x3": Layer(3 * thin, 32, (3, 3), 2, "VALID"),
        "Conv2d_2a_3x3": Layer(32, 32, (3, 3), 1, "VALID"),
        "Conv2d_2b_3x3": Layer(32, 64, (3, 3)),
        "Conv2d_3b_1x1": Layer(64, 80),
        "Conv2d_4a_3x3": Layer(80, 192, (3, 3), 1, "VALID"),
    }
    blocks = {
        "Mixed_5b": _block_a(192, 32),
        "Mixed_5c": _block_a(256, 64),
        "Mixed_5d": _block_a(288, 64),
        "Mixed_6a": _block_b(),
        "Mixed_6b": _block_c(128),
        "Mixed_6c": _block_c(160),
        "Mixed_6d": _block_c(160),
        "Mixed_6e": _block_c(192),
        "Mixed_7a": _block_d(),
        "Mixed_7b": _block_e(1280),
        "Mixed_7c": _block_e(2048),
    }
    table |= {f"{block}.{name}": layer for block, parts in blocks.items() for name, layer in parts.items()}
    return {
        name: layer._replace(inputs=layer.inputs // thin, outputs=layer.outputs // thin)
        for name, layer in table.items()
    }


def _block_a(inputs: int, pooled: int) -> dict[str, Layer]:
    return {
        "branch1x1": Layer(inputs, 64),
        "branch5x5_1": Layer(inputs, 48),
        "branch5x5_2": Layer(48, 64, (5, 5)),
        "branch3x3dbl_1": Layer(inputs, 64),
        "branch3x3dbl_2": Layer(64, 96, (3, 3)),
        "branch3x3dbl_3": Layer(96, 96, (3, 3)),
        "branch_pool": Layer(inputs, pooled),
    }


def _block_b() -> dict[str, Layer]:
    return {
        "branch3x3": Layer(288, 384, (3, 3), 2, "VALID"),
        "branch3x3dbl_1": Layer(288, 64),
        "branch3x3dbl_2": Layer(64, 96, (3, 3)),
        "branch3x3dbl_3": Layer(96, 96, (3, 3), 2, "VALID"),
    }


def _block_c(inner: int) -> dict[str, Layer]:
    return {
        "branch1x1": Layer(768, 192),
        "branch7x7_1": Layer(768, inner),
        "branch7x7_2": Layer(inner, inner, (1, 7)),
        "branch7x7_3": Layer(inner, 192, (7, 1)),
        "branch7x7dbl_1": Layer(768, inner),
        "branch7x7dbl_2": Layer(inner, inner, (7, 1)),
        "branch7x7dbl_3": Layer(inner, inner, (1, 7)),
        "branch7x7dbl_4": Layer(inner, inner, (7, 1)),
        "branch7x7dbl_5": Layer(inner, 192, (1, 7)),
        "branch_pool": Layer(768, 192),
    }


def _block_d() -> dict[str, Layer]:
    return {
        "branch3x3_1": Layer(768, 192),
        "branch3x3_2": Layer(192, 320, (3, 3), 2, "VALID"),
        "branch7x7x3_1": Layer(768, 192),
        "branch7x7x3_2": Layer(192, 192, (1, 7)),
        "branch7x7x3_3": Layer(192, 192, (7, 1)),
        "branch7x7x3_4": Layer(192, 192, (3, 3), 2, "VALID"),
    }


def _block_e(inputs: int) -> dict[str, Layer]:
    return {
        "branch1x1": Layer(inputs, 320),
        "branch3x3_1": Layer(inputs, 384),
        "branch3x3_2a": Layer(384, 384, (1, 3)),
        "branch3x3_2b": Layer(384, 384, (3, 1)),
        "branch3x3dbl_1": Layer(inputs, 448),
        "branch3x3dbl_2": Layer(448, 384, (3, 3)),
        "branch3x3dbl_3a": Layer(384, 384, (1, 3)),
        "branch3x3dbl_3b": Layer(384, 384, (3, 1)),
        "branch_pool": Layer(inputs, 192),
    }


class Conv(nnx.Module):
    """relu(scale * conv(x) + shift). x (B, H, W, inputs) -> (B, H', W', outputs)."""

    def __init__(self, layer: Layer):
        self.kernel = Frozen(jnp.zeros((*layer.size, layer.inputs, layer.outputs)))
        self.scale, self.shift = Frozen(jnp.ones(layer.outputs)), Frozen(jnp.zeros(layer.outputs))
        self.layer = layer

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            (self.layer.stride, self.layer.stride),
            self.layer.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_PRECISION,
        )
        return jax.nn.relu(y * self.scale[...] + self.shift[...])


class Inception(nnx.Module):
    """Images to features. `thin` divides the widths, for tests."""

    def __init__(self, thin: int = 1):
        self.convs = nnx.Dict({name: Conv(layer) for name, layer in layers(thin).items()})
        self.classes = Frozen(jnp.zeros((2048 // thin, CLASSES)))

    def __call__(self, images: jax.Array) -> Features:
        """images (B, H, W, 3) in 0..255, of any size."""
        x = (resize(images.astype(jnp.float32)) - 128.0) / 128.0
        x = self._run(x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")
        x = self._run(_max_pool(x, 2), "Conv2d_3b_1x1", "Conv2d_4a_3x3")
        x = _max_pool(x, 2)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = _join(
                self._branch(block, x, "1x1"),
                self._branch(block, x, "5x5_1", "5x5_2"),
                self._branch(block, x, "3x3dbl_1", "3x3dbl_2", "3x3dbl_3"),
                self._branch(block, _average_pool(x), "_pool"),
            )
        x = _join(
            self._branch("Mixed_6a", x, "3x3"),
            self._branch("Mixed_6a", x, "3x3dbl_1", "3x3dbl_2", "3x3dbl_3"),
            _max_pool(x, 2),
        )
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            first = self._branch(block, x, "1x1")
            if block == "Mixed_6d":  # TensorFlow's mixed_6
                spatial = rearrange(first[..., :SPATIAL_CHANNELS], "b h w c -> b (h w c)")
            x = _join(
                first,
                self._branch(block, x, "7x7_1", "7x7_2", "7x7_3"),
                self._branch(block, x, "7x7dbl_1", "7x7dbl_2", "7x7dbl_3", "7x7dbl_4", "7x7dbl_5"),
                self._branch(block, _average_pool(x), "_pool"),
            )
        x = _join(
            self._branch("Mixed_7a", x, "3x3_1", "3x3_2"),
            self._branch("Mixed_7a", x, "7x7x3_1", "7x7x3_2", "7x7x3_3", "7x7x3_4"),
            _max_pool(x, 2),
        )
        for block, pool in (("Mixed_7b", _average_pool), ("Mixed_7c", lambda x: _max_pool(x, 1))):
            wide = self._branch(block, x, "3x3_1")
            deep = self._branch(block, x, "3x3dbl_1", "3x3dbl_2")
            x = _join(
                self._branch(block, x, "1x1"),
                self._branch(block, wide, "3x3_2a"),
                self._branch(block, wide, "3x3_2b"),
                self._branch(block, deep, "3x3dbl_3a"),
                self._branch(block, deep, "3x3dbl_3b"),
                self._branch(block, pool(x), "_pool"),
            )
        pooled = reduce(x, "b h w c -> b c", "mean")
        return Features(pooled, spatial, jnp.dot(pooled, self.classes[...], precision=_PRECISION))

    def _run(self, x: jax.Array, *names: str) -> jax.Array:
        for name in names:
            x = self.convs[name](x)
        return x

    def _branch(self, block: str, x: jax.Array, *names: str) -> jax.Array:
        return self._run(x, *(f"{block}.branch{name}" for name in names))


def resize(images: jax.Array) -> jax.Array:
    """(B, H, W, 3) -> (B, 299, 299, 3), bilinear as in TensorFlow 1: output i samples i * H / 299, no antialiasing."""

    def along(x, axis):
        size = x.shape[axis]
        places = np.arange(SIDE, dtype=np.float32) * np.float32(size / SIDE)
        low = np.minimum(places.astype(np.int32), size - 1)
        high = np.minimum(low + 1, size - 1)
        part = (places - low).reshape([-1 if i == axis else 1 for i in range(4)])
        start = jnp.take(x, low, axis=axis)
        return start + (jnp.take(x, high, axis=axis) - start) * part

    return along(along(images, 2), 1)


def _join(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


def _max_pool(x: jax.Array, stride: int) -> jax.Array:
    """3 x 3; stride 1 keeps the size."""
    padding = "SAME" if stride == 1 else "VALID"
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _average_pool(x: jax.Array) -> jax.Array:
    """3 x 3, stride 1; the mean leaves the padding out."""

    def total(y):
        return jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1)))
