"""Items that a preparation rejects: they are counted, and too many of them end it."""

import collections
from pathlib import Path

from lina_jax.errors import UserError
from lina_jax.recording import Record
from lina_jax.sources.base import Fields, Reject, Source
from lina_jax.work_units import Receipt

ALL_REJECTED = 1000  # this many rejects without a single good item: the input or a column must be wrong


class Guard:
    """Counts this process's rejects, and raises UserError as soon as they are too many."""

    def __init__(self, source: Source, fields: Fields, max_fraction: float, place: Path):
        """`place` is the work directory, where rejects are listed."""
        counts = [unit.count for unit in source.units]
        self._total = None if None in counts else sum(counts)
        self._fields, self._max_fraction, self._place = fields, max_fraction, place
        self._rejected: collections.Counter[str] = collections.Counter()
        self._useful = False  # whether there is any good item

    def add_receipt(self, receipt: Receipt) -> None:
        """Count the rejects of a finished unit."""
        self._rejected.update(receipt.rejected)
        self._useful = self._useful or bool(receipt.shards)

    def check(self, item: Record | Reject) -> None:
        """Count the item. Raises UserError if it is one reject too many."""
        if not isinstance(item, Reject):
            self._useful = True
            return
        self._rejected[item.reason] += 1
        # A process sees only its own share, so it stops early only if its rejects are too many for the whole.
        if self._total is not None:
            check_fraction(self._rejected, self._total, self._max_fraction, self._place)
        elif not self._useful and self._max_fraction < 1 and self._rejected.total() >= ALL_REJECTED:
            columns = [f"--{name}_column={column}" for name, column in self._fields._asdict().items()]
            raise UserError(
                f"the first {self._rejected.total()} items are all rejected: {_commonest(self._rejected)}; check "
                f"--input and {', '.join(columns[1:])}, or continue with --max_reject_fraction=1"
            )


def check_fraction(rejected: dict[str, int], total: int, fraction: float, place: Path) -> None:
    """Raises UserError if more than this fraction of `total` items are rejected; `place` is the work directory."""
    bad = sum(rejected.values())
    if bad > fraction * total:
        raise UserError(
            f"{bad} of {total} items rejected, more than --max_reject_fraction={fraction}: {listed(rejected, place)}"
        )


def listed(rejected: dict[str, int], place: Path) -> str:
    """The commonest reasons, and where each reject is listed; `place` is the work directory."""
    return f"{_commonest(rejected)}; each is listed in {place}/units/*/rejects.jsonl"


def _commonest(rejected: dict[str, int]) -> str:
    return "; ".join(f"{reason} ({count})" for reason, count in collections.Counter(rejected).most_common(5))
