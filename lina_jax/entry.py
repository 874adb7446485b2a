"""How entry points run and end: with one line for what a user can fix, with a traceback for bugs."""

import _thread
import contextlib
import gc
import inspect
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

from absl import app, flags
from absl import logging as absl_logging

import lina_jax
from lina_jax.errors import UserError, exit_message

_EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false"}  # by absl's name of a flag's type
_leaving = threading.Lock()


class _Stderr:
    """Standard error whose reader may go away (`2> >(head)`): messages are lost then, and the work goes on."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def run(main: Callable[[Sequence[str]], None], commands: Sequence[str] = ()) -> None:
    """Run an absl `main`, turning the errors of errors.py and Ctrl-C into one line on stderr and an exit code.

    If there are `commands`, the first argument (argv[1] of `main`) must be one of them, and the only one.
    """

    def guarded(argv: Sequence[str]) -> int:
        try:
            if commands and (not argv[1:] or argv[1] not in commands):
                raise UserError(f"the first argument must be one of: {', '.join(commands)}")
            rest = argv[2 if commands else 1 :]
            if rest:
                raise UserError(f"unexpected argument {rest[0]!r}: options are given as --name=value")
            main(argv)
        except Exception as error:
            if known := exit_message(error):
                exit_process(*known)
            raise
        return 0

    absl_logging.use_absl_handler()  # while it still finds the handler of libraries, which would print warnings again
    if sys.stderr is not None:  # as with 2>&-
        sys.stderr = _Stderr(sys.stderr)
    # Tracing makes many objects, few of which are garbage: collections took a tenth of a run's start.
    gc.freeze()
    gc.set_threshold(100_000)
    gc.enable()  # lina_jax/__init__.py has disabled it
    # When one read of a checkpoint fails, orbax abandons the others, each of which would print long messages.
    sys.unraisablehook = _unraisable_hook
    absl_logging.get_absl_logger().addFilter(_without_orbax_tracebacks)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        if signal.getsignal(signal.SIGINT) is lina_jax.interrupted_importing:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        app.run(guarded, flags_parser=_parse_flags)
    except KeyboardInterrupt as stop:
        exit_process(*exit_message(stop))


def _parse_flags(argv: Sequence[str]) -> list[str]:
    flags.DEFINE_alias("h", "help")
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:  # absl's help ends with 1
        sys.exit(0)
    except flags.IllegalFlagValueError as error:
        exit_process(f"error: {_illegal_value(error)}", 2)
    except flags.UnrecognizedFlagError as error:
        reason = str(error)
        if error.flagname.startswith("config.") and "config" in flags.FLAGS and flags.FLAGS["config"].value is None:
            reason = f"--{error.flagname} needs --config=configs/NAME.py[:preset]"
        exit_process(f"error: {reason}", 2)
    # Parsing flags evaluates the config file and its overrides, so any mistake can surface here.
    except Exception as error:
        exit_process(f"error: {error}", 2)

    # absl's default is INFO, at which libraries log every save at length.
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = absl_logging.WARNING
    return rest


def _illegal_value(error: flags.IllegalFlagValueError) -> str:
    """'--steps=many: expected a whole number' for absl's 'flag --steps=many: REASON'."""
    given = str(error).removeprefix("flag ").removesuffix(f": {error.__context__}")
    name, _, value = given.removeprefix("--").partition("=")
    if name not in flags.FLAGS:
        return str(error)
    parser = flags.FLAGS[name].parser
    if isinstance(parser, flags.IntegerParser | flags.FloatParser):
        with contextlib.suppress(TypeError, ValueError):
            parser.convert(value)
            return f"{given}: {error.__context__}"  # a number out of bounds, which absl's message names
    expected = _EXPECTED.get(parser.flag_type())
    return f"{given}: expected {expected}" if expected else str(error)


def exit_process(line: str, code: int, farewell: Callable[[], None] = lambda: None) -> NoReturn:
    """Print one line and end the process; if several threads call this, the first one wins.

    `farewell` runs in between; anything that is printed to stderr after the line is dropped.
    """
    _leaving.acquire()
    try:
        with contextlib.suppress(OSError):  # stderr may be closed
            print(" ".join(line.split()), file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        farewell()
    finally:
        # Not sys.exit: tearing the interpreter down while XLA still compiles is a segmentation fault.
        os._exit(code)


def leaving() -> bool:
    """Whether a thread of this process is about to end it."""
    return _leaving.locked()


def _without_orbax_tracebacks(record: logging.LogRecord) -> bool:
    """A logging filter that drops tracebacks from orbax's threads; it raises the same errors where we wait for it."""
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


def _unraisable_hook(unraisable) -> None:
    """A hook for errors that Python would only print: those in finalizers and callbacks of garbage collection.

    Ctrl-C is raised again a moment later. Errors about a closed event loop, and coroutines that were never awaited, are
    dropped.
    """
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _thread.start_new_thread(_interrupt_again, ())
        return
    closed = isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
    if not (closed or inspect.iscoroutine(unraisable.object)):
        sys.__unraisablehook__(unraisable)


def _interrupt_again() -> None:
    time.sleep(0.05)  # without the pause, the interrupt would come within the callback
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # a real signal ends a wait in C
