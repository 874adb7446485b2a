"""Rules for which arrays of other weights a new run takes, and named sets of them."""

import dataclasses
from collections.abc import Mapping

UNFIT = ("refuse", "skip")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Patterns of array names, applied in this order; arrays that none of them concerns are loaded.

    `exclude` skips arrays, `include` skips all others (unless empty), `restart` draws them anew, `recompute`
    interpolates gates.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()
    unfit: str = "refuse"

    def extended(self, own: "Rules") -> "Rules":
        """These rules plus those of `own`."""
        joined = {name: getattr(self, name) + getattr(own, name) for name in LISTS}
        return Rules(**joined, unfit="skip" if "skip" in (self.unfit, own.unfit) else "refuse")


LISTS = ("include", "exclude", "restart", "recompute")
GATES = ("*/attention/key_scale*", "*/attention/value_scale")

SETS: Mapping[str, Rules] = {
    "all": Rules(),
    # Published: from NOVA to 256 px. NOVA has softmax attention; arrays of other shapes start anew, too.
    "nova": Rules(exclude=("*/attention/*",), unfit="skip"),
    # Published: from 256 to 512 to 1024 px. Gates are per token, and each step has four times as many tokens.
    "resolution": Rules(restart=GATES),
    # Ours.
    "interpolate": Rules(recompute=GATES),
}
