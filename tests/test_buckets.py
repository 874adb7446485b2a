"""Collections in buckets: calls that fail or stall are retried, and the tries do not disturb each other."""

import errno
import io
import itertools
import os
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from test_sources import items, png

from lina_jax import errors
from lina_jax.errors import UserError
from lina_jax.sources import base
from lina_jax.sources.base import Example, Fields
from lina_jax.sources.folder import FolderSource
from lina_jax.sources.parquet import ParquetSource


@pytest.mark.parametrize(
    ("name", "retryable", "passes"),
    [
        ("NoCredentials", None, False),
        ("TokenRetrievalError", None, False),
        ("RefreshError", False, False),
        ("RefreshError", True, True),
        ("HttpError", None, True),
    ],
)
def test_what_libraries_of_buckets_raise_is_of_the_storage(monkeypatch, name, retryable, passes):
    """Waiting does not renew expired credentials."""
    kind = type(name, (Exception,), {} if retryable is None else {"retryable": retryable})

    def refused():
        raise kind("log in")

    monkeypatch.setattr("lina_jax.retry.FIRST_PAUSE_S", 0)
    with pytest.raises(UserError, match=f"cannot read s3://bucket: .*{name}: log in") as caught:
        base.retry_storage("s3://bucket", refused)
    assert errors.storage_failed(caught.value) == passes


@pytest.fixture
def bucket(monkeypatch):
    """Makes files in a bucket; calls that stall there are given up after 50 ms and retried without a pause."""
    monkeypatch.setattr("lina_jax.retry.FIRST_PAUSE_S", 0)
    monkeypatch.setattr(base, "_STALLED_S", 0.05)
    files = MemoryFileSystem()

    def make(name: str, data: bytes) -> str:
        files.pipe(f"/raw/{name}", data)
        return f"memory://raw/{name}"

    yield make
    monkeypatch.undo()  # of what a test broke
    if files.exists("/raw"):
        files.rm("/raw", recursive=True)


class Stalling(io.BytesIO):
    """A file whose `stalls`-th read stalls until it is woken; `calls` lists the reads of all openings."""

    def __init__(self, data: bytes, calls: list[threading.Thread], stalls: int, woken: threading.Event):
        super().__init__(data)
        self._calls, self._stalls, self._woken = calls, stalls, woken

    def read(self, size=-1):
        self._calls.append(threading.current_thread())
        if len(self._calls) == self._stalls:
            self._woken.wait()
        return super().read(size)


@pytest.fixture
def stalling(monkeypatch):
    """Makes the `stalls`-th read of a bucket's file stall; returns a function that wakes it and joins its thread."""
    woken = threading.Event()

    def set_up(data: bytes, stalls: int):
        calls = []
        monkeypatch.setattr(MemoryFileSystem, "open", lambda *_, **__: Stalling(data, calls, stalls, woken))

        def wake():
            woken.set()
            calls[stalls - 1].join()

        return wake

    yield set_up
    woken.set()


def test_a_copy_that_was_given_up_leaves_the_next_one_alone(bucket, stalling):
    data = bytes(range(256)) * 100
    url, wake = bucket("a.tar", data), stalling(data, stalls=1)
    with base.local_file(url, len(data)) as copy:
        wake()
        assert os.listdir(os.path.dirname(copy)) == ["a.tar"]
        with open(copy, "rb") as file:
            assert file.read() == data


def test_a_copy_that_gets_on_may_take_any_time(bucket, monkeypatch):
    """Here one piece comes in each of three intervals, each as long as a stall."""
    go_on, reached, joins = threading.Semaphore(0), threading.Semaphore(0), itertools.count()
    pieces, join = iter([b"a", b"b", b"c"]), threading.Thread.join

    class Slow(io.BytesIO):
        begun = False

        def read(self, size=-1):
            if self.begun:
                reached.release()
            self.begun = True
            if piece := next(pieces, b""):
                go_on.acquire()
            return piece

    def let_time_pass(thread, timeout=None):
        if next(joins) < 3:
            go_on.release()
            reached.acquire()
        else:
            join(thread, timeout)

    url = bucket("a.tar", b"abc")
    monkeypatch.setattr(MemoryFileSystem, "open", lambda *_, **__: Slow())
    monkeypatch.setattr(base, "_STALLED_S", 60)
    monkeypatch.setattr(threading.Thread, "join", let_time_pass)
    with base.local_file(url, 3) as copy, open(copy, "rb") as file:
        assert file.read() == b"abc"


