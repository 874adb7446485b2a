"""What a path holds, and how two of them differ, for every format (programs: test_export.py)."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from encoder_checkpoints import write_autoencoder, write_phi
from golden_case import Case
from pipelines import WEIGHTS, change_weights, write_pipeline
from safetensors.numpy import save_file

from lina_jax import convert, describe
from lina_jax.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """One model in every format."""
    place = tmp_path_factory.mktemp("formats")
    convert.from_torch(write_pipeline(Case("transformer_c2i"), place / "in"), place / "run")
    convert.to_torch(place / "run", place / "out")
    convert.to_torch(place / "run", place / "shards", max_shard_gb=1e-4)
    convert.to_safetensors(place / "run", place / "plain.safetensors")
    shutil.copy(place / "in" / WEIGHTS, place / "bare.safetensors")
    return place


FORMATS = {
    "in": "published PyTorch layout",
    "in/transformer": "published PyTorch layout",
    "bare.safetensors": "published PyTorch layout",
    "run": "training directory, steps 0; the last has weights only",
    "run/checkpoints/0": "training directory, steps 0; this one has weights only",
    "out": "published PyTorch layout, exported from here",
    "shards": "published PyTorch layout, exported from here",
    "plain.safetensors": "safetensors file with lina_jax's own names, weights: raw",
}


@pytest.mark.parametrize(("name", "kind"), FORMATS.items())
def test_every_format_is_described(place, name, kind):
    count = sum(array.size for array in Case("transformer_c2i").weights.values())
    text = describe.describe(place / name).splitlines()
    assert text[0] == f"{place / name}: {kind}"
    assert "config.model.width = 32" in text
    assert f"{count:,} of float32 ({count * 4 / 1e9:.3f} GB)" in text[-1]


@pytest.mark.parametrize("other", [name for name in FORMATS if name != "in"])
def test_every_format_is_compared(place, other):
    for pair in (("in", other), (other, "in")):
        said = describe.difference(*(place / name for name in pair)).splitlines()
        assert said[-1] == "129 tensors in both, 129 with equal values", said


def test_what_is_assumed_of_a_bare_file_is_told(place):
    line = "assumed, as no file states it: a square image: 16 x 16 tokens, 8 x 8 condition tokens"
    assert line in describe.describe(place / "bare.safetensors").splitlines()
    assert line not in describe.describe(place / "in").splitlines()


def test_formats_with_our_names_are_compared_by_these(place):
    said = describe.difference(place / "run", place / "plain.safetensors")
    assert said == "81 tensors in both, 81 with equal values"


def test_what_differs_is_told(place, tmp_path):
    shutil.copytree(place / "out", tmp_path / "out")
    change_weights(lambda tensors: tensors["image_encoder.norm.bias"].__setitem__(0, 9.0))(tmp_path / "out")
    said = describe.difference(place / "run", tmp_path / "out").splitlines()
    assert "step: 0 | None" in said  # the rewritten file has no metadata
    assert any(line.startswith("image_encoder.norm.bias: values differ by up to ") for line in said)
    assert said[-1] == "129 tensors in both, 128 with equal values"


def test_values_that_are_not_finite_are_compared_too(tmp_path):
    weights = {"a": [1.0, np.nan, np.inf], "b": [1.0, np.nan, 2.0], "c": [1.0, 2.0, 3.0]}
    for name, b in (("one", np.nan), ("other", 0.0)):
        weights["b"][1] = b
        save_file(
            {key: np.array(value, np.float32) for key, value in weights.items()}, tmp_path / f"{name}.safetensors"
        )
    said = describe.difference(tmp_path / "one.safetensors", tmp_path / "other.safetensors").splitlines()
    assert said == ["b: values differ by up to inf", "3 tensors in both, 2 with equal values"]


def test_runs_may_have_any_name(place, tmp_path):
    for run in (tmp_path / "checkpoints", tmp_path / "checkpoints" / "1"):
        shutil.copytree(place / "run", run)
        assert "training directory, steps 0" in describe.describe(run).splitlines()[0]
        assert "this one has" in describe.describe(run / "checkpoints" / "0").splitlines()[0]


def test_types_that_differ_are_told_in_one_line(place, tmp_path):
    convert.to_torch(place / "run", tmp_path / "half", dtype="bfloat16")
    said = describe.difference(place / "out", tmp_path / "half").splitlines()
    (line,) = [line for line in said if "float32 | bfloat16" in line]
    assert line.startswith("129 tensors, first ")


@pytest.mark.parametrize(
    ("write", "kind"), [(write_autoencoder, "AutoencoderKL"), (write_phi, "PhiForCausalLM")], ids=["vae", "text"]
)
def test_encoders_are_described_and_compared(write, kind, place, tmp_path):
    write(tmp_path / "encoder")
    text = describe.describe(tmp_path / "encoder")
    assert text.splitlines()[0] == f"{tmp_path / 'encoder'}: PyTorch weights of another model, {kind}"
    count = len(describe.open_content(tmp_path / "encoder").tensors)
    said = describe.difference(tmp_path / "encoder", tmp_path / "encoder")
    assert said == f"{count} tensors in both, {count} with equal values"
    assert describe.difference(place / "in", tmp_path / "encoder").endswith("0 tensors in both, 0 with equal values")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is corrupt: 'utf-8' codec"),
        (b'{"seed": 1,', "is corrupt: Expecting"),
        (b"[1]", ": config: [1] is not a group of fields"),
        (b'{"sed": 1}', ": unknown config field sed (did you mean seed?)"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(content, message, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        describe.describe(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}") and message in str(caught.value)


def test_notes_of_others_in_a_file_are_not_ours(tmp_path):
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "vit.safetensors", {"step": "final", "config": "vit.yaml"})
    assert describe.describe(tmp_path / "vit.safetensors").startswith(
        f"{tmp_path / 'vit.safetensors'}: PyTorch weights"
    )


def test_what_cannot_be_described_is_named(place, tmp_path):
    with pytest.raises(UserError, match="no such file or directory"):
        describe.describe(tmp_path / "none")
    with pytest.raises(UserError, match="no weights; expected"):
        describe.describe(tmp_path)
    (tmp_path / "begun").mkdir()
    shutil.copy(place / "run" / "config.json", tmp_path / "begun")
    for path in (tmp_path / "begun", tmp_path / "begun" / "checkpoints"):
        with pytest.raises(UserError, match=f"^{tmp_path / 'begun'}: a training directory without a checkpoint"):
            describe.describe(path)
    with pytest.raises(UserError, match=f"^{place / 'run'}: no checkpoint 9; there are 0"):
        describe.describe(place / "run" / "checkpoints" / "9")
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "0" / "params" / "_METADATA").unlink()
    with pytest.raises(UserError, match=r"checkpoint 0 in .* is damaged \(params/_METADATA is missing\)"):
        describe.describe(tmp_path / "run")
