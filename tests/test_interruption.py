"""Processes that are killed, terminated or stall leave whole files, from which the same command continues."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import inception_weights
import jax
import pytest

from lina_jax import checkpoint, metrics, periodic, preemption, state
from lina_jax.checkpoint import Checkpoints
from lina_jax.errors import RUN_AGAIN, TransientFailure, UserError

DEADLINE_S = 240  # for a subprocess to get somewhere


@pytest.fixture(scope="module")
def endless(tiny_text):
    return tiny_text(steps=1_000_000, checkpoint={"every": 2, "keep_last": 2}, log={"every": 1000})


def wait_for(condition, process):
    """Wait until `condition` holds; fails if the process ends first or the deadline passes."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "the run did not get there in time"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)


def test_a_killed_process_goes_on_exactly(endless, run_module, config_file, tmp_path, one_device, identical):
    """After SIGKILL at any time after the first checkpoint, the same command ends like an uninterrupted run."""
    options = [f"--config={config_file(endless)}", f"--workdir={tmp_path / 'killed'}"]
    process = run_module("train", *options, start=True)
    try:
        wait_for((tmp_path / "killed" / "checkpoints" / "4").exists, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    steps = Checkpoints(tmp_path / "killed", endless.checkpoint, create=False).latest_step() + 3
    finals = {}
    for name in ("killed", "in_one_go"):
        workdir = tmp_path / name
        result = run_module("train", options[0], f"--workdir={workdir}", f"--config.steps={steps}")
        assert result.returncode == 0, result.stderr
        checkpoints = Checkpoints(workdir, endless.checkpoint, create=False)
        finals[name] = jax.device_get(checkpoints.restore(state.make_blueprint(endless, one_device), steps))
    assert identical(finals["killed"], finals["in_one_go"])


def test_sigterm_saves_and_asks_to_be_run_again(endless, run_module, config_file, tmp_path, one_device, identical):
    """However often the signal comes, the continued run ends like an uninterrupted one."""
    options = [f"--config={config_file(endless)}", "--config.checkpoint.every=100000", "--config.log.every=1"]
    process = run_module("train", *options, f"--workdir={tmp_path / 'stopped'}", start=True)
    try:
        wait_for(lambda: len(metrics.read_jsonl(tmp_path / "stopped" / "metrics.jsonl")) > 2, process)
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.1)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == RUN_AGAIN
    saved = Checkpoints(tmp_path / "stopped", endless.checkpoint, create=False).latest_step()
    assert saved == metrics.read_jsonl(tmp_path / "stopped" / "metrics.jsonl")[-1]["step"]
    finals = []
    for name in ("stopped", "in_one_go"):
        result = run_module("train", *options, f"--workdir={tmp_path / name}", f"--config.steps={saved + 2}")
        assert result.returncode == 0, result.stderr
        checkpoints = Checkpoints(tmp_path / name, endless.checkpoint, create=False)
        finals.append(jax.device_get(checkpoints.restore(state.make_blueprint(endless, one_device), saved + 2)))
    assert identical(*finals)


SIGNALLING = """

import os, signal, threading

def signal_when_it_is_handled():
    while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        threading.Event().wait(0.001)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=signal_when_it_is_handled, daemon=True).start()
"""


def test_sigterm_at_the_start_asks_to_be_run_again_and_leaves_nothing(tiny_text, run_module, config_file, tmp_path):
    """The earliest that a config file can see of the run is that it handles the signal."""
    file = Path(config_file(tiny_text()))
    file.write_text(file.read_text() + SIGNALLING)
    result = run_module("train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert (result.stderr, result.returncode) == (
        "preempted, with nothing to save; run the same command again\n",
        RUN_AGAIN,
    )
    assert not (tmp_path / "run").exists()


def test_sigterm_does_after_a_run_what_it_did_before():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("after"))
    try:
        with preemption.Notice() as notice:
            signal.raise_signal(signal.SIGTERM)
            assert notice.reached() and not heard
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["after"]


def test_ctrl_c_waits_once_for_what_is_being_finished(capfd):
    done = []
    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt), preemption.defer_interrupt("a save"):
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            done.append(times)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert done == [1]
    assert capfd.readouterr().err == 2 * "finishing a save; Ctrl-C again leaves it unfinished\n"


STALLED = """
import sys, threading
from lina_jax import entry, preemption

def main(argv):
    with preemption.Watchdog(0.2) as watchdog:
        with watchdog.time_limit(0.3, "a save took over 0.3 s"):
            pass  # the first save
        threading.Event().wait(0.5)  # the first step compiles
        watchdog.restart()
        with watchdog.time_limit(0.0, ""):
            threading.Event().wait(0.5)  # what takes its own time
        print("alive", file=sys.stderr)
        stalled_for_ever()

def stalled_for_ever():
    threading.Event().wait()

entry.run(main)
"""


