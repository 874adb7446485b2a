"""An interrupted run ends like an uninterrupted one, and failures leave workdirs intact."""

import dataclasses
import importlib
import itertools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from lina_jax import mesh, metrics, state
from lina_jax.checkpoint import Checkpoints
from lina_jax.errors import RUN_AGAIN, Preempted, UserError, exit_message
from lina_jax.flops import training_flops
from lina_jax.prepare import Settings, prepare
from lina_jax.train import train
from lina_jax.workdir import check_config, load_config, write_config

pytestmark = pytest.mark.usefixtures("train_on_one_device", "traced_once")


def test_a_run_resumed_equals_a_run_in_one_go(config, finished, tmp_path, identical):
    """Bit for bit: parameters, EMA, moments, counters."""
    halfway = train(dataclasses.replace(config, steps=3), tmp_path / "run")
    assert int(halfway.step) == 3
    resumed = train(config, tmp_path / "run")
    assert identical(jax.device_get(resumed), finished[1])


def test_a_run_that_starts_from_weights_is_a_run(config, finished, tmp_path, identical, one_device):
    """Bit for bit, if they are those of a fresh run; the training settings that came with them do not bind it."""
    fresh = state.make_blueprint(config, one_device).init()
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=1.0), batch_size=4)
    write_config(tmp_path / "run", other)
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint)
    checkpoints.save_weights(fresh.params, fresh.frozen)
    checkpoints.close()
    check_config(tmp_path / "run", config)
    with pytest.raises(UserError, match=r"belongs to another config: model\.width"):
        check_config(tmp_path / "run", dataclasses.replace(config, model=dataclasses.replace(config.model, width=64)))
    assert identical(jax.device_get(train(config, tmp_path / "run")), finished[1])
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
        runs.append(jax.device_get(checkpoints.restore(state.make_blueprint(config, one_device))))
    assert identical(*runs)


def test_a_run_resumes_on_its_own_records_alone(config, finished, shapes_data, tmp_path, capsys):
    def train_on(path):
        return train(dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(path))), workdir)

    workdir, _ = finished
    prepare(tmp_path / "other", Settings(resolution=8, train=32, validation=8))
    with pytest.raises(UserError, match=r"data\.path holds other records than those that .* was trained on"):
        train_on(tmp_path / "other")
    shutil.copytree(shapes_data, tmp_path / "moved")
    train_on(tmp_path / "moved")
    assert "nothing to do" in capsys.readouterr().err


def test_training_changes_the_parameters(finished, one_device, config, identical):
    workdir, run = finished
    first = Checkpoints(workdir, config.checkpoint, create=False).restore(state.make_blueprint(config, one_device), 0)
    assert not identical(run.params, first.params)
    assert identical(run.frozen, first.frozen)


def test_a_checkpoint_restores_on_another_mesh(config, finished, identical):
    workdir, run = finished
    other = jax.make_mesh((1, 2, 2, 1, 2), mesh.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 5)
    plan = state.make_blueprint(config, other)
    restored = Checkpoints(workdir, config.checkpoint, create=False).restore(plan)
    assert identical(jax.device_get(restored), run)
    shards = restored.params["patch_embed"]["kernel"].addressable_shards
    assert shards[0].data.size * 2 == restored.params["patch_embed"]["kernel"].size


def test_the_first_and_the_due_checkpoints_are_kept(finished, config):
    assert Checkpoints(finished[0], config.checkpoint, create=False).steps() == [0, 3, 6]


def test_only_the_last_and_the_milestones_are_kept(config, tmp_path):
    settings = dataclasses.replace(config.checkpoint, every=1, keep_last=1, keep_every=2)
    config = dataclasses.replace(config, checkpoint=settings, steps=5)
    train(dataclasses.replace(config, log=dataclasses.replace(config.log, preview_images=0)), tmp_path / "run")
    assert Checkpoints(tmp_path / "run", settings, create=False).steps() == [0, 2, 4, 5]


def test_logs_of_a_run_that_starts_over_are_set_aside(finished, config, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    shutil.rmtree(workdir / "checkpoints")
    train(dataclasses.replace(config, steps=3), workdir)
    assert [row["step"] for row in metrics.read_jsonl(workdir / "metrics.jsonl")] == [1, 2, 3]
    assert metrics.read_jsonl(workdir / "earlier" / "0" / "metrics.jsonl") == metrics.read_jsonl(
        finished[0] / "metrics.jsonl"
    )


def test_a_logged_step_has_all_promised_scalars(finished, config):
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
    assert identical(jax.device_get(train(config, tmp_path / "run")), finished[1])
    assert capsys.readouterr().err == f"{tmp_path / 'run'} is already at step 6, steps=6: nothing to do\n"


def test_fewer_steps_than_are_done_change_nothing(config, finished, tmp_path, identical, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    assert identical(jax.device_get(train(dataclasses.replace(config, steps=4), tmp_path / "run")), finished[1])
    assert capsys.readouterr().err == f"{tmp_path / 'run'} is already at step 6, steps=4: nothing to do\n"
    assert load_config(tmp_path / "run").steps == 6


def measured(workdir):
    """The lines of the log that are not of training steps, and the previews."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    previews = {path.name: path.read_bytes() for path in (workdir / "previews").iterdir()}
    return [line for line in lines if "loss" not in line], previews


def signal_at(patch, name, call, number):
    """Send this process signal `number` at the `call`-th call of a method of lina_jax."""
    module, kind, method = name.split(".")
    kind = getattr(importlib.import_module(f"lina_jax.{module}"), kind)
    original, calls = getattr(kind, method), itertools.count(1)

    def counted(*args, **options):
        if next(calls) == call:
            signal.raise_signal(number)
        return original(*args, **options)

    patch.setattr(kind, method, counted)


@pytest.mark.parametrize("name", ["validation.Validation.both", "previews.Previews.draw"])
@pytest.mark.parametrize("call", [1, 2], ids=["midway", "at the end"])
def test_measurements_that_were_cut_off_are_made_up_for(config, finished, tmp_path, identical, name, call):
    """They are cut off after the saves of steps 3 and 6; what was already recorded is not measured again."""
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, name, call, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match=f"resume from step {3 * call}"):
            train(config, tmp_path / "run")
    assert identical(jax.device_get(train(config, tmp_path / "run")), finished[1])
    assert measured(tmp_path / "run") == measured(finished[0])


@pytest.mark.parametrize(
    ("name", "call"),
    [("metrics.Writer.scalars", 2), ("validation.Validation.losses", 1), ("previews.Previews.draw", 1)],
    ids=["in_step_3", "validation", "previews"],
)
def test_what_was_due_when_sigterm_came_is_measured_when_the_run_goes_on(name, call, config, finished, tmp_path):
    rarely = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=100))
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, name, call, signal.SIGTERM)
        with pytest.raises(Preempted, match="resume from step 3") as caught:
            train(rarely, tmp_path / "run")
    assert exit_message(caught.value)[1] == RUN_AGAIN
    assert Checkpoints(tmp_path / "run", config.checkpoint, create=False).steps() == [0, 3]
    train(config, tmp_path / "run")
    assert measured(tmp_path / "run") == measured(finished[0])


def test_a_record_that_a_kill_cut_is_made_again(config, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    os.truncate(log, log.stat().st_size - 10)
    train(config, tmp_path / "run")
    assert measured(tmp_path / "run") == measured(finished[0])


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
    """No file may grow beyond 24 KiB, as if the disk were full."""
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
    assert identical(jax.device_get(checkpoints.restore(state.make_blueprint(config, one_device))), finished[1])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 9
