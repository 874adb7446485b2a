"""Several processes in one run: they start together, agree on what they run, and end together.

Entry points work within `distributed_run()`. If flags or the environment (TPU pod, GKE, SLURM, Open MPI) say that the
process is one of several, it starts jax.distributed; a single process just runs. docs/many_hosts.md is for users.
"""

import _thread
import contextlib
import ctypes
import faulthandler
import hashlib
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NoReturn, TypeVar

import jax
from absl import flags
from jax._src import distributed  # its key-value store, which has no public name

import lina_jax
from lina_jax import entry, errors, roll_call
from lina_jax.cluster import Cluster, find_cluster
from lina_jax.errors import RUN_AGAIN, Preempted, TransientFailure, UserError

T = TypeVar("T")
_END = "lina_jax/end"  # key of the reason why the run ended: [process, line, exit code]
_SEEN = "lina_jax/seen"  # directory of keys, one for each process that knows of the end
_FAREWELL_S = 5.0  # longest time that a process that ends waits for all others to know why
_said: int | None = None  # the exit code, once this process has printed why it ends
# Statuses of JAX's runtime for mistakes, which would recur. All others may be the fault of a link or a machine.
_LASTING = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
_NO_BACKEND = "Unable to initialize backend"  # how JAX's error begins if a runtime fails to start
PATIENCE_S = 24 * 3600  # how long to wait for live processes; heartbeats detect dead ones


def define_flags() -> None:
    """Define the flags of entry points that run in several processes."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; default: from the environment, or run alone")
    flags.DEFINE_integer("processes", None, "number of processes; 1: run alone, whatever the environment says")
    flags.DEFINE_integer("process_id", None, "number of this process, from 0")
    flags.DEFINE_float("connect_timeout", 600.0, "seconds to wait at the start for all processes and their files")
    flags.DEFINE_integer("heartbeat_timeout", 100, "seconds without a heartbeat after which a process counts as lost")


@contextlib.contextmanager
def distributed_run(facts: Mapping[str, Any], *, preemption: bool = False) -> Iterator[None]:
    """The context in which each process of a run does an entry point's work.

    All processes must agree on `facts` (name: value). An error in one of them ends all, with its line and its exit
    code. With `preemption`, SIGTERM is left to `preemption.Notice`.
    """
    values = flags.FLAGS
    for name in ("connect_timeout", "heartbeat_timeout"):
        if not 0 < values[name].value <= PATIENCE_S:
            raise UserError(f"--{name}={values[name].value}: expected seconds above 0, at most {PATIENCE_S}")
    cluster = find_cluster(values.coordinator, values.processes, values.process_id, values.connect_timeout)
    if cluster is None:
        yield
        return
    _connect(cluster, values.connect_timeout, values.heartbeat_timeout, preemption)
    follower = threading.Thread(target=_follow, args=(cluster,), daemon=True)
    follower.start()
    preempted = None
    try:
        check_same("start", {"code": _code(), "jax": jax.__version__, **facts})
        try:
            yield
        except Preempted as error:  # in all processes after the same step
            preempted = error
        barrier("end")  # one process may work alone for long; JAX itself waits only five minutes
    except BaseException as error:
        if not errors.exit_message(error):
            traceback.print_exc()
        if reason := _runtime_failure(error):
            # Collectives fail at once when a process is gone. By the end of this time, `_follow` or `_aborted` knows
            # which one it was, and whether it gave a reason.
            time.sleep(1.5 * values.heartbeat_timeout + _FAREWELL_S)
            error = TransientFailure(f"JAX's runtime failed in process {cluster.process_id}: {reason}")
        _end_all(cluster, error)
    _disconnect(follower)
    if preempted:
        raise preempted


def _runtime_failure(error: BaseException) -> str:
    """What JAX's runtime reports about a failed device or link; "" for any other error."""
    if not isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(_NO_BACKEND):
        return ""
    if errors.exhausted(error):
        return ""
    reason = (str(error).splitlines() or ["no reason given"])[0][:200]
    return "" if any(status in reason for status in _LASTING) else reason


def check_same(what: str, facts: Mapping[str, Any]) -> None:
    """Wait until all processes are here with the facts of process 0. Raises UserError that names what differs.

    `what` names the occasion and must be new each time. A single process does nothing.
    """
    client = distributed.global_state.client
    if client is None:
        return
    mine, key = {name: str(value) for name, value in facts.items()}, f"lina_jax/same/{what}"
    theirs = _as_process_0_says(key, lambda: mine)
    differing = [
        f"{name}={mine.get(name, 'absent')} instead of {theirs.get(name, 'absent')}"
        for name in theirs | mine
        if mine.get(name) != theirs.get(name)
    ]
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"process {jax.process_index()} differs from process 0: {'; '.join(differing[:3])}{more} "
            "(all processes must run the same command with the same code and data)"
        )
    _heeding_signals(client.wait_at_barrier, key, 1000 * PATIENCE_S)


def check_shared(what: str, look: Callable[[], Any]) -> None:
    """Wait until `look` returns in all processes what it returned in process 0. Raises UserError if it does not.

    `what` names what is looked at. The others look repeatedly, for up to --connect_timeout, as network file systems
    cache old listings.
    """
    client, key = distributed.global_state.client, f"lina_jax/shared/{what}"
    if client is None:
        return
    theirs = _as_process_0_says(key, look)
    if not soon(lambda: look() == theirs):
        raise UserError(
            f"process {jax.process_index()} sees {what} {look()}, process 0 {theirs}: all processes must work in one "
            "shared directory"
        )
    _heeding_signals(client.wait_at_barrier, key, 1000 * PATIENCE_S)


