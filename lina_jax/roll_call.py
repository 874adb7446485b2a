"""The roll call: all processes of a run connect to the coordinator's port, just before JAX starts there.

If a process is missing, JAX would abort the others without naming it.
"""

import contextlib
import socket
import time
from collections.abc import Collection

from lina_jax.cluster import Cluster
from lina_jax.errors import TransientFailure, UserError

_GREETING = "lina_jax"
WAKE_S = 0.5  # how often a process that waits checks for signals
_PATIENCE_S = 5.0  # how long to wait for a caller that sends nothing


def hold(cluster: Cluster, timeout: float) -> None:
    """Wait until all processes have called, for up to `timeout` seconds.

    Raises, in all that did, TransientFailure that names the missing ones (a late machine is not a mistake of the user),
    and UserError if numbers of processes do not fit.
    """
    deadline = time.monotonic() + timeout
    if cluster.process_id == 0:
        _call(cluster, deadline, timeout)
    else:
        _answer(cluster, deadline, timeout)


def _call(cluster: Cluster, deadline: float, timeout: float) -> None:
    port = int(cluster.address.rpartition(":")[2])
    callers, here = [], {}  # everyone who called; those who are waiting, by number
    mistake: UserError | TransientFailure | None = None
    with contextlib.ExitStack() as present:
        try:
            server = present.enter_context(_listen(port))
        except OSError as error:
            raise UserError(f"process 0 cannot listen on port {port} of {cluster.address}: {error.strerror}") from error
        while len(here) < cluster.processes - 1 and not mistake and (left := deadline - time.monotonic()) > 0:
            server.settimeout(min(left, WAKE_S))
            try:
                caller = present.enter_context(server.accept()[0])
                caller.settimeout(_PATIENCE_S)
                greeting, *numbers = caller.makefile().readline().split()
                number, count = map(int, numbers)
            except (OSError, ValueError):  # the timeout, or a caller that is not ours
                continue
            if greeting != _GREETING:
                continue
            callers.append(caller)
            if count != cluster.processes:
                mistake = UserError(
                    f"process {number} was started with --processes={count}, process 0 with {cluster.processes}"
                )
            elif number == 0 or (number in here and not _hung_up(here[number])):
                mistake = UserError(f"two processes have --process_id={number}")
            here[number] = caller
            if len(here) == cluster.processes - 1:
                here = {number: line for number, line in here.items() if not _hung_up(line)}
        missing = set(range(1, cluster.processes)) - here.keys()
        if missing and not mistake:
            absent = f"{_listed(missing)} of {cluster.processes}"
            mistake = TransientFailure(f"{absent} did not connect within {timeout:g} s (--connect_timeout)")
        verdict = [type(mistake).__name__, str(mistake)] if mistake else []
        for caller in callers:
            with contextlib.suppress(OSError):
                caller.sendall(f"{' '.join([_GREETING, *verdict])}\n".encode())
    if mistake:
        raise mistake


def _hung_up(caller: socket.socket) -> bool:
    """Whether a caller has gone since: it was restarted, or lost its connection."""
    caller.setblocking(False)
    try:
        return not caller.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        caller.settimeout(_PATIENCE_S)


def _answer(cluster: Cluster, deadline: float, timeout: float) -> None:
    host, _, port = cluster.address.rpartition(":")
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as line:
                line.sendall(f"{_GREETING} {cluster.process_id} {cluster.processes}\n".encode())
                line.settimeout(left + _PATIENCE_S)
                greeting, *verdict = line.makefile().readline().rstrip("\n").split(" ", 2)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        else:
            if greeting == _GREETING and verdict:
                kind, reason = verdict
                raise {"UserError": UserError, "TransientFailure": TransientFailure}[kind](reason)
            if greeting == _GREETING:
                return
        time.sleep(0.1)  # process 0 has not started yet
    raise TransientFailure(
        f"process 0 cannot be reached at {cluster.address} within {timeout:g} s (--connect_timeout): {reason}"
    )


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=4096, dualstack_ipv6=dual)


def _listed(processes: Collection[int]) -> str:
    shown = ", ".join(map(str, sorted(processes)[:20]))
    more = f" and {len(processes) - 20} more" if len(processes) > 20 else ""
    return f"process{'es' * (len(processes) > 1)} {shown}{more}"
