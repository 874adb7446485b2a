"""Exporting weights: published layout, plain arrays, and programs that run without the package."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from encoder_checkpoints import write_autoencoder, write_phi
from golden_case import Case
from pipelines import WEIGHTS, change_weights, write_pipeline
from safetensors import safe_open
from safetensors.numpy import load_file

from lina_jax import convert, describe, drawing, export, mesh, state
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import freeze
from lina_jax.errors import UserError
from lina_jax.models import sequence
from lina_jax.workdir import load_config, write_config


@pytest.fixture(scope="module")
def c2i_run(tmp_path_factory) -> Path:
    """A workdir with an imported fixture."""
    place = tmp_path_factory.mktemp("c2i")
    convert.from_torch(write_pipeline(Case("transformer_c2i"), place / "in"), place / "run")
    return place / "run"


def test_places_that_are_taken_or_closed_are_refused(c2i_run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="already exists"):
        convert.to_torch(c2i_run, c2i_run)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    for write in (convert.to_torch, convert.to_safetensors, convert.to_stablehlo):
        with pytest.raises(UserError, match="cannot be written"):
            write(c2i_run, tmp_path / "out.safetensors")


def test_a_write_that_fails_leaves_nothing(tmp_path):
    """float16 cannot hold a parameter of 1e6, which shows only while writing."""
    source = write_pipeline(Case("transformer_c2i"), tmp_path / "in")
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
    with pytest.raises(UserError, match="has our own names"):
        convert.from_torch(file, tmp_path / "again")
    arrays = load_file(file)
    assert arrays.keys() == {"/".join(path) for path in weights.arrays}
    assert all(np.array_equal(arrays["/".join(path)], array) for path, array in weights.arrays.items())


def test_places_of_this_machine_stay_here(tiny):
    """The metadata has no directories of this machine; the rest of the config is complete and valid."""
    secret = {"path": "/secret/a", "cache": "/secret/b"}
    evaluation = {"images": 8, "inception": "/secret/inception.pth", "reference": "/secret/reference.npz"}
    config = tiny(data=secret, eval=evaluation, autoencoder={"path": "/secret/c"}, init_from={"path": "/secret/d"})
    metadata = export.metadata_of(config, 3, "ema")
    assert "secret" not in metadata["config"]
    assert freeze(json.loads(metadata["config"])).eval.inception == "inception.pth"


def test_a_weight_file_has_the_name_that_readers_expect(c2i_run, tmp_path):
    (tmp_path / "there.safetensors").mkdir()
    for name in ("weights.bin", "there.safetensors"):
        with pytest.raises(UserError, match=f"{name}: expected the name of a file that ends in .safetensors"):
            convert.to_safetensors(c2i_run, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]


def test_models_without_a_published_counterpart_are_refused(tiny_text, rough, tmp_path):
    config = tiny_text()
    write_config(tmp_path / "run", config)
    run = rough(state.make_blueprint(config, mesh.mesh_for_weights(config.model)))
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint)
    checkpoints.save_weights(run.params, run.frozen)
    checkpoints.close()
    with pytest.raises(UserError, match="the published code cannot load this model") as caught:
        convert.to_torch(tmp_path / "run", tmp_path / "out")
    assert "model.text_encoder=bytes" in str(caught.value)
    assert "byte_encoder/taps: has no published counterpart" in str(caught.value)
    convert.to_safetensors(tmp_path / "run", tmp_path / "plain.safetensors")


@pytest.fixture(scope="module")
def tiny_run(tiny, rough, tmp_path_factory) -> Path:
    """A workdir of a class-conditional model of pixels, with made-up checkpoints of steps 1 to 3."""
    config = tiny(sample={"steps": 3, "euler_steps": 2, "stages": 1})
    workdir = tmp_path_factory.mktemp("trained") / "run"
    write_config(workdir, config)
    plan = state.make_blueprint(config, mesh.mesh_for_weights(config.model))
    checkpoints = Checkpoints(workdir, config.checkpoint)
    for step in (1, 2, 3):
        run = rough(plan, seed=step)
        average = jax.tree.map(lambda x, s=step: x + s, run.params)
        frozen = jax.tree.map(jax.numpy.zeros_like, run.frozen)
        checkpoints.save(dataclasses.replace(run, step=run.step + step, ema=average, frozen=frozen))
    checkpoints.close()
    return workdir


def test_average_or_parameters_of_any_step_go_out(tiny_run, tmp_path):
    """They are different arrays; the EMA is the default."""
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


@pytest.fixture(scope="module")
def program(tiny_run, tmp_path_factory) -> Path:
    """What --to_stablehlo writes for the raw parameters."""
    directory = tmp_path_factory.mktemp("exported") / "program"
    convert.to_stablehlo(tiny_run, directory, ema=False)
    return directory


def test_a_sampling_program_runs_without_the_package(tiny_run, program, tmp_path):
    command = [sys.executable, "-c", RUN_PROGRAM, str(program)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    plan, params, frozen, _ = drawing.load(tiny_run, ema=False)
    ours = drawing.Sampler(plan, plan.config.sample, 8)(params, frozen, [0, 2, 1], seed=7)
    theirs = np.load(tmp_path / "images.npy")
    assert theirs.shape == ours.shape and theirs.std() > 10
    # Programs for one batch size and for any batch size round differently: a value near an integer may be truncated to
    # the one below.
    assert np.max(np.abs(theirs.astype(int) - ours)) <= 1 and np.mean(theirs != ours) < 0.01


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_rotary_models_go_out_as_programs(platform, tiny, rough, save_run, tmp_path, monkeypatch):
    """Their angles, like everything else, take any number of images, also on machines with GPUs."""
    monkeypatch.setattr(sequence, "platform", lambda: platform)
    config = tiny(model={"rotary": True, "width": 32, "heads": 1}, sample={"steps": 2, "euler_steps": 1, "stages": 1})
    plan = state.make_blueprint(config, mesh.mesh_for_weights(config.model))
    convert.to_stablehlo(save_run(tmp_path / "run", plan, rough(plan)), tmp_path / "program", platforms=("cpu",))
    exported = jax.export.deserialize((tmp_path / "program" / "sample.stablehlo").read_bytes())
    weights = load_file(tmp_path / "program" / "weights.safetensors")
    labels, numbers = np.array([0, 2, 1], np.int32), np.arange(3, dtype=np.int32)
    theirs = np.asarray(exported.call(weights, {"label": labels}, numbers, np.int32(7)))
    plan, params, frozen, _ = drawing.load(tmp_path / "run")
    ours = drawing.Sampler(plan, plan.config.sample, 8)(params, frozen, [0, 2, 1], seed=7)
    assert np.max(np.abs(theirs.astype(int) - ours)) <= 1  # as above


def test_encoders_are_part_of_a_sampling_program(tiny, rough, save_run, tmp_path):
    write_autoencoder(tmp_path / "vae", scaling_factor=0.2)
    write_phi(tmp_path / "phi")
    config = tiny(
        model={"condition": "text", "text_encoder": "features", "text_length": 8, "text_dim": 32, "latent_channels": 4},
        autoencoder={"kind": "sdxl", "stride": 2, "scaling_factor": 0.2, "path": str(tmp_path / "vae")},
        text_encoder={"path": str(tmp_path / "phi")},
        sample={"steps": 2, "euler_steps": 1, "stages": 1},
    )
    plan = state.make_blueprint(config, mesh.mesh_for_weights(config.model))
    workdir = save_run(tmp_path / "run", plan, rough(plan))
    convert.to_stablehlo(workdir, tmp_path / "program")
    exported = jax.export.deserialize((tmp_path / "program" / "sample.stablehlo").read_bytes())
    prompts = ["a large red circle", "two green triangles"]
    plan, params, frozen, _ = drawing.load(workdir)
    condition = drawing.encode_conditions(config, prompts, plan.encoders.text)
    weights = load_file(tmp_path / "program" / "weights.safetensors")
    theirs = exported.call(weights, condition, np.arange(2, dtype=np.int32), np.int32(7))
    ours = drawing.Sampler(plan, config.sample, 8)(params, frozen, prompts, seed=7)
    assert ours.std() > 10
    assert np.max(np.abs(np.asarray(theirs).astype(int) - ours)) <= 1 and np.mean(theirs != ours) < 0.01


def test_a_sampling_program_is_described_and_compared(tiny_run, program, tmp_path):
    text = describe.describe(program).splitlines()
    assert text[0] == f"{program}: sampling program and its weights: raw"
    for part in ("sample.stablehlo", "weights.safetensors"):  # either file describes the whole program
        assert describe.describe(program / part).splitlines()[1:] == text[1:]
    assert {"step: 3", 'platforms: ["cpu", "cuda", "tpu"]', "config.model.width = 32"} <= set(text)
    convert.to_safetensors(tiny_run, tmp_path / "raw.safetensors", ema=False)
    convert.to_torch(tiny_run, tmp_path / "torch", ema=False)
    for other in ("raw.safetensors", "torch"):
        said = describe.difference(program, tmp_path / other)
        count = len(describe.open_content(tmp_path / other).tensors)
        assert said.splitlines()[-1] == f"{count} tensors in both, {count} with equal values", said
    assert "image_norm/scale: values differ by up to 3" in describe.difference(program, tiny_run)  # its EMA


def test_platforms_that_do_not_exist_are_refused(tiny_run, tmp_path):
    for platforms in (["gpu"], []):
        with pytest.raises(UserError, match=f"^--platforms={','.join(platforms)}: expected some of cpu, cuda, tpu$"):
            convert.to_stablehlo(tiny_run, tmp_path / "out", platforms=platforms)


@pytest.mark.parametrize("operation", ["--to_torch", "--to_safetensors", "--average=1 --out"])
def test_a_disk_that_fills_up_is_one_line(operation, c2i_run, run_module, tmp_path):
    """Files may not grow beyond 100 KiB. The error names the place, and nothing is left there."""
    result = run_module(
        "convert", f"--workdir={c2i_run}", *f"{operation}={tmp_path / 'out.safetensors'}".split(),
        prefix=("bash", "-c", 'ulimit -f 100 && exec "$@"', "bash"),
    )  # fmt: skip
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: ") and "File too large" in line
    assert str(tmp_path) in line and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--average=1", "--out=out", "--raw"],
         "--raw goes with --to_torch, --to_safetensors, --to_stablehlo, not with --average"),
        (["--describe=."], "--workdir goes with --from_torch, --to_torch, --to_safetensors, --to_stablehlo, "
                           "--average, --ema_decay, not with --describe"),
        (["--to_torch="], "--to_torch= is empty, expected a path"),
    ],
)  # fmt: skip
def test_an_option_that_would_be_ignored_is_refused(flags, message, c2i_run, run_module):
    result = run_module("convert", f"--workdir={c2i_run}", *flags)
    assert (result.returncode, result.stderr) == (2, f"error: {message}\n")
