"""Which arrays of other weights a new run takes: rules as data, and the published sets of them."""

import dataclasses
from collections.abc import Mapping

UNFIT = ("refuse", "skip")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Patterns of names. The first list that has one that fits decides: exclude, include (empty: all), restart, ..."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()
    unfit: str = "refuse"

    def extended(self, own: "Rules") -> "Rules":
        """With the patterns of `own` as well."""
        joined = {name: getattr(self, name) + getattr(own, name) for name in LISTS}
        return Rules(**joined, unfit="skip" if "skip" in (self.unfit, own.unfit) else "refuse")


LISTS = ("include", "exclude", "restart", "recompute")
GATES = ("*/attention/key_scale*", "*/attention/value_scale")

SETS: Mapping[str, Rules] = {
    "all": Rules(),
    # Published: NOVA to 256 px. Its attention is softmax; whatever has another shape starts anew, too.
    "nova": Rules(exclude=("*/attention/*",), unfit="skip"),
    # Published: 256 to 512 to 1024 px. Gates belong to tokens, of which there are four times as many.
    "resolution": Rules(restart=GATES),
    # Ours.
    "interpolate": Rules(recompute=GATES),
}
