"""Floating-point operations of the model, counted from its sizes; a multiply-add is two.

What is counted are the matrix products of the mathematics, and the depthwise convolutions: no more than must be done,
whatever the program does (padding, recomputation). Embeddings, norms, gates and the autoencoder are left out. The MFU
of training logs, of plans and of benchmarks rests on these numbers.
"""

import math
from typing import TYPE_CHECKING

from lina_jax.config import LossConfig, ModelConfig

if TYPE_CHECKING:
    from lina_jax.generate import Schedule


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


def condition_flops(model: ModelConfig) -> int:
    """The condition of one image, encoded."""
    text = model.text_tokens if model.condition == "text" else 1
    total = stack_flops(model, 0, model.condition_depth, text + model.condition_tokens)
    if model.condition == "text":
        total += 2 * text * model.text_dim * model.width
    return total


def image_flops(model: ModelConfig, visible: int) -> int:
    """z of one image, `visible` tokens of which exist: embedding, encoder half, decoder half."""
    c, n, half = model.condition_tokens, model.image_tokens, model.image_depth // 2
    total = stack_flops(model, 0, half, c + visible)
    total += stack_flops(model, half, half, c + n, conv=model.depthwise_conv)
    return total + 2 * n * model.token_dim * model.width


def projection_flops(model: ModelConfig) -> int:
    """The head's projection of the condition of one token."""
    return 2 * model.head_width * (model.width + model.head_width)


def forward_flops(model: ModelConfig, loss: LossConfig) -> float:
    """One image's loss. Only tokens that exist count: the visible ones of the encoder half at their mean number."""
    n = model.image_tokens
    visible = round(n * (1 - _mean_mask_ratio(loss)))
    head = n * (projection_flops(model) + loss.repeat * head_flops(model))
    return condition_flops(model) + image_flops(model, visible) + head


def training_flops(model: ModelConfig, loss: LossConfig) -> float:
    """One image's forward and backward pass; recomputation by remat is not counted, as in MFU's definition."""
    return 3 * forward_flops(model, loss)


def sampling_flops(model: ModelConfig, schedule: "Schedule") -> float:
    """One image, without the autoencoder; the unconditional condition, one for all images of a call, is left out."""
    branches = 2 if schedule.guided else 1
    total = condition_flops(model)
    steps = zip(schedule.visible, schedule.predicted, schedule.euler_steps, strict=True)
    for visible, predicted, euler in steps:
        head = int(predicted) * (projection_flops(model) + int(euler) * head_flops(model))
        total += branches * (image_flops(model, int(visible)) + head)
    return total


def _mean_mask_ratio(loss: LossConfig) -> float:
    """Mean of the truncated normal, by quadrature."""
    steps = 1000
    ratios = [loss.mask_ratio_min + (1 - loss.mask_ratio_min) * (i + 0.5) / steps for i in range(steps)]
    weights = [math.exp(-0.5 * ((r - loss.mask_ratio_mean) / loss.mask_ratio_std) ** 2) for r in ratios]
    return sum(r * w for r, w in zip(ratios, weights, strict=True)) / sum(weights)
