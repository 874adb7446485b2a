"""How the entry points end: one clear line for what a user can mend, a traceback for what only we can."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging


class UserError(Exception):
    """A mistake in a config, a flag, a path or a file; the message names the value and what is allowed. Exit code 2."""


class TrainingDiverged(Exception):
    """Training stopped itself to protect its checkpoints. Exit code 1."""


def run(main: Callable[[Sequence[str]], None], commands: Sequence[str] = ()) -> None:
    """Run an absl `main`, turning the errors above into one line on stderr and their exit code.

    Where there are `commands`, exactly one of them follows the program's name: argv[1] of `main`.
    """

    def guarded(argv: Sequence[str]) -> int:
        try:
            if commands and (not argv[1:] or argv[1] not in commands):
                raise UserError(f"the first argument must be one of: {', '.join(commands)}")
            rest = argv[2 if commands else 1 :]
            if rest:
                raise UserError(f"unexpected argument {rest[0]!r}: options are given as --name=value")
            main(argv)
        except (UserError, OSError) as error:  # OSError: a full disk, a place that cannot be written or read
            return _report(error, 2)
        except TrainingDiverged as error:
            return _report(error, 1)
        return 0

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    # A config file and the overrides of its fields are evaluated while flags are parsed: any mistake can surface here.
    except Exception as error:
        sys.exit(_report(error, 2))

    if flags.FLAGS[
        "verbosity"
    ].using_default_value:  # absl would choose INFO, where libraries report each save at length
        flags.FLAGS.verbosity = logging.WARNING
    return rest


def _report(error: Exception, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
