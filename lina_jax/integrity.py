"""Digests of a checkpoint's files (size and CRC-32), in a file beside them, to detect damage."""

import json
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from lina_jax import output_files

DIGESTS = "digests.json"
_PIECE = 2**24
_THREADS = 8  # reading waits for storage, and CRC-32 works outside the interpreter lock
_SOUND, _UNKNOWN, _UNREADABLE, _FIRST = 0, 1, 2, 3  # findings; _FIRST and above encode the file and the kind of damage
_KINDS = ("is missing", "has a different size than was saved", "has different bytes than were saved")


def record(folder: Path) -> None:
    """Write the digests of all files in a checkpoint's items."""
    paths = [path for item in folder.iterdir() if item.is_dir() for path in item.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = dict(zip((str(path.relative_to(folder)) for path in paths), pool.map(_digest, paths), strict=True))
    output_files.write_json(folder / DIGESTS, dict(sorted(digests.items())))


def saved_items(folder: Path) -> set[str]:
    """The names of items in a checkpoint's digests, even if the items are gone, and of everything in its folder."""
    try:
        recorded = _recorded(folder)
    except (OSError, ValueError):
        recorded = {}
    return {*map(_item, recorded), *(path.name for path in folder.iterdir())}


def fingerprint(folder: Path) -> str:
    """A fingerprint of all files of a checkpoint; "" without digests (from earlier versions)."""
    try:
        return f"{zlib.crc32((folder / DIGESTS).read_bytes()):08x}"
    except FileNotFoundError:
        return ""


def damage(folder: Path, items: Collection[str]) -> str:
    """What is wrong with the files of these items, "" if nothing; the same in all processes, which share the work.

    Checkpoints without digests (from earlier versions) pass. Raises OSError if storage fails.
    """
    try:
        digests = _recorded(folder)
        files = [(name, *digests[name]) for name in sorted(digests) if _item(name) in items]
    except FileNotFoundError:
        finding, files = _UNKNOWN, []
    except (ValueError, TypeError):
        finding, files = _UNREADABLE, []
    else:
        mine = range(jax.process_index(), len(files), jax.process_count())
        with ThreadPoolExecutor(_THREADS) as pool:
            kinds = pool.map(lambda number: _compare(folder, *files[number]), mine)
            found = [(number, kind) for number, kind in zip(mine, kinds, strict=True) if kind is not None]
        finding = _FIRST + found[0][0] * len(_KINDS) + found[0][1] if found else _SOUND
    finding = int(np.max(multihost_utils.process_allgather(np.int32(finding))))
    if finding == _UNREADABLE or (finding >= _FIRST and not files):
        return f"{DIGESTS} cannot be read"
    if finding < _FIRST:
        return ""
    number, kind = divmod(finding - _FIRST, len(_KINDS))
    return f"{files[number][0]} {_KINDS[kind]}"


def _recorded(folder: Path) -> dict[str, list[int]]:
    """[size, CRC-32] of each file, by name. Raises OSError and ValueError."""
    digests = json.loads((folder / DIGESTS).read_text())
    if not isinstance(digests, dict) or not digests:
        raise ValueError(f"{DIGESTS} holds no digests")
    return digests


def _item(name: str) -> str:
    return name.partition("/")[0]


def _compare(folder: Path, name: str, size: int, crc: int) -> int | None:
    try:
        if (folder / name).stat().st_size != size:
            return 1
        return 2 if _digest(folder / name) != (size, crc) else None
    except FileNotFoundError:
        return 0


def _digest(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return size, crc
