"""How the entry points end: one clear line for what a user can mend, a traceback for what only we can."""

import sys
from collections.abc import Callable, Sequence

from absl import app


class UserError(Exception):
    """A mistake in a config, a flag, a path or a file; the message names the value and what is allowed. Exit code 2."""


class TrainingDiverged(Exception):
    """Training stopped itself to protect its checkpoints. Exit code 1."""


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run an absl `main`, turning the errors above into one line on stderr and their exit code."""

    def guarded(argv: Sequence[str]) -> int:
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}: options are given as --name=value")
            main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except TrainingDiverged as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    app.run(guarded)
