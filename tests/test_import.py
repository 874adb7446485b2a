"""Importing published weights: inferred configs, fields that must be given, bad input, shards, PyTorch's own files."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from encoder_checkpoints import write_autoencoder, write_phi, write_tokenizer
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_case import Case
from golden_models import config_of
from PIL import Image
from pipelines import WEIGHTS, change_weights, given_config, write_pipeline
from safetensors.numpy import load_file, save_file

from lina_jax import convert, mesh, published, published_names, state, torch_layout
from lina_jax.config import Config, default, freeze
from lina_jax.errors import UserError
from lina_jax.pipeline import Pipeline
from lina_jax.workdir import check_config, load_config


def test_files_that_tell_all_need_no_config(tmp_path):
    """Heads come from the gates, the grid from config.json or, in a bare file, from the number of gates."""
    case = Case("transformer_c2i")
    source = write_pipeline(case, tmp_path / "in")
    model = dataclasses.replace(config_of(case), dtype="bfloat16")
    assert convert.from_torch(source, tmp_path / "whole").model == model
    assert convert.from_torch(source / "transformer", tmp_path / "part").model == model
    shutil.copy(source / WEIGHTS, tmp_path / "bare.safetensors")
    assert convert.from_torch(tmp_path / "bare.safetensors", tmp_path / "bare").model == model
    assert load_config(tmp_path / "bare").model == model


@dataclasses.dataclass
class Named:
    """Names and shapes of a model that is too large to build."""

    shapes: dict
    metadata: dict = dataclasses.field(default_factory=dict)


def abstract_pipeline(config: Config, **index) -> Pipeline:
    plan = state.make_blueprint(config, mesh.mesh_for_weights(config.model))
    flat = flatten_dict(plan.shapes.params) | flatten_dict(plan.shapes.frozen)
    shapes = torch_layout.published_shapes(list(torch_layout.entries(config.model)), unflatten_dict(flat))
    content = published_names.transformer_config(config)
    return Pipeline(Path("published"), Named(shapes), content, index, {}, None, None)


NAMED = [(suffix, 768, False) for suffix in published_names.VARIANTS] + [
    (suffix, 1536, True)
    for suffix, variant in published_names.VARIANTS.items()
    if variant.get("normalization") != "subtraction"  # which takes no rotary positions
]


@pytest.mark.parametrize(("suffix", "width", "rotary"), NAMED)
def test_every_published_variant_is_told_by_its_name_and_arch(suffix, width, rotary):
    variant = published_names.VARIANTS[suffix]
    config = default()
    config.model.update(width=width, heads=published_names.HEADS[width], head_width=width, rotary=rotary, **variant)
    config = freeze(config)
    module = published_names.module_of(config.model)
    assert module == published_names.MODULE + (suffix and f"_{suffix}")
    pipeline = abstract_pipeline(config, transformer=[module, "NOVATransformer3DModel"])
    assert published.config_of(pipeline, None) == (config, [])


@pytest.mark.parametrize("preset", ["t2i:256", "t2i:512", "t2i:1024", "imagenet256_c2i"])
def test_the_published_sizes_are_inferred(preset, load_preset):
    """From the names and shapes of presets of up to 1.45 B parameters, without --config."""
    config = load_preset(preset)
    found, assumed = published.config_of(abstract_pipeline(config), None)
    assert found.model == config.model
    assert (found.autoencoder, found.sample) == (config.autoencoder, config.sample)
    assert not assumed


def test_what_keys_cannot_tell_is_asked_for(tmp_path):
    case = Case("transformer_variant_linear6")
    source = write_pipeline(case, tmp_path / "in")
    (source / "model_index.json").unlink()
    (source / "transformer" / "config.json").unlink()
    with pytest.raises(UserError, match="--config is needed") as caught:
        convert.from_torch(source, tmp_path / "run")
    told = [f"model.{name}" for name in ("attention", "heads", "image_grid", "condition_grid")]
    asked = str(caught.value).partition("is needed for: ")[2].split("; ")
    assert [field.split()[0] for field in asked] == told
    assert not (tmp_path / "run").exists()
    for attention in ("softmax", "linear"):
        config = default()
        config.update(model=dataclasses.asdict(given_config(case).model) | {"attention": attention})
        assert convert.from_torch(source, tmp_path / attention, freeze(config)).model.attention == attention


def test_a_config_that_disagrees_is_told_every_field(tmp_path):
    case = Case("transformer_t2i")
    config = default()
    config.update(model=dataclasses.asdict(given_config(case).model))
    config.model.update(width=64, heads=8, kv_gate="shared", image_grid=(8, 8))
    with pytest.raises(UserError) as caught:
        convert.from_torch(write_pipeline(case, tmp_path / "in"), tmp_path / "run", freeze(config))
    fields = {line.split(":")[0] for line in str(caught.value).split("; ")[1:]}
    assert fields == {"model.width", "model.heads", "model.kv_gate", "model.image_grid",
                      "model.image_grid, model.condition_grid"}  # fmt: skip


def truncate(source: Path) -> None:
    file = source / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def halve_one(tensors) -> None:
    tensors["image_encoder.norm.weight"] = tensors["image_encoder.norm.weight"].astype(np.float16)


def spoil_two(tensors) -> None:
    for key in ("image_encoder.norm.bias", "image_decoder.head.bias"):
        tensors[key][0] = np.nan


def lose_reshape_and_add(tensors) -> None:
    del tensors["image_encoder.blocks.1.norm1.weight"]
    tensors["image_encoder.norm.bias"] = np.zeros(7, np.float32)
    tensors["motion_embed.weight"] = np.zeros(3, np.float32)


def change_config(**fields):
    def damage(source: Path) -> None:
        path = source / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def write_scheduler(**fields):
    def write(source: Path) -> None:
        (source / "scheduler").mkdir()
        (source / "scheduler" / "scheduler_config.json").write_text(json.dumps(fields))

    return write


def rename_module(source: Path) -> None:
    index = {"transformer": [f"{published_names.MODULE}_linear7", "NOVATransformer3DModel"]}
    (source / "model_index.json").write_text(json.dumps(index))


def reshape(end: str, shape: tuple[int, ...]):
    """Replace all tensors whose names end in `end` by zeros of another shape."""

    def change(tensors) -> None:
        tensors |= {name: np.zeros(shape, np.float32) for name in tensors if name.endswith(end)}

    return change_weights(change)


@pytest.mark.parametrize(
    "damage, parts",
    [
        (truncate, ["not a complete safetensors file"]),
        (lambda source: (source / WEIGHTS).unlink(), ["transformer: no weights; expected"]),
        (lambda source: write_autoencoder(source / "transformer"), ["not a LINA or NOVA transformer"]),
        (change_weights(halve_one), ["several dtypes (1 in F16, 128 in F32; first in F16: image_encoder.norm"]),
        (change_weights(spoil_two), ["non-finite values in ", "image_encoder.norm.bias", "image_decoder.head.bias"]),
        (change_weights(lose_reshape_and_add), ["unexpected: motion_embed.weight", "image_encoder.norm.bias is (7,)",
                                                "missing: image_encoder.blocks.1.norm1.weight"]),
        (change_config(image_base_size=[12, 12]),
         ["model.image_grid: (12, 12) from config.json, (16, 16) from config.json (image_size)",
          "(12, 12) and (8, 8), gates for 320 tokens"]),
        (change_config(arch=5), ["config.json: arch=[5]: expected three names"]),
        (write_scheduler(shift="three"), ["transformer: loss.shift='three': expected float"]),
        (write_scheduler(_class_name="DDPM"), ["scheduler_config.json: _class_name='DDPM': expected 'FlowMatchEuler"]),
        (write_scheduler(num_train_timesteps=500), ["scheduler_config.json: num_train_timesteps=500: expected 1000"]),
        (rename_module, ["transformer_nova_linear7 is unknown; describe the model with --config"]),
        (reshape(".key_scale", ()), ["attn.key_scale is (), expected 4 axes"]),
        (reshape(".dw_conv.weight", (800,)), ["attn.dw_conv.weight is (800,), expected 4 axes"]),
        (reshape("encoder.patch_embed.proj.weight", (0, 4, 2, 2)), ["is (0, 4, 2, 2), expected 4 axes, none"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_leaves_nothing(damage, parts, tmp_path):
    source = write_pipeline(Case("transformer_c2i"), tmp_path / "in")
    damage(source)
    with pytest.raises(UserError) as caught:
        convert.from_torch(source, tmp_path / "run")
    assert all(part in str(caught.value) for part in parts), caught.value
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_shift_of_a_config_must_be_that_of_the_scheduler(tmp_path):
    case = Case("transformer_c2i")
    source, given = write_pipeline(case, tmp_path / "in"), given_config(case)
    write_scheduler(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=3.0)(source)
    with pytest.raises(UserError, match=r"loss.shift: 1.0 from --config, 3.0 from scheduler_config.json"):
        convert.from_torch(source, tmp_path / "run", given)
    shifted = dataclasses.replace(given, loss=dataclasses.replace(given.loss, shift=3.0))
    assert convert.from_torch(source, tmp_path / "run", shifted).loss.shift == 3.0
    assert convert.from_torch(source, tmp_path / "again").loss.shift == 3.0


def test_a_bare_file_of_ours_brings_its_shift_and_autoencoder(tmp_path):
    case = Case("transformer_c2i")
    given = given_config(case)
    ours = dataclasses.replace(
        given,
        loss=dataclasses.replace(given.loss, shift=3.0),
        autoencoder=dataclasses.replace(given.autoencoder, scaling_factor=0.9),
    )
    convert.from_torch(write_pipeline(case, tmp_path / "in"), tmp_path / "run", ours)
    convert.to_torch(tmp_path / "run", tmp_path / "out")
    (tmp_path / "out" / WEIGHTS).rename(tmp_path / "bare.safetensors")
    back = convert.from_torch(tmp_path / "bare.safetensors", tmp_path / "back")
    assert (back.loss.shift, back.autoencoder.scaling_factor) == (3.0, 0.9)
    with pytest.raises(UserError, match=r"scaling_factor: 0.2325 from --config, 0.9 from the weights' metadata"):
        convert.from_torch(tmp_path / "bare.safetensors", tmp_path / "other", given)


def test_a_text_buffer_of_another_type_is_as_published(tmp_path):
    """The published EMA is float32 except for the buffer, which keeps the dtype that it was loaded in."""
    source = write_pipeline(Case("transformer_t2i"), tmp_path / "in")
    tensors = load_file(source / WEIGHTS)
    tensors["text_embed.weight"] = tensors["text_embed.weight"].astype(np.float16)
    save_file(tensors, source / WEIGHTS)
    convert.from_torch(source, tmp_path / "run")


def test_places_that_are_taken_or_closed_are_refused(tmp_path, monkeypatch):
    source = write_pipeline(Case("transformer_c2i"), tmp_path / "in")
    with pytest.raises(UserError, match="already exists"):
        convert.from_torch(source, source)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="cannot be written"):
        convert.from_torch(source, tmp_path / "run")


def test_a_model_is_never_another_one(tmp_path, tiny):
    convert.from_torch(write_pipeline(Case("transformer_c2i"), tmp_path / "in"), tmp_path / "run")
    with pytest.raises(UserError, match=r"belongs to another config: model\.num_classes"):
        check_config(tmp_path / "run", tiny())


def test_from_a_downloaded_pipeline_to_a_picture_in_two_commands_and_back_in_one(tmp_path, run_module):
    source = write_pipeline(Case("transformer_t2i_hires"), tmp_path / "in")
    write_autoencoder(source / "vae", channels=(32, 32, 32, 32), scaling_factor=0.5)
    write_phi(source / "text_encoder", width=12, heads=1, tokenizer=False)
    write_tokenizer(source / "tokenizer" / "tokenizer.json")
    (source / "scheduler").mkdir()
    (source / "scheduler" / "scheduler_config.json").write_text('{"shift": 3.0}')
    run, out, back = (str(tmp_path / name) for name in ("run", "out", "back"))
    assert run_module("convert", f"--from_torch={source}", f"--workdir={run}").returncode == 0
    config = load_config(tmp_path / "run")
    assert config.loss.shift == 3.0 and config.autoencoder.scaling_factor == 0.5
    drawing = ("--prompt=a lemon", "--num=1", "--steps=2", "--euler_steps=1", "--batch_size=1")
    result = run_module("sample", f"--workdir={run}", f"--out={out}", *drawing)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "out" / "00000.png") as picture:
        assert picture.size == (192, 192)
    assert run_module("convert", f"--workdir={run}", f"--to_torch={back}").returncode == 0
    assert (tmp_path / "back" / WEIGHTS).is_file()


def test_bin_files_need_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pip install torch"):
        convert.from_torch(tmp_path, tmp_path / "run")


@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files_hold_what_safetensors_hold(shards, tmp_path):
    torch = pytest.importorskip("torch")
    case, folder = Case("transformer_c2i"), tmp_path / "in"
    folder.mkdir()
    tensors = {key: torch.from_numpy(array).to(torch.bfloat16) for key, array in case.weights.items()}
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    where = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        torch.save({key: tensor for key, tensor in tensors.items() if where[key] == name}, folder / name)
    if shards == 1:
        (folder / names[0]).rename(folder / "diffusion_pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    convert.from_torch(folder, tmp_path / "run")
    convert.to_torch(tmp_path / "run", tmp_path / "out")
    out = load_file(tmp_path / "out" / WEIGHTS)
    assert all(np.array_equal(out[key], tensors[key].float().numpy()) for key in tensors)
    if shards > 1:
        (folder / names[2]).unlink()
        with pytest.raises(UserError, match=f"1 of 3 files are absent: {names[2]}"):
            convert.from_torch(folder, tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda torch, table: {1: table}, "expected a state dict"),
        (lambda torch, table: {"table": table.to_sparse()}, "1 tensors are sparse or without values, first table"),
        (lambda torch, table: {"table": table.to("meta")}, "1 tensors are sparse or without values, first table"),
        (lambda torch, table: {"table": table.double()}, "tensor table is torch.float64, not one of F32, F16, BF16"),
    ],
)
def test_bin_files_of_other_things_are_refused(change, message, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(change(torch, torch.ones(3, 3)), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        convert.from_torch(tmp_path, tmp_path / "run")


def test_bin_files_run_no_code(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": Path("anything")}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded as PyTorch weights"):
        convert.from_torch(tmp_path, tmp_path / "run")
