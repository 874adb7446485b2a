"""How far a long loop over images has come, and when it will be done."""

import sys

import jax
from tqdm import tqdm

_LOGGED_EVERY_S = 30.0


def bar(total: int, *, done: int = 0, name: str = "", leave: bool = True) -> tqdm:
    """A bar in process 0: on a terminal at once, in a log twice a minute, so that short loops say nothing there.

    `leave`: it stays on the terminal when the loop has ended.
    """
    often = {"mininterval": 0.5} if sys.stderr.isatty() else {"mininterval": _LOGGED_EVERY_S, "delay": _LOGGED_EVERY_S}
    hidden = jax.process_index() != 0
    return tqdm(total=total, initial=done, desc=name, unit="image", disable=hidden, leave=leave, **often)
