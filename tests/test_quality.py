"""Results depend only on (weights, seed, number); work that was finished before a kill is used."""

import dataclasses
import json
import os
import shutil
import signal
import zipfile

import jax
import numpy as np
import pytest
from inception_weights import write
from PIL import Image
from safetensors.numpy import load_file, save_file

from lina_jax import data, featurise, image_sources, mesh, pictures, quality, reference, shapes, state, train
from lina_jax.config import MeshConfig
from lina_jax.errors import Preempted, UserError
from lina_jax.featurise import Network
from lina_jax.workdir import saved_steps

COUNT = 44

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Chunks of 12 images, so that a few images make several; 44 is not a multiple of 12."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(featurise, "CHUNK", 12)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write(tmp_path_factory.mktemp("inception") / "thin.safetensors")


@pytest.fixture(scope="module")
def devices():
    return {count: mesh.build(MeshConfig(), jax.devices()[:count]) for count in (1, 8)}


@pytest.fixture(scope="module")
def networks(weights, devices):
    return {count: Network(weights, mesh) for count, mesh in devices.items()}


@pytest.fixture(scope="module")
def compared(networks, shapes_data):
    return reference.load(shapes_data, networks[1], per_device=4, work=None, images=True)


@pytest.fixture(scope="module")
def source(tiny, rough, devices):
    """A function of the number of devices: images of a class model with random weights."""
    made = {}

    def make(count):
        if count not in made:
            plan = state.make_blueprint(tiny(), devices[count])
            run = rough(plan)
            made[count] = image_sources.generated_images(plan, plan.config.sample, None, COUNT, seed=3, facts={})
            made[count].weights = run.params, run.frozen
        return made[count]

    return make


@pytest.fixture(scope="module")
def measure(source, networks, devices, compared):
    def measured(count=1, per_device=4, of=None, **options):
        common = {"count": COUNT, "per_device": per_device}
        return quality.measure(of or source(count), networks[count], compared, devices[count], **common, **options)

    return measured


@pytest.fixture(scope="module")
def whole(measure):
    return measure()


def test_all_metrics_are_measured(whole):
    told = whole.as_json()
    assert set(told) == {*quality.METRICS, "images", "reference"}
    assert told["fid"]["value"] > 0 and told["fid"]["standard_error"] > 0
    assert 0 <= told["precision"]["value"] <= 1
    assert told["inception_score"]["value"] > 1
    assert whole.images.shape == (pictures.SHOWN, 8, 8, 3)


def test_eight_devices_measure_what_one_does(measure, whole):
    eight = measure(8)
    np.testing.assert_array_equal(eight.images, whole.images)
    assert eight.as_json() == whole.as_json()
    assert eight.values == whole.values  # to the bit: each device runs the same program


def test_the_batch_size_does_not_matter(measure, whole):
    """Results agree in all reported digits; images and features are equal up to rounding."""
    assert measure(per_device=5).as_json() == whole.as_json()


def test_another_seed_matters(source, measure, whole, monkeypatch):
    monkeypatch.setattr(source(1), "_seed", 4)
    assert measure().as_json() != whole.as_json()


class Killed:
    """A source that is interrupted when it reaches number `at`."""

    def __init__(self, source, at=10**9):
        self._source, self._at, self.made, self.facts, self.count = source, at, [], source.facts, source.count

    def batch(self, numbers):
        if numbers[-1] >= self._at:
            raise KeyboardInterrupt
        self.made.extend(numbers.tolist())
        return self._source.batch(numbers)


