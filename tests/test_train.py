"""A run that was interrupted ends like one that was not, failures leave workdirs whole."""

import dataclasses
import errno
import importlib
import itertools
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from lina_jax import mesh, metrics, state
from lina_jax.checkpoint import Checkpoints
from lina_jax.errors import RUN_AGAIN, Preempted, UserError, ending
from lina_jax.flops import training_flops
from lina_jax.train import train
from lina_jax.workdir import check_config, load_config, write_config

pytestmark = pytest.mark.usefixtures("train_on_one_device", "traced_once")
DEADLINE_S = 240  # for a subprocess to get somewhere


def whole(run: state.TrainState):
    """A state on the host: donation cannot take it away."""
    return jax.device_get(run)


@pytest.fixture(scope="module")
def config(tiny_text):
    # Muon, whose state has AdamW's in it.
    previews = {"preview_images": 2, "preview_every": 3, "preview_prompts": ("a red circle",)}
    return tiny_text(optim={"name": "muon"}, log=previews, eval={"every": 3, "examples": 6})


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory, one_device):
    """(workdir, state) of six steps in one go."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "build", lambda config, devices=None: one_device)
        return workdir, whole(train(config, workdir))


def test_a_run_resumed_equals_a_run_in_one_go(config, finished, tmp_path, identical):
    """Bit for bit: parameters, their average, moments, counters."""
    halfway = train(dataclasses.replace(config, steps=3), tmp_path / "run")
    assert int(halfway.step) == 3
    resumed = train(config, tmp_path / "run")
    assert identical(whole(resumed), finished[1])


def test_a_run_that_starts_from_weights_is_a_run(config, finished, tmp_path, identical, one_device):
    """Bit for bit, where the weights are those of a fresh run; what they came with does not bind the training."""
    fresh = state.blueprint(config, one_device).init()
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=1.0), batch_size=4)
    write_config(tmp_path / "run", other)
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint)
    checkpoints.save_weights(fresh.params, fresh.frozen)
    checkpoints.close()
    check_config(tmp_path / "run", config)
    with pytest.raises(UserError, match=r"belongs to another config: model\.width"):
        check_config(tmp_path / "run", dataclasses.replace(config, model=dataclasses.replace(config.model, width=64)))
    assert identical(whole(train(config, tmp_path / "run")), finished[1])
    with pytest.raises(UserError, match=r"batch_size.*optim\.learning_rate"):  # trained by now
        check_config(tmp_path / "run", other)


def test_worker_processes_change_nothing(config, run_module, config_file, tmp_path, one_device, identical):
    """From the command line, where workers must not take the program's flags or devices."""
    silent = dataclasses.replace(config, steps=3, log=dataclasses.replace(config.log, preview_images=0))
    runs = []
    for workers in (0, 2):
        workdir = tmp_path / str(workers)
        options = f"--config={config_file(silent)}", f"--workdir={workdir}", f"--config.data.workers={workers}"
        result = run_module("train", *options)
        assert result.returncode == 0, result.stderr
        checkpoints = Checkpoints(workdir, config.checkpoint, create=False)
        runs.append(whole(checkpoints.restore(state.blueprint(config, one_device))))
    assert identical(*runs)


def test_training_changes_the_parameters(finished, one_device, config, identical):
    workdir, run = finished
    first = Checkpoints(workdir, config.checkpoint, create=False).restore(state.blueprint(config, one_device), 0)
    assert not identical(run.params, first.params)
    assert identical(run.frozen, first.frozen)


def test_a_checkpoint_restores_on_another_mesh(config, finished, identical):
    workdir, run = finished
    other = jax.make_mesh((1, 2, 2, 1, 2), mesh.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 5)
    plan = state.blueprint(config, other)
    restored = Checkpoints(workdir, config.checkpoint, create=False).restore(plan)
    assert identical(whole(restored), run)
    shards = restored.params["patch_embed"]["kernel"].addressable_shards
    assert shards[0].data.size * 2 == restored.params["patch_embed"]["kernel"].size


def test_kept_checkpoints(finished, config):
    assert Checkpoints(finished[0], config.checkpoint, create=False).steps() == [0, 3, 6]


def test_only_the_last_and_the_milestones_are_kept(config, tmp_path):
    settings = dataclasses.replace(config.checkpoint, every=1, keep_last=1, keep_every=2)
    config = dataclasses.replace(config, checkpoint=settings, steps=5)
    train(dataclasses.replace(config, log=dataclasses.replace(config.log, preview_images=0)), tmp_path / "run")
    assert Checkpoints(tmp_path / "run", settings, create=False).steps() == [0, 2, 4, 5]


