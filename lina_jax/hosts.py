"""Many processes, one run: how they start together, agree on what they run, and end together.

`together()` is the frame of an entry point. Where flags or the environment (TPU pod, GKE, SLURM, Open MPI) say that the
process is one of several, it starts jax.distributed; alone, nothing is different. docs/many_hosts.md tells the user's
side.
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
from lina_jax import errors, roll_call
from lina_jax.cluster import Cluster, the_cluster
from lina_jax.errors import RUN_AGAIN, PartFailed, Preempted, UserError

T = TypeVar("T")
_END = "lina_jax/end"  # key of what ended the run: [process, line, exit code]
_SEEN = "lina_jax/seen"  # directory of keys, one for each process that knows of the end
_FAREWELL_S = 5.0  # how long a process that ends waits until all others know why
_said: int | None = None  # the exit code, as soon as this process has said why it ends
# What JAX's runtime says of mistakes, which would come again. All else may be the fault of a link or a machine.
_LASTING = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
_NO_BACKEND = "Unable to initialize backend"  # how JAX begins to tell of a runtime that failed as it started
PATIENCE_S = 24 * 3600  # for processes that live: those that do not are noticed by their heartbeats


def define_flags() -> None:
    """Define the flags of entry points that run in many processes."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; default: found by the environment, or alone")
    flags.DEFINE_integer("processes", None, "number of processes; 1: alone, whatever the environment says")
    flags.DEFINE_integer("process_id", None, "number of this process, from 0")
    flags.DEFINE_float("connect_timeout", 600.0, "seconds to wait for all processes, and their files, at the start")
    flags.DEFINE_integer("heartbeat_timeout", 100, "seconds without a sign of life after which a process is given up")


@contextlib.contextmanager
def together(facts: Mapping[str, Any], *, preemption: bool = False) -> Iterator[None]:
    """The frame of an entry point's work, in each process of the run.

    All processes must agree on `facts` (name: value). An error in one of them ends all, with its line and its exit
    code. With `preemption`, SIGTERM is a notice for `preemption.Notice`.
    """
    values = flags.FLAGS
    for name in ("connect_timeout", "heartbeat_timeout"):
        if not 0 < values[name].value <= PATIENCE_S:
            raise UserError(f"--{name}={values[name].value}: expected seconds, at most {PATIENCE_S}")
    cluster = the_cluster(values.coordinator, values.processes, values.process_id, values.connect_timeout)
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
        barrier("end")  # however long one of them works alone: JAX's own patience is five minutes
    except BaseException as error:
        if not errors.ending(error):
            traceback.print_exc()
        if reason := _runtime_failure(error):
            # Collectives fail at once when a process is gone. Which one, and whether it said why, is known by the end
            # of this time, in `_follow` or `_aborted`.
            time.sleep(1.5 * values.heartbeat_timeout + _FAREWELL_S)
            error = PartFailed(f"JAX's runtime failed in process {cluster.process_id}: {reason}")
        _end_all(cluster, error)
    _disconnect(follower)
    if preempted:
        raise preempted


def _runtime_failure(error: BaseException) -> str:
    """What JAX's runtime says of a device or a link that failed; "" of any other error."""
    if not isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(_NO_BACKEND):
        return ""
    if errors.exhausted(error):
        return ""
    reason = (str(error).splitlines() or ["no reason given"])[0][:200]
    return "" if any(status in reason for status in _LASTING) else reason


