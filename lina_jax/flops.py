"""Floating-point operations of the model, counted from its sizes; a multiply-add is two.

The count covers the matmuls of the mathematics and the depthwise convolutions, whatever else the program does (padding,
recomputation). The loss counted is the published one: the head predicts all tokens, including the visible ones, which
have no weight and which a single CPU leaves out (13 % of the head; without them, a step of a large preset would count
2.6 to 3.6 % less). Norms, gates, the autoencoder and embeddings, other than the projections of image tokens and text
features, are left out. The MFU of training logs, plans and benchmarks uses these numbers.
"""

import math

from lina_jax.config import LossConfig, ModelConfig, is_softmax_block
from lina_jax.decoding_schedule import Schedule


def attention_flops(model: ModelConfig, tokens: int, *, softmax: bool, conv: bool, read: int | None = None) -> int:
    """One attention layer over `tokens` tokens of one image, with outputs for `read` of them (None: all)."""
    width, made = model.width, tokens if read is None else read
    projections = 2 * (tokens + made) * width * 2 * width  # keys and values; queries and outputs
    if softmax:
        core = 2 * 2 * made * tokens * width
    else:  # the d x d state of each head, built and read
        core = 2 * (tokens + made) * width * (width // model.heads)
    convolved = model.image_tokens if read is None else read
    return projections + core + (2 * convolved * width * model.conv_kernel**2 if conv else 0)


def stack_flops(
    model: ModelConfig, first: int, depth: int, tokens: int, *, conv: bool = False, read: int | None = None
) -> int:
    """Blocks first .. first + depth - 1 over `tokens` tokens of an image; the last outputs `read` (None: all)."""
    total = 0
    for i in range(first, first + depth):
        softmax = model.attention == "softmax" or is_softmax_block(i, model.hybrid_period)
        wanted = read if i == first + depth - 1 else None
        total += attention_flops(model, tokens, softmax=softmax, conv=conv and not softmax, read=wanted)
        total += 2 * (tokens if wanted is None else wanted) * 2 * model.mlp_ratio * model.width**2
    return total


def head_flops(model: ModelConfig) -> int:
    """The diffusion head for one token and one noise level, without the projection of its condition."""
    r = model.head_width
    return 2 * (2 * model.token_dim * r + model.head_depth * 5 * r * r + 2 * r * r)


def condition_flops(model: ModelConfig) -> int:
    """Encoding the condition of one image."""
    text = model.prompt_tokens
    total = stack_flops(model, 0, model.condition_depth, text + model.condition_tokens)
    if model.condition == "text":
        total += 2 * text * model.text_dim * model.width
    return total


def image_flops(model: ModelConfig, visible: int, read: int | None = None) -> int:
    """z for `read` tokens (None: all) of an image with `visible` visible ones: projection, encoder and decoder half."""
    c, n, (encoders, decoders) = model.condition_tokens, model.image_tokens, model.halves
    total = stack_flops(model, 0, encoders, c + visible)
    total += stack_flops(model, encoders, decoders, c + n, conv=model.depthwise_conv, read=read)
    return total + 2 * n * model.token_dim * model.width


def projection_flops(model: ModelConfig) -> int:
    """The head's projection of the condition of one token."""
    return 2 * model.head_width * (model.width + model.head_width)


def forward_flops(model: ModelConfig, loss: LossConfig) -> float:
    """One image's loss, without padding: the encoder half counts the mean number of visible tokens."""
    n = model.image_tokens
    visible = round(n * (1 - _mean_mask_ratio(loss)))
    head = n * (projection_flops(model) + loss.repeat * head_flops(model))
    return condition_flops(model) + image_flops(model, visible) + head


def training_flops(model: ModelConfig, loss: LossConfig) -> float:
    """One image's forward and backward pass; as in the definition of MFU, recomputation by remat does not count."""
    return 3 * forward_flops(model, loss)


def sampling_flops(model: ModelConfig, schedule: Schedule) -> float:
    """One image, without the autoencoder and without the unconditional condition, which all images of a call share."""
    branches = 2 if schedule.guided else 1
    total = condition_flops(model)
    steps = zip(schedule.visible, schedule.predicted, schedule.euler_steps, strict=True)
    for visible, predicted, euler in steps:
        head = int(predicted) * (projection_flops(model) + int(euler) * head_flops(model))
        total += branches * (image_flops(model, int(visible), int(predicted)) + head)
    return total


def _mean_mask_ratio(loss: LossConfig) -> float:
    """Mean of the truncated normal, by quadrature."""
    steps = 1000
    ratios = [loss.mask_ratio_min + (1 - loss.mask_ratio_min) * (i + 0.5) / steps for i in range(steps)]
    exponents = [-0.5 * ((r - loss.mask_ratio_mean) / loss.mask_ratio_std) ** 2 for r in ratios]
    largest = max(exponents)  # subtracted, as all weights of a narrow normal would underflow to zero
    weights = [math.exp(exponent - largest) for exponent in exponents]
    return sum(r * w for r, w in zip(ratios, weights, strict=True)) / sum(weights)
