"""Several processes train, stop, die and resume like one: separate Python processes on CPU devices, over gloo."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import inception_weights
import numpy as np
import pytest
from PIL import Image
from ports import free_port

from lina_jax import metrics, quality
from lina_jax.checkpoint import Checkpoints
from lina_jax.config import CheckpointConfig
from lina_jax.errors import RUN_AGAIN
from lina_jax.prepare import Settings, prepare
from lina_jax.train import train

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("traced_once")
DEADLINE_S = 200  # for processes to reach some state, or to end
HEARTBEAT_S = 6
# Relative difference of the loss of a step. Only the order of summation may differ: measured 3.8e-7 at most over 150
# steps, 2 devices against 8 (with a learning rate of 1e-3: 6e-7 at step 30, 1e-3 at step 38). One update changes the
# loss by 2e-3.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def start(compiled_programs, tmp_path_factory):
    """Start `python -m lina_jax.NAME ...` in `count` processes that share the devices; in the end they are killed."""
    started = []

    def run(
        name: str, count: int, *args: str, devices: int = 8, own=lambda process: (), cwd=lambda process: ROOT
    ) -> list["Process"]:
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices // count),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(compiled_programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }
        place = [f"--coordinator=localhost:{free_port()}", f"--processes={count}", f"--heartbeat_timeout={HEARTBEAT_S}"]
        processes = [
            Process(
                [sys.executable, "-m", f"lina_jax.{name}", *args, *place, f"--process_id={i}", *own(i)],
                cwd(i),
                env,
                tmp_path_factory.mktemp("output") / "stderr",
            )
            for i in range(count)
        ]
        started.extend(processes)
        return processes

    yield run
    for process in started:
        process.kill()


class Process:
    """One of the processes; its stderr goes to a file, so that it never blocks on a full pipe."""

    def __init__(self, command, cwd, env, errors):
        self._errors = errors
        with errors.open("w") as file:
            self._popen = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=file)

    def send(self, number: int) -> None:
        self._popen.send_signal(number)

    def running(self) -> bool:
        return self._popen.poll() is None

    def end(self) -> tuple[int, str]:
        """(exit code, stderr)"""
        try:
            return self._popen.wait(DEADLINE_S), self._errors.read_text()
        except subprocess.TimeoutExpired:
            pytest.fail(f"a process has not ended:\n{self._errors.read_text()}")

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._popen.kill()
        self._popen.wait()


def succeed(processes) -> None:
    for code, errors in [process.end() for process in processes]:
        assert code == 0, errors


def wait_until(condition, processes) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        for process in processes:
            assert process.running(), process.end()
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.01)


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics.read_jsonl(workdir / "metrics.jsonl") if "loss" in row}


def check_losses(workdir: Path, reference: dict[int, float], steps) -> None:
    got = losses(workdir)
    assert [got[step] for step in steps] == pytest.approx([reference[step] for step in steps], rel=TOLERANCE)


@pytest.fixture(scope="module")
def config(tiny_text):
    """A low learning rate limits the growth of rounding: how far a run gets before a signal depends on the machine."""
    return tiny_text(optim={"learning_rate": 3e-5})


@pytest.fixture(scope="module")
def file(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "experiment.py"
    path.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({dataclasses.asdict(config)!r})\n"
    )
    return path


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    """Losses by step of one process with eight devices that was never interrupted."""
    workdir = tmp_path_factory.mktemp("reference") / "run"

    def until(steps: int) -> dict[int, float]:
        if steps > max(losses(workdir), default=0):
            every = dataclasses.replace(config.checkpoint, every=1000)
            train(dataclasses.replace(config, steps=steps, checkpoint=every), workdir)
        return losses(workdir)

    return until


@pytest.fixture(scope="module")
def two(file, start, tmp_path_factory):
    """The workdir of a run of six steps in two processes with four devices each."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    succeed(start("train", 2, f"--config={file}", f"--workdir={workdir}"))
    return workdir


def test_two_processes_compute_what_one_computes(two, reference):
    check_losses(two, reference(6), range(1, 7))


def test_processes_that_share_images_compute_what_one_computes(file, start, tmp_path, reference):
    """Each process has half of the tokens of every image."""
    axes = "--config.mesh.data=1", "--config.mesh.sequence=2"
    succeed(start("train", 2, f"--config={file}", f"--workdir={tmp_path / 'run'}", *axes, devices=2))
    check_losses(tmp_path / "run", reference(6), range(1, 7))


