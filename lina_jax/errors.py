"""What can end a program: its exceptions, their exit codes, and the line that each prints.

Exit codes: 0 done; 1 training stopped itself (or a bug); 2 a user's mistake; 75 run the same command again
(EX_TEMPFAIL: preempted, a step that stalled, storage that failed, another process or a worker that is gone, or, with
several processes, a failed device or link; launchers restart on it); 130 interrupted (Ctrl-C).
"""

import errno
import re

RUN_AGAIN = 75
# Failures of a storage's disk, server or network, which may recover, unlike missing space or permissions.
_TRANSIENT_ERRNOS = {
    errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED,
    errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH,
}  # fmt: skip
# Messages about missing device memory for arrays; and about on-chip memory: a kernel that exceeds it is a bug of ours.
_NO_MEMORY = re.compile("out of memory|allocat", re.IGNORECASE)
_ON_CHIP = re.compile("vmem|smem|shared memory", re.IGNORECASE)


class UserError(Exception):
    """A mistake in a config, a flag, a path or a file; the message names the value and what is allowed. Exit code 2."""


class TrainingDiverged(Exception):
    """Training stopped itself to protect its checkpoints. Exit code 1."""


class Preempted(Exception):
    """Training was asked to stop and has saved; the same command resumes it. Exit code 75."""


class TransientFailure(Exception):
    """A device, link, storage or process failed; the same command resumes the run. Exit code 75."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def exit_message(error: BaseException) -> tuple[str, int] | None:
    """(line to print, exit code) for an error; None for a bug."""
    match error:
        case UserError() | OSError() if storage_failed(error):
            return f"error: {error}; run the same command again", RUN_AGAIN
        case UserError() | OSError():  # OSError: a full disk, a path that cannot be written or read
            return f"error: {error}", 2
        case TrainingDiverged():
            return f"error: {error}", 1
        case Preempted():
            return f"preempted; {error}", RUN_AGAIN
        case TransientFailure():
            return f"error: {error}; run the same command again", RUN_AGAIN
        case KeyboardInterrupt():
            return "; ".join(["interrupted", *map(str, error.args)]), 130
        case RuntimeError() if "home directory" in str(error):  # how pathlib expands ~NAME
            return "error: a path begins with ~, but there is no such home directory", 2
    if line := exhausted(error):
        return f"error: {line}; use fewer images at once or, in training, a larger optim.accumulate", 2
    return None


def exhausted(error: BaseException) -> str:
    """The line of a JAX error about device memory that is too small for arrays; "" for any other error."""
    if type(error).__name__ != "JaxRuntimeError":  # by name: not every program has imported jax
        return ""
    lines = map(str.strip, str(error).splitlines())
    return next((line for line in lines if _NO_MEMORY.search(line) and not _ON_CHIP.search(line)), "")


def storage_failed(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is a transient failure of storage: its errno, or a read that stalled."""
    while error:
        if isinstance(error, TimeoutError) or (isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS):
            return True
        error = error.__cause__
    return False
