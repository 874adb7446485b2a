"""lina_jax: train and sample LINA (arXiv 2601.22630) on TPU pods, GPU clusters and laptops."""

import os
import signal
import sys

__version__ = "0.1.0"


def interrupted_importing(signum, frame) -> None:
    """What Ctrl-C does until `errors.run`: libraries would swallow a KeyboardInterrupt, or miss the module it ended."""
    del signum, frame
    os.write(2, b"interrupted\n")
    os._exit(130)


# "-m" is what Python calls itself while it looks for the module of `python -m lina_jax.NAME`.
_is_command = sys.argv[:1] == ["-m"] and any(word.startswith("lina_jax.") for word in sys.orig_argv)
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted_importing)
