"""Processes on one machine, as launch/local.sh and launch/worker.sh start them: numbers, exit codes, signals."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"

PROCESS = """
import contextlib, json, os, pathlib, signal, sys
signal.alarm(50)
flags = dict(word.split("=") for word in sys.argv[2:])
me, here, todo = flags["--process_id"], pathlib.Path(os.environ["HOME"]), json.loads(sys.argv[1])
with open(here / me, "a") as starts:
    print(os.environ.get("JAX_NUM_CPU_DEVICES"), flags["--processes"], flags["--coordinator"], file=starts)
started = len((here / me).read_text().splitlines())
mine = todo[me][min(started, len(todo[me])) - 1]
for number, code in {signal.SIGTERM: 75, signal.SIGINT: 130}.items():
    heed = {"deaf": signal.SIG_IGN, "loading": signal.SIG_DFL}.get(mine, lambda *_, code=code: os._exit(code))
    signal.signal(number, heed)
if mine == "deaf" and not os.fork():  # its child is deaf too, and keeps stdout open, to whose end `launch` reads
    signal.alarm(90)
    signal.pause()
if len(todo) == 2:
    with contextlib.suppress(FileExistsError):
        os.mkfifo(here / f"meet{started}")
    open(here / f"meet{started}", "rw"[int(me)]).close()
if isinstance(mine, int):
    os._exit(mine)
if mine == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""


@pytest.fixture
def process(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    return lambda **table: [sys.executable, str(script), json.dumps({key[1:]: value for key, value in table.items()})]


def starts(home: Path) -> list[list[str]]:
    return [(home / str(number)).read_text().splitlines() for number in range(2)]


LOCAL = ["--name=run-1", "--accelerator=cpu", "--grace=30"]


def test_local_processes_know_who_they_are(launch, process):
    words = [*LOCAL, "--devices=4", "--port=7777", "--", *process(_0=[0], _1=[0])]
    result, _, home = launch(LAUNCH / "local.sh", *words)
    assert result.returncode == 0, result.stderr
    assert starts(home) == [["4 2 localhost:7777"]] * 2

    printed, _, nothing = launch(LAUNCH / "local.sh", "--dry-run", *words)
    assert list(nothing.iterdir()) == []
    _, _, pasted = launch(printed.stdout)
    assert starts(pasted) == starts(home)


@pytest.mark.parametrize(
    ("table", "code", "number_of_starts"),
    [
        ({"_0": [75, 0], "_1": ["wait", 0]}, 0, 2),
        ({"_0": ["wait", "wait", 0], "_1": [75, 75, 0]}, 0, 3),
        ({"_0": ["wait", 0], "_1": ["killed", 0]}, 0, 2),
        ({"_0": ["wait"], "_1": [143]}, 143, 1),
        ({"_0": ["wait"], "_1": [2]}, 2, 1),
        ({"_0": [1], "_1": [0]}, 1, 1),
        ({"_0": [75], "_1": [75]}, 75, 4),
    ],
    ids=["preempted", "preempted_twice", "killed", "stopped", "mistake", "one_fails_late", "without_end"],
)
def test_local_processes_start_and_end_together(table, code, number_of_starts, launch, process):
    result, _, home = launch(LAUNCH / "local.sh", *LOCAL, "--max_restarts=3", "--", *process(**table))
    assert result.returncode == code, result.stderr
    assert [len(each) for each in starts(home)] == [number_of_starts] * 2


def test_a_process_that_does_not_end_is_killed_with_its_children(launch, process):
    result, _, _ = launch(LAUNCH / "local.sh", *LOCAL, "--grace=0", "--", *process(_0=["deaf"], _1=[2]))
    assert result.returncode == 2 and "process 0 ended with 137" in result.stderr


@pytest.mark.parametrize(("state", "ends_with"), [("wait", {}), ("loading", {75: 143})])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)])
def test_signals_reach_all_local_processes(number, code, state, ends_with, tmp_path, process):
    """They save and end; nothing restarts, since the machine or its user wants them to end.

    Those that are still importing die from the signal: they have nothing to save.
    """
    command = ["bash", str(LAUNCH / "local.sh"), *LOCAL, "--", *process(_0=[state], _1=[state])]
    env = os.environ | {"HOME": str(tmp_path), "PYTHON": sys.executable}
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if nohup runs the tests
    launcher = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGHUP, before)
    with launcher:
        assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        launcher.send_signal(number)
        _, lines = launcher.communicate(timeout=30)
    assert launcher.returncode == code
    code = ends_with.get(code, code)
    assert sorted(lines.splitlines()) == [f"run-1: process {each} ended with {code}" for each in range(2)]


def test_processes_end_together_when_nobody_reads_the_launchers_messages(tmp_path, process):
    command = ["bash", str(LAUNCH / "local.sh"), *LOCAL, "--", *process(_0=["wait"], _1=[3])]
    env = os.environ | {"HOME": str(tmp_path), "PYTHON": sys.executable}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launcher:
        launcher.stderr.close()
        assert launcher.wait(timeout=30) == 3


def test_gpus_are_shared_out(launch):
    words = ["--name=r", "--accelerator=gpu", "--dry-run", "--", "train"]
    result, _, _ = launch(LAUNCH / "local.sh", *words, CUDA_VISIBLE_DEVICES="3,5,6,7")
    assert re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", result.stdout) == ["3,5", "6,7"]


