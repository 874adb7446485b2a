"""Processes that wait for each other: they heed signals, check that they share files, and end together."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port

import lina_jax
from lina_jax.errors import RUN_AGAIN

PROGRAM = """
import functools, os, pathlib, signal, sys, threading
import jax
from lina_jax import entry, errors, hosts, preemption

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it
# Ends that wait for each other must not rest on the patience of JAX's runtime.
jax.distributed.initialize = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=1)

def main(argv):
    with hosts.distributed_run({}, preemption=True):
        work(jax.process_index())

"""
START = """
hosts.define_flags()
entry.run(main)
"""


@contextlib.contextmanager
def two_processes(work: str, *flags: str, cwd=lambda process: None):
    """Two processes that run `work(process)`; both are killed on exit."""
    place = [f"--coordinator=localhost:{free_port()}", "--processes=2", *flags]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM + work + START, *place, f"--process_id={i}"],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            cwd=cwd(i),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ends(processes) -> list[tuple[str, int]]:
    """(stderr, exit code) of each."""
    return [(process.communicate(timeout=100)[1], process.returncode) for process in processes]


WAITING = """
def work(process):
    if process == 0:
        print("waiting", flush=True)
        hosts.barrier("what the other never comes to")
    threading.Event().wait()
"""


def test_ctrl_c_is_heard_where_a_process_waits_for_the_others():
    with two_processes(WAITING) as processes:
        assert processes[0].stdout.readline() == "waiting\n"
        processes[0].send_signal(signal.SIGINT)
        assert ends(processes) == [("interrupted\n", 130), ("process 0: interrupted\n", 130)]


LATE = """
def work(process):
    if process == 0:
        threading.Event().wait(3)
"""


def test_all_wait_for_the_one_that_works_alone_at_the_end():
    with two_processes(LATE) as processes:
        assert ends(processes) == [("", 0), ("", 0)]


AGAIN = """
def work(process):
    hosts.barrier("measured")
    if process == 1:
        pathlib.Path("file").touch()
    hosts.barrier("measured")
    assert pathlib.Path("file").exists()
"""


def test_processes_wait_for_each_other_when_an_occasion_comes_again(tmp_path):
    with two_processes(AGAIN, cwd=lambda process: tmp_path) as processes:
        assert ends(processes) == [("", 0), ("", 0)]


KILLED = """
def work(process):
    if process == 1:
        print("here", flush=True)
        threading.Event().wait()
"""


def test_who_waits_at_the_end_notices_that_another_died():
    with two_processes(KILLED, "--heartbeat_timeout=1") as processes:
        assert processes[1].stdout.readline() == "here\n"
        processes[1].kill()
        said, code = ends(processes)[0]
    assert code == RUN_AGAIN and said.splitlines()[-1].endswith("run the same command again"), said


COUNTING = """
def work(process):
    hosts.summed("records", {"bad": 5, "cut": 0})
    hosts.barrier("counted once")
    print(hosts.summed("records", {"bad": 10 + process, "cut": process}), flush=True)
    hosts.barrier("counted twice")
    print(hosts.summed("records", {"bad": 10 + process, "cut": process}), flush=True)
"""


def test_process_0_knows_what_all_have_counted():
    """Nobody waits: without a barrier, process 0 may still see the previous counts of the others."""
    with two_processes(COUNTING) as processes:
        (first, last), others = ([eval(line) for line in p.communicate(timeout=100)[0].splitlines()] for p in processes)
    assert first in ({"bad": 15, "cut": 0}, {"bad": 21, "cut": 1})
    assert last == {"bad": 21, "cut": 1}
    assert others == [{"bad": 11, "cut": 1}] * 2


HEEDING = """
def work(process):
    with preemption.Notice() as notice:
        if process == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        questions = 0
        while not notice.reached():
            questions += 1
            threading.Event().wait(0.01)
        print(questions, flush=True)
        preemption.raise_if_preempted()