def soon(holds: Callable[[], bool]) -> bool:
    """Whether what others have done to files is seen within --connect_timeout; alone: whether it is seen now."""
    deadline = None
    while not holds():
        if distributed.global_state.client is None:
            return False
        deadline = deadline or time.monotonic() + flags.FLAGS.connect_timeout
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _as_process_0_says(key: str, what: Callable[[], Any]) -> Any:
    """The result of `what` in process 0, passed through JSON, in all processes."""
    client = distributed.global_state.client
    if jax.process_index() == 0:
        client.key_value_set(key, json.dumps(what()))
    return json.loads(_heeding_signals(client.blocking_key_value_get, key, 1000 * PATIENCE_S))


def barrier(occasion: str) -> None:
    """Wait, for up to a day, until all processes are here. The same `occasion` may come again."""
    client = distributed.global_state.client
    if client is not None:
        _heeding_signals(client.wait_at_barrier, f"lina_jax/meet/{occasion}", 1000 * PATIENCE_S)


def summed(name: str, counts: Mapping[str, int]) -> dict[str, int]:
    """In process 0, the sum of the counts that each process last reported; in the others their own. Never waits."""
    client = distributed.global_state.client
    if client is None:
        return dict(counts)
    client.key_value_set(f"lina_jax/{name}/{jax.process_index()}", json.dumps(counts), allow_overwrite=True)
    if jax.process_index() != 0:
        return dict(counts)
    said = [json.loads(text) for _, text in client.key_value_dir_get(f"lina_jax/{name}")]
    return {key: sum(each[key] for each in said) for key in counts}


def _heeding_signals(wait: Callable[..., T], *args) -> T:
    """The result of a wait in JAX's runtime, in another thread, as the main thread could not be interrupted there.

    The main thread waits in a SimpleQueue, which is written in C: an interrupt within locks written in Python, like
    those of executors, may leave them held forever. It wakes up at intervals, as a signal that comes just before a wait
    in C does not end it.
    """
    ends: SimpleQueue = SimpleQueue()

    def end() -> None:
        try:
            ends.put((wait(*args), None))
        except Exception as error:
            ends.put((None, error))

    _thread.start_new_thread(end, ())
    while True:
        with contextlib.suppress(Empty):
            result, error = ends.get(timeout=roll_call.WAKE_S)
            break
    if error:
        raise error
    return result


def _connect(cluster: Cluster, timeout: float, heartbeat: int, preemption: bool) -> None:
    roll_call.hold(cluster, timeout)
    # Without this service, SIGTERM ends a process as usual; with it, only a training loop reacts to the signal.
    jax.config.update("jax_enable_preemption_service", preemption)
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)
    try:
        jax.distributed.initialize(
            cluster.address,
            cluster.processes,
            cluster.process_id,
            cluster.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout),
            heartbeat_timeout_seconds=heartbeat,
        )
    except ValueError as error:
        raise UserError(f"cannot start jax.distributed at {cluster.address}: {error}") from error
    except RuntimeError as error:  # a process that answered the roll call is gone
        raise TransientFailure(f"cannot start jax.distributed at {cluster.address}: {error}") from error


def _disconnect(follower: threading.Thread) -> None:
    """Disconnect, together with all processes."""
    jax.distributed.shutdown()
    follower.join()  # a thread still in the runtime would make the interpreter abort at exit
    ctypes.CDLL(None).signal(signal.SIGABRT, None)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(signum: int) -> None:
    """Handler of SIGABRT: JAX's runtime aborts this process when another one is gone."""
    del signum
    if _said is not None:  # the others have left already
        os._exit(_said)
    faulthandler.dump_traceback()
    entry.exit_process(
        "error: JAX's runtime ended this process, as it does when another process is gone (the reason is above); "
        "run the same command again",
        RUN_AGAIN,
    )


def _end_all(cluster: Cluster, error: BaseException) -> None:
    """Report to the others why this process ends, and end it."""
    line, code = errors.exit_message(error) or (f"error: {type(error).__name__}: {error}", 1)
    client = distributed.global_state.client
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or the store is gone
        client.key_value_set(_END, json.dumps([cluster.process_id, line, code]))
    _leave_knowingly(cluster, line, code)


def _follow(cluster: Cluster) -> None:
    """End this process when another one reports that it ends."""
    try:
        process, line, code = json.loads(
            distributed.global_state.client.blocking_key_value_get(_END, 365 * 1000 * PATIENCE_S)
        )
    except jax.errors.JaxRuntimeError:  # disconnected
        return
    if process != cluster.process_id:
        _leave_knowingly(cluster, f"process {process}: {line}", code)


def _leave_knowingly(cluster: Cluster, line: str, code: int) -> NoReturn:
    """Report that this process knows of the end, and leave once all have: leaving earlier makes JAX abort the others.

    It also aborts processes that leave just after process 0, but their output is closed by then.
    """

    def farewell():
        global _said
        _said = code
        client, deadline = distributed.global_state.client, time.monotonic() + _FAREWELL_S
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"{_SEEN}/{cluster.process_id}", "", allow_overwrite=True)
            while len(client.key_value_dir_get(_SEEN)) < cluster.processes and time.monotonic() < deadline:
                time.sleep(0.02)

    entry.exit_process(line, code, farewell)


def _code() -> str:
    """The version and a digest of this package's sources."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"{lina_jax.__version__}-{digest.hexdigest()[:12]}"
