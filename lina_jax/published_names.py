"""The published names of models, and which models the published code can compute."""

from collections.abc import Iterator
from typing import Any

from lina_jax.config import Config, ModelConfig

HEADS = {768: 12, 1024: 16, 1536: 16}  # by published width
MODULE = "diffnext.models.transformers.transformer_nova"
PLAIN = {"attention": "linear", "normalization": "division", "depthwise_conv": False, "kv_gate": "none"}
CONV = {**PLAIN, "depthwise_conv": True}
# Suffix of the module's name -> fields of the model; `_high_res` may follow it (see `module_of`).
VARIANTS = {
    "": {"attention": "softmax", "depthwise_conv": False, "kv_gate": "none"},
    "linear6": PLAIN,
    "linear9": {**PLAIN, "normalization": "subtraction"},
    "linear_decouple1": CONV,
    "linear_decouple10": {**CONV, "normalization": "subtraction"},
    "linear_decouple1_kvscale1": {**CONV, "kv_gate": "head"},
    "linear_decouple1_kvscale2": {**CONV, "kv_gate": "shared"},
    "linear_decouple1_kvscale3": {**CONV, "kv_gate": "key"},
    "linear_decouple1_kvscale4": {**CONV, "kv_gate": "value"},
    "linear_decouple1_kvscale5": {**CONV, "kv_gate": "decoupled"},
    "linear_decouple1_kvscale6": {**CONV, "kv_gate": "dynamic"},
}


def variant_of(module: str) -> dict[str, Any]:
    """Fields of ModelConfig that a published module's name implies; empty if the name is unknown."""
    suffix = module.rpartition(".")[2].removesuffix("_high_res")
    if suffix == "transformer_nova":
        return dict(VARIANTS[""])
    suffix = suffix.removeprefix("transformer_nova_")
    for name, variant in VARIANTS.items():
        if name and suffix in (name, name.removeprefix("linear_"), name.rpartition("_")[2]):
            return dict(variant)
    return {}


def unpublishable(config: ModelConfig) -> Iterator[str]:
    """A line for each feature of a model that the published code does not have."""
    if module_of(config) is None:
        yield (
            f"model.attention={config.attention}, normalization={config.normalization}, "
            f"depthwise_conv={config.depthwise_conv}, kv_gate={config.kv_gate}: no published module has all of these"
        )
    if config.condition == "text" and config.text_encoder != "features":
        yield f"model.text_encoder={config.text_encoder}: published models read features"
    if config.condition == "text" and config.mask_text_padding:
        yield "model.mask_text_padding=True: published models attend to padding"
    if HEADS.get(config.width, config.heads) != config.heads:
        yield f"model.heads={config.heads}: published models of width {config.width} have {HEADS[config.width]}"
    if stride_of(config.patch_size) is None:
        yield f"model.patch_size={config.patch_size}: no published image_stride gives it (1, 2, 3, 4, 6, 8, 16 exist)"


def module_of(config: ModelConfig) -> str | None:
    """The published module that computes a model; None if there is none."""
    matching = (s for s, variant in VARIANTS.items() if all(getattr(config, n) == v for n, v in variant.items()))
    suffix = next(matching, None)
    if suffix is None:
        return None
    # The module of head-wise gates without `_high_res` is written for 256 px.
    large = config.kv_gate == "head" and config.image_grid != (16, 16)
    return MODULE + (f"_{suffix}" if suffix else "") + ("_high_res" if large else "")


def stride_of(patch: int, wanted: int = 16) -> int | None:
    """The image_stride that gives published code this patch size: `wanted` if it does, else the smallest, if any."""
    strides = [stride for stride in (wanted, *range(1, 17)) if 15 // stride + 1 == patch]
    return strides[0] if strides else None


def transformer_config(config: Config) -> dict[str, Any]:
    """The published config.json of a model."""
    model = config.model
    stride = stride_of(model.patch_size, config.autoencoder.stride)
    text = model.condition == "text"
    return {
        "_class_name": "NOVATransformer3DModel",
        "arch": [
            f"vit_d{model.condition_depth}w{model.width}",
            f"vit_d{model.image_depth}w{model.width}",
            f"mlp_d{model.head_depth}w{model.head_width}",
        ],
        "image_dim": model.latent_channels,
        "image_size": [side * model.patch_size * stride for side in model.image_grid],
        "image_stride": stride,
        "image_base_size": list(model.image_grid),
        "video_base_size": [1, *model.condition_grid],
        "video_mixer_rank": None,
        "rotary_pos_embed": model.rotary,
        "text_token_dim": model.text_dim if text else None,
        "text_token_len": model.text_length if text else None,
    }