def test_what_a_run_reports(finished, config):
    rows = metrics.read_jsonl(finished[0] / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    promised = {
        "loss", "grad_norm", "learning_rate", "skipped", "images_per_s", "model_flops_per_s", "bad_records",
        "truncated_captions",
    }  # fmt: skip
    for row in rows:
        assert promised <= row.keys()
        assert np.isfinite(row["loss"])
        assert row["skipped"] == 0
        assert row["images_per_s"] > 0
        flops = row["images_per_s"] * training_flops(config.model, config.loss)
        assert row["model_flops_per_s"] == pytest.approx(flops)
    assert [row["learning_rate"] for row in rows[:3]] == pytest.approx([0.5005e-3, 1e-3, 1e-3])  # warm-up of 2
    levels = {f"validation/loss{level}{kind}" for level in LEVELS for kind in ("", "_ema")}
    assert levels <= rows[-1].keys()
    assert all(rows[-1][name] > 0 for name in levels)
    assert rows[-1]["validation/loss"] != rows[-1]["validation/loss_ema"]


LEVELS = ("", "_sigma_0.00_0.25", "_sigma_0.25_0.50", "_sigma_0.50_0.75", "_sigma_0.75_1.00")


def test_what_a_run_leaves_to_look_at(finished):
    workdir = finished[0]
    for picture in ("previews/00000003.png", "previews/00000006.png", "loss.png"):
        with Image.open(workdir / picture) as image:
            assert min(image.size) > 100
    assert list((workdir / "events").glob("*tfevents*"))


def test_a_finished_run_started_again_changes_nothing(config, finished, tmp_path, identical, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    assert identical(whole(train(config, tmp_path / "run")), finished[1])
    assert capsys.readouterr().err == f"{tmp_path / 'run'} is already at step 6, steps=6: nothing to do\n"


def test_fewer_steps_than_are_done_change_nothing(config, finished, tmp_path, identical, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    assert identical(whole(train(dataclasses.replace(config, steps=4), tmp_path / "run")), finished[1])
    assert capsys.readouterr().err == f"{tmp_path / 'run'} is already at step 6, steps=4: nothing to do\n"
    assert load_config(tmp_path / "run").steps == 6


def measured(workdir):
    """What stands in the log beside the steps themselves, line by line, and the previews."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    previews = {path.name: path.read_bytes() for path in (workdir / "previews").iterdir()}
    return [line for line in lines if "loss" not in line], previews


def signal_at(patch, name, call, number):
    """This process gets a signal when a method of lina_jax is called for this time."""
    module, kind, method = name.split(".")
    kind = getattr(importlib.import_module(f"lina_jax.{module}"), kind)
    original, calls = getattr(kind, method), itertools.count(1)

    def counted(*args, **options):
        if next(calls) == call:
            signal.raise_signal(number)
        return original(*args, **options)

    patch.setattr(kind, method, counted)


@pytest.mark.parametrize("name", ["validation.Validation.both", "sample.Previews.draw"])
@pytest.mark.parametrize("call", [1, 2], ids=["midway", "at the end"])
def test_measurements_that_were_cut_off_are_made_up_for(config, finished, tmp_path, identical, name, call):
    """Between a save and what is due after it, at steps 3 and 6; what is recorded by then is not measured again."""
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, name, call, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match=f"go on from step {3 * call}"):
            train(config, tmp_path / "run")
    assert identical(whole(train(config, tmp_path / "run")), finished[1])
    assert measured(tmp_path / "run") == measured(finished[0])


@pytest.mark.parametrize(
    ("name", "call"),
    [("metrics.Writer.scalars", 2), ("validation.Validation.losses", 2), ("sample.Previews.draw", 1)],
    ids=["in_step_3", "validation", "previews"],
)
def test_what_was_due_when_sigterm_came_is_measured_when_the_run_goes_on(name, call, config, finished, tmp_path):
    rarely = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=100))
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, name, call, signal.SIGTERM)
        with pytest.raises(Preempted, match="go on from step 3") as caught:
            train(rarely, tmp_path / "run")
    assert ending(caught.value)[1] == RUN_AGAIN
    assert Checkpoints(tmp_path / "run", config.checkpoint, create=False).steps() == [0, 3]
    train(config, tmp_path / "run")
    assert measured(tmp_path / "run") == measured(finished[0])


def test_a_record_that_a_kill_cut_is_made_again(config, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    os.truncate(log, log.stat().st_size - 10)
    train(config, tmp_path / "run")
    assert measured(tmp_path / "run") == measured(finished[0])


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(folder):
    os.truncate(largest_file(folder / "progress"), 100)


def flip_a_bit(folder):
    path = largest_file(folder / "params")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forget_digests_and_cut(folder):
    """As in a checkpoint of an earlier version."""
    (folder / "digests.json").unlink()
    for file in (folder / "params" / "ocdbt.process_0" / "d").iterdir():
        os.truncate(file, 100)


def lose_all_but_weights(folder):
    """Which then looks like a checkpoint of weights alone."""
    for item in ("ema", "progress"):
        shutil.rmtree(folder / item)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: shutil.rmtree(folder / "params"), "params/_METADATA is missing"),
        (lambda folder: (folder / "progress" / "manifest.ocdbt").unlink(), "progress/manifest.ocdbt is missing"),
        (lose_all_but_weights, "ema/_METADATA is missing"),
        (cut, "has another size than was saved"),
        (flip_a_bit, "has other bytes than were saved"),
        (lambda folder: os.truncate(folder / "digests.json", 100), "digests.json cannot be read"),
        (lambda folder: (folder / "digests.json").write_text("[1]"), "digests.json cannot be read"),
        (lambda folder: (folder / "digests.json").write_text("{}"), "digests.json cannot be read"),
        (forget_digests_and_cut, "OUT_OF_RANGE"),
    ],
    ids=["params", "manifest", "weights", "cut", "bit", "digests", "list", "none", "unrecorded"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    config, finished, tmp_path, one_device, damage, reason, caplog
):
    shutil.copytree(finished[0], tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint, create=False)
    plan = state.blueprint(config, one_device)
    damage(checkpoints.directory / "6")
    with pytest.raises(UserError, match=rf"checkpoint 6 in {checkpoints.directory} is damaged \(.*{reason}"):
        checkpoints.restore(plan, 6)
    assert int(checkpoints.restore(plan).step) == 3
    assert re.search(rf"checkpoint 6 in .* is damaged \(.*{reason}.*\): using 3", caplog.text)
    assert checkpoints.steps() == [0, 3]
    assert (tmp_path / "run" / "damaged" / "6.0").is_dir()


@pytest.mark.parametrize("other_disk", [False, True], ids=["names_are_taken", "checkpoints_are_on_another_disk"])
def test_damaged_checkpoints_find_a_place(other_disk, config, finished, tmp_path, one_device, monkeypatch):
    def refuse(path, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(path))

    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "damaged" / "6.1" / "params").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint, create=False)
    flip_a_bit(checkpoints.directory / "6")
    if other_disk:
        monkeypatch.setattr(os, "rename", refuse)
    assert int(checkpoints.restore(state.blueprint(config, one_device)).step) == 3
    assert (tmp_path / "run" / "damaged" / "6.0" / "params" / "_METADATA").exists()
    assert not (checkpoints.directory / "6").exists()


def test_a_run_with_a_damaged_checkpoint_ends_like_one_without(config, finished, tmp_path, identical):
    shutil.copytree(finished[0], tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "checkpoints" / "6")
    assert identical(whole(train(config, tmp_path / "run")), finished[1])
    assert Checkpoints(tmp_path / "run", config.checkpoint, create=False).steps() == [0, 3, 6]


def test_what_a_killed_save_left_is_removed_by_the_run_alone(config, finished, tmp_path, one_device):
    shutil.copytree(finished[0], tmp_path / "run")
    left = tmp_path / "run" / "checkpoints" / "5.orbax-checkpoint-tmp"
    (left / "params").mkdir(parents=True)
    reading = Checkpoints(tmp_path / "run", config.checkpoint, create=False)
    reading.restore_weights(state.blueprint(config, one_device))
    reading.close()
    assert left.is_dir()
    train(dataclasses.replace(config, steps=7), tmp_path / "run")
    assert not left.exists()


def test_a_checkpoint_that_cannot_be_read_for_the_time_being_is_not_damaged(
    config, finished, tmp_path, one_device, monkeypatch
):
    shutil.copytree(finished[0], tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint, create=False)
    said = "UNKNOWN: Error reading local file /d/1: Input/output error [os_error_code='5'] [tensorstore_spec='{}']"
    for error in (OSError(errno.EIO, "Input/output error"), ValueError(said)):

        def fail(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "restore", fail)
            with pytest.raises(
                UserError, match=r"checkpoint 6 in .* cannot be read \(.*Input/output error\)"
            ) as caught:
                checkpoints.restore(state.blueprint(config, one_device))
        assert ending(caught.value)[1] == RUN_AGAIN
    assert checkpoints.steps() == [0, 3, 6]


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")], ids=["host", "device"]
)
def test_a_checkpoint_that_finds_no_memory_is_not_damaged(config, finished, tmp_path, one_device, monkeypatch, error):
    def fail(*_, **__):
        raise error

    shutil.copytree(finished[0], tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint, create=False)
    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(type(error)):
        checkpoints.restore(state.blueprint(config, one_device))
    assert checkpoints.steps() == [0, 3, 6]


def test_damage_to_all_checkpoints_is_one_line_and_nothing_is_moved(config, finished, tmp_path, one_device):
    shutil.copytree(finished[0], tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint, create=False)
    for step in checkpoints.steps():
        flip_a_bit(checkpoints.directory / str(step))
    with pytest.raises(UserError, match=r"checkpoint 6 in .*; checkpoint 0 in .* damaged .*: there is no older one"):
        checkpoints.restore(state.blueprint(config, one_device))
    assert checkpoints.steps() == [0, 3, 6]


def test_sampling_reads_past_damage_and_moves_nothing(config, finished, tmp_path, one_device):
    """Only what is read has to be sound."""
    shutil.copytree(finished[0], tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint, create=False)
    plan = state.blueprint(config, one_device)
    flip_a_bit(checkpoints.directory / "6")
    assert checkpoints.restore_weights(plan, ema=True)[2] == 6
    assert checkpoints.restore_weights(plan, ema=False)[2] == 3
    with pytest.raises(UserError, match=r"checkpoint 6 in .* is damaged"):
        checkpoints.restore_weights(plan, ema=False, step=6)
    assert checkpoints.steps() == [0, 3, 6]


def test_cut_files_of_a_checkpoint_are_one_line(config, finished, tmp_path, run_module, config_file):
    """Nothing is said of the many reads that orbax abandons when the first one fails."""
    shutil.copytree(finished[0], tmp_path / "run")
    forget_digests_and_cut(tmp_path / "run" / "checkpoints" / "6")
    options = f"--workdir={tmp_path / 'run'}", "--prompt=a red circle", f"--out={tmp_path / 'out'}", "--raw"
    result = run_module("sample", *options, "--checkpoint=6")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: checkpoint 6 in {tmp_path / 'run' / 'checkpoints'} is damaged (OUT_OF_RANGE: ")
    assert line.endswith("): no other was asked for")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"width": 64}},
            r"model of this config: bos_token: \(32,\) in the checkpoint, \(64,\) in .*",
        ),
        ({"optim": {"name": "adamw"}}, "optimizer of this config: opt_state/.*"),
    ],
    ids=["model", "optimizer"],
)
def test_arrays_that_differ_are_named(config, finished, tmp_path, tiny_text, changes, message):
    shutil.copytree(finished[0], tmp_path / "run")
    other = tiny_text(**{"optim": {"name": "muon"}, "steps": 9} | changes)
    message += r"and \d+ more \(--allow_config_change cannot change the arrays"
    with pytest.raises(UserError, match=message):
        train(other, tmp_path / "run", allow_config_change=True)
    assert load_config(tmp_path / "run") == config


def test_a_save_that_fails_names_the_place_and_spares_the_earlier_checkpoint(
    config, finished, run_module, config_file, tmp_path, one_device, identical
):
    """No file may grow beyond 24 KiB, as on a disk that fills up."""
    shutil.copytree(finished[0], tmp_path / "run")
    longer = dataclasses.replace(config, steps=9, log=dataclasses.replace(config.log, preview_images=0))
    result = run_module(
        "train", f"--config={config_file(longer)}", f"--workdir={tmp_path / 'run'}",
        prefix=("bash", "-c", 'ulimit -f 24 && exec "$@"', "bash"),
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    place = tmp_path / "run" / "checkpoints"
    assert line == f"error: saving step 9 to {place} failed, earlier checkpoints are intact: File too large"
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint, create=False)
    assert identical(whole(checkpoints.restore(state.blueprint(config, one_device))), finished[1])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 9