"""


def test_a_notice_reaches_all_at_the_same_question_and_stays():
    with two_processes(HEEDING) as processes:
        told = [process.communicate(timeout=100) for process in processes]
        assert [process.returncode for process in processes] == [RUN_AGAIN] * 2
    questions = {told_by[0] for told_by in told}
    assert len(questions) == 1 and int(*questions) > 0
    assert all(said.splitlines()[-1].startswith("preempted") for _, said in told), told


SAVING = """
def work(process):
    import numpy as np
    from lina_jax.checkpoint import Checkpoints
    from lina_jax.config import CheckpointConfig
    from lina_jax.state import TrainState
    with preemption.Notice() as notice:
        for _ in range(5):
            assert not notice.reached()
        checkpoints = Checkpoints(pathlib.Path("run"), CheckpointConfig())
        scalars, trees = [np.array(1_000_000, np.int32)] * 4, [{"a": np.ones(4)}] * 4
        checkpoints.save(TrainState(*scalars, *trees))
        checkpoints.close()
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(3)  # a step; the runtime looks for the signal once a second
        while not notice.reached():
            threading.Event().wait(0.01)
"""


def test_a_notice_that_comes_after_a_save_is_heard(tmp_path):
    """Orbax's manager would lose it: it asks JAX with steps, in a resumed run far larger than our question numbers."""
    with two_processes(SAVING, cwd=lambda process: tmp_path) as processes:
        assert [code for _, code in ends(processes)] == [0, 0]


GONE = """
def work(process):
    sys.stderr.flush()
    os.close(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(reader)
    raise errors.UserError("a mistake")
"""


def test_the_exit_code_is_kept_where_nobody_reads_the_line():
    with two_processes(GONE) as processes:
        assert [code for _, code in ends(processes)] == [2, 2]


LOOKING = """
def work(process):
    if process == 0:
        pathlib.Path("run").write_text("")
    hosts.check_shared("the run", lambda: "there" if pathlib.Path("run").exists() else "absent")
"""


# Of the look alone: two processes may take long to connect.
IMPATIENT = """
look = work

def work(process):
    hosts.flags.FLAGS.connect_timeout = 1
    look(process)
"""


def test_files_of_one_directory_are_waited_for(tmp_path):
    with two_processes(LOOKING, cwd=lambda process: tmp_path) as processes:
        assert ends(processes) == [("", 0), ("", 0)]


def test_directories_of_equal_names_are_told_apart(tmp_path):
    def own(process):
        (tmp_path / str(process)).mkdir()
        return tmp_path / str(process)

    said = "process 1 sees the run absent, process 0 there: all processes must work in one shared directory\n"
    with two_processes(LOOKING + IMPATIENT, cwd=own) as processes:
        assert ends(processes) == [(f"process 1: error: {said}", 2), (f"error: {said}", 2)]


AT_WORK = """
def work(process):
    print("at work", flush=True)
"""
# Delays the report of what differs, so that others would have time to begin.
ANOTHER_VERSION = """
compare = check_same

def check_same(*args):
    try:
        compare(*args)
    finally:
        threading.Event().wait(0.5)
"""


def test_processes_with_different_code_do_not_begin(tmp_path):
    """Nor does process 0, with which the others are compared."""
    shutil.copytree(Path(lina_jax.__file__).parent, tmp_path / "lina_jax")
    with (tmp_path / "lina_jax" / "hosts.py").open("a") as file:
        file.write(ANOTHER_VERSION)
    with two_processes(AT_WORK, cwd=lambda process: tmp_path if process else None) as processes:
        told = [process.communicate(timeout=100) for process in processes]
        assert [process.returncode for process in processes] == [2, 2]
    assert [done for done, _ in told] == ["", ""]
    assert all("error: process 1 differs from process 0: code=" in said for _, said in told), told


FAILING = """
def work(process):
    if process == 1:
        raise ERROR: what the runtime says\\nand at length")
    threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ('jax.errors.JaxRuntimeError("INTERNAL', RUN_AGAIN),
        ('jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED', 1),
        ('jax.errors.JaxRuntimeError("Out of memory allocating 9 bytes', 2),
        ("RuntimeError(\"Unable to initialize backend 'tpu': UNAVAILABLE", RUN_AGAIN),
        ('RuntimeError("a bug', 1),
    ],
)
def test_a_link_that_fails_is_tried_again_and_a_mistake_is_not(error, code):
    with two_processes(FAILING.replace("ERROR", error), "--heartbeat_timeout=1") as processes:
        ended = ends(processes)
    assert [last for _, last in ended] == [code, code]
    reason = error.partition('"')[2]
    assert all(f"{reason}: what the runtime says" in said.splitlines()[-1] for said, _ in ended)
