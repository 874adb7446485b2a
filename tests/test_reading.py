"""Random access to datasets, whatever the storage does; errors name what cannot be read."""

import errno
import itertools
import json
import os
import pickle
import queue
import resource
import shutil
import threading

import fsspec
import numpy as np
import pytest
from tiny_dataset import captions, png, write

from lina_jax import cache, reading, records, retry, tf_example
from lina_jax.errors import UserError


def keys(split: reading.Split) -> list[bytes]:
    return [bytes(tf_example.parse(split[i])["key"]) for i in range(len(split))]


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    """A dataset with at most two records per shard: three shards for train."""
    monkeypatch.setattr(records, "SHARD_RECORDS", 2)
    return write(tmp_path / "tiny")


def test_fields_of_pixels(tmp_path):
    fields = tf_example.parse(reading.open_split(write(tmp_path / "tiny"), "train")[0])
    assert {name: v if isinstance(v, int) else bytes(v) for name, v in fields.items()} == {
        "image": png(0), "caption": "nº 0".encode(), "short_caption": b"", "label": -1, "key": b"file:0",
    }  # fmt: skip


def test_fields_of_latents(tmp_path):
    rng = np.random.default_rng(0)
    moments, text = rng.standard_normal((4, 2, 3)).astype(np.float16), rng.standard_normal((5, 7)).astype(np.float16)
    with records.create(tmp_path / "tiny", "tiny", records.latent_features((4, 2, 3), 7)) as writer:
        writer.write(
            "train", moments=moments, text=text, short_text=text[:0], label=2**40, key="", **captions("a" * 300)
        )
    split = reading.open_split(tmp_path / "tiny", "train")
    assert split.layout == reading.RecordLayout((4, 2, 3), 7)
    fields = tf_example.parse(split[0])
    assert bytes(fields["moments"]) == moments.tobytes()
    assert bytes(fields["text"]) == text.tobytes()
    assert bytes(fields["short_text"]) == b""
    assert fields["label"] == 2**40
    assert len(fields["caption"]) == 300


@pytest.mark.parametrize("broken", [b"\x0a", b"\x0a\x05abc", b"no example", b"\x0a\x02\x0a\x00"])
def test_other_bytes_are_no_example(broken):
    with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
        tf_example.parse(broken)


def test_labels_need_no_names(tmp_path):
    assert tf_example.parse(reading.open_split(write(tmp_path / "tiny", label_names=()), "train")[2])["label"] == 1


def test_shards_make_one_sequence(sharded):
    split = reading.open_split(sharded, "train")
    assert keys(split) == [b"file:%d" % i for i in range(5)]
    assert split.location(3) == f"record 1 of {sharded}/tiny-train.array_record-00001-of-00003"


def test_a_slice_of_a_split(sharded):
    split = reading.open_split(sharded, "train[1:4]")
    assert keys(split) == [b"file:1", b"file:2", b"file:3"]
    assert split.location(1) == f"record 0 of {sharded}/tiny-train.array_record-00001-of-00003"


def test_a_split_travels_to_other_processes(sharded):
    split = reading.open_split(sharded, "train")
    assert keys(pickle.loads(pickle.dumps(split))) == keys(split)


def test_more_shards_than_open_files(sharded, monkeypatch):
    """The limit holds for all splits together."""
    readers = reading.Readers(2)
    monkeypatch.setattr(reading, "_readers", lambda: readers)
    splits = [reading.open_split(sharded, "train") for _ in range(2)]
    assert [keys(split) for split in 2 * splits] == 4 * [[b"file:%d" % i for i in range(5)]]
    assert len(readers._open) == 2


@pytest.mark.parametrize(
    ("hard", "refused", "allowed"), [(4096, False, 4096), (resource.RLIM_INFINITY, False, 2**16), (4096, True, 256)]
)
def test_as_many_files_may_be_open_as_the_system_allows(monkeypatch, hard, refused, allowed):
    """On macOS there is no hard limit, and the system refuses to remove the soft one."""
    limits = [256, hard]

    def set_limits(_, wanted):
        if refused or wanted[0] == resource.RLIM_INFINITY:
            raise ValueError("current limit exceeds maximum limit")
        limits[:] = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", set_limits)
    assert reading._open_files() == allowed == limits[0]


