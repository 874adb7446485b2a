"""Units of preparation: whoever makes them, and wherever a process is killed, the dataset has the same bytes."""

import errno
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import test_webdataset

from lina_jax import records, work_units
from lina_jax.errors import UserError
from lina_jax.prepare import Settings, Share, prepare


def contents(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# 11 units of about 3 KiB, with the fixture `small_units`.
SMALL = {"resolution": 8, "train": 300, "validation": 30}


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(records, "SHARD_RECORDS", 30)


def test_units_may_be_made_by_several_processes(tmp_path, small_units, capsys):
    made = Settings(**SMALL)
    prepare(tmp_path / "one", made)
    assert prepare(tmp_path / "out", made, share=Share(1, 3)) is None
    assert prepare(tmp_path / "out", made, share=Share(0, 3)) is None
    assert "3 of 11 units are left to other processes" in capsys.readouterr().out
    totals = prepare(tmp_path / "out", made, share=Share(2, 3))
    assert totals == {"images": {"train": 300, "validation": 30}, "rejected": {}, "truncated_captions": 0}
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("shapes-train.*"))) == 10
    assert len(list((tmp_path / "one").glob("shapes-validation.*"))) == 1


def test_one_that_comes_too_late_leaves_nothing(tmp_path, small_units, monkeypatch):
    """Another process finishes the dataset while this one makes a unit."""
    inner = work_units.WorkDirectory.make

    def make(*args):
        def truncated():  # asked for when a unit is complete but for its receipt
            monkeypatch.setattr(work_units.WorkDirectory, "make", inner)
            prepare(tmp_path / "out", Settings(**SMALL))
            return 0

        inner(*args[:-1], truncated)

    monkeypatch.setattr(work_units.WorkDirectory, "make", make)
    assert prepare(tmp_path / "out", Settings(**SMALL))["images"]["train"] == SMALL["train"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_that_make_the_same_unit_leave_it_whole(tmp_path, small_units, monkeypatch):
    """The second starts and ends while the first is still at work."""
    prepare(tmp_path / "one", Settings(**SMALL))
    inner = work_units.WorkDirectory.make

    def make(work, number, source, items, made, *rest):
        def slowly():
            for i, record in enumerate(made):
                if i == 1 and number == 0:
                    monkeypatch.setattr(work_units.WorkDirectory, "make", inner)
                    assert prepare(tmp_path / "out", Settings(**SMALL), share=Share(0, 2)) is None
                yield record

        inner(work, number, source, items, slowly(), *rest)

    monkeypatch.setattr(work_units.WorkDirectory, "make", make)
    assert prepare(tmp_path / "out", Settings(**SMALL), share=Share(0, 2)) is None
    prepare(tmp_path / "out", Settings(**SMALL), share=Share(1, 2))
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_a_unit_that_cannot_be_moved_into_place_is_an_error(tmp_path, small_units, monkeypatch):
    """As in a bucket that cannot rename directories; no other process has made the unit."""

    def refuse(path, target):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"cannot prepare .*out: .*Too many open files"):
        prepare(tmp_path / "out", Settings(**SMALL), share=Share(0, 2))


def test_work_that_others_began_differently_is_refused(tmp_path, small_units):
    prepare(tmp_path / "out", Settings(**SMALL), share=Share(0, 2))
    with pytest.raises(UserError, match=r"out.partial was started with other settings .*: resolution=8, requested 16"):
        prepare(tmp_path / "out", Settings(**SMALL | {"resolution": 16}), share=Share(1, 2))


@pytest.fixture
def tars(tmp_path):
    """Six tars of 12 captioned images each, one of which cannot be decoded."""
    (tmp_path / "raw").mkdir()
    for i in range(6):
        members = test_webdataset.pairs(f"{i}-{j}" for j in range(11))
        members += [("bad.jpg", b"?"), ("bad.txt", b"a caption")]
        (tmp_path / "raw" / f"{i}.tar").write_bytes(test_webdataset.tar(members))
    return {"source": "webdataset", "input": f"{tmp_path}/raw/*.tar", "resolution": 8, "validation": 8}


# Prepares OUT, and dies at the n-th operation on files whose path contains it (0: never).
DYING = """
import json, os, signal, sys
out, settings, last, *share = sys.argv[1:]
count = 0
def watch(event, args):
    global count
    if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove") and out in str(args[0]):
        count += 1
        if count == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
from lina_jax import prepare
sys.addaudithook(watch)
share = prepare.Share(*map(int, share))
prepare.prepare(out, prepare.Settings(**json.loads(settings)), max_reject_fraction=0.5, share=share)
"""


def dying(out, settings, last, *share) -> list[str]:
    return [sys.executable, "-c", DYING, *map(str, (out, json.dumps(settings), last, *share))]


def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path, tars):
    prepare(tmp_path / "whole", Settings(**tars), max_reject_fraction=0.5)
    random.seed(0)
    last, codes = 0, []
    # Each run gets further than the one before; the last ones die while they assemble the finished units.
    while 0 not in codes:
        last += random.randrange(3, 12)
        codes.append(subprocess.run(dying(tmp_path / "out", tars, last)).returncode)
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0]
    assert len(codes) > 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_processes_at_the_same_time_make_the_same_bytes(tmp_path, tars):
    prepare(tmp_path / "whole", Settings(**tars), max_reject_fraction=0.5)
    both = [subprocess.Popen(dying(tmp_path / "out", tars, 0, index, 2)) for index in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
