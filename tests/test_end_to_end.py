"""From a tar of captioned photos to pictures: latents of small random encoders, training, sampling, decoding."""

import io
import json
import shutil
import tarfile

import inception_weights
import jax
import numpy as np
import pytest
from encoder_checkpoints import write_autoencoder, write_phi
from PIL import Image

from lina_jax import data, image_sources, reference, shapes, state, train, training_step
from lina_jax.encoders import load_encoders
from lina_jax.errors import UserError
from lina_jax.featurise import Network
from lina_jax.models import vae
from lina_jax.prepare import Settings, Share, contact_sheet, prepare
from lina_jax.workdir import saved_steps

MODEL = {
    "condition": "text", "text_encoder": "features", "text_length": 16, "text_dim": 32,
    "latent_channels": 4, "patch_size": 1, "image_grid": (4, 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two WebDataset tars, each of 12 JPEGs of 40 x 48 pixels with long and short captions."""
    directory = tmp_path_factory.mktemp("photos")
    for part in range(2):
        _write_tar(directory / f"photos-{part:06d}.tar", range(12 * part, 12 * part + 12))
    return directory / "*.tar"


def _write_tar(path, numbers):
    with tarfile.open(path, "w") as archive:
        for i in numbers:
            scene = shapes.scene("train", i, 0)
            image = io.BytesIO()
            Image.fromarray(shapes.render(scene, 48)[:40]).save(image, "JPEG")
            short = json.dumps({"short": scene.caption.split()[-1]}).encode()
            for kind, data in (("jpg", image.getvalue()), ("txt", scene.caption.encode()), ("json", short)):
                member = tarfile.TarInfo(f"{i:06d}.{kind}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Directories of an autoencoder of stride 8 and of a text encoder, in their published layouts."""
    directory = tmp_path_factory.mktemp("encoders")
    write_autoencoder(directory / "vae", channels=(32, 32, 32, 32), scaling_factor=0.2)
    write_phi(directory / "phi", width=32)
    return {"autoencoder": str(directory / "vae"), "text_encoder": str(directory / "phi")}


def pixels(photos, **more) -> Settings:
    column = {"short_caption_column": "json.short"}
    return Settings(source="webdataset", input=str(photos), resolution=32, validation=4, **column, **more)


def latents(photos, encoders) -> Settings:
    return pixels(photos, **encoders, dtype="float32", batch_size=5)


@pytest.fixture(scope="module")
def prepared(photos, encoders, tmp_path_factory):
    """The photos as latents and text features, and as pixels."""
    out = tmp_path_factory.mktemp("prepared")
    totals = prepare(out / "latents", latents(photos, encoders))
    assert totals["images"] == {"train": 20, "validation": 4}
    prepare(out / "pixels", pixels(photos))
    return out


@pytest.fixture(scope="module")
def experiment(tiny, encoders):
    def make(data, *, online: bool):
        paths = {kind: {"path": path} for kind, path in encoders.items()} if online else {}
        latents = {"kind": "sdxl", "stride": 8, "scaling_factor": 0.2} | paths.get("autoencoder", {})
        return tiny(
            model=MODEL, autoencoder=latents, text_encoder=paths.get("text_encoder", {}), data={"path": str(data)},
            steps=4, log={"preview_images": 0}, eval={"examples": 4}, checkpoint={"every": 2},
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def run_of_latents(prepared, experiment, train_alone, tmp_path_factory):
    """The workdir of a model that was trained on latents, without encoders."""
    workdir = tmp_path_factory.mktemp("latents") / "run"
    train_alone(experiment(prepared / "latents", online=False), workdir)
    return workdir


def test_photos_become_latents_a_model_and_pictures(run_of_latents, encoders, tmp_path, run_module):
    losses = [json.loads(line) for line in (run_of_latents / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in losses if "loss" in line)
    drawn = run_module(
        "sample", f"--workdir={run_of_latents}", "--prompt=a red circle", "--num=2", f"--out={tmp_path}/drawn",
        *(f"--{name}={path}" for name, path in encoders.items()),
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    pictures = [np.asarray(Image.open(tmp_path / "drawn" / f"0000{i}.png")) for i in range(2)]
    assert [picture.shape for picture in pictures] == [(32, 32, 3)] * 2
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize("devices", [1, 3])
def test_latents_do_not_depend_on_processes_or_devices(photos, prepared, encoders, tmp_path, monkeypatch, devices):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:devices])
    made = latents(photos, encoders)
    assert prepare(tmp_path / "out", made, share=Share(1, 2)) is None
    prepare(tmp_path / "out", made, share=Share(0, 2))
    for path in (prepared / "latents").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_a_cache_of_features_is_read_though_an_encoder_is_named(prepared, experiment, one_device):
    config = experiment(prepared / "latents", online=True)
    batch = data.fixed_examples(data.open_records(config, "train", load_encoders(config, one_device).text), 2)
    assert batch["text"].dtype == np.float16


@pytest.mark.parametrize("form", ["latents", "pixels"])
def test_a_dataset_is_shown(prepared, photos, encoders, form, tmp_path):
    settings = latents(photos, encoders) if form == "latents" else pixels(photos)
    contact_sheet(prepared / form, settings, tmp_path / "shown.png")
    with Image.open(tmp_path / "shown.png") as image:
        assert np.asarray(image).std() > 10


def test_a_model_of_latents_says_what_it_lacks_for_drawing(run_of_latents, tmp_path, run_module):
    drawn = run_module("sample", f"--workdir={run_of_latents}", "--prompt=a red circle", f"--out={tmp_path}/drawn")
    assert drawn.returncode == 2
    assert "--autoencoder=DIR" in drawn.stderr
    assert drawn.stderr.count("\n") == 1


def test_frozen_encoders_in_the_step_equal_a_cache(prepared, experiment, one_device, no_optimizer):
    losses = []
    for form, online in (("latents", False), ("pixels", True)):
        config = experiment(prepared / form, online=online)
        encoders = load_encoders(config, one_device)
        plan = state.make_blueprint(config, one_device, encoders)
        batch = data.fixed_examples(data.open_records(config, "train", encoders.text), config.batch_size)
        losses.append(float(training_step.make_train_step(plan)(plan.init(), batch)[1]["loss"]))
    # The cache is float16, whose rounding is 5e-4 of each value and averages out. Measured: 1e-6.

    np.testing.assert_allclose(losses[0], losses[1], rtol=3e-5)


def test_training_goes_on_bit_for_bit_with_encoders_in_the_step(
    prepared, experiment, tmp_path, identical, train_on_one_device
):
    config = experiment(prepared / "pixels", online=True)
    whole = train.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert saved_steps(tmp_path / "run")[-1] == 2
    assert identical(train.train(config, tmp_path / "run").params, whole.params)


def test_latents_are_measured_as_the_autoencoder_of_a_run_decodes_them(prepared, experiment, one_device, tmp_path):
    """Their means are decoded, and the stored reference records that they are reconstructions."""
    config = experiment(prepared / "latents", online=True)
    plan = state.make_blueprint(config, one_device, load_encoders(config, one_device))
    source = image_sources.open_images(prepared / "latents", one_device, "validation", plan)
    assert source.count == 4
    shown = np.asarray(source.batch(np.arange(4)))
    assert shown.shape == (4, 32, 32, 3)
    photos = image_sources.open_images(prepared / "pixels", one_device, "validation").batch(np.arange(4))
    moments = plan.encoders.moments(plan.encoders.weights, np.asarray(photos, np.float32) / 127.5 - 1)
    means = vae.scale(plan.config.autoencoder, np.split(moments, 2, axis=-1)[0])
    again = vae.to_uint8(plan.encoders.pixels(plan.encoders.weights, means))
    # Stored moments are float16.
    assert np.mean(np.abs(np.asarray(again, np.int32) - shown)) < 0.5
    network = Network(inception_weights.write(tmp_path / "inception.safetensors"), one_device)
    options = {"per_device": 4, "images": False, "work": tmp_path / "work", "out": tmp_path / "reference.npz"}
    made = reference.load(prepared / "latents", network, **options, blueprint=plan)
    stored = reference.load(tmp_path / "reference.npz", network, **options)
    assert made.facts["reconstructed_by"] == stored.facts["reconstructed_by"] == config.autoencoder.path
    assert image_sources.npz_array(options["out"], "arr_0").shape == (20, 32, 32, 3)
    with pytest.raises(UserError, match="latents holds latents: they are decoded as --reference with --workdir"):
        image_sources.open_images(prepared / "latents", one_device)