def test_a_file_that_has_shrunk_is_a_failure_of_the_storage(sharded):
    split = reading.open_split(sharded, "train")
    shard = sharded / "tiny-train.array_record-00001-of-00003"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises((OSError, RuntimeError)):
        split[2]
    assert len(split[4])


def test_what_the_system_says_of_a_read_is_known(sharded):
    """ArrayRecord keeps only the message. Here the open file is replaced by one that cannot be read at that offset."""
    split = reading.open_split(sharded, "train")
    split[2]
    shard = str(sharded / "tiny-train.array_record-00001-of-00003")
    (number,) = (n for n in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{n}") == shard)
    with open("/proc/self/mem", "rb") as unreadable:
        os.dup2(unreadable.fileno(), int(number))
    with pytest.raises(OSError, match="Input/output error") as caught:
        split[3]
    assert caught.value.errno == errno.EIO
    assert len(split[3])  # opened again


class Storage:
    """Fails or stalls in the first calls, as many as given, then answers."""

    def __init__(self, failures: int = 0, stalls: int = 0):
        self.failures, self.stalls, self.calls = failures, stalls, 0
        self.mended = threading.Event()

    def __call__(self, progress: retry.Progress) -> int:
        self.calls += 1
        call = self.calls
        progress.reach(f"record {call}")
        if call <= self.failures:
            raise OSError("connection reset")
        if call <= self.stalls:
            self.mended.wait()
        return call


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0)


def test_a_failing_read_is_tried_again_with_growing_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    assert retry.with_retries(Storage(failures=3), timeout=60) == 4
    assert pauses == [0.5, 1.0, 2.0]


def test_a_read_that_goes_on_failing_says_what_it_was_at(no_pause):
    storage = Storage(failures=100)
    with pytest.raises(OSError, match="connection reset") as caught:
        retry.with_retries(storage, timeout=60)
    assert storage.calls == retry.TRIES
    assert caught.value.at == f"record {retry.TRIES}"


def test_a_stalled_read_is_tried_again(no_pause):
    storage = Storage(stalls=1)
    try:
        assert retry.with_retries(storage, timeout=0.01) >= 2
    finally:
        storage.mended.set()


def test_a_stalled_read_that_goes_on_later_learns_that_it_was_given_up(monkeypatch):
    """Otherwise, it would go on reading beside the call that replaced it."""
    monkeypatch.setattr(retry, "TRIES", 1)
    begun, mended = queue.SimpleQueue(), threading.Event()

    def call(progress):
        begun.put(progress)
        mended.wait()

    with pytest.raises(TimeoutError, match="no answer for"):
        retry.with_retries(call, timeout=0.01)
    mended.set()
    with pytest.raises(TimeoutError, match="given up"):
        begun.get().check()


def test_a_read_that_gets_on_may_take_any_time(monkeypatch):
    """Here it makes progress once in each of three intervals of `timeout`."""
    go_on, reached = threading.Semaphore(0), threading.Semaphore(0)
    waits, join = itertools.count(), threading.Thread.join

    def let_time_pass(thread, timeout):
        if next(waits) < 3:
            go_on.release()
            reached.acquire()
        else:
            join(thread)

    def call(progress):
        for record in range(3):
            go_on.acquire()
            progress.reach(f"record {record}")
            reached.release()
        return "all"

    monkeypatch.setattr(retry, "TRIES", 1)
    monkeypatch.setattr(threading.Thread, "join", let_time_pass)
    assert retry.with_retries(call, timeout=60) == "all"


@pytest.mark.parametrize("mistake", [KeyError, FileNotFoundError])
def test_mistakes_are_not_tried_again(mistake, monkeypatch):
    def call(progress):
        raise mistake("typo")

    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it was tried again"))
    with pytest.raises(mistake):
        retry.with_retries(call, timeout=60)


@pytest.fixture
def bucket(sharded):
    """The URL of a copy of the dataset in memory; the original is gone."""
    files = fsspec.filesystem("memory")
    for path in sharded.iterdir():
        files.pipe(f"/bucket/tiny/{path.name}", path.read_bytes())
    shutil.rmtree(sharded)
    yield "memory://bucket/tiny"
    files.rm("/bucket", recursive=True)


