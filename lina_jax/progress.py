"""How far a long loop over images has come, and when it will be done."""

import sys

import jax
from tqdm import tqdm

_LOGGED_EVERY_S = 30.0


def bar(total: int, *, done: int = 0, name: str = "", leave: bool = True) -> tqdm:
    """A bar in process 0: on a terminal at once, in a log twice a minute, so that short loops say nothing there.

    `leave`: it stays on the terminal when the loop has ended.
    """
    if sys.stderr.isatty():
        shown = {"mininterval": 0.5, "leave": leave}
    else:  # a log keeps its lines, so that what comes next has one of its own
        shown = {"mininterval": _LOGGED_EVERY_S, "delay": _LOGGED_EVERY_S, "leave": True}
    return tqdm(total=total, initial=done, desc=name, unit="image", disable=jax.process_index() != 0, **shown)