def test_two_processes_draw_what_one_draws(two, start, tmp_path):
    drawn = []
    for count in (1, 2):
        out = tmp_path / str(count)
        succeed(start("sample", count, f"--workdir={two}", "--prompt=a red circle", "--num=9", f"--out={out}"))
        drawn.append([np.asarray(Image.open(out / f"{i:05d}.png"), np.int32) for i in range(9)])
    assert np.max(np.abs(np.subtract(*drawn))) <= 1  # a value between two bytes may round either way


def test_two_processes_evaluate_as_one_does(two, config, start, tmp_path):
    """Four devices in two processes write the same score.json and samples as a single device, byte for byte."""
    weights = inception_weights.write(tmp_path / "inception.safetensors")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "a {c} circle"}}\n' for c in ("red", "blue", "cyan")))
    out = tmp_path / "out"
    flags = [
        f"--workdir={two}", f"--out={out}", "--scenes=2", f"--inception={weights}", f"--reference={config.data.path}",
        "--number=20", "--per_device=2", f"--geneval={tmp_path / 'prompts.jsonl'}", "--geneval_images=3",
        f"--npz={out / 'samples.npz'}", "--steps=1",
    ]  # fmt: skip
    report = f"--report={tmp_path / 'report'}"
    written = []
    for processes, devices, *more in ((2, 4, report), (1, 1)):
        succeed(start("evaluate", processes, *flags, *more, devices=devices))
        assert sorted(path.name for path in (out / "geneval" / "00002" / "samples").iterdir()) == [
            "0000.png", "0001.png", "0002.png",
        ]  # fmt: skip
        assert not (out / ".measuring").exists()
        with np.load(out / "samples.npz") as arrays:
            written.append(((out / "score.json").read_bytes(), arrays["arr_0"].tobytes()))
        shutil.rmtree(out)
    assert written[0] == written[1]
    assert (tmp_path / "report" / "index.html").read_text().count("data:image/png;base64,") == 6
    score = json.loads(written[0][0])
    row = metrics.read_jsonl(two / "metrics.jsonl")[-1]
    assert score["validation"] == {name: row[f"validation/{name}"] for name in score["validation"]}
    assert set(quality.METRICS) < set(score["quality"])


def test_two_processes_prepare_what_one_prepares(start, tmp_path):
    settings = Settings(resolution=8, train=48, validation=8)
    prepare(tmp_path / "one", settings)
    flags = "--source=shapes", "--resolution=8", "--train=48", "--validation=8", f"--out={tmp_path / 'two'}"
    succeed(start("prepare", 2, "--distributed", *flags))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_benchmark_of_two_processes_makes_the_same_calls_in_both(file, start, tmp_path):
    """The clock of one suggests ten times as many; it would wait forever for calls that the other does not make."""
    for process in range(2):
        (tmp_path / str(process)).mkdir()
        longer = f"\n\nfrom lina_jax import timing\n\ntiming.RUN_S *= {10**process}\n"
        (tmp_path / str(process) / file.name).write_text(file.read_text() + longer)
    flags = f"--config={file.name}", "--repeats=2"
    succeed(start("benchmark", 2, "train", *flags, cwd=lambda process: tmp_path / str(process)))


def test_two_processes_make_up_for_a_measurement(two, file, start, tmp_path):
    """As after a kill between the last save and its validation."""
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    log = workdir / "metrics.jsonl"
    *steps, validation = log.read_text().splitlines(keepends=True)
    assert "validation/loss" in json.loads(validation)
    log.write_text("".join(steps))
    succeed(start("train", 2, f"--config={file}", f"--workdir={workdir}"))
    assert log.read_text() == "".join(steps) + validation


def test_a_flipped_bit_is_noticed_by_all_and_four_go_on_from_the_checkpoint_before(
    two, file, start, tmp_path, reference
):
    workdir = tmp_path / "run"
    shutil.copytree(two, workdir)
    largest = max((workdir / "checkpoints" / "6" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as opened:
        opened.seek(largest.stat().st_size // 2)
        byte = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte[0] ^ 1]))
    (workdir / "metrics.jsonl").unlink()
    processes = start("train", 4, f"--config={file}", f"--workdir={workdir}")
    succeed(processes)
    name = largest.relative_to(workdir / "checkpoints" / "6")
    assert (
        f"checkpoint 6 in {workdir}/checkpoints is damaged ({name} has different bytes than were saved): using 3"
        in (processes[0].end()[1])
    )
    assert sorted(losses(workdir)) == [4, 5, 6]
    check_losses(workdir, reference(6), range(4, 7))
    assert (workdir / "damaged" / "6.0" / "params").is_dir()
    assert Checkpoints(workdir, CheckpointConfig(), create=False).latest_step() == 6


