"""python -m lina_jax: list the commands."""

import ast
import sys
from pathlib import Path

COMMANDS = ("prepare", "train", "sample", "evaluate", "demo", "convert", "plan", "benchmark")


def _summary(command: str) -> str:
    """First line of a command's docstring, parsed from its source, as importing it would start JAX."""
    module = ast.parse((Path(__file__).parent / f"{command}.py").read_text())
    return ast.get_docstring(module).splitlines()[0]


if __name__ == "__main__":
    for command in COMMANDS:
        print(f"python -m lina_jax.{command:<10} {_summary(command)}")
    print("Each command lists its options with --help.")
    if sys.argv[1:] and sys.argv[1] not in ("-h", "--help"):
        sys.stdout.flush()
        print(f"error: unexpected argument {sys.argv[1]!r}: start a command as listed above", file=sys.stderr)
        sys.exit(2)
