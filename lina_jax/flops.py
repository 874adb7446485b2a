"""Floating-point operations of the model, counted from its sizes; a multiply-add is two.

Embeddings, norms and gates are left out.
"""

import math

from lina_jax.config import LossConfig, ModelConfig


def attention_flops(model: ModelConfig, tokens: int, *, softmax: bool, conv: bool) -> int:
    """One attention layer over `tokens` tokens of one image."""
    width = model.width
    projections = 2 * tokens * width * 4 * width
    if softmax:
        core = 2 * 2 * tokens * tokens * width
    else:  # the d x d state of each head, built and read
        core = 2 * 2 * tokens * width * (width // model.heads)
    convolution = 2 * model.image_tokens * width * model.conv_kernel**2 if conv else 0
    return projections + core + convolution


def stack_flops(model: ModelConfig, first: int, depth: int, tokens: int, conv: bool = False) -> int:
    """Blocks first .. first + depth - 1 over `tokens` tokens of one image."""
    total = depth * 2 * tokens * 2 * model.mlp_ratio * model.width**2
    for i in range(first, first + depth):
        softmax = model.attention == "softmax" or (
            model.attention == "hybrid" and i % model.softmax_period == model.softmax_period - 1
        )
        total += attention_flops(model, tokens, softmax=softmax, conv=conv and not softmax)
    return total


def head_flops(model: ModelConfig) -> int:
    """The diffusion head for one token and one noise level, the projection of its condition left out."""
    r = model.head_width
    return 2 * (2 * model.token_dim * r + model.head_depth * 5 * r * r + 2 * r * r)


def forward_flops(model: ModelConfig, loss: LossConfig) -> float:
    """One image's loss. Only tokens that exist count: the visible ones of the encoder half at their mean number."""
    text = model.text_tokens if model.condition == "text" else 1
    c, n, half = model.condition_tokens, model.image_tokens, model.image_depth // 2
    visible = n * (1 - _mean_mask_ratio(loss))
    total = stack_flops(model, 0, model.condition_depth, text + c)
    total += stack_flops(model, 0, half, c + round(visible))
    total += stack_flops(model, half, half, c + n, conv=model.depthwise_conv)
    total += 2 * n * model.token_dim * model.width
    total += 2 * n * model.head_width * (model.width + model.head_width)
    total += loss.repeat * n * head_flops(model)
    if model.condition == "text":
        total += 2 * text * model.text_dim * model.width
    return total


def training_flops(model: ModelConfig, loss: LossConfig) -> float:
    """One image's forward and backward pass; recomputation by remat is not counted, as in MFU's definition."""
    return 3 * forward_flops(model, loss)


def _mean_mask_ratio(loss: LossConfig) -> float:
    """Mean of the truncated normal, by quadrature."""
    steps = 1000
    ratios = [loss.mask_ratio_min + (1 - loss.mask_ratio_min) * (i + 0.5) / steps for i in range(steps)]
    weights = [math.exp(-0.5 * ((r - loss.mask_ratio_mean) / loss.mask_ratio_std) ** 2) for r in ratios]
    return sum(r * w for r, w in zip(ratios, weights, strict=True)) / sum(weights)
