"""Damaged checkpoints are named and the one before is used; a checkpoint that is temporarily unreadable is kept."""

import dataclasses
import errno
import os
import re
import shutil

import jax
import orbax.checkpoint as ocp
import pytest

from lina_jax import state
from lina_jax.checkpoint import Checkpoints
from lina_jax.errors import RUN_AGAIN, UserError, exit_message
from lina_jax.train import train

pytestmark = pytest.mark.usefixtures("train_on_one_device", "traced_once")


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
    """Remove the digests, which checkpoints of earlier versions lack, and cut files."""
    (folder / "digests.json").unlink()
    for file in (folder / "params" / "ocdbt.process_0" / "d").iterdir():
        os.truncate(file, 100)


def lose_all_but_weights(folder):
    """What is left looks like a checkpoint of weights alone."""
    for item in ("ema", "progress"):
        shutil.rmtree(folder / item)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: shutil.rmtree(folder / "params"), "params/_METADATA is missing"),
        (lambda folder: (folder / "progress" / "manifest.ocdbt").unlink(), "progress/manifest.ocdbt is missing"),
        (lose_all_but_weights, "ema/_METADATA is missing"),
        (cut, "has a different size than was saved"),
        (flip_a_bit, "has different bytes than were saved"),
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
    plan = state.make_blueprint(config, one_device)
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
    assert int(checkpoints.restore(state.make_blueprint(config, one_device)).step) == 3
    assert (tmp_path / "run" / "damaged" / "6.0" / "params" / "_METADATA").exists()
    assert not (checkpoints.directory / "6").exists()


def test_a_run_with_a_damaged_checkpoint_ends_like_one_without(config, finished, tmp_path, identical):
    shutil.copytree(finished[0], tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "checkpoints" / "6")
    assert identical(jax.device_get(train(config, tmp_path / "run")), finished[1])
    assert Checkpoints(tmp_path / "run", config.checkpoint, create=False).steps() == [0, 3, 6]


def test_what_a_killed_save_left_is_removed_by_the_run_alone(config, finished, tmp_path, one_device):
    shutil.copytree(finished[0], tmp_path / "run")
    left = tmp_path / "run" / "checkpoints" / "5.orbax-checkpoint-tmp"
    (left / "params").mkdir(parents=True)
    reading = Checkpoints(tmp_path / "run", config.checkpoint, create=False)
    reading.restore_weights(state.make_blueprint(config, one_device))
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
                checkpoints.restore(state.make_blueprint(config, one_device))
        assert exit_message(caught.value)[1] == RUN_AGAIN
    assert checkpoints.steps() == [0, 3, 6]


READABLE = r"checkpoint 6 in .* cannot be read \(.*\), although its files are exactly as they were saved"


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (MemoryError(), MemoryError, "^$"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), jax.errors.JaxRuntimeError, "memory"),
        (RuntimeError("can't start new thread"), UserError, READABLE),
        (OSError(errno.EMFILE, "Too many open files"), UserError, READABLE),
    ],
    ids=["host", "device", "threads", "files"],
)
def test_a_checkpoint_whose_files_are_right_is_not_damaged(
    config, finished, tmp_path, one_device, monkeypatch, error, raised, message
):
    """Whatever keeps it from being read, it stays where it is."""

    def fail(*_, **__):
        raise error

    shutil.copytree(finished[0], tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint, create=False)
    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(raised, match=message):
        checkpoints.restore(state.make_blueprint(config, one_device))
    assert checkpoints.steps() == [0, 3, 6]


def test_damage_to_all_checkpoints_is_one_line_and_nothing_is_moved(config, finished, tmp_path, one_device):
    shutil.copytree(finished[0], tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint, create=False)
    for step in checkpoints.steps():
        flip_a_bit(checkpoints.directory / str(step))
    with pytest.raises(UserError, match=r"checkpoint 6 in .*; checkpoint 0 in .* damaged .*: there is no older"):
        checkpoints.restore(state.make_blueprint(config, one_device))
    assert checkpoints.steps() == [0, 3, 6]


def test_sampling_reads_past_damage_and_moves_nothing(config, finished, tmp_path, one_device):
    """Only the parts that are read must be intact."""
    shutil.copytree(finished[0], tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", config.checkpoint, create=False)
    plan = state.make_blueprint(config, one_device)
    flip_a_bit(checkpoints.directory / "6")
    assert checkpoints.restore_weights(plan, ema=True)[2] == 6
    assert checkpoints.restore_weights(plan, ema=False)[2] == 3
    with pytest.raises(UserError, match=r"checkpoint 6 in .* is damaged"):
        checkpoints.restore_weights(plan, ema=False, step=6)
    assert checkpoints.steps() == [0, 3, 6]


def test_cut_files_of_a_checkpoint_are_one_line(config, finished, tmp_path, run_module, config_file):
    """The many reads that orbax abandons after the first failure are not reported."""
    shutil.copytree(finished[0], tmp_path / "run")
    forget_digests_and_cut(tmp_path / "run" / "checkpoints" / "6")
    options = f"--workdir={tmp_path / 'run'}", "--prompt=a red circle", f"--out={tmp_path / 'out'}", "--raw"
    result = run_module("sample", *options, "--checkpoint=6")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: checkpoint 6 in {tmp_path / 'run' / 'checkpoints'} is damaged (OUT_OF_RANGE: ")
    assert line.endswith("): no other was requested")
