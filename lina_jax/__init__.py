"""lina_jax: train and sample LINA (arXiv 2601.22630) on TPU pods, GPU clusters and laptops."""

import gc
import os
import signal
import sys

__version__ = "0.1.0"


def interrupted_importing(signum, frame) -> None:
    """End at once on Ctrl-C during imports: libraries swallow a KeyboardInterrupt, or fail half imported."""
    del signum, frame
    os.write(2, b"interrupted\n")
    os._exit(130)


# sys.argv[0] is "-m" while Python looks for the module of `python -m lina_jax.NAME`.
_is_command = sys.argv[:1] == ["-m"] and any(word.startswith("lina_jax.") for word in sys.orig_argv)
if _is_command:
    gc.disable()  # until entry.run: imports leave no garbage, and looking for it takes a tenth of their time
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted_importing)
