"""A run that is asked to stop, and a run that has stopped by itself: both end so that they can be run again."""

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from lina_jax import errors


def leave_when_asked() -> None:
    """From here on, but within a `Notice`, SIGTERM ends this process at once, to be run again: it has nothing to save.

    Where jax.distributed starts with preemption, the runtime takes the signal over.
    """
    signal.signal(signal.SIGTERM, _leave)


def _leave(signum, frame) -> None:
    del signum, frame
    if not errors.leaving():  # the thread that this interrupts may be at it
        errors.leave("preempted, with nothing to save; run the same command again", errors.RUN_AGAIN)


class Notice:
    """Whether the run is to stop: SIGTERM in this process, or with jax.distributed in any, or the platform's notice.

    A context: within it SIGTERM, however often it comes, does nothing else, and `heed` asks this notice.
    """

    def __init__(self):
        self._asked = False
        self._questions = 0

    def __enter__(self):
        global _notice
        _notice = self
        # With jax.distributed the signal is in the hands of the runtime, which tells all processes.
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
        """To be asked equally often by all processes, after every step at least: from some question on true in all."""
        self._questions += 1
        if jax.distributed.is_initialized():  # which says so once
            self._asked = self._asked or multihost_utils.reached_preemption_sync_point(self._questions)
        return self._asked

    def _ask(self, signum, frame) -> None:
        del signum, frame
        self._asked = True


_notice: Notice | None = None


def heed() -> None:
    """Raises Preempted, in all processes at once, where a training run is to stop; for work between its steps."""
    if _notice and _notice.reached():
        raise errors.Preempted


@contextlib.contextmanager
def finishing(what: str) -> Iterator[None]:
    """Within, the first Ctrl-C counts at the end: work that was interrupted could not be waited for again.

    Where Ctrl-C does not interrupt anyway, or in another thread than the main one, nothing is different.
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
        os.write(2, f"finishing {what}; Ctrl-C again leaves it unfinished\n".encode())  # print might be at work

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt


class Watchdog:
    """Ends the process, with the stacks of its threads, when the next step does not end within so many seconds.

    A context. It starts with the first `restart`, when the first step is compiled, or `allowing`. 0 s: never.
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
        """A step has ended, or begins: it has its full time."""
        self._set(self._seconds, f"no step has ended for {self._seconds:g} s (step_timeout)")

    @contextlib.contextmanager
    def allowing(self, seconds: float, otherwise: str) -> Iterator[None]:
        """Work that has a time of its own, 0 s: any, and what is said when that is over.

        Then a step that was timed has its full time. After an error the time goes on, for what ends the run.
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
                    errors.leave(
                        f"error: {self._otherwise}, the stacks of all threads stand above; run the same command again",
                        errors.RUN_AGAIN,
                    )
                self._changed.wait(left)


@contextlib.contextmanager
def limited(seconds: float, otherwise: str) -> Iterator[None]:
    """Within, a watchdog's time for work that has no steps: what is said when it is over. 0 s: any time."""
    with Watchdog(0.0) as watchdog, watchdog.allowing(seconds, otherwise):
        yield