def test_an_interrupted_measurement_goes_on(source, measure, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measure(of=Killed(source(1), 30), work=tmp_path / "work")
    again = Killed(source(1))
    found = measure(of=again, work=tmp_path / "work")
    assert min(again.made) == 24  # two chunks of 12 were done
    assert found.values == whole.values
    np.testing.assert_array_equal(found.images, whole.images)


def test_others_wait_while_process_0_adds_what_was_done(source, measure, tmp_path, monkeypatch):
    """Otherwise they would wait in a collective, which times out after 30 s on CPUs."""
    with pytest.raises(KeyboardInterrupt):
        measure(of=Killed(source(1), 30), work=tmp_path / "work")
    events, add = [], quality.Collector.add

    def added(collector, chunk):
        events.append(f"add {chunk.start}")
        add(collector, chunk)

    class Watched(Killed):
        def batch(self, numbers):
            events.append("draw")
            return super().batch(numbers)

    monkeypatch.setattr(quality.Collector, "add", added)
    monkeypatch.setattr(featurise.hosts, "barrier", events.append)
    measure(of=Watched(source(1)), work=tmp_path / "work")
    before = ["what is done is known", "add 0", "add 12", "what is done is added", "draw"]
    assert events[: len(before)] == before


def test_devices_gather_no_more_images_than_are_kept(devices, monkeypatch):
    """The batch of a pod would not fit on one of them; 20 images are gathered in portions of 7."""
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
    placed = jax.device_put(images, mesh.sharding(devices[8], "batch"))
    monkeypatch.setattr(featurise, "_PORTION", 7 * images[0].nbytes)
    np.testing.assert_array_equal(featurise._gathered(placed, devices[8], 20), images[:20])
    program = featurise._gatherer(devices[8]).lower(placed, np.arange(7, dtype=np.int32)).compile().as_text()
    assert "[7,8,8,3]" in program
    assert "[64," not in program


@pytest.mark.parametrize("left", [0, 1000])
def test_a_file_of_features_that_is_cut_is_named(left, source, measure, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measure(of=Killed(source(1), 30), work=tmp_path / "work")
    os.truncate(tmp_path / "work" / "000001.npz", left)
    with pytest.raises(UserError, match=r"000001\.npz is damaged .*: remove it to recompute it"):
        measure(of=source(1), work=tmp_path / "work")


@pytest.mark.parametrize(
    ("seed", "others"),
    [
        (99, {}),
        (3, {"autoencoder": {"path": "another"}}),
        (3, {"autoencoder": {"tile": 8}}),
        (3, {"loss": {"shift": 2.0}}),
        (3, {"text_encoder": {"path": "another"}}),
    ],
    ids=str,
)
def test_what_was_done_for_other_pictures_does_not_count(
    seed, others, tiny, devices, source, measure, whole, tmp_path, capsys
):
    plan = state.make_blueprint(tiny(**others), devices[1])
    other = Killed(source(1), 30)
    other.facts = image_sources.generated_images(plan, plan.config.sample, None, COUNT, seed=seed, facts={}).facts
    with pytest.raises(KeyboardInterrupt):
        measure(of=other, work=tmp_path / "work")
    again = Killed(source(1))
    assert measure(of=again, work=tmp_path / "work").values == whole.values
    assert min(again.made) == 0
    assert "is from another evaluation, which did not finish: replacing it" in capsys.readouterr().err


def test_what_was_done_by_another_network_does_not_count(source, networks, measure, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks[1], "digest", "of other weights")
        with pytest.raises(KeyboardInterrupt):
            measure(of=Killed(source(1), 19), work=tmp_path / "work")
    assert (tmp_path / "work" / "000000.npz").exists()
    again = Killed(source(1), 4)
    with pytest.raises(KeyboardInterrupt):
        measure(of=again, work=tmp_path / "work")
    assert again.made == [0, 1, 2, 3]


def test_a_chunk_whose_writing_was_cut_off_is_not_done(tmp_path, monkeypatch):
    def cut_off(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    chunk = featurise.Chunk(0, featurise.Features(*[np.zeros((12, 1))] * 3), np.zeros((0, 8, 8, 3), np.uint8))
    monkeypatch.setattr(np, "savez", cut_off)
    with pytest.raises(KeyboardInterrupt):
        featurise.ChunkStore(tmp_path, {}).add(chunk)
    assert featurise.ChunkStore(tmp_path, {}).count == 0


def test_the_npz_file_is_adms_and_measures_the_same(measure, whole, networks, devices, compared, tmp_path):
    labels = np.arange(COUNT) % 3
    measure(work=tmp_path / "work", npz=tmp_path / "samples.npz", labels=labels)
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (COUNT, 8, 8, 3) and arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_0"][: len(whole.images)], whole.images)
        np.testing.assert_array_equal(arrays["arr_1"], labels)
    source = image_sources.open_images(tmp_path / "samples.npz", devices[1])
    assert measure(of=source).values == whole.values


def test_a_folder_of_pictures_measures_the_same(measure, whole, source, devices, tmp_path):
    for first in range(0, COUNT, 4):
        for number, image in enumerate(np.asarray(source(1).batch(np.arange(first, first + 4))), first):
            Image.fromarray(image).save(tmp_path / f"{number:03d}.png")
    folder = image_sources.open_images(tmp_path, devices[1])
    found = measure(of=folder)  # in another order
    for name, (value, _) in whole.values.items():
        assert found.values[name].value == pytest.approx(value, rel=1e-6), name
    Image.new("RGB", (9, 8)).save(tmp_path / "zzz.png")
    folder = image_sources.open_images(tmp_path, devices[1])
    with pytest.raises(UserError, match=r"zzz.png is 9 x 8, 000.png is 8 x 8: all pictures must have the same size"):
        folder.batch(np.arange(COUNT + 1))


def test_a_dataset_against_itself(measure, networks, devices, compared, shapes_data):
    """The distances are zero, and all images are within the manifold."""
    source = image_sources.open_images(shapes_data, devices[1])
    own = quality.measure(source, networks[1], compared, devices[1], count=64, per_device=4)
    told = own.as_json()
    assert told["fid"]["value"] == 0 and told["sfid"]["value"] == 0
    assert told["precision"]["value"] == told["recall"]["value"] == 1


def test_a_computed_reference_is_stored_and_read(networks, weights, shapes_data, devices, tmp_path):
    path = tmp_path / "reference.npz"
    made = reference.load(shapes_data, networks[8], per_device=4, work=tmp_path / "work", images=True, out=path)
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["mu"], made.pool.mean)
        assert arrays["sigma_s"].shape == arrays["mu_s"].shape * 2
        kept = {image.tobytes() for image in arrays["arr_0"]}
        assert kept == {shapes.render(shapes.scene("train", i), 8).tobytes() for i in range(64)}
    assert zipfile.ZipFile(path).testzip() is None
    stored = reference.load(path, networks[1], per_device=4, work=None, images=True)
    np.testing.assert_array_equal(stored.features, made.features)
    assert stored.pool.covariance.tobytes() == made.pool.covariance.tobytes()
    other = Network(write(tmp_path / "other.safetensors", seed=1), devices[1])
    with pytest.raises(UserError, match="was made with different weights of Inception v3"):
        reference.load(path, other, per_device=4, work=None, images=True)
    save_file(load_file(weights), tmp_path / "same.safetensors", {"note": "the same weights in another file"})
    assert Network(tmp_path / "same.safetensors", devices[1]).digest == networks[1].digest


def test_statistics_without_images_give_distances_alone(source, networks, devices, compared, tmp_path):
    """As in the files of other suites; the result says why the other metrics are missing."""
    np.savez(tmp_path / "statistics.npz", mu=compared.pool.mean, sigma=compared.pool.covariance)
    statistics = reference.load(tmp_path / "statistics.npz", networks[1], per_device=4, work=None, images=True)
    found = quality.measure(source(1), networks[1], statistics, devices[1], count=COUNT, per_device=4)
    assert set(found.values) == {"fid", "inception_score"}
    assert found.not_measured["precision"] == "the reference has no images (arr_0)"
    assert "no statistics" in found.not_measured["sfid"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((3, 4, 4))}, r"arr_0 is \(3, 4, 4\) float64, expected uint8 images"),
        ({"other": np.zeros(3)}, "no arr_0, expected uint8 images"),
        ({"mu": np.zeros(4), "sigma": np.zeros((4, 3))}, r"mu is \(4,\) and sigma \(4, 3\)"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "mu or sigma has values that are not finite"),
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, "mu is of 4 features, these weights have "),
    ],
)
def test_files_that_are_no_reference_are_named(networks, tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        reference.load(tmp_path / "bad.npz", networks[1], per_device=4, work=None, images=True)


def test_what_is_wrong_with_a_reference_is_known_before_it_is_computed(networks, shapes_data, tmp_path, monkeypatch):
    monkeypatch.setattr(featurise, "chunks", None)
    (tmp_path / "note.txt").touch()
    options = {"per_device": 4, "work": tmp_path / "work", "images": True}
    with pytest.raises(UserError, match=r"note.txt: not a folder of pictures, an .npz file or a prepared dataset"):
        reference.opened(tmp_path / "note.txt", networks[1], **options)
    with pytest.raises(UserError, match="--reference_number=65: there are only 64 images"):
        reference.opened(shapes_data, networks[1], **options, count=65)
    reference.opened(shapes_data, networks[1], **options)
    assert not (tmp_path / "work").exists()


@pytest.fixture(scope="module")
def trained(tiny_text, weights, compared, train_alone, tmp_path_factory):
    """(config, workdir, state) of a run of three steps on one device, measured after the second and the last."""
    path = tmp_path_factory.mktemp("trained")
    np.savez(path / "statistics.npz", mu=compared.pool.mean, sigma=compared.pool.covariance)
    measuring = {"images": 28, "images_every": 2, "inception": str(weights), "per_device": 4}
    config = tiny_text(steps=3, checkpoint={"every": 2}, eval={**measuring, "reference": str(path / "statistics.npz")})
    return config, path / "run", train_alone(config, path / "run")


def of_quality(workdir):
    """The rows of the log with image metrics."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "quality/fid" in line]


def test_the_training_loop_measures_its_average(trained, devices):
    config, workdir, run = trained
    assert [row["step"] for row in of_quality(workdir)] == [2, 3]
    plan = state.make_blueprint(config, devices[1])
    drawn_quality = quality.DrawnQuality(plan, data.open_records(config, "validation"))
    again = drawn_quality.measure(run.ema, run.frozen, step=3)
    assert of_quality(workdir)[-1]["quality/fid"] == again.as_json()["fid"]["value"]
    assert json.loads(json.dumps(again.as_json()))["images"] == 28
    assert not (workdir / "measuring").exists()


@pytest.mark.parametrize(
    ("number", "error", "step"),
    [(signal.SIGTERM, Preempted, 2), (signal.SIGINT, KeyboardInterrupt, 3)],
    ids=["sigterm", "ctrl_c"],
)
def test_a_measurement_that_was_stopped_in_the_training_loop_goes_on(
    number, error, step, trained, tmp_path, train_on_one_device, monkeypatch
):
    """Also after the last step."""
    config, workdir, _ = trained
    batch, made = image_sources.GeneratedImages.batch, []

    def stopped(source, numbers):
        if source.facts["step"] == step and numbers[-1] == 27:
            signal.raise_signal(number)
        return batch(source, numbers)

    def counted(source, numbers):
        made.extend((source.facts["step"], number) for number in numbers.tolist())
        return batch(source, numbers)

    monkeypatch.setattr(image_sources.GeneratedImages, "batch", stopped)
    with pytest.raises(error, match=f"resume from step {step}"):
        train.train(config, tmp_path / "run")
    assert saved_steps(tmp_path / "run")[-1] == step
    monkeypatch.setattr(image_sources.GeneratedImages, "batch", counted)
    train.train(config, tmp_path / "run")
    assert min(made) == (step, 12)  # one chunk of 12 was finished; the second was being gathered when the signal came
    assert of_quality(tmp_path / "run") == of_quality(workdir)
    assert not (tmp_path / "run" / "measuring").exists()


def test_a_run_with_other_cadences_goes_on_with_the_same_features(tiny, weights, one_device):
    """A change of what is trained or drawn invalidates them."""

    def facts(**changes):
        config = tiny(eval={"images": 8, "inception": str(weights)}, **changes)
        return quality.DrawnQuality(state.make_blueprint(config, one_device), None)._source.facts

    assert facts(steps=9, log={"every": 7}, checkpoint={"every": 2}) == facts()
    for changes in ({"optim": {"learning_rate": 0.5}}, {"sample": {"steps": 3}}, {"autoencoder": {"tile": 8}}):
        assert facts(**changes) != facts(), changes


def test_features_that_nothing_asks_for_any_more_are_removed(trained, tmp_path, train_on_one_device):
    """A killed measurement left them, and the run starts again without measuring, here after its last step."""
    config, workdir, _ = trained
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "measuring").mkdir()
    train.train(dataclasses.replace(config, eval=dataclasses.replace(config.eval, images=0)), tmp_path / "run")
    assert not (tmp_path / "run" / "measuring").exists()


def test_too_few_images_are_refused_before_any_is_drawn(tiny, weights, networks, shapes_data, one_device, tmp_path):
    """Precision and recall need a third neighbour; with statistics alone, there is no such minimum."""
    options = {"per_device": 4, "work": None, "count": 3}
    with pytest.raises(UserError, match=r"shapes: 3 images; a reference needs at least 4"):
        reference.load(shapes_data, networks[1], **options, images=True)
    made = reference.load(shapes_data, networks[1], **options, images=False)
    statistics = {"mu": made.pool.mean, "sigma": made.pool.covariance}
    np.savez(tmp_path / "statistics.npz", **statistics)
    np.savez(tmp_path / "with_images.npz", **statistics, arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    for name, fits in (("statistics", True), ("with_images", False)):
        config = tiny(eval={"images": 3, "inception": str(weights), "reference": str(tmp_path / f"{name}.npz")})
        plan = state.make_blueprint(config, one_device)
        if fits:
            quality.DrawnQuality(plan, None)
            continue
        with pytest.raises(UserError, match=r"eval.images=3: more than 3 are needed for precision and recall"):
            quality.DrawnQuality(plan, None)