@pytest.mark.parametrize("state", ["wait", "loading"])
def test_a_worker_passes_sigterm_on_and_does_not_restart(state, tmp_path, process):
    words = ["--accelerator=cpu", "--max_restarts=5", f"--code_file={tmp_path}/code", "--"]
    command = ["bash", str(LAUNCH / "worker.sh"), *words, *process(_0=[state])]
    command += ["--process_id=0", "--processes=1", "--coordinator=none"]
    env = os.environ | {"HOME": str(tmp_path)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout.readline() == "ready\n"
        worker.send_signal(signal.SIGTERM)
        worker.communicate(timeout=30)
    assert worker.returncode == 75 and (tmp_path / "code").read_text() == "75\n"
    assert len((tmp_path / "0").read_text().splitlines()) == 1


def test_a_worker_never_ends_with_the_code_by_which_one_is_known_to_be_at_work(launch, tmp_path):
    """launch/detached.sh ends with 124 in that case, and `timeout` does when the time is over."""
    words = ["--accelerator=cpu", f"--code_file={tmp_path}/code", "--", "bash", "-c", "exit 124"]
    result, _, _ = launch(LAUNCH / "worker.sh", *words)
    assert result.returncode == 1 and (tmp_path / "code").read_text() == "1\n"


def test_a_worker_that_is_stopped_while_it_sets_up_asks_to_be_run_again(launch, tmp_path):
    words = ["--accelerator=cpu", f"--code_file={tmp_path}/code", "--setup=kill -TERM $$; :", "--", "echo", "ran"]
    result, _, _ = launch(LAUNCH / "worker.sh", *words)
    assert (result.returncode, result.stdout) == (75, "") and (tmp_path / "code").read_text() == "75\n"


def test_a_worker_takes_nothing_from_the_environment(launch):
    """sbatch passes on what was set for the launcher; only the command may use it."""
    script = '"$0" --accelerator=cpu -- bash -c \'echo "$LINA_INDEX"; exit 75\''
    settings = {"LINA_MAX_RESTARTS": "3", "LINA_SETUP": "exit 9", "LINA_REQUIREMENTS": "tpu", "LINA_INDEX": "5"}
    result, _, _ = launch(script.replace("$0", str(LAUNCH / "worker.sh")), **settings)
    assert (result.returncode, result.stdout) == (75, "5\n")


# The launchers' own variables, one that is not set, a limit, and what the command is to see.
CARELESS = "root=/nowhere words=none name=none devices=9; : $unset; ulimit -n 100; cd /; export SEEN=yes"
SEEN = ["bash", "-c", "echo $SEEN $(ulimit -n) $LINA_SETUP"]


def test_a_set_up_changes_nothing_of_the_launcher(launch, tmp_path):
    words = ["--accelerator=cpu", f"--code_file={tmp_path}/code", f"--setup={CARELESS}", "--", *SEEN]
    result, _, _ = launch(LAUNCH / "worker.sh", *words)
    assert (result.stdout, result.stderr, (tmp_path / "code").read_text()) == ("yes 100\n", "", "0\n")

    local = [*LOCAL, "--processes=1", "--", *SEEN]
    result, _, _ = launch(LAUNCH / "local.sh", *local, LINA_SETUP=CARELESS)
    assert (result.returncode, result.stdout, result.stderr) == (0, "yes 100\n", "")


@pytest.mark.parametrize(
    ("words", "named"),
    [(["plan"], "plan"), (["convert", "--out=a"], "convert"), (["benchmark", "data", "--batches=1"], "benchmark data")],
)
def test_what_runs_in_one_process_is_refused(words, named, launch):
    result, _, _ = launch(LAUNCH / "local.sh", *LOCAL, "--dry-run", "--", *words)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {named} runs in one process\n"


@pytest.mark.parametrize("setup", ["", " ", "# a comment", "set -- a b", "cat <<END\n$HOME'\"\nEND", "true \\"])
def test_what_a_shell_takes_is_a_set_up(setup, launch):
    result, _, _ = launch(LAUNCH / "worker.sh", "--accelerator=cpu", f"--setup={setup}", "--", "echo", "ran")
    assert (result.returncode, result.stderr, result.stdout.splitlines()[-1]) == (0, "", "ran")


def test_background_jobs_of_a_set_up_are_not_taken_for_processes(launch):
    """This one ends before the run does."""
    words = [*LOCAL, "--processes=1", "--setup=mkfifo ~/go; (: >~/go) &", "--", "bash", "-c", "read <~/go || echo ran"]
    result, _, _ = launch(LAUNCH / "local.sh", *words)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "ran\n")


@pytest.mark.parametrize(("setup", "code"), [("false", 78), ("exit 7", 78), ("exit 0", 78), ("exit 75", 75)])
def test_a_set_up_that_fails_ends_a_worker_for_good(setup, code, launch, tmp_path):
    words = ["--accelerator=cpu", "--max_restarts=3", f"--code_file={tmp_path}/code", f"--setup=echo one; {setup}"]
    result, _, _ = launch(LAUNCH / "worker.sh", *words, "--", "echo", "ran")
    assert (result.returncode, result.stdout, (tmp_path / "code").read_text()) == (code, "one\n", f"{code}\n")


def test_a_dry_run_of_a_worker_prints_what_runs(launch):
    words = ["--accelerator=cpu", f"--setup={CARELESS}", "--", *SEEN]
    printed, _, _ = launch(LAUNCH / "worker.sh", "--dry-run", *words)
    assert "ulimit" in printed.stdout
    assert launch(printed.stdout)[0].stdout == launch(LAUNCH / "worker.sh", *words)[0].stdout == "yes 100\n"
