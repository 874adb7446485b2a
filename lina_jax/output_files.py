"""Where results go: checked before work starts, and never visible half-written."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from absl import logging

from lina_jax.errors import UserError

_LEASE_S = 120  # after this time NFS frees the locks of a machine that is gone


def check(flag: str, directory: Path) -> None:
    """Raises UserError, naming the flag, unless `directory` is writable or can be created."""
    if directory.parts[:1] and directory.parts[0].endswith(":"):  # gs://BUCKET, in which a Path keeps one slash
        raise UserError(f"--{flag}={directory}: a URL; mount the bucket and give a directory (docs/pods.md)")
    nearest = _nearest(directory)
    if not nearest.is_dir():
        raise UserError(f"--{flag}={directory}: {nearest} is not a directory")
    if not writable(directory):
        raise UserError(f"--{flag}={directory}: {nearest} cannot be written")


def check_renames(flag: str, directory: Path) -> None:
    """Raises UserError, naming the flag, if directories with files cannot be renamed there, as results are."""
    before = _beside(_nearest(directory) / "renamed")
    after = before.with_suffix(".after")
    try:
        before.mkdir()
        (before / "file").touch()
        os.rename(before, after)
    except OSError as error:
        raise UserError(
            f"--{flag}={directory}: directories with files cannot be renamed there ({error.strerror}), as finished "
            "checkpoints and datasets have to be (buckets need a hierarchical namespace)"
        ) from error
    finally:
        for path in (before, after):
            shutil.rmtree(path, ignore_errors=True)


def lock(flag: str, directory: Path) -> TextIO:
    """Lock `directory` against other processes of this machine (on NFS: of any), until the returned file is closed.

    The system also frees the lock when the process ends in any way, or closes any other handle of the file. Raises
    UserError that names the flag and the holder.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path, host, patience = directory / "lock", socket.gethostname(), time.monotonic() + _LEASE_S
    file = path.open("a+")
    try:
        while not _locked(file):
            file.seek(0)
            holder = file.read().strip()
            if holder.endswith(f" on {host}") or time.monotonic() > patience:
                raise UserError(
                    f"--{flag}={directory}: another run is using it ({holder}); if that run is gone, remove {path}"
                )
            logging.log_every_n_seconds(logging.WARNING, "waiting for %s, which has locked %s", 30, holder, path)
            time.sleep(1)
    except OSError as error:
        logging.warning("%s cannot be locked (%s): make sure that no other run uses it", directory, error.strerror)
    file.truncate(0)
    print(f"process {os.getpid()} on {host}", file=file, flush=True)
    return file


def _locked(file: TextIO) -> bool:
    """Try to lock the file for this process; False if another one holds it."""
    try:
        # A lock of the process, not of the open file: data workers that outlive it do not keep the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def writable(directory: Path) -> bool:
    """Whether files can be created in a directory, which exists or can be created."""
    return os.access(_nearest(directory), os.W_OK | os.X_OK)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to write into, renamed to `path` (empty or absent) once it is complete."""
    path = path.resolve()  # a link to a directory cannot be replaced
    partial = _beside(path)
    try:
        partial.mkdir(parents=True)
        with _naming(path):
            yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def own_directory(directory: Path) -> Iterator[Path]:
    """A directory within `directory` that no other process has, for as long as the block lasts."""
    own = _beside(directory / "own")
    own.mkdir()
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path, *, parents: bool = True) -> Iterator[Path]:
    """The path of a file to write, renamed to `path` once it is complete, replacing what was there.

    Without `parents`, the directory must exist.
    """
    partial = _beside(path)
    try:
        if parents:
            partial.parent.mkdir(parents=True, exist_ok=True)
        with _naming(path):
            yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether a path is that of something half-written, of a writer that may have been killed."""
    return path.match(_beside_name("*", "*"))


def remove_partials(directory: Path) -> None:
    """Remove what killed writers (`new_file`, `new_directory`, `own_directory`) left; none may be active there."""
    for left in directory.glob(_beside_name("*", "*")):
        # Others may be removing it, too.
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def write_json(path: Path, content: Any, *, parents: bool = True) -> None:
    """Write an indented JSON file that is complete or absent, even after a power failure.

    Without `parents`, the directory must exist. Raises OSError that names the file if it cannot be written.
    """
    with new_file(path, parents=parents) as partial, partial.open("w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the path to the OSError of a failed write (a full disk), which lacks it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _beside(path: Path) -> Path:
    """A path beside `path`, in the same file system, that no other process uses."""
    return path.with_name(_beside_name(path.name, uuid.uuid4().hex))


def _beside_name(name: str, unique: str) -> str:
    return f".{name}.{unique}.partial"


def _nearest(directory: Path) -> Path:
    """The path itself if it exists, else the nearest parent that does."""
    directory = directory.absolute()
    return next(path for path in (directory, *directory.parents) if path.exists())
