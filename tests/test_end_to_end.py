"""From a tar of captioned photos to pictures: latents of small random encoders, training, sampling, decoding."""

import io
import json
import tarfile

import numpy as np
import pytest
from encoder_checkpoints import write_autoencoder, write_phi
from PIL import Image

from lina_jax import data, shapes, state, train
from lina_jax.encoders import load_encoders
from lina_jax.prepare import Settings, prepare

MODEL = {
    "condition": "text", "text_encoder": "features", "text_length": 16, "text_dim": 32,
    "latent_channels": 4, "patch_size": 1, "image_grid": (4, 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A tar of 24 JPEGs of 40 x 48 pixels with long and short captions, in the manner of WebDataset."""
    path = tmp_path_factory.mktemp("photos") / "photos-000000.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(24):
            scene = shapes.scene("train", i, 0)
            image = io.BytesIO()
            Image.fromarray(shapes.render(scene, 48)[:40]).save(image, "JPEG")
            short = json.dumps({"short": scene.caption.split()[-1]}).encode()
            for kind, data in (("jpg", image.getvalue()), ("txt", scene.caption.encode()), ("json", short)):
                member = tarfile.TarInfo(f"{i:06d}.{kind}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """(autoencoder of stride 8, text encoder) in the layouts in which they are published."""
    directory = tmp_path_factory.mktemp("encoders")
    write_autoencoder(directory / "vae", channels=(32, 32, 32, 32), scaling_factor=0.2)
    write_phi(directory / "phi", width=32)
    return {"autoencoder": str(directory / "vae"), "text_encoder": str(directory / "phi")}


@pytest.fixture(scope="module")
def prepared(photos, encoders, tmp_path_factory):
    """The photos as latents and text features, and as pixels."""
    out = tmp_path_factory.mktemp("prepared")
    common = {
        "source": "webdataset", "input": str(photos), "resolution": 32, "validation": 4,
        "short_caption_column": "json.short",
    }  # fmt: skip
    totals = prepare(out / "latents", Settings(**common, **encoders, dtype="float32", batch_size=5))
    assert totals["images"] == {"train": 20, "validation": 4}
    prepare(out / "pixels", Settings(**common))
    return out


@pytest.fixture
def experiment(tiny, encoders):
    def make(data, *, online: bool, steps: int = 4):
        paths = {kind: {"path": path} for kind, path in encoders.items()} if online else {}
        latents = {"kind": "sdxl", "stride": 8, "scaling_factor": 0.2} | paths.get("autoencoder", {})
        return tiny(
            model=MODEL, autoencoder=latents, text_encoder=paths.get("text_encoder", {}), data={"path": str(data)},
            steps=steps, log={"preview_images": 0}, eval={"examples": 4}, checkpoint={"every": 2},
        )  # fmt: skip

    return make


def test_photos_become_latents_a_model_and_pictures(
    prepared, encoders, experiment, tmp_path, run_module, config_file, train_on_one_device
):
    train.train(experiment(prepared / "latents", online=False), tmp_path / "run")
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in losses if "loss" in line)
    drawn = run_module(
        "sample", f"--workdir={tmp_path}/run", "--prompt=a red circle", "--num=2", f"--out={tmp_path}/drawn",
        *(f"--{name}={path}" for name, path in encoders.items()),
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    pictures = [np.asarray(Image.open(tmp_path / "drawn" / f"0000{i}.png")) for i in range(2)]
    assert [picture.shape for picture in pictures] == [(32, 32, 3)] * 2
    assert not np.array_equal(*pictures)


def test_a_model_of_latents_says_what_it_lacks_for_drawing(
    prepared, experiment, tmp_path, run_module, train_on_one_device
):
    train.train(experiment(prepared / "latents", online=False), tmp_path / "run")
    drawn = run_module("sample", f"--workdir={tmp_path}/run", "--prompt=a red circle", f"--out={tmp_path}/drawn")
    assert drawn.returncode == 2
    assert "--autoencoder=DIR" in drawn.stderr
    assert drawn.stderr.count("\n") == 1


def test_frozen_encoders_in_the_step_equal_a_cache(prepared, experiment, one_device):
    losses = []
    for form, online in (("latents", False), ("pixels", True)):
        config = experiment(prepared / form, online=online)
        encoders = load_encoders(config, one_device)
        plan = state.blueprint(config, one_device, encoders)
        batch = data.fixed_examples(data.open_records(config, "train", encoders.text), config.batch_size)
        losses.append(float(state.make_train_step(plan)(plan.init(), batch)[1]["loss"]))
    # The cache is float16, whose rounding is 5e-4 of each value and averages out; 1e-6 was measured.

    np.testing.assert_allclose(losses[0], losses[1], rtol=3e-5)


def test_training_goes_on_bit_for_bit_with_encoders_in_the_step(
    prepared, experiment, tmp_path, identical, train_on_one_device
):
    whole = train.train(experiment(prepared / "pixels", online=True), tmp_path / "whole")
    train.train(experiment(prepared / "pixels", online=True, steps=2), tmp_path / "halves")
    assert identical(
        train.train(experiment(prepared / "pixels", online=True), tmp_path / "halves").params, whole.params
    )