def test_a_step_that_stalls_ends_the_process_with_its_stacks():
    result = subprocess.run([sys.executable, "-c", STALLED], capture_output=True, text=True, timeout=DEADLINE_S)
    assert result.returncode == RUN_AGAIN
    first, *stacks, last = result.stderr.splitlines()
    assert first == "alive"
    assert any("stalled_for_ever" in line for line in stacks)
    assert last.startswith("error: no step has finished for 0.2 s (step_timeout)")


def test_a_save_that_another_process_left_is_no_failure_of_the_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    lost = jax.errors.JaxRuntimeError("UNAVAILABLE: the following tasks are unhealthy")
    with pytest.raises(jax.errors.JaxRuntimeError, match="unhealthy"), checkpoint._naming_failures(tmp_path):
        raise TimeoutError("Timed out while waiting for a barrier.") from lost
    part = pytest.raises(TransientFailure, match="failed, earlier checkpoints are intact: UNKNOWN: Gloo")
    with part, checkpoint._naming_failures(tmp_path):
        raise ValueError("UNKNOWN: Gloo AllGather failed")
    whole = pytest.raises(UserError, match="failed, earlier checkpoints are intact: No space left")
    with whole, checkpoint._naming_failures(tmp_path):
        raise OSError("No space left on device")


EVALUATE_IN_SMALL_CHUNKS = """
import runpy
from lina_jax import featurise
featurise.CHUNK = 50
runpy.run_module("lina_jax.evaluate", run_name="__main__")
"""


def test_a_killed_evaluation_goes_on(tiny, rough, save_run, shapes_data, one_device, one_device_env, tmp_path):
    """After SIGKILL with the first 50 pictures done, the same command draws only the others and scores the same.

    Of the weights it reads only the EMA, so the parameters may be lost.
    """
    plan = state.make_blueprint(tiny(), one_device)
    save_run(tmp_path / "run", plan, rough(plan))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "0" / "params")
    weights = inception_weights.write(tmp_path / "inception.safetensors")
    options = [
        f"--workdir={tmp_path / 'run'}", f"--inception={weights}", f"--reference={shapes_data}", "--number=120",
        "--novalidation", "--reference_number=20", "--steps=1",
    ]  # fmt: skip
    command = [sys.executable, "-c", EVALUATE_IN_SMALL_CHUNKS, *options]
    process = subprocess.Popen([*command, f"--out={tmp_path / 'killed'}"], env=one_device_env)
    try:
        wait_for((tmp_path / "killed" / ".measuring" / "samples" / "000000.npz").exists, process)
    finally:
        process.kill()
        process.wait()
    scores = {}
    for name in ("killed", "in_one_go"):
        out = tmp_path / name
        result = subprocess.run([*command, f"--out={out}"], env=one_device_env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        scores[name] = (out / "score.json").read_bytes()
        assert ("images: 50 of 120 already done" in result.stderr) == (name == "killed")
    assert scores["killed"] == scores["in_one_go"]


@pytest.mark.parametrize(
    ("rows", "missing"),
    [
        (["train 3", "validation 3"], False),
        (["train 3"], True),
        (["train 3", "validation 3", "train 4", "train 5"], False),  # a kill on the way to the next checkpoint
        (["train 3", "validation 3", "train 2", "train 3"], True),
        (["train 3", "validation 3", "train 3"], True),
        (["train 3", "validation 3", "validation 2"], True),
        (["train 3", "validation 3", "train 2", "train 3", "validation 3"], False),
        (["train 3", "validation 3", "quality 3"], False),
    ],
    ids=str,
)
def test_a_measurement_from_before_a_run_was_thrown_back_does_not_count(rows, missing, tiny, tmp_path):
    """The order of the log shows that the run, for lack of a whole checkpoint, reached the step once more."""
    names = {"train": "loss", "validation": "validation/loss", "quality": "quality/fid"}
    lines = [{"step": int(step), names[kind]: 1.0} for kind, step in map(str.split, rows)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "va')
    config = tiny(steps=9, eval={"every": 3})
    assert periodic.overdue(config, tmp_path, 3) == ["validation"] * missing


def test_what_is_no_row_of_a_log_is_left_out(tmp_path):
    """A line that a kill has cut, and blocks that were never written because of a power failure."""
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss": 2.0}\n\xff\xfe\0\0{"step": 2\n{"step": 3, "loss": 1.0}\n{"st'
    )
    assert [row["step"] for row in metrics.read_jsonl(tmp_path / "metrics.jsonl")] == [1, 3]
