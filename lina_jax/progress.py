"""Progress bars of long loops over images."""

import sys

import jax
from tqdm import tqdm

_LOGGED_EVERY_S = 30.0


def bar(total: int, *, done: int = 0, name: str = "", leave: bool = True) -> tqdm:
    """A progress bar in process 0. In a log, it prints twice a minute, so short loops print nothing.

    `leave`: keep it on the terminal after the loop.
    """
    if sys.stderr.isatty():
        shown = {"mininterval": 0.5, "leave": leave}
    else:  # in a log, the last line stays, so that what follows starts a new one
        shown = {"mininterval": _LOGGED_EVERY_S, "delay": _LOGGED_EVERY_S, "leave": True}
    return tqdm(total=total, initial=done, desc=name, unit="image", disable=jax.process_index() != 0, **shown)
