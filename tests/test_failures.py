"""Failures that end a training run: losses that diverge, batches that do not come, logs that cannot be written."""

import errno
import importlib
import itertools
import os
import resource
import signal
import socket
import sys
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lina_jax import integrity, metrics, output_files, state
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import CheckpointConfig
from lina_jax.errors import RUN_AGAIN, TrainingDiverged, UserError
from lina_jax.train import train

pytestmark = pytest.mark.usefixtures("train_on_one_device", "traced_once")


@pytest.fixture(scope="module")
def exploding(tiny_text):
    """The first update moves the parameters so far away that every later loss overflows."""
    return tiny_text(
        steps=50, optim={"learning_rate": 1e30, "warmup_steps": 0, "max_skipped": 4}, checkpoint={"every": 2}
    )


def test_a_run_that_diverges_stops_and_leaves_the_checkpoint_before(exploding, tmp_path, one_device):
    """Checkpoints due while steps are skipped would all have the same state, and push out the earlier ones."""
    with pytest.raises(TrainingDiverged, match=r"step 5: .* not finite for 4 steps in a row \(optim.max_skipped\)"):
        train(exploding, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", exploding.checkpoint, create=False)
    restored = checkpoints.restore(state.make_blueprint(exploding, one_device))
    assert (checkpoints.steps(), int(restored.step), int(restored.updates)) == ([0], 0, 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(restored.params))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_training_that_waits_for_batches_in_vain_is_ended(tiny_text, tmp_path, monkeypatch):
    """It ends after three steps, of which the first compiles for longer than step_timeout."""

    class Ended(Exception):
        pass

    def stopping(*args):
        yield from itertools.islice(batches(*args), 3)
        ended.wait()
        raise Ended

    def leave(line, code):
        said.append((line, code))
        ended.set()
        sys.exit()  # which ends the watchdog's thread

    said, ended, batches = [], threading.Event(), importlib.import_module("lina_jax.train").device_batches
    monkeypatch.setattr("lina_jax.train.device_batches", stopping)
    monkeypatch.setattr("lina_jax.entry.exit_process", leave)
    with pytest.raises(Ended):
        train(tiny_text(step_timeout=0.5), tmp_path / "run")
    line, code = said[0]
    assert code == RUN_AGAIN
    assert line.startswith("error: no step has finished for 0.5 s (step_timeout)")


def test_a_save_that_fails_ends_the_run_before_the_next_is_due(tiny_text, tmp_path, monkeypatch):
    def record(folder):
        if not folder.name.startswith("0."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(folder)

    whole = integrity.record
    monkeypatch.setattr(integrity, "record", record)
    config = tiny_text(steps=200, checkpoint={"every": 100}, log={"every": 1, "preview_images": 0})
    with pytest.raises(UserError, match=r"saving step 100 to .* No space left on device"):
        train(config, tmp_path / "run")
    assert 100 <= [*metrics.rows_as_written(tmp_path / "run" / "metrics.jsonl")][-1]["step"] < 200


@pytest.mark.parametrize("stuck", [0, 2], ids=["when_the_next_is_due", "at_the_end"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_save_that_does_not_end_is_ended(stuck, tiny_text, tmp_path, monkeypatch):
    """As on storage that no longer answers. After the last save, nothing else would wait for it."""

    def record(folder):
        if folder.name.startswith(f"{stuck}."):
            ended.wait()
        whole(folder)

    def leave(line, code):
        said.append((line, code))
        ended.set()
        sys.exit()  # which ends the watchdog's thread

    said, ended, whole = [], threading.Event(), integrity.record
    monkeypatch.setattr(integrity, "record", record)
    monkeypatch.setattr("lina_jax.entry.exit_process", leave)
    train(tiny_text(steps=2, checkpoint={"every": 1, "timeout": 0.5}), tmp_path / "run")
    line, code = said[0]
    assert code == RUN_AGAIN and line.startswith(
        "error: a save took over 0.5 s (checkpoint.timeout); the stacks of all"
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_measuring_that_does_not_end_is_ended(tiny_text, tmp_path, monkeypatch):
    """As when a device hangs in a validation: no step ends, and nothing else would notice."""

    def take(*args):
        ended.wait()

    def leave(line, code):
        said.append((line, code))
        ended.set()
        sys.exit()  # which ends the watchdog's thread

    said, ended = [], threading.Event()
    monkeypatch.setattr("lina_jax.periodic.Measurements.take", take)
    monkeypatch.setattr("lina_jax.entry.exit_process", leave)
    train(tiny_text(steps=1, eval={"timeout": 0.5}), tmp_path / "run")
    line, code = said[0]
    assert code == RUN_AGAIN and line.startswith("error: measuring took over 0.5 s (eval.timeout)")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_checkpoint_that_cannot_be_read_in_time_ends_the_run(tiny_text, tmp_path, monkeypatch):
    def restore(*args):
        ended.wait()
        return whole(*args)

    def leave(line, code):
        said.append((line, code))
        ended.set()
        sys.exit()  # which ends the watchdog's thread

    train(tiny_text(steps=1), tmp_path / "run")
    said, ended, whole = [], threading.Event(), Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", restore)
    monkeypatch.setattr("lina_jax.entry.exit_process", leave)
    train(tiny_text(steps=1, checkpoint={"timeout": 0.5}), tmp_path / "run")
    line, code = said[0]
    assert code == RUN_AGAIN and line.startswith("error: reading weights took over 0.5 s (checkpoint.timeout)")


def test_a_run_interrupted_finishes_its_save_and_says_where_it_goes_on(tiny_text, tmp_path, monkeypatch):
    def interrupted(*args):
        yield from itertools.islice(batches(*args), 4)
        raise KeyboardInterrupt

    batches = importlib.import_module("lina_jax.train").device_batches
    monkeypatch.setattr("lina_jax.train.device_batches", interrupted)
    with pytest.raises(KeyboardInterrupt, match="run the same command to resume from step 3"):
        train(tiny_text(), tmp_path / "run")
    assert Checkpoints(tmp_path / "run", tiny_text().checkpoint, create=False).steps() == [0, 3]


def test_ctrl_c_during_the_last_save_waits_for_it(tiny_text, tmp_path, monkeypatch):
    def record(folder):
        if folder.name.startswith("2."):
            for _ in range(1000):
                if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # it waits for this save
                    break
                pause.wait(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            pause.wait(0.5)
        whole(folder)

    whole, pause = integrity.record, threading.Event()
    monkeypatch.setattr(integrity, "record", record)
    with pytest.raises(KeyboardInterrupt, match="run the same command to resume from step 2"):
        train(tiny_text(steps=2), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "2" / "digests.json").exists()


def test_a_save_that_is_overtaken_by_the_next_has_its_digests(tmp_path, monkeypatch):
    """Digests are recorded at the end of a save, here while the next one already waits for it."""

    def late(self):
        waited_for.wait()
        record(self)

    def wait(self):
        waited_for.set()
        return until_finished(self)

    waited_for, record = threading.Event(), Checkpoints._record_digests
    until_finished = ocp.CheckpointManager.wait_until_finished
    monkeypatch.setattr(Checkpoints, "_record_digests", late)
    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", wait)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    for step in (1, 2):
        checkpoints.save(state.TrainState(*[np.array(step, np.int32)] * 4, *[{"a": np.ones(4)}] * 4))
    checkpoints.close()
    assert all((tmp_path / "checkpoints" / step / integrity.DIGESTS).exists() for step in "12")


def test_a_workdir_has_one_run_at_a_time(tiny_text, run_module, config_file, tmp_path):
    file, workdir = config_file(tiny_text(steps=1)), tmp_path / "run"
    with output_files.lock("workdir", workdir):
        result = run_module("train", f"--config={file}", f"--workdir={workdir}")
    assert result.returncode == 2 and [path.name for path in workdir.iterdir()] == ["lock"]
    said = f"another run is using it (process {os.getpid()} on {socket.gethostname()}); if that run is gone, remove"
    assert result.stderr.splitlines()[-1] == f"error: --workdir={workdir}: {said} {workdir}/lock"


def test_events_that_cannot_be_written_end_the_run(tmp_path):
    """They end it at once: after a failure in a writer's thread, whoever adds more events would wait forever."""
    writer = metrics.Writer(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(UserError, match=f"^cannot write {tmp_path}/events: "):
            writer.image(1, "picture", np.zeros((8, 8, 3), np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()
