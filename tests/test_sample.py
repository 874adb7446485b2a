"""`sample` draws what is requested, records its settings, and names what it cannot draw."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lina_jax import drawing, sample
from lina_jax.checkpoint import Checkpoints
from lina_jax.encoders import Tokens
from lina_jax.errors import UserError
from lina_jax.workdir import write_config


@pytest.fixture(scope="module")
def workdir(text_plan, rough, save_run, tmp_path_factory):
    """A text-conditional training directory with one checkpoint."""
    run = dataclasses.replace(rough(text_plan), step=jnp.int32(7))
    return save_run(tmp_path_factory.mktemp("run"), text_plan, run)


def test_sample_writes_pictures_and_how_they_were_made(run_module, workdir, tmp_path):
    out = tmp_path / "pictures"
    (tmp_path / "prompts").write_text("a red circle\n\ntwo blue squares\n")
    result = run_module(
        "sample", f"--workdir={workdir}", f"--out={out}", f"--prompts_file={tmp_path / 'prompts'}", "--num=2",
        "--seed=5", "--guidance=1.5", "--steps=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    names = ["00000.png", "00001.png", "00002.png", "00003.png", "grid.png", "settings.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    with Image.open(out / "00003.png") as image:
        assert (image.size, image.mode) == ((8, 8), "RGB")
    settings = json.loads((out / "settings.json").read_text())
    assert settings["conditions"] == ["a red circle"] * 2 + ["two blue squares"] * 2
    assert (settings["checkpoint"], settings["weights"], settings["seed"]) == (7, "ema", 5)
    assert (settings["sample"]["guidance"], settings["sample"]["steps"]) == (1.5, 2)

    (out / "mine.png").touch()
    result = run_module(
        "sample", f"--workdir={workdir}", f"--out={out}", "--prompt=a red circle", "--num=1", "--steps=2"
    )
    assert result.stdout.startswith("1 image in"), result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["00000.png", "grid.png", "mine.png", "settings.json"]


def test_a_place_with_settings_of_something_else_is_refused(tmp_path):
    assert sample.earlier_pictures(tmp_path, 3) == []
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(UserError, match=r"settings\.json is not from an earlier call"):
        sample.earlier_pictures(tmp_path, 3)
    (tmp_path / "settings.json").write_text('{"conditions": ["a red circle"]}')
    (tmp_path / "00000.png").touch()
    assert sample.earlier_pictures(tmp_path, 3) == [tmp_path / "00000.png"]
    (tmp_path / "00002.png").touch()
    with pytest.raises(UserError, match=r"00002\.png is not from an earlier call"):
        sample.earlier_pictures(tmp_path, 3)
    assert sample.earlier_pictures(tmp_path, 2) == [tmp_path / "00000.png"]
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match=r"00000\.png is not from an earlier call"):
        sample.earlier_pictures(tmp_path, 2)


def test_a_prompt_that_is_cut_is_named(tiny_text, caplog):
    def tokenize(prompts):
        return Tokens(np.zeros((len(prompts), 3), np.int32), np.full(len(prompts), 3), np.array([False, True]))

    config = tiny_text(model={"text_encoder": "features"})
    drawing.encode_conditions(config, ["short", "too long for it"], SimpleNamespace(tokenize=tokenize))
    assert caplog.messages == ["only the first 3 tokens of prompt 'too long for it' are read"]
    caplog.clear()
    drawing.encode_conditions(tiny_text(model={"text_length": 8}), ["a circle", "a square, too"])
    assert caplog.messages == ["only the first 8 bytes of prompt 'a square, too' are read"]


def test_sample_refuses_a_label_for_a_text_model(run_module, workdir, tmp_path):
    result = run_module("sample", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--label=1")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: this model draws from text")
    assert not (tmp_path / "out").exists()


def test_guidance_that_is_given_is_not_exceeded_on_the_way_to_it(tiny):
    """So 1 means no guidance, whatever the ramp of a config begins with."""
    config = tiny(sample={"guidance": 5.0, "guidance_min": 3.0})
    assert drawing.sample_settings(config, {"guidance": 1.0}).guidance_min == 1.0
    assert drawing.sample_settings(config, {"guidance": 4.0}).guidance_min == 3.0


@pytest.mark.parametrize("name", ["steps", "euler_steps"])
@pytest.mark.parametrize("value", [0, 10**12])
def test_steps_that_cannot_be_made_are_refused(tiny, name, value):
    with pytest.raises(UserError, match=f"--{name}={value}: expected 1 to 100000"):
        drawing.sample_settings(tiny(), {name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts=["a circle"], prompts_file=None, labels=[], num=1), "this model draws 3 classes"),
        (
            dict(prompts=[], prompts_file=None, labels=[], num=1),
            "3 classes: give --label=0 to --label=2",
        ),
        (dict(prompts=[], prompts_file=None, labels=[1], num=0), "--num=0: must be at least 1"),
        (dict(prompts=[], prompts_file="no/such/file", labels=[1], num=1), "--prompts_file=no/such/file"),
    ],
)
def test_requests_that_a_class_model_cannot_meet(tiny, arguments, message):
    with pytest.raises(UserError, match=message):
        sample.requested(tiny(), **arguments)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a very large red circle on white", r"prompt 'a very .*' has 32 bytes, more than model\.text_length=24"),
        (" ", "prompt ' ' is blank"),
        ("caf\udce9", r"prompt 'caf\\udce9' is not UTF-8"),  # how Python decodes the byte E9 on a command line
    ],
)
def test_prompts_that_cannot_be_drawn_are_refused(tiny_text, prompt, message):
    with pytest.raises(UserError, match=message):
        sample.requested(tiny_text(), ["a red circle", prompt], None, [], 1)


def test_prompts_are_read_from_a_file_of_lines(tiny_text, tmp_path):
    """With the byte order mark and the line ends that editors on Windows write."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa red circle\r\n\r\n a cross\r\n")
    assert sample.requested(tiny_text(), [], str(file), [], 2) == ["a red circle"] * 2 + ["a cross"] * 2
    file.write_text("a red\u2028circle\n", encoding="utf-8")  # ends a line in Unicode, but not in editors
    assert sample.requested(tiny_text(), [], str(file), [], 1) == ["a red\u2028circle"]
    file.write_bytes(b"\n")
    with pytest.raises(UserError, match=r"--prompts_file=.*prompts\.txt: it contains no prompt"):
        sample.requested(tiny_text(), ["a red circle"], str(file), [], 2)


