"""How processes find each other: who takes part, from flags or the environment, and the roll call at the start."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from ports import free_port

from lina_jax import roll_call
from lina_jax.cluster import Cluster, find_cluster
from lina_jax.errors import TransientFailure, UserError


def answers(port: int, *ids: int, count: int = 4, timeout: float = 1.0) -> dict[int, str]:
    """The error of the roll call in each of these processes, "" if none, by position in `ids`."""
    said = {}

    def take_part(number, process):
        try:
            roll_call.hold(Cluster(f"localhost:{port}", count, process), timeout)
            said[number] = ""
        except (UserError, TransientFailure) as error:
            said[number] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=take_part, args=place) for place in enumerate(ids)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_a_roll_call_with_all_is_silent():
    port = free_port()
    for _ in range(2):  # the port is free again at once
        assert set(answers(port, 3, 1, 0, 2, timeout=30).values()) == {""}


def test_missing_processes_are_named_in_all_that_came():
    line = "TransientFailure: processes 1, 3 of 4 did not connect within 1 s (--connect_timeout)"
    assert set(answers(free_port(), 2, 0).values()) == {line}


def test_without_process_0_its_address_is_named():
    port = free_port()
    (line,) = answers(port, 1).values()
    assert line.startswith(
        f"TransientFailure: process 0 cannot be reached at localhost:{port} within 1 s (--connect_timeout)"
    )


def test_two_processes_of_one_number_are_refused():
    assert "UserError: two processes have --process_id=1" in answers(free_port(), 0, 1, 1, timeout=30).values()


@pytest.mark.parametrize(
    ("said", "stays"),
    [(b"GET / HTTP/1.1\r\n", False), (b"lina_jax 1 3\n", False), (b"", True)],
    ids=["a stranger", "one that died since", "one that says nothing"],
)
def test_who_does_not_take_part_is_passed_over(said, stays, monkeypatch):
    monkeypatch.setattr(roll_call, "_PATIENCE_S", 0.5)
    port = free_port()
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as until_the_end:
        first = pool.submit(answers, port, 0, count=3, timeout=30)
        while not first.done():  # until it listens
            with contextlib.suppress(OSError), contextlib.ExitStack() as call:
                call.enter_context(socket.create_connection(("localhost", port))).sendall(said)
                if stays:
                    until_the_end.push(call.pop_all())
                break
        assert answers(port, 1, 2, count=3, timeout=30) == {0: "", 1: ""}
        assert first.result() == {0: ""}


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
}  # fmt: skip


# The second of two slices, before the first has a pod.
MULTISLICE = {
    "JAX_FORCE_TPU_INIT": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "h0,h1", "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "run-slice-job-0-0.run.invalid:8081", "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "JAX_COORD", "OMPI_", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "cluster"),
    [
        ({}, None),
        (SLURM, Cluster(f"node03:{65535 - 2**12 + 8}", 8, 5, [1])),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # a shell in the allocation
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")}, None),  # a batch script
    ],
    ids=["alone", "srun", "shell", "one task", "batch script"],
)
def test_the_environment_says_who_takes_part(variables, cluster, environment):
    for name, value in variables.items():
        environment.setenv(name, value)
    assert find_cluster(None, None, None) == cluster


def test_a_coordinator_that_has_no_name_yet_is_waited_for(environment):
    """A GKE pod has a name only once it is scheduled."""
    # In a process of its own, as the import reads JAX_FORCE_TPU_INIT.
    program = "from lina_jax.cluster import find_cluster\nfind_cluster(None, None, None, 1)"
    for name, value in MULTISLICE.items():
        environment.setenv(name, value)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("lina_jax.errors.TransientFailure: cannot tell yet which process this is: ")
    assert "run-slice-job-0-0" in last


@pytest.mark.filterwarnings("ignore:Kubernetes environment detected")
def test_pods_of_a_job_do_not_run_each_alone(environment):
    environment.setitem(sys.modules, "kubernetes", None)  # as if it were not installed
    environment.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    environment.setenv("JOB_COMPLETION_INDEX", "1")
    with pytest.raises(UserError, match=r"JOB_COMPLETION_INDEX=1: .* needs the package kubernetes"):
        find_cluster(None, None, None)
    assert find_cluster(None, 1, None) is None


def test_flags_go_before_the_environment(environment):
    for name, value in SLURM.items():
        environment.setenv(name, value)
    assert find_cluster(None, 1, None) is None
    assert find_cluster("here:1", 3, 2) == Cluster("here:1", 3, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("here:1", 3, None), "--process_id=None: all three are needed, or none"),
        ((None, 3, 1), "--coordinator=None .*: all three are needed, or none"),
        (("here:1", 3, 3), "--process_id=3: expected 0 <= process_id < processes"),
        (("here", 3, 1), "--coordinator=here .*: expected HOST:PORT"),
        (("here:70000", 3, 1), "--coordinator=here:70000 .*: expected HOST:PORT with a port from 1 to 65535"),
    ],
)
def test_places_that_cannot_be_are_refused(given, message, environment):
    with pytest.raises(UserError, match=message):
        find_cluster(*given)
