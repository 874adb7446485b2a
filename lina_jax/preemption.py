"""Preemption and stalls: a run that is asked to stop, or whose step hangs, ends so that the same command resumes it."""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from lina_jax import entry, errors


def exit_on_sigterm() -> None:
    """From here on, except within a `Notice`, SIGTERM ends this process at once with exit code 75: nothing to save.

    If jax.distributed starts with preemption, its runtime takes over the signal.
    """
    signal.signal(signal.SIGTERM, _leave)


def ignore_sigterm() -> None:
    """From here on, SIGTERM does not end this process: its work is done. Not where jax.distributed has the signal."""
    if not jax.distributed.is_initialized():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _leave(signum, frame) -> None:
    del signum, frame
    if not entry.leaving():  # the interrupted thread may be in `entry.exit_process` itself
        entry.exit_process("preempted, with nothing to save; run the same command again", errors.RUN_AGAIN)


class Notice:
    """Whether the run is to stop: after SIGTERM (with jax.distributed: in any process) or the platform's notice.

    A context manager. Within it, SIGTERM has no other effect, however often it comes, and `raise_if_preempted` asks it.
    """

    def __init__(self):
        self._asked = False
        self._questions = 0

    def __enter__(self):
        global _notice
        _notice = self
        # With jax.distributed, its runtime handles the signal and notifies all processes.
        self._own = not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread()
        if self._own:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *error):
        global _notice
        _notice = None
        if self._own:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self) -> bool:
        """Whether to stop. All processes must ask equally often, at least after each step; all get the same answer."""
        self._questions += 1
        if jax.distributed.is_initialized():  # it reports the point only once
            self._asked = self._asked or multihost_utils.reached_preemption_sync_point(self._questions)
        return self._asked

    def _ask(self, signum, frame) -> None:
        del signum, frame
        self._asked = True


_notice: Notice | None = None


def raise_if_preempted() -> None:
    """Raises Preempted, in all processes at once, if a training run is to stop; for work between its steps."""
    if _notice and _notice.reached():
        raise errors.Preempted


@contextlib.contextmanager
def defer_interrupt(what: str) -> Iterator[None]:
    """A context that defers the first Ctrl-C to its end, as interrupted work could not be waited for again.

    Does nothing if Ctrl-C does not interrupt anyway, or in a thread other than the main one.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    asked = False

    def ask(signum, frame):
        nonlocal asked
        if asked:
            signal.default_int_handler(signum, frame)
        asked = True
        os.write(2, f"finishing {what}; Ctrl-C again leaves it unfinished\n".encode())  # a print may be under way

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt


class Watchdog:
    """Prints the stacks of all threads and ends the process if the next step does not end in time; 0 s: never.

    A context manager. The clock starts with the first `restart`, when the first step is compiled, or with `time_limit`.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._deadline: float | None = None
        self._changed = threading.Condition()

    def __enter__(self):
        self._open = True
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error):
        self._set(0.0, "", is_open=False)

    def restart(self) -> None:
        """Give the next step its full time."""
        self._set(self._seconds, f"no step has finished for {self._seconds:g} s (step_timeout)")

    @contextlib.contextmanager
    def time_limit(self, seconds: float, otherwise: str) -> Iterator[None]:
        """A context for work with a time limit of its own (0 s: none); `otherwise` is printed when it is exceeded.

        Afterwards, if a step was being timed, it gets its full time. After an error the clock keeps running, for the
        work that ends the run.
        """
        timed = self._deadline is not None
        self._set(seconds, otherwise)
        yield
        if timed:
            self.restart()
        else:
            self._set(0.0, "")

    def _set(self, seconds: float, otherwise: str, *, is_open: bool = True) -> None:
        with self._changed:
            self._deadline = time.monotonic() + seconds if seconds else None
            self._otherwise, self._open = otherwise, is_open
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while self._open:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    faulthandler.dump_traceback()
                    entry.exit_process(
                        f"error: {self._otherwise}; the stacks of all threads are above; run the same command again",
                        errors.RUN_AGAIN,
                    )
                self._changed.wait(left)


@contextlib.contextmanager
def time_limit(seconds: float, otherwise: str) -> Iterator[None]:
    """A context with a watchdog for work that has no steps; prints `otherwise` when time is up. 0 s: no limit."""
    with Watchdog(0.0) as watchdog, watchdog.time_limit(seconds, otherwise):
        yield
