"""Directories that are to be written, looked at before work is done for nothing."""

import os
from pathlib import Path

from lina_jax.errors import UserError


def check(flag: str, directory: Path) -> None:
    """Raises UserError, naming the flag, unless `directory` can be made or is there and can be written."""
    nearest = _nearest(directory)
    if not nearest.is_dir():
        raise UserError(f"--{flag}={directory}: {nearest} is not a directory")
    if not writable(directory):
        raise UserError(f"--{flag}={directory}: {nearest} cannot be written")


def writable(directory: Path) -> bool:
    """Whether files can be made in a directory that is there or can be made."""
    return os.access(_nearest(directory), os.W_OK | os.X_OK)


def _nearest(directory: Path) -> Path:
    """What is there of a path: itself or the nearest of its parents."""
    directory = directory.absolute()
    return next(path for path in (directory, *directory.parents) if path.exists())