@pytest.mark.parametrize("encoder", ["autoencoder", "text_encoder"])
def test_an_encoder_that_the_model_does_not_use_is_refused(tiny_text, encoder):
    with pytest.raises(UserError, match=f"--{encoder}=somewhere: this model"):
        drawing.with_encoders(tiny_text(), **{"autoencoder": "", "text_encoder": "", encoder: "somewhere"})


def test_a_training_directory_takes_no_pictures(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="this is a training directory, choose another place"):
        sample.earlier_pictures(tmp_path, 1)


@pytest.mark.parametrize("name", ["temperature", "guidance"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, -1.0])
def test_the_setting_that_is_wrong_is_named_alone(tiny, name, value):
    with pytest.raises(UserError, match=rf"^--{name}={re.escape(str(value))}: must be in \[0, 3.4e\+38\]$"):
        drawing.sample_settings(tiny(), {name: value})


@pytest.mark.parametrize("label", [-1, 4])
def test_classes_that_do_not_exist_are_refused(tiny, label):
    with pytest.raises(UserError, match=f"label {label}: expected 0 to 2"):
        drawing.encode_conditions(tiny(), [label])


def test_load_takes_the_average_or_the_parameters(text_plan, tmp_path, rough, save_run, identical):
    run = rough(text_plan)
    run = dataclasses.replace(run, ema=jax.tree.map(lambda x: x + 1, run.params))
    save_run(tmp_path, text_plan, run)
    assert identical(drawing.load(tmp_path)[1], run.ema)
    assert identical(drawing.load(tmp_path, ema=False)[1], run.params)


def test_imported_weights_are_not_called_an_average(text_plan, rough, run_module, tmp_path):
    run, workdir = rough(text_plan), tmp_path / "run"
    write_config(workdir, text_plan.config)
    checkpoints = Checkpoints(workdir, text_plan.config.checkpoint)
    checkpoints.save_weights(run.params, run.frozen)
    checkpoints.close()
    out = tmp_path / "out"
    result = run_module("sample", f"--workdir={workdir}", f"--out={out}", "--prompt=x", "--num=1", "--steps=1")
    assert result.returncode == 0, result.stderr
    assert json.loads((out / "settings.json").read_text())["weights"] == "raw"


def test_a_checkpoint_that_is_not_there_is_named(workdir):
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*: its steps are \[7\]"):
        drawing.load(workdir, step=3)