def test_a_copy_that_comes_short_is_made_again(bucket, monkeypatch):
    url = bucket("a.tar", b"whole")
    came = iter([b"wh", b"whole"])
    monkeypatch.setattr(MemoryFileSystem, "open", lambda *_, **__: io.BytesIO(next(came)))
    with base.local_file(url, 5) as copy, open(copy, "rb") as file:
        assert file.read() == b"whole"


def test_a_read_that_was_given_up_moves_no_other(bucket, stalling):
    data = b"abcdefgh"
    url, wake = bucket("a.parquet", data), stalling(data, stalls=2)
    with base.PatientFile(url) as file:
        assert file.read(2) == b"ab"
        assert file.read(2) == b"cd"  # tried twice
        wake()
        assert (file.tell(), file.read(2)) == (4, b"ef")
        assert (file.seek(-1, os.SEEK_END), file.read()) == (7, b"h")
        assert (file.seek(1), file.seek(2, os.SEEK_CUR), file.read(1)) == (1, 3, b"d")


def test_storage_that_fails_once_is_no_absence(bucket, monkeypatch):
    """fsspec's own `exists` and `isdir` return False then."""
    described, classes = (
        bucket("described/metadata.jsonl", b'{"file_name": "a.png", "text": "a"}'),
        bucket("labels.txt", b"x"),
    )
    bucket("described/a.png", png(1))
    out = io.BytesIO()
    pq.write_table(pa.table({"image": [png(3)], "label": [0]}), out)
    shards = bucket("a.parquet", out.getvalue())
    failed, info = set(), MemoryFileSystem.info

    def fails_once(files, path, **options):
        if path not in failed:
            failed.add(path)
            raise ConnectionResetError(errno.ECONNRESET, "reset by peer")
        return info(files, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "info", fails_once)
    for name in ("exists", "isdir"):
        monkeypatch.setattr(MemoryFileSystem, name, getattr(AbstractFileSystem, name))
    source = FolderSource(os.path.dirname(described), Fields("", "text", "", ""), 100)
    assert items(source) == [Example("a.png", png(1), "a", "", -1)]
    source = ParquetSource(shards, Fields("image", label="label"), 100)
    assert source.label_names == ("x",) and classes.endswith("/labels.txt")


@pytest.mark.parametrize("lost", ["/raw", "/raw/a"])
def test_a_listing_that_fails_once_is_no_empty_directory(bucket, monkeypatch, lost):
    """fsspec's own `glob` and `find` would leave the directory out."""
    wanted = [bucket(f"{directory}/{name}.tar", b"x") for directory in ("a", "b") for name in ("1", "2")]
    bucket("a/readme.txt", b"")
    bucket("a/deeper/3.tar", b"")
    ls, failures = MemoryFileSystem.ls, [lost]

    def flaky(self, path, **options):
        if path.rstrip("/") in failures:
            failures.remove(path.rstrip("/"))
            raise OSError(errno.EREMOTEIO, "reset")
        return ls(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "ls", flaky)
    assert [name.replace(":///", "://") for name in base.find_files("memory://raw/*/*.tar")] == wanted
    assert not failures
    failures.append(lost)
    assert len(base.files_below(*base.filesystem("memory://raw"))) == 6 and not failures
    assert len(base.find_files("memory://raw/**/*.tar")) == 5
    with pytest.raises(UserError, match="no file matches"):
        base.find_files("memory://nowhere/*.tar")


def test_storage_that_goes_on_failing_is_named(bucket, monkeypatch):
    class HttpError(Exception):
        pass

    def fails(*_, **__):
        raise HttpError("503")

    url = bucket("a.png", png())
    monkeypatch.setattr(MemoryFileSystem, "info", fails)
    with pytest.raises(UserError, match=r"cannot read /raw: .*HttpError: 503") as caught:
        FolderSource(os.path.dirname(url), Fields(), 100)
    assert errors.storage_failed(caught.value)


def test_rows_of_a_large_group_come_before_all_of_it_is_read(bucket, monkeypatch):
    noise = np.random.default_rng(0)
    out = io.BytesIO()
    table = pa.table({"image": [noise.bytes(2**14) for _ in range(600)]})
    pq.write_table(table, out, use_dictionary=False, write_batch_size=16)
    source = ParquetSource(bucket("a.parquet", out.getvalue()), Fields("image"), 1000)
    sizes, read = [], base.PatientFile.read
    monkeypatch.setattr(base.PatientFile, "read", lambda file, size=-1: sizes.append(size) or read(file, size))
    with source.open(source.units[0]) as (_, rows):
        assert next(rows).key == "a.parquet:0"
    assert sum(sizes) < len(out.getvalue()) * 0.75