@pytest.mark.parametrize("compiling", [False, True], ids=["at_a_random_step", "before_the_first"])
def test_sigterm_to_one_saves_the_same_step_in_all(compiling, config, file, start, tmp_path, reference):
    """SIGTERM comes twice, and in the end a single process resumes the run."""
    draw, workdir = random.Random(0), tmp_path / "run"
    options = [f"--config={file}", f"--workdir={workdir}", "--config.checkpoint.every=100000"]
    processes = start("train", 2, *options, "--config.steps=100000", devices=2)
    moment, victim = 0 if compiling else draw.randint(1, 9), draw.randrange(2)
    wait_until(lambda: (workdir / "events").exists() and max(losses(workdir), default=0) >= moment, processes)
    processes[victim].send(signal.SIGTERM)
    processes[victim].send(signal.SIGTERM)
    ends = [process.end() for process in processes]
    saved = Checkpoints(workdir, config.checkpoint, create=False).latest_step()
    assert saved >= moment
    for code, errors in ends:
        assert code == RUN_AGAIN, errors
        assert errors.splitlines()[-1] == f"preempted; run the same command to resume from step {saved}"
    train(dataclasses.replace(config, steps=saved + 2), workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, saved + 3))  # none twice, none missing
    check_losses(workdir, reference(saved + 2), range(1, saved + 3))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_during_a_save_ends_the_other_and_the_run_goes_on(
    victim, config, file, start, tmp_path, reference
):
    """Process 0 hosts the coordination service and renames checkpoints; other deaths show only by lost heartbeats.

    Two processes resume the run without process 0, a single one that without process 1.
    """
    workdir, draw = tmp_path / "run", random.Random(victim)
    checkpoints = workdir / "checkpoints"
    options = [f"--config={file}", f"--workdir={workdir}", "--config.checkpoint.every=1"]
    processes = start("train", 2, *options, "--config.steps=100000", devices=2)
    moment = draw.randint(2, 6)
    wait_until(lambda: max(losses(workdir), default=0) >= moment, processes)
    wait_until(lambda: list(checkpoints.glob("*.orbax-checkpoint-tmp*")), processes)
    completed = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    processes[victim].send(signal.SIGKILL)
    killed = time.monotonic()
    code, errors = processes[1 - victim].end()
    assert time.monotonic() - killed < 5 * HEARTBEAT_S
    assert code == RUN_AGAIN, errors
    assert errors.splitlines()[-1].endswith("; run the same command again")
    processes[victim].end()

    saved = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    assert saved >= completed
    before = (workdir / "metrics.jsonl").read_text().count("\n")
    if victim == 0:
        succeed(start("train", 2, *options, f"--config.steps={saved + 2}", devices=2))
    else:
        every = dataclasses.replace(config.checkpoint, every=1)
        train(dataclasses.replace(config, steps=saved + 2, checkpoint=every), workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()[before:]]
    assert [line["step"] for line in lines if "loss" in line] == [saved + 1, saved + 2]
    check_losses(workdir, reference(saved + 2), range(1, saved + 3))


def test_another_config_in_one_process_ends_all(file, start, tmp_path):
    processes = start(
        "train",
        2,
        f"--config={file}",
        f"--workdir={tmp_path / 'run'}",
        own=lambda process: (f"--config.seed={process}",),
    )
    said = (
        "error: process 1 differs from process 0: seed=1 instead of 0 "
        "(all processes must run the same command with the same code and data)"
    )
    for process, line in zip(processes, (f"process 1: {said}", said), strict=True):
        code, errors = process.end()
        assert (code, errors.splitlines()[-1]) == (2, line)
    assert not (tmp_path / "run").exists()


def test_other_data_in_one_process_ends_all(file, start, tmp_path):
    for process in range(2):
        prepare(tmp_path / str(process) / "data", Settings(resolution=8, train=16 + process, validation=8))
    processes = start(
        "train", 2, f"--config={file}", f"--workdir={tmp_path / 'run'}", "--config.data.path=data",
        cwd=lambda process: tmp_path / str(process),
    )  # fmt: skip
    for process in processes:
        code, errors = process.end()
        assert code == 2, errors
        assert "error: process 1 differs from process 0: training data=" in errors.splitlines()[-1]
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_missing_process_is_named_by_the_command(file, start, tmp_path):
    options = f"--config={file}", f"--workdir={tmp_path / 'run'}", "--connect_timeout=3"
    process, other = start("train", 2, *options, own=lambda process: ("--process_id=0",))
    ends = {process.end(), other.end()}
    line = "error: process 1 of 2 did not connect within 3 s (--connect_timeout); run the same command again\n"
    assert (RUN_AGAIN, line) in ends
    assert 2 in [code for code, _ in ends]  # the other one cannot bind the port
