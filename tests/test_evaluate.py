"""The evaluate command, and the call of it that training suggests: what it needs, reports and writes."""

import io
import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from encoder_checkpoints import write_autoencoder, write_phi
from inception_weights import write
from PIL import Image

from lina_jax import output_files, quality, records, state
from lina_jax.errors import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write(tmp_path_factory.mktemp("inception") / "thin.safetensors")


def test_training_names_the_command_that_makes_its_reference(
    tiny, weights, shapes_data, run_module, one_device, tmp_path
):
    """Training then accepts the file that this command writes."""

    def prepared(reference):
        config = tiny(eval={"images": 8, "inception": str(weights), "reference": str(reference)})
        return quality.DrawnQuality(state.make_blueprint(config, one_device), None)

    with pytest.raises(UserError, match=f"eval.reference={shapes_data}: training needs an .npz file with mu") as error:
        prepared(shapes_data)
    python, module, name, *options, out = shlex.split(str(error.value).partition(", run ")[2])
    assert (python, module, name, out) == ("python", "-m", "lina_jax.evaluate", "--out=DIR")
    result = run_module("evaluate", *options, f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    prepared(tmp_path / "reference.npz")
    np.savez(tmp_path / "pictures.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=f"eval.reference={tmp_path}/pictures.npz: training needs an .npz file with mu"):
        prepared(tmp_path / "pictures.npz")
    with pytest.raises(UserError, match=f"eval.reference={tmp_path}/nowhere.npz: no such file"):
        prepared(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--number=3", "--number=3: more than 3 are needed for precision and recall"),
        ("--number=1", "--number=1: must be at least 2"),
        ("--metrics=fid,sfid --reference=", "--metrics=fid,sfid: fid cannot be measured: no --reference"),
        ("--metrics=fid --inception= --reference=", "--metrics=fid needs --inception=FILE"),
        ("--reference_split=train --reference=", "--reference_split=train needs --reference=FILE"),
        ("--number=9 --inception= --reference=", "--number=9 needs --inception=FILE or --npz=FILE"),
        ("--npz=there", "--npz=there: expected a name that ends in .npz"),
        ("--workdir= --samples_from=. --guidance=2", "--guidance needs a model that draws"),
        ("--study=. --report=.", "--workdir does not apply to --study"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(run_module, weights, shapes_data, tmp_path, flag, message):
    options = [f"--inception={weights}", f"--reference={shapes_data}", f"--out={tmp_path / 'out'}"]
    result = run_module("evaluate", "--workdir=nowhere", *options, *flag.split())
    assert result.returncode == 2 and result.stderr.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--npz=a.npz", "--mesh=fsdp=1", "--seed=1"])
def test_flags_that_a_study_would_ignore_are_refused(run_module, flag):
    result = run_module("evaluate", "--study=.", flag)
    assert (result.returncode, result.stderr) == (2, f"error: {flag.partition('=')[0]} does not apply to --study\n")


def test_a_reference_is_not_overwritten(run_module, weights, tmp_path):
    np.savez(tmp_path / "pool.npz", mu=np.zeros(4), sigma=np.eye(4))
    options = [f"--inception={weights}", f"--reference={tmp_path}/pool.npz", f"--npz={tmp_path}/pool.npz"]
    result = run_module("evaluate", "--workdir=nowhere", *options)
    assert result.returncode == 2 and "pool.npz: is the reference, which it would overwrite" in result.stderr


def test_a_metric_that_is_asked_for_needs_its_statistics(run_module, weights, tmp_path):
    """By default, what the reference has no statistics for is left out."""
    np.savez(tmp_path / "pool.npz", mu=np.zeros(4), sigma=np.eye(4))
    options = ["--workdir=nowhere", f"--inception={weights}", f"--reference={tmp_path}/pool.npz"]
    result = run_module("evaluate", *options, "--metrics=fid,sfid")
    assert result.returncode == 2 and "sfid cannot be measured" in result.stderr
    assert "pool.npz has no mu_s and sigma_s" in result.stderr
    result = run_module("evaluate", *options)
    assert result.returncode == 2 and "nowhere is not a training directory" in result.stderr


def test_score_json_tells_what_draws_and_nothing_else_is_read(tiny, rough, save_run, one_device, run_module, tmp_path):
    """The weights and encoders that the flags ask for; the EMA is deleted beforehand, so that reading it would fail."""
    encoders = {"autoencoder": str(tmp_path / "vae"), "text_encoder": str(tmp_path / "phi")}
    write_autoencoder(tmp_path / "vae", scaling_factor=0.2)
    write_phi(tmp_path / "phi")
    model = {"condition": "text", "text_encoder": "features", "text_dim": 32, "latent_channels": 4}
    autoencoder = {"kind": "sdxl", "stride": 2, "scaling_factor": 0.2, "tile": 8}
    plan = state.make_blueprint(tiny(model=model, autoencoder=autoencoder), one_device)
    workdir = save_run(tmp_path / "run", plan, rough(plan))
    shutil.rmtree(workdir / "checkpoints" / "0" / "ema")
    flags = [f"--{name}={path}" for name, path in encoders.items()]
    others = [workdir / "evaluation" / name for name in ("work", ".measuring")]  # a user's; an unfinished measurement
    for directory in others:
        directory.mkdir(parents=True)
    result = run_module("evaluate", f"--workdir={workdir}", "--raw", "--novalidation", *flags)
    assert result.returncode == 0, result.stderr
    assert all(directory.is_dir() for directory in others)
    score = json.loads((workdir / "evaluation" / "score.json").read_text())
    assert score["weights"] == "raw"
    assert score["autoencoder"] | {"path": encoders["autoencoder"], "tile": 8} == score["autoencoder"]
    assert score["text_encoder"]["path"] == encoders["text_encoder"]


@pytest.fixture(scope="module")
def run(text_plan, rough, save_run, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("text") / "run", text_plan, rough(text_plan))


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red circle"}\n')
    return tmp_path / "prompts.jsonl"


def test_mistakes_are_told_before_anything_is_measured(run, weights, shapes_data, prompts, run_module, tmp_path):
    """Validation, which comes first, would fail, because the parameters are missing."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "0" / "params")
    (tmp_path / "blank.txt").write_text('{"prompt": " "}\n')
    other = tmp_path / "other" / "geneval"
    other.mkdir(parents=True)
    (other / "settings.json").write_text('{"seed": 1}')
    for out, options, message in (
        ("out", [f"--geneval={prompts}", f"--geneval_rewritten={tmp_path}/blank.txt"], "blank.txt, line 1: prompt ' '"),
        ("other", [f"--geneval={prompts}"], f"{other} holds pictures that differ in "),
        ("out", [f"--inception={weights}", f"--reference={shapes_data}", "--reference_number=65"], "there are only 64"),
    ):
        result = run_module("evaluate", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / out}", *options)
        assert result.returncode == 2 and message in result.stderr.splitlines()[-1], result.stderr
    assert not (tmp_path / "out").exists()


def test_two_evaluations_do_not_share_a_directory(weights, run_module, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, name in enumerate(("a.png", "b.tif", "c.bmp")):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(pictures / name)
    options = [f"--samples_from={pictures}", f"--inception={weights}", f"--out={tmp_path / 'out'}"]
    with output_files.lock("out", tmp_path / "out" / ".measuring"):
        result = run_module("evaluate", *options)
    assert result.returncode == 2 and "another run is using it" in result.stderr
    result = run_module("evaluate", *options)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["quality"]["images"] == 3
    assert not (tmp_path / "out" / ".measuring").exists()


def test_what_is_measured_before_a_failure_is_kept(run, weights, prompts, run_module, tmp_path):
    """The same command then succeeds, even by another path to the run."""
    shown, out = tmp_path / "reference", tmp_path / "out"
    shown.mkdir()
    for number in range(5):
        Image.new("RGB", (8 + (number == 4), 8), (40 * number, 0, 0)).save(shown / f"{number}.png")
    (tmp_path / "link").symlink_to(run)
    options = [f"--out={out}", f"--geneval={prompts}", f"--inception={weights}", f"--reference={shown}", "--number=4"]
    options.append("--steps=1")
    result = run_module("evaluate", f"--workdir={run}", *options)
    assert result.returncode == 2 and "4.png is 9 x 8" in result.stderr
    assert not (out / "score.json").exists()
    kept = json.loads((out / "score.unfinished.json").read_text())
    (shown / "4.png").unlink()
    result = run_module("evaluate", f"--workdir={tmp_path / 'link'}", *options)
    assert result.returncode == 0, result.stderr
    score = json.loads((out / "score.json").read_text())
    assert {"validation", "geneval"} < kept.keys() and kept == {name: score[name] for name in kept}
    assert "quality" in score and not (out / "score.unfinished.json").exists()


EVALUATE_PRINTING_NAMES = """
import runpy, sys
from lina_jax import report
conditions_of = report.conditions_of
def printed(*given):
    found = conditions_of(*given)
    print(found[1], file=sys.stderr)
    return found
report.conditions_of = printed
runpy.run_module("lina_jax.evaluate", run_name="__main__")
"""


def test_a_report_has_the_class_names_of_the_data_that_is_given(
    tiny, rough, save_run, one_device, one_device_env, tmp_path
):
    with records.create(tmp_path / "data", "data", records.pixel_features(["cat", "dog", "newt"])) as writer:
        content = io.BytesIO()
        Image.new("RGB", (8, 8)).save(content, "PNG")
        writer.write("train", image=content.getvalue(), caption="", short_caption="", label=0, key="0")
    plan = state.make_blueprint(tiny(), one_device)
    workdir = save_run(tmp_path / "run", plan, rough(plan))
    options = [f"--workdir={workdir}", "--novalidation", "--steps=1", f"--data={tmp_path / 'data'}"]
    options.append(f"--report={tmp_path / 'page'}")
    command = [sys.executable, "-c", EVALUATE_PRINTING_NAMES, *options]
    result = subprocess.run(command, env=one_device_env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "['0: cat', '1: dog', '2: newt']" in result.stderr
