"""Published weights through the command: fixtures in give their recorded outputs, and come out as the same bytes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import golden_models
import jax
import ml_dtypes
import numpy as np
import pytest
from encoder_checkpoints import write_autoencoder, write_phi, write_tokenizer
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_case import GOLDEN, Case
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lina_jax import convert, describe, export, mesh, published, published_names, sample, state, torch_layout
from lina_jax.checkpoint import Checkpoints, check_config, load_config, write_config
from lina_jax.config import Config, default, freeze
from lina_jax.errors import UserError

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


def test_files_that_tell_all_need_no_config(tmp_path):
    """Heads come from the gates, the grid from config.json or, in a bare file, from the number of gates."""
    case = Case("transformer_c2i")
    source = write_pipeline(case, tmp_path / "in")
    model = dataclasses.replace(golden_models.config_of(case), dtype="bfloat16")
    assert convert.from_torch(source, tmp_path / "whole").model == model
    assert convert.from_torch(source / "transformer", tmp_path / "part").model == model
    shutil.copy(source / WEIGHTS, tmp_path / "bare.safetensors")
    assert convert.from_torch(tmp_path / "bare.safetensors", tmp_path / "bare").model == model
    assert load_config(tmp_path / "bare").model == model


@dataclasses.dataclass
class Named:
    """Names and shapes of a model that is too large to be made."""

    shapes: dict
    metadata: dict = dataclasses.field(default_factory=dict)


def abstract_pipeline(config: Config, **index) -> published.Pipeline:
    plan = state.blueprint(config, mesh.holding(config.model))
    flat = flatten_dict(plan.shapes.params) | flatten_dict(plan.shapes.frozen)
    shapes = torch_layout.published_shapes(list(torch_layout.entries(config.model)), unflatten_dict(flat))
    content = published_names.transformer_config(config)
    return published.Pipeline(Path("published"), Named(shapes), content, index, {}, None, None)


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
    """Names and shapes of the presets, 1.45 B parameters among them, without a --config."""
    config = load_preset(preset)
    found, assumed = published.config_of(abstract_pipeline(config), None)
    assert dataclasses.replace(found.model, remat=config.model.remat) == config.model
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
    assert [line.split()[0] for line in str(caught.value).split("; ")[1:]] == told
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


def change_weights(change):
    def damage(source: Path) -> None:
        tensors = load_file(source / WEIGHTS)
        change(tensors)
        save_file(tensors, source / WEIGHTS)

    return damage


def halve_one(tensors) -> None:
    tensors["image_encoder.norm.weight"] = tensors["image_encoder.norm.weight"].astype(np.float16)


def spoil_two(tensors) -> None:
    for key in ("image_encoder.norm.bias", "image_decoder.head.bias"):
        tensors[key][0] = np.nan


def lose_reshape_and_add(tensors) -> None:
    del tensors["image_encoder.blocks.1.norm1.weight"]
    tensors["image_encoder.norm.bias"] = np.zeros(7, np.float32)
    tensors["motion_embed.weight"] = np.zeros(3, np.float32)


def wrong_grid(source: Path) -> None:
    path = source / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_base_size": [12, 12]}))


@pytest.mark.parametrize(
    "damage, parts",
    [
        (truncate, ["not a whole safetensors file"]),
        (lambda source: (source / WEIGHTS).unlink(), ["transformer: no weights; expected"]),
        (lambda source: write_autoencoder(source / "transformer"), ["not a LINA or NOVA transformer"]),
        (change_weights(halve_one), ["several types (1 of F16, 128 of F32; first of F16: image_encoder.norm"]),
        (change_weights(spoil_two), ["not finite in ", "image_encoder.norm.bias", "image_decoder.head.bias"]),
        (change_weights(lose_reshape_and_add), ["unexpected: motion_embed.weight", "image_encoder.norm.bias is (7,)",
                                                "missing: image_encoder.blocks.1.norm1.weight"]),
        (wrong_grid, ["model.image_grid: (12, 12) by config.json, (16, 16) by config.json (image_size)",
                      "(12, 12) and (8, 8), gates of 320 tokens"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_leaves_nothing(damage, parts, tmp_path):
    source = write_pipeline(Case("transformer_c2i"), tmp_path / "in")
    damage(source)
    with pytest.raises(UserError) as caught:
        convert.from_torch(source, tmp_path / "run")
    assert all(part in str(caught.value) for part in parts), caught.value
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_text_buffer_of_another_type_is_as_published(tmp_path):
    """The published EMA is float32 but for the buffer, which stays in the type that it was loaded in."""
    source = write_pipeline(Case("transformer_t2i"), tmp_path / "in")
    tensors = load_file(source / WEIGHTS)
    tensors["text_embed.weight"] = tensors["text_embed.weight"].astype(np.float16)
    save_file(tensors, source / WEIGHTS)
    convert.from_torch(source, tmp_path / "run")


@pytest.fixture
def c2i_run(tmp_path) -> Path:
    """A workdir with an imported fixture."""
    convert.from_torch(write_pipeline(Case("transformer_c2i"), tmp_path / "in"), tmp_path / "run")
    return tmp_path / "run"


def test_places_that_are_taken_or_closed_are_refused(c2i_run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is there already"):
        convert.from_torch(tmp_path / "in", c2i_run)
    with pytest.raises(UserError, match="is there already"):
        convert.to_torch(c2i_run, tmp_path / "in")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    for write in (convert.to_torch, convert.to_safetensors):
        with pytest.raises(UserError, match="cannot be written"):
            write(c2i_run, tmp_path / "out")


def test_a_write_that_fails_leaves_nothing(c2i_run, tmp_path):
    """float16 cannot hold a parameter of 1e6: noticed on the way."""
    source = tmp_path / "in"
    change_weights(lambda tensors: tensors["image_encoder.norm.bias"].__setitem__(0, 1e6))(source)
    convert.from_torch(source, tmp_path / "large")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=r"image_encoder.norm.bias has values that are not finite in float16"):
        convert.to_torch(tmp_path / "large", tmp_path / "out", dtype="float16")
    with pytest.raises(UserError, match=r"image_norm/bias has values that are not finite in float16"):
        convert.to_safetensors(tmp_path / "large", tmp_path / "out.safetensors", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_shards_and_types_are_read_again(c2i_run, tmp_path):
    weights = convert.to_torch(c2i_run, tmp_path / "out", dtype="bfloat16", max_shard_gb=1e-4)
    files = sorted((tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 1.2e5 for file in files)
    convert.from_torch(tmp_path / "out", tmp_path / "again")
    again = export.load(tmp_path / "again")
    for path, array in weights.arrays.items():
        rounded = np.asarray(array).astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(rounded, again.arrays[path]), path


def test_a_plain_file_holds_arrays_config_and_step(c2i_run, tmp_path):
    file = tmp_path / "plain.safetensors"
    weights = convert.to_safetensors(c2i_run, file)
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    assert freeze(json.loads(metadata["config"])).model == load_config(c2i_run).model
    assert metadata["step"] == "0"
    arrays = load_file(file)
    assert arrays.keys() == {"/".join(path) for path in weights.arrays}
    assert all(np.array_equal(arrays["/".join(path)], array) for path, array in weights.arrays.items())


def test_formats_are_described_and_compared(c2i_run, tmp_path):
    convert.to_torch(c2i_run, tmp_path / "out")
    convert.to_safetensors(c2i_run, tmp_path / "plain.safetensors")
    count = sum(array.size for array in Case("transformer_c2i").weights.values())
    for path, kind in (
        (c2i_run, "training directory, steps 0; the last has weights alone"),
        (tmp_path / "in", "published PyTorch layout"),
        (tmp_path / "out", "published PyTorch layout, exported from here"),
        (tmp_path / "plain.safetensors", "safetensors file of arrays as they are here"),
    ):
        text = describe.describe(path)
        assert kind in text.splitlines()[0]
        assert "config.model.width = 32" in text
        assert f"{count:,} of float32" in text.splitlines()[-1]
        assert "129 tensors in both, 129 with equal values" in describe.difference(tmp_path / "in", path)
    change_weights(lambda tensors: tensors["image_encoder.norm.bias"].__setitem__(0, 9.0))(tmp_path / "out")
    told = describe.difference(tmp_path / "in", tmp_path / "out").splitlines()
    assert told[0].startswith("image_encoder.norm.bias: values differ by up to ")
    assert told[1:] == ["129 tensors in both, 128 with equal values"]


def test_models_without_a_published_counterpart_are_refused(tiny_text, rough, tmp_path):
    config = tiny_text()
    write_config(tmp_path / "run", config)
    run = rough(state.blueprint(config, mesh.holding(config.model)))
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint)
    checkpoints.save_weights(run.params, run.frozen)
    checkpoints.close()
    with pytest.raises(UserError, match="not a model that the published code can load") as caught:
        convert.to_torch(tmp_path / "run", tmp_path / "out")
    assert "model.text_encoder=bytes" in str(caught.value)
    assert "byte_encoder/taps: no published tensor holds it" in str(caught.value)
    convert.to_safetensors(tmp_path / "run", tmp_path / "plain.safetensors")


def test_a_model_is_never_another_one(c2i_run, tiny):
    with pytest.raises(UserError, match=r"belongs to another config: model\.num_classes"):
        check_config(c2i_run, tiny())


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


@pytest.fixture
def tiny_run(tiny, rough, tmp_path) -> Path:
    """A workdir of a class-conditional model of pixels, trained for three steps of which nothing is said."""
    config = tiny()
    write_config(tmp_path / "run", config)
    plan = state.blueprint(config, mesh.holding(config.model))
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint)
    for step in (1, 2, 3):
        run = rough(plan, seed=step)
        average = jax.tree.map(lambda x, s=step: x + s, run.params)
        frozen = jax.tree.map(jax.numpy.zeros_like, run.frozen)
        checkpoints.save(dataclasses.replace(run, step=run.step + step, ema=average, frozen=frozen))
    checkpoints.close()
    return tmp_path / "run"


def test_average_or_parameters_of_any_step_go_out(tiny_run, tmp_path):
    """Different arrays: EMA by default."""
    average, raw = export.load(tiny_run), export.load(tiny_run, ema=False)
    assert (average.kind, raw.kind, raw.step) == ("ema", "raw", 3)
    for ema, step, weights in ((True, None, average), (False, None, raw), (True, 2, export.load(tiny_run, step=2))):
        out = tmp_path / f"out_{ema}_{step}"
        convert.to_torch(tiny_run, out, ema=ema, step=step)
        found = load_file(out / WEIGHTS)["image_encoder.norm.bias"]
        assert np.array_equal(found, weights.arrays["image_norm", "bias"])
    assert not np.array_equal(average.arrays["image_norm", "bias"], raw.arrays["image_norm", "bias"])


RUN_PROGRAM = """
import sys
sys.modules["lina_jax"] = None  # importing it fails
import jax, numpy as np
from jax import export
from safetensors.numpy import load_file
program = export.deserialize(open(f"{sys.argv[1]}/sample.stablehlo", "rb").read())
weights = load_file(f"{sys.argv[1]}/weights.safetensors")
labels, numbers = np.array([0, 2, 1], np.int32), np.arange(3, dtype=np.int32)
np.save("images.npy", program.call(weights, {"label": labels}, numbers, np.int32(7)))
"""


def test_a_sampling_program_runs_without_the_package(tiny_run, tmp_path):
    convert.to_stablehlo(tiny_run, tmp_path / "program", ema=False)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-c", RUN_PROGRAM, str(tmp_path / "program")]
    result = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    plan, params, frozen, _ = sample.load(tiny_run, ema=False)
    ours = sample.Sampler(plan, plan.config.sample, 8)(params, frozen, [0, 2, 1], seed=7)
    theirs = np.load(elsewhere / "images.npy")
    assert theirs.shape == ours.shape and theirs.std() > 10
    # Programs for one batch size and for any round differently: a value near an integer may be cut to the one below.
    assert np.max(np.abs(theirs.astype(int) - ours)) <= 1 and np.mean(theirs != ours) < 0.01


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


def test_bin_files_run_no_code(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": Path("anything")}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="not a whole file of PyTorch weights alone"):
        convert.from_torch(tmp_path, tmp_path / "run")
