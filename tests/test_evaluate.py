"""The command that measures, and the one that training names: what it asks for, says and leaves."""

import json
import shlex
import shutil

import numpy as np
import pytest
from encoder_checkpoints import write_autoencoder, write_phi
from inception_weights import write

from lina_jax import evaluate, state
from lina_jax.errors import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write(tmp_path_factory.mktemp("inception") / "thin.safetensors")


def test_training_names_the_command_that_makes_its_reference(
    tiny, weights, shapes_data, run_module, one_device, tmp_path
):
    """And takes what that makes."""

    def prepared(reference):
        config = tiny(eval={"images": 8, "inception": str(weights), "reference": str(reference)})
        return evaluate.DrawnQuality(state.blueprint(config, one_device), None)

    with pytest.raises(UserError, match=f"eval.reference={shapes_data}: training reads .npz files with mu") as error:
        prepared(shapes_data)
    python, module, name, *options, out = shlex.split(str(error.value).partition(" is one after ")[2])
    assert (python, module, name, out) == ("python", "-m", "lina_jax.evaluate", "--out=DIR")
    result = run_module("evaluate", *options, f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    prepared(tmp_path / "reference.npz")
    np.savez(tmp_path / "pictures.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    for other in ("pictures.npz", "nowhere.npz"):
        with pytest.raises(UserError, match=f"eval.reference={tmp_path}/{other}: training reads .npz files with mu"):
            prepared(tmp_path / other)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--number=3", "--number=3: more than 3 are needed for precision and recall"),
        ("--number=1", "--number=1: must be at least 2"),
    ],
)
def test_the_command_says_how_many_images_it_takes(run_module, weights, shapes_data, tmp_path, flag, message):
    options = [f"--inception={weights}", f"--reference={shapes_data}", f"--out={tmp_path / 'out'}"]
    result = run_module("evaluate", "--workdir=nowhere", flag, *options)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_score_json_tells_what_draws_and_nothing_else_is_read(tiny, rough, save_run, one_device, run_module, tmp_path):
    """Parameters and encoders as they are asked for; of the average not a byte is there."""
    encoders = {"autoencoder": str(tmp_path / "vae"), "text_encoder": str(tmp_path / "phi")}
    write_autoencoder(tmp_path / "vae", scaling_factor=0.2)
    write_phi(tmp_path / "phi")
    model = {"condition": "text", "text_encoder": "features", "text_dim": 32, "latent_channels": 4}
    autoencoder = {"kind": "sdxl", "stride": 2, "scaling_factor": 0.2, "tile": 8}
    plan = state.blueprint(tiny(model=model, autoencoder=autoencoder), one_device)
    workdir = save_run(tmp_path / "run", plan, rough(plan))
    shutil.rmtree(workdir / "checkpoints" / "0" / "ema")
    flags = [f"--{name}={path}" for name, path in encoders.items()]
    others = [workdir / "evaluation" / name for name in ("work", ".measuring")]  # somebody's own; unfinished metrics
    for directory in others:
        directory.mkdir(parents=True)
    result = run_module("evaluate", f"--workdir={workdir}", "--raw", "--novalidation", *flags)
    assert result.returncode == 0, result.stderr
    assert all(directory.is_dir() for directory in others)
    score = json.loads((workdir / "evaluation" / "score.json").read_text())
    assert score["weights"] == "raw"
    assert score["autoencoder"] | {"path": encoders["autoencoder"], "tile": 8} == score["autoencoder"]
    assert score["text_encoder"]["path"] == encoders["text_encoder"]