def check_same(what: str, facts: Mapping[str, Any]) -> None:
    """Returns when all processes have come here with the facts of process 0. Raises UserError naming what differs.

    `what` names the occasion, anew each time. Alone, nothing happens.
    """
    client = distributed.global_state.client
    if client is None:
        return
    mine, key = {name: str(value) for name, value in facts.items()}, f"lina_jax/same/{what}"
    theirs = _as_process_0_says(key, lambda: mine)
    differing = [
        f"{name}={mine.get(name, 'absent')}, there {theirs.get(name, 'absent')}"
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
    """Returns when `look` shows all processes what it showed process 0 when that came here. Raises UserError.

    `what` names what is looked at; the others look again, as network file systems keep old listings, for as long as
    --connect_timeout.
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
    """What `what` gives in process 0, as JSON gives it back, in all processes."""
    client = distributed.global_state.client
    if jax.process_index() == 0:
        client.key_value_set(key, json.dumps(what()))
    return json.loads(_heeding_signals(client.blocking_key_value_get, key, 1000 * PATIENCE_S))


def barrier(occasion: str) -> None:
    """Returns when all processes have come here, which may take a day. An occasion has a name of its own."""
    client = distributed.global_state.client
    if client is not None:
        _heeding_signals(client.wait_at_barrier, f"lina_jax/meet/{occasion}", 1000 * PATIENCE_S)


def summed(name: str, counts: Mapping[str, int]) -> dict[str, int]:
    """In process 0 the counts of all processes, as each said them last; in the others their own. Nobody waits."""
    client = distributed.global_state.client
    if client is None:
        return dict(counts)
    client.key_value_set(f"lina_jax/{name}/{jax.process_index()}", json.dumps(counts), allow_overwrite=True)
    if jax.process_index() != 0:
        return dict(counts)
    said = [json.loads(text) for _, text in client.key_value_dir_get(f"lina_jax/{name}")]
    return {key: sum(each[key] for each in said) for key in counts}


def _heeding_signals(wait: Callable[..., T], *args) -> T:
    """The result of a wait in JAX's runtime, in a thread of its own: the main one could not be interrupted there.

    The main thread waits in C: an interrupt within locks that are written in Python, as those of executors are, may
    leave them held for ever. And it wakes up now and then: a signal just before a wait in C does not end it.
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
    # Without it SIGTERM ends a process, as usual; with it nothing but a training loop heeds the signal.
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
    except RuntimeError as error:  # one that came to the roll call has gone since
        raise PartFailed(f"cannot start jax.distributed at {cluster.address}: {error}") from error


def _disconnect(follower: threading.Thread) -> None:
    """Leave when all do."""
    jax.distributed.shutdown()
    follower.join()  # a thread in the runtime's hands would end the interpreter's own end with an abort
    ctypes.CDLL(None).signal(signal.SIGABRT, None)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(signum: int) -> None:
    """JAX's runtime aborts the process when others are gone, and asks nobody before."""
    del signum
    if _said is not None:  # the others have left already
        os._exit(_said)
    faulthandler.dump_traceback()
    errors.leave(
        "error: JAX's runtime ended this process, as it does when another one is gone (its reason stands above); "
        "run the same command again",
        RUN_AGAIN,
    )


def _end_all(cluster: Cluster, error: BaseException) -> None:
    """Tell the others why this process ends, and end it."""
    line, code = errors.ending(error) or (f"error: {type(error).__name__}: {error}", 1)
    client = distributed.global_state.client
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or the store is gone
        client.key_value_set(_END, json.dumps([cluster.process_id, line, code]))
    _leave_knowingly(cluster, line, code)


def _follow(cluster: Cluster) -> None:
    """End this process when another one says that it ends."""
    try:
        process, line, code = json.loads(
            distributed.global_state.client.blocking_key_value_get(_END, 365 * 1000 * PATIENCE_S)
        )
    except jax.errors.JaxRuntimeError:  # disconnected
        return
    if process != cluster.process_id:
        _leave_knowingly(cluster, f"process {process}: {line}", code)


def _leave_knowingly(cluster: Cluster, line: str, code: int) -> NoReturn:
    """Say that the end is known here, and leave when all have said so: who leaves earlier makes JAX abort others.

    It aborts those, too, that leave a moment after process 0 does: nobody hears it by then.
    """

    def farewell():
        global _said
        _said = code
        client, deadline = distributed.global_state.client, time.monotonic() + _FAREWELL_S
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(f"{_SEEN}/{cluster.process_id}", "", allow_overwrite=True)
            while len(client.key_value_dir_get(_SEEN)) < cluster.processes and time.monotonic() < deadline:
                time.sleep(0.02)

    errors.leave(line, code, farewell)


def _code() -> str:
    """The version, and a digest of this package's sources."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"{lina_jax.__version__}-{digest.hexdigest()[:12]}"