def test_a_bucket_is_read_from_its_copy(bucket, tmp_path):
    split = reading.open_split(bucket, "train", cache=str(tmp_path / "cache"))
    assert keys(split) == [b"file:%d" % i for i in range(5)]
    copied = {path.name for path in (tmp_path / "cache").rglob("*array_record*")}
    assert copied == {f"tiny-train.array_record-{i:05d}-of-00003" for i in range(3)}  # not the shard of validation


def test_a_bucket_without_cache_is_refused(bucket):
    with pytest.raises(UserError, match=r"data\.path=memory://bucket/tiny: .*mount .*data\.cache"):
        reading.open_split(bucket, "train")


def test_an_interrupted_copy_goes_on(bucket, tmp_path, monkeypatch):
    fetched, fetch = [], cache.Copy._fetch

    def fails_at_the_second_shard(self, name, size):
        if "00001-of" in name:
            (self.directory / f"{name}.1.partial").write_bytes(b"half")
            raise UserError("cannot copy")
        fetch(self, name, size)

    monkeypatch.setattr(cache.Copy, "_fetch", fails_at_the_second_shard)
    with pytest.raises(UserError, match="cannot copy"):
        reading.open_split(bucket, "train", cache=str(tmp_path / "cache"), threads=1)
    (whole,) = (tmp_path / "cache").rglob("*00000-of-00003")
    before = os.stat(whole).st_ino

    def noted(self, name, size):
        fetched.append(name)
        fetch(self, name, size)

    monkeypatch.setattr(cache.Copy, "_fetch", noted)
    assert len(keys(reading.open_split(bucket, "train", cache=str(tmp_path / "cache")))) == 5
    assert os.stat(whole).st_ino == before
    assert whole.name not in fetched
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_copy_of_another_size_is_made_again(bucket, tmp_path):
    reading.open_split(bucket, "train", cache=str(tmp_path / "cache"))
    (shard,) = (tmp_path / "cache").rglob("*00002-of-00003")
    shard.write_bytes(b"cut")
    assert len(keys(reading.open_split(bucket, "train", cache=str(tmp_path / "cache")))) == 5


def test_a_shard_that_was_written_anew_is_copied_again(bucket, tmp_path):
    """Latents of another autoencoder have the same size in bytes."""
    reading.open_split(bucket, "train", cache=str(tmp_path / "cache"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").rglob("*00000-of-00003")}
    (name,) = before
    files = fsspec.filesystem("memory")
    files.pipe(f"/bucket/tiny/{name}", before[name][::-1])
    cache.Copy(bucket, str(tmp_path / "cache"), timeout=60).copy_shards([name], threads=1)
    (shard,) = (tmp_path / "cache").rglob(name)
    assert shard.read_bytes() == before[name][::-1]


def test_a_directory_is_copied_too(sharded, tmp_path):
    reading.open_split(sharded, "train", cache=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").rglob("*array_record*"))) == 3


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("memory://bucket/none", "memory://bucket/none does not exist"),
        ("nothing://bucket/tiny", "Protocol not known: nothing"),
    ],
)
def test_a_bucket_that_is_not_there(url, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        reading.open_split(url, "train", cache=str(tmp_path / "cache"))


def test_errors_name_the_path_and_what_exists(tmp_path):
    with pytest.raises(UserError, match="absent does not exist"):
        reading.open_split(tmp_path / "absent", "train")

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cat.jpg").touch()
    with pytest.raises(UserError, match=r"no dataset_info.json; it holds cat.jpg"):
        reading.open_split(tmp_path / "other", "train")

    directory = write(tmp_path / "tiny")
    with pytest.raises(UserError, match="no split 'test'; its splits: train, validation"):
        reading.open_split(directory, "test")

    (directory / "tiny-validation.array_record-00000-of-00001").unlink()
    with pytest.raises(UserError, match=r"1 of the 1 shards .*tiny-validation.array_record-00000-of-00001"):
        reading.open_split(directory, "validation")
    assert len(reading.open_split(directory, "train")) == 5

    info = json.loads((directory / "dataset_info.json").read_text())
    (directory / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="stored as tfrecord; only array_record"):
        reading.open_split(directory, "train")
    (directory / "dataset_info.json").write_text('{"name": ')
    with pytest.raises(UserError, match="cannot read the metadata of"):
        reading.open_split(directory, "train")
