"""Retries for storage: calls that fail or stall are tried again, with growing pauses."""

import errno
import functools
import itertools
import re
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from absl import logging

from lina_jax.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")

TRIES = 6
FIRST_PAUSE_S = 0.5  # each pause is twice as long as the one before: 15.5 s in all


class Progress:
    """How far a call has come. It has stalled when it no longer reaches anything new."""

    def __init__(self):
        self.at: str = "the start"
        self.steps = 0
        self.given_up = False

    def reach(self, at: str) -> None:
        self.at = at
        self.steps += 1

    def check(self) -> None:
        """Raises TimeoutError if the call was given up, so that nobody waits for its outcome."""
        if self.given_up:
            raise TimeoutError("given up")


def storage_errors(call: Callable[P, T]) -> Callable[P, T]:
    """`call`, a request to a bucket, but errors of types that its library defines become OSError.

    They count as passing, like failures of a link, unless the name of the type is about credentials (expired ones, too)
    or permissions. Even such an error counts as passing if its attribute `retryable` is true.
    """

    @functools.wraps(call)
    def translated(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except (OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, UserError):
            raise
        except Exception as error:
            kind = type(error).__name__
            message = f"{kind}: {error}"
            lasts = re.search("credential|auth|permission|forbidden|refresh|token", kind, re.IGNORECASE)
            lasts = lasts and not getattr(error, "retryable", False)
            raise (OSError(message) if lasts else OSError(errno.EREMOTEIO, message)) from error

    return translated


def with_retries(call: Callable[[Progress], T], timeout: float) -> T:
    """The result of `call(progress)`, run in its own thread; retried if it raises OSError or RuntimeError or stalls.

    A stall is `timeout` seconds without progress; the stalled thread is left behind. Raises the error of the last try,
    TimeoutError for a stall; its attribute `at` says what the call had reached. FileNotFoundError and errors of all
    other types are raised at once.
    """
    for tried in itertools.count(1):
        progress = Progress()
        try:
            return _watched(call, progress, timeout)
        except (OSError, RuntimeError) as error:
            error.at = progress.at
            if tried == TRIES or isinstance(error, FileNotFoundError):
                raise
            logging.warning("attempt %d of %d failed at %s: %s", tried, TRIES, progress.at, error)
            time.sleep(FIRST_PAUSE_S * 2 ** (tried - 1))


def _watched(call: Callable[[Progress], T], progress: Progress, timeout: float) -> T:
    outcome: list[tuple[T | None, Exception | None]] = []

    def run():
        try:
            outcome.append((call(progress), None))
        except Exception as error:
            outcome.append((None, error))

    # Not an executor, which would wait for stalled threads when the interpreter exits.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while True:
        before = progress.steps
        thread.join(timeout)
        if outcome:
            value, error = outcome[0]
            if error:
                raise error
            return value
        if progress.steps == before:
            progress.given_up = True
            raise TimeoutError(f"no answer for {timeout:g} s")
