"""Fixtures of whole models as published pipeline directories, with the configs that users would write for them."""

import dataclasses
import json
from pathlib import Path

from golden_case import Case
from golden_models import config_of
from safetensors.numpy import load_file, save_file

from lina_jax import published_names
from lina_jax.config import Config, default, freeze

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def given_config(case: Case) -> Config:
    """The config of a fixture; published files need not state its heads and kind of attention."""
    config = default()
    config.update(model=dataclasses.asdict(config_of(case)), autoencoder={"stride": case.config["image_stride"]})
    return freeze(config)


def write_pipeline(case: Case, directory: Path) -> Path:
    """A fixture as a published pipeline directory."""
    c = case.config
    (directory / "transformer").mkdir(parents=True)
    save_file(case.weights, directory / WEIGHTS)
    content = {
        "_class_name": "NOVATransformer3DModel",
        "arch": [f"vit_d{c['video_depth']}w{c['dim']}", f"vit_d{c['image_depth']}w{c['dim']}",
                 f"mlp_d{c['decoder_depth']}w{c['decoder_dim']}"],
        "image_dim": c["image_dim"], "image_size": c["image_size"], "image_stride": c["image_stride"],
        "image_base_size": c["image_base_size"], "video_base_size": c["video_base_size"], "video_mixer_rank": None,
        "rotary_pos_embed": c["rotary_pos_embed"], "text_token_dim": c.get("text_token_dim"),
        "text_token_len": c.get("text_token_len"),
    }  # fmt: skip
    (directory / "transformer" / "config.json").write_text(json.dumps(content))
    index = {"transformer": [published_names.module_of(config_of(case)), "NOVATransformer3DModel"]}
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


def change_weights(change):
    """A function that applies change(tensors) to the weights of a pipeline directory, in place."""

    def damage(source: Path) -> None:
        tensors = load_file(source / WEIGHTS)
        change(tensors)
        save_file(tensors, source / WEIGHTS)

    return damage
