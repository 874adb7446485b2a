"""Preparation in units: one process makes each, a rename completes it, and all of them become the dataset.

The work directory OUT.partial holds `settings.json` and, for each finished unit, `units/NUMBER/` with its shards, its
rejects and a receipt. A process that is killed loses only the unit it was making. A unit depends on the settings and
the collection alone, and so does the dataset: not on the number of processes, nor on how often they were killed.
"""

import collections
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from lina_jax import output_files, records
from lina_jax.errors import UserError
from lina_jax.records import Shard, Shards
from lina_jax.sources.base import Reject, Source

_SETTINGS = "settings.json"
SplitItem = tuple[str, dict[str, Any] | Reject]  # (split, record or reject)


@dataclasses.dataclass(frozen=True)
class Receipt:
    """The results of one unit."""

    items: int
    shards: dict[str, list[Shard]]
    rejected: dict[str, int]
    truncated: int  # number of truncated captions


class WorkDirectory:
    """OUT.partial, shared by all processes that prepare OUT."""

    def __init__(self, out: Path, settings: Mapping[str, Any], source: Source):
        """Raises UserError if it was begun for another collection or with other settings, which the message names."""
        self.out = out
        self.path = _work(out)
        self._units = self.path / "units"
        self._count = len(source.units)
        begun = self.path / _SETTINGS
        # Units are identified by number, so what a number stands for must not have changed.
        collection = hashlib.sha256(repr((source.contents, source.units, source.label_names)).encode()).hexdigest()
        if begun.exists():
            there = json.loads(begun.read_text())
            compare(there, settings, f"{self.path} was started with other settings (remove it or choose another --out)")
            if there["collection"] != collection:
                raise UserError(f"{source.name} has changed since {self.path} was started: remove that directory")
        else:
            self._units.mkdir(parents=True, exist_ok=True)
            output_files.write_json(begun, dict(settings) | {"collection": collection})

    def missing(self) -> set[int]:
        """The numbers of the unfinished units. Raises OSError if the work directory is gone."""
        there = set(os.listdir(self._units))
        return {number for number in range(self._count) if self._place(number).name not in there}

    def receipt(self, number: int) -> Receipt:
        """The results of a finished unit."""
        place = self._place(number)
        read = json.loads((place / "receipt.json").read_text())
        shards = {
            split: [Shard(str(place / name), *sizes) for name, *sizes in parts]
            for split, parts in read["shards"].items()
        }
        return Receipt(read["items"], shards, read["rejected"], read["truncated"])

    def make(
        self,
        number: int,
        source: str,
        count: int,
        items: Iterable[SplitItem],
        serialize: Callable[[Mapping[str, Any]], bytes],
        shard_bytes: int,
        truncated: Callable[[], int],
    ) -> None:
        """Write one unit of `count` items; it appears, complete, when all of them have been written.

        `truncated` is called at the end and returns the number of truncated captions.
        """
        # What killed processes leave here stays until the end: it may just as well belong to a live one.
        place = self._place(number)
        partial = place.with_name(f"{place.name}.{uuid.uuid4().hex}")
        partial.mkdir()
        splits: dict[str, Shards] = {}
        rejected: collections.Counter[str] = collections.Counter()
        try:
            with (partial / "rejects.jsonl").open("w") as rejects:
                for split, item in items:
                    if isinstance(item, Reject):
                        rejected[item.reason] += 1
                        value = {"value": item.value} if item.value else {}
                        line = {"source": source, "key": item.key, "reason": item.reason} | value
                        rejects.write(json.dumps(line) + "\n")
                        continue
                    if split not in splits:
                        splits[split] = Shards(partial / split, shard_bytes)
                    splits[split].append(serialize(item))
            finished = {split: shards.finish() for split, shards in splits.items()}
            made = sum(shard.records for shards in finished.values() for shard in shards) + rejected.total()
            if made != count:
                raise RuntimeError(f"unit {number} of {source} has {count} items, but {made} came")
        except BaseException:
            for shard in partial.glob("*-?????"):  # it would only take space; the rejects are for the user
                shard.unlink(missing_ok=True)
            raise
        shards = {split: [(Path(s.path).name, s.records, s.bytes) for s in finished[split]] for split in finished}
        receipt = {"items": count, "shards": shards, "rejected": rejected, "truncated": truncated()}
        # If another process has finished the dataset meanwhile, the work directory must not come back.
        output_files.write_json(partial / "receipt.json", receipt, parents=False)
        try:
            partial.rename(place)
        except OSError:
            if number in self.missing():
                raise
            # Another process made the same unit and was faster.
            shutil.rmtree(partial, ignore_errors=True)

    def assemble(
        self,
        receipts: Sequence[Receipt],
        name: str,
        features: tfds.features.FeaturesDict,
        summary: Mapping[str, Any],
    ) -> None:
        """Turn the finished units into the dataset OUT, with rejects.jsonl and prepare.json.

        Any process may do this, even several at once: each step may be repeated.
        """
        splits = {
            split: [shard for receipt in receipts for shard in receipt.shards.get(split, ())]
            for split in dict.fromkeys(split for receipt in receipts for split in receipt.shards)
        }
        with output_files.own_directory(self.path) as mine:
            if "validation" in splits:  # each unit has only a few records of it
                splits["validation"] = _joined(splits["validation"], mine / "validation")
            records.assemble(self.path, name, features, splits)
            with (mine / "rejects.jsonl").open("wb") as joined:
                for number in range(len(receipts)):
                    joined.write((self._place(number) / "rejects.jsonl").read_bytes())
            os.replace(mine / "rejects.jsonl", self.path / "rejects.jsonl")
            output_files.write_json(self.path / "prepare.json", dict(summary), parents=False)
        self.path.rename(self.out)  # replaces an empty directory and refuses any other
        clean(self.out)

    def remove(self) -> None:
        """Remove the directory and everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _place(self, number: int) -> Path:
        return self._units / f"{number:06d}"


def stage(out: Path) -> str:
    """How far OUT is: "absent", "begun" or "finished"."""
    if (out / "prepare.json").exists():
        return "finished"
    return "begun" if (_work(out) / _SETTINGS).exists() else "absent"


def _work(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def clean(out: Path) -> None:
    """Remove leftovers of the work from a finished dataset."""
    shutil.rmtree(out / "units", ignore_errors=True)
    (out / _SETTINGS).unlink(missing_ok=True)
    output_files.remove_partials(out)


def compare(there: Mapping[str, Any], wanted: Mapping[str, Any], message: str) -> None:
    """Raises UserError, with the message and the settings that differ, if any do."""
    different = [name for name in wanted if there.get(name) != wanted[name]]
    if different:
        listed = "; ".join(f"{name}={there.get(name)!r}, requested {wanted[name]!r}" for name in different)
        raise UserError(f"{message}: {listed}")


def _joined(parts: Sequence[Shard], stem: Path) -> list[Shard]:
    """Copy the records of many small shards into as few as possible; the parts stay."""
    joined = Shards(stem)
    for part in parts:
        try:
            reader = ArrayRecordReader(part.path)
            for record in reader.read_all():
                joined.append(record)
            reader.close()
        except RuntimeError as error:  # as of a missing file, if another process has moved it
            raise OSError(f"cannot read {part.path}: {error}") from error
    return joined.finish()
