"""Datasets in buckets: shards are first copied to a local directory, where random access is fast.

A mounted bucket (gcsfuse, mountpoint-s3) does not need this: it is a directory like any other.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import fsspec
from tqdm import tqdm

from lina_jax import output_files
from lina_jax.errors import UserError
from lina_jax.retry import Progress, storage_errors, with_retries

_PARTIAL = ".partial"
# Names of file attributes that change when a file is rewritten; the first one that a file has is used.
_VERSIONS = ("etag", "ETag", "generation", "md5Hash", "mtime", "LastModified", "last_modified", "created")


class _File(NamedTuple):
    size: int
    version: str


def local_path(directory: str | Path) -> Path:
    """The path of a dataset that is read in place. Raises UserError for URLs."""
    if "://" in str(directory):
        raise UserError(
            f"data.path={directory}: mount the bucket (gcsfuse, mountpoint-s3) and give its directory, or copy it "
            "ahead by setting data.cache to a directory"
        )
    return Path(directory).expanduser()


class Copy:
    """The copy of one dataset in a cache directory.

    A file gets its name when it is complete, so that an interrupted copy continues with the missing files. Processes of
    one machine take turns: the first copies, the others find everything there.
    """

    def __init__(self, source: str, cache: str, *, timeout: float):
        """`source` is a directory or any URL that fsspec knows (gs:// needs gcsfs, s3:// needs s3fs)."""
        if "://" not in source:
            source = str(Path(source).expanduser().absolute())
        self._source, self._timeout = source.rstrip("/"), timeout
        try:
            self._files, self._root = fsspec.core.url_to_fs(self._source)
        except (ImportError, ValueError, OSError) as error:
            raise UserError(f"data.path={source}: {error}") from error
        # The name is for people; the digest is needed because two buckets may hold datasets of the same name.
        name = f"{os.path.basename(self._source)}-{hashlib.sha256(self._source.encode()).hexdigest()[:8]}"
        self.directory = Path(cache).expanduser().absolute() / name
        self._versions_file, self._versions_lock = self.directory / "copied.json", threading.Lock()

    def copy_metadata(self, names: Sequence[str]) -> Path:
        """Copy small files, every time, and return the directory of the copy. Skips files that the source lacks."""
        with self._locked():
            files = self._list_source()
            for name in names:
                if name in files:
                    self._fetch(name, files[name].size)
        return self.directory

    def copy_shards(self, names: Sequence[str], threads: int) -> None:
        """Copy the shards that are not there yet or have been rewritten since.

        Raises UserError for shards that the source lacks or that cannot be copied.
        """
        with self._locked():
            files, versions = self._list_source(), self._copied_versions()
            missing = [name for name in names if name not in files]
            if missing:
                raise UserError(
                    f"{len(missing)} of the {len(names)} shards in {self._source} are missing, first {missing[0]}"
                )

            def copy(name: str) -> None:
                self._fetch(name, files[name].size)
                with self._versions_lock:
                    versions[name] = files[name].version
                    output_files.write_json(self._versions_file, versions)

            wanted = [name for name in names if not self._is_current(name, files[name], versions.get(name))]
            pool = concurrent.futures.ThreadPoolExecutor(threads)
            copies = [pool.submit(copy, name) for name in wanted]
            done = concurrent.futures.as_completed(copies)
            try:
                for made in tqdm(done, "copying shards", len(copies), unit="shard", disable=None):
                    made.result()
            finally:  # after a failure or Ctrl-C, drop the remaining copies and do not wait for those under way
                pool.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.directory.glob(f"*{_PARTIAL}"):
                left.unlink(missing_ok=True)  # a copy that was given up may remove its own
            yield

    def _list_source(self) -> dict[str, _File]:
        try:
            listed = with_retries(storage_errors(lambda _: self._files.ls(self._root, detail=True)), self._timeout)
        except FileNotFoundError:
            raise UserError(f"data.path={self._source} does not exist") from None
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot list {self._source}: {error}") from error
        return {
            os.path.basename(entry["name"].rstrip("/")): _File(
                entry["size"], next((str(entry[key]) for key in _VERSIONS if entry.get(key)), "")
            )
            for entry in listed
        }

    def _copied_versions(self) -> dict[str, str]:
        """The version of each shard when it was copied."""
        try:
            return json.loads(self._versions_file.read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def _is_current(self, name: str, file: _File, version: str | None) -> bool:
        path = self.directory / name
        return version == file.version and path.exists() and path.stat().st_size == file.size

    def _fetch(self, name: str, size: int) -> None:
        try:
            fetch(self._files, f"{self._root}/{name}", self.directory / name, size, self._timeout)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot copy {self._source}/{name} to {self.directory}: {error}") from error


def fetch(files: fsspec.AbstractFileSystem, path: str, target: Path, size: int | None, timeout: float) -> None:
    """Copy a file of a bucket to `target`, which appears when it is complete.

    The copy must have `size` bytes (None: unknown). A try that makes no progress for `timeout` seconds is given up.
    Raises the OSError or RuntimeError of the last try.
    """

    def copy(progress: Progress) -> Path:
        # One file per thread: a thread that was given up may wake up and go on writing.
        partial = target.with_name(f"{target.name}.{threading.get_ident()}{_PARTIAL}")
        try:
            with files.open(path, "rb") as source, open(partial, "wb") as file:
                while piece := source.read(2**23):
                    progress.check()
                    file.write(piece)
                    progress.reach(f"byte {file.tell()} of {target.name}")
            came = partial.stat().st_size
            if size is not None and came != size:
                raise OSError(f"{came} of {size} bytes arrived")
            progress.check()
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return partial

    os.replace(with_retries(storage_errors(copy), timeout), target)
