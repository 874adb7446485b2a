"""Published weights through the command: fixtures in give their recorded outputs, and come out as the same bytes."""

import dataclasses
import json
from pathlib import Path

import golden_models
import jax
import numpy as np
import pytest
from golden_case import GOLDEN, Case
from safetensors.numpy import load_file, save_file

from lina_jax import convert, mesh, published_names, state, torch_layout
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import Config, default, freeze

WHOLE = sorted(path.stem for path in GOLDEN.glob("*.json") if path.stem.startswith(("transformer_", "train_steps")))
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def given_config(case: Case) -> Config:
    """What a user would write for a fixture, whose heads and kind of attention files need not tell."""
    model = dataclasses.asdict(golden_models.config_of(case))
    c = case.config
    config = default()
    config.update(model=model, autoencoder={"stride": c["image_stride"]})
    return freeze(config)


def write_pipeline(case: Case, directory: Path, **changes) -> Path:
    """A fixture as a published pipeline directory; `changes` to the fields of its transformer/config.json."""
    c, model = case.config, golden_models.config_of(case)
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
    } | changes  # fmt: skip
    (directory / "transformer" / "config.json").write_text(json.dumps(content))
    index = {"transformer": [published_names.module_of(model), "NOVATransformer3DModel"]}
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


def imported(tmp_path: Path):
    """How the fixtures' runners get a model: through a pipeline directory, the command and its checkpoint."""

    def load(case: Case):
        source = write_pipeline(case, tmp_path / "pipeline")
        config = convert.from_torch(source, tmp_path / "run", given_config(case))
        plan = state.blueprint(config, mesh.holding(config.model))
        params, frozen, _ = Checkpoints(tmp_path / "run", config.checkpoint).restore_weights(plan)
        params, frozen = jax.device_put((params, frozen), jax.devices()[0])
        return config.model, list(torch_layout.entries(config.model)), plan.graphdef, params, frozen

    return load


@pytest.mark.parametrize(
    "name, runner",
    [
        ("transformer_t2i_rope", golden_models.transformer),
        ("transformer_variant_linear9", golden_models.transformer),
        ("transformer_variant_softmax", golden_models.transformer),
        ("sample_c2i_cfg", golden_models.sample),
        ("train_steps_c2i", golden_models.train_steps),
    ],
)
def test_an_imported_fixture_gives_its_recorded_outputs(name, runner, tmp_path):
    case = Case(name)
    runner(case, imported(tmp_path))
    assert not case.left


@pytest.mark.parametrize("name", WHOLE)
def test_exported_again_every_tensor_has_the_same_bytes(name, tmp_path):
    case = Case(name)
    convert.from_torch(write_pipeline(case, tmp_path / "in"), tmp_path / "run", given_config(case))
    convert.to_torch(tmp_path / "run", tmp_path / "out")
    out = load_file(tmp_path / "out" / WEIGHTS)
    assert out.keys() == case.weights.keys()
    assert all(out[key].tobytes() == case.weights[key].tobytes() for key in out)
    assert all(out[key].dtype == np.float32 for key in out)
