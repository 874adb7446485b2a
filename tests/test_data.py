"""Batches depend on (seed, step) alone, not on processes or restarts, and survive bad records."""

import errno
import io
import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from numbered_records import COLUMNS, COUNT, LENGTH, SIZE, batches, block, dataset, labels, one, open_records, png
from PIL import Image

from lina_jax import data, decode, reading, records, retry
from lina_jax.errors import RUN_AGAIN, TransientFailure, UserError, exit_message


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return open_records(dataset(tmp_path_factory.mktemp("data") / "clean"))


def test_a_record_decoded(clean):
    record = one(clean, 3)
    assert {name: (value.dtype, value.shape) for name, value in record.items()} == {
        "image": (np.uint8, (*SIZE, 3)),
        "label": (np.int32, ()),
        "text": (np.uint8, (LENGTH,)),
        "text_length": (np.int32, ()),
    }
    assert (record["image"] == 3).all()
    assert bytes(record["text"][: record["text_length"]]).decode() == "nº 3"


def test_batches_are_stacked_records(clean):
    for batch in batches(clean, 2):
        assert {name: value.shape[0] for name, value in batch.items()} == dict.fromkeys(batch, 8)
        assert (batch["image"] == batch["label"][:, None, None, None]).all()


def test_an_epoch_has_every_record_once_in_an_order_of_its_own(clean):
    order = list(chain(*labels(clean, 10)))  # 80 positions: 4 epochs of 20
    epochs = [order[i : i + COUNT] for i in range(0, 80, COUNT)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(COUNT))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert labels(clean, 10, seed=2) != labels(clean, 10)


def test_order_does_not_depend_on_restarts_or_threads(clean):
    whole = labels(clean, 12)
    assert labels(clean, 5, start_step=7) == whole[7:]
    assert labels(clean, 12, prefetch=1) == whole


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_read_parts_of_the_same_global_batches(clean, processes):
    parts = [labels(clean, 4, start_step=3, rows=block(p, processes)) for p in range(processes)]
    assert [list(chain(*blocks)) for blocks in zip(*parts, strict=True)] == labels(clean, 4, start_step=3)


def test_any_rows_can_be_read(clean):
    whole = labels(clean, 4, start_step=3)
    assert labels(clean, 4, start_step=3, rows=[1, 2, 6]) == [[batch[row] for row in (1, 2, 6)] for batch in whole]


def test_a_batch_may_exceed_the_dataset(clean):
    (batch,) = labels(clean, 1, global_batch=50)
    assert sorted(batch[:40]) == sorted(2 * list(range(COUNT)))


@pytest.mark.parametrize(
    ("bad", "kwargs", "reason"),
    [
        ({"image": b"no image"}, {}, "cannot identify image"),
        ({"image": png(0)[:-24]}, {}, "truncated"),
        ({"image": png(0, (6, 4))}, {}, r"the image is \(6, 4\), expected \(4, 6\)"),
        ({"caption": " "}, {}, "the caption is empty"),
        ({"caption": b"\xff\xfe"}, {}, "can't decode"),
        ({"label": -1}, {"num_classes": COUNT}, "it has no label, which model.condition=class needs"),
        ({"label": COUNT}, {"num_classes": COUNT}, "the label is 20, expected 0 to 19"),
    ],
)
def test_a_bad_record_is_replaced_by_the_next(tmp_path, caplog, bad, kwargs, reason):
    source = open_records(dataset(tmp_path / "data", i5=bad), **kwargs)
    with caplog.at_level(logging.WARNING):
        assert [one(source, 5)["label"], one(source, 5)["label"]] == [6, 6]
    assert source.skipped == 1
    (message,) = caplog.messages
    assert "record 5 of" in message
    assert re.search(reason, message)


def test_replacements_are_the_same_for_every_reader(tmp_path, clean):
    broken = {"image": b"no image"}
    directory = dataset(tmp_path / "data", i4=broken, i19=broken)
    source = open_records(directory)
    replaced = {4: 5, 19: 0}
    expected = [[replaced.get(label, label) for label in batch] for batch in labels(clean, 6)]
    assert labels(source, 6) == expected
    assert source.skipped == 2
    parts = [labels(open_records(directory), 6, rows=block(p, 2)) for p in range(2)]
    assert [list(chain(*blocks)) for blocks in zip(*parts, strict=True)] == expected


def test_a_flipped_byte_in_a_shard_costs_one_record(tmp_path):
    directory = dataset(tmp_path / "data", i7={"caption": "a mark"})
    (shard,) = directory.glob("*.array_record*")
    content = shard.read_bytes()
    assert content.count(b"a mark") == 1
    shard.write_bytes(content.replace(b"a mark", b"a mask"))
    source = open_records(directory)
    assert [int(one(source, i)["label"]) for i in range(COUNT)] == [*range(7), 8, *range(8, COUNT)]


def test_a_broken_header_in_a_shard_costs_its_records(tmp_path):
    directory = dataset(tmp_path / "data")
    (shard,) = directory.glob("*.array_record*")
    content = bytearray(shard.read_bytes())
    headers = [found.start() - 24 for found in re.finditer(rb"r\x01\0\0\0\0\0\0", content)]  # chunks have one record
    assert len(headers) == COUNT
    content[headers[7]] ^= 1
    shard.write_bytes(content)
    source = open_records(directory)
    assert [int(one(source, i)["label"]) for i in range(COUNT)] == [*range(7), 8, *range(8, COUNT)]


def test_a_broken_block_header_in_a_shard_costs_its_record(tmp_path):
    """Riegeli writes 24 bytes at each multiple of 64 KiB, in the midst of whatever record is there."""
    directory = dataset(tmp_path / "data", i7={"caption": "x" * 70_000})
    (shard,) = directory.glob("*.array_record*")
    content = bytearray(shard.read_bytes())
    content[2**16] ^= 1
    shard.write_bytes(content)
    source = open_records(directory)
    got = [int(one(source, i)["label"]) for i in range(COUNT)]
    assert source.skipped == 1
    assert sum(label != i for i, label in enumerate(got)) == 1


def test_a_lost_shard_ends_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0)
    directory = dataset(tmp_path / "data")
    (shard,) = directory.glob("*.array_record*")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"cannot read record .* of {shard}: "):
        batches(open_records(directory), 1)


def test_storage_that_fails_asks_for_a_restart_from_a_worker_too(tmp_path, monkeypatch):
    """An exception that grain passes on from a worker process has lost its cause."""

    def stale(split, index):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0)
    source = open_records(dataset(tmp_path / "data"))
    monkeypatch.setattr(reading.Split, "__getitem__", stale)
    with pytest.raises(TransientFailure) as caught:
        batches(source, 1)
    line, code = exit_message(pickle.loads(pickle.dumps(caught.value)))
    assert code == RUN_AGAIN and "Stale file handle" in line


def test_a_dataset_of_bad_records_ends_with_the_last(tmp_path):
    directory = dataset(tmp_path / "data", **{f"i{i}": {"image": b"no image"} for i in range(COUNT)})
    with pytest.raises(UserError, match=r"20 bad records in a row, the last: record .*: cannot identify"):
        batches(open_records(directory), 1)


class Hanging:
    """A split whose first read of record 5 hangs until `released` is set; later reads work."""

    def __init__(self, split):
        self._split, self._hung = split, False
        self.released, self.late = threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(self._split, name)

    def __len__(self):
        return len(self._split)

    def __getitem__(self, index):
        if index == 5 and not self._hung:
            self._hung = True
            self.released.wait()
            self.late.set()
        return self._split[index]


def test_a_read_that_hangs_is_read_again(clean, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0)
    hanging = Hanging(reading.open_split(dataset(tmp_path / "data"), "train"))
    source = data.Records([hanging], COLUMNS, threads=1, read_timeout=0.2)
    try:
        assert labels(source, 3) == labels(clean, 3)
    finally:
        hanging.released.set()
    assert hanging.late.wait(10)
    assert source.skipped == 0


def test_long_captions_are_cut_counted_and_told_once(tmp_path, caplog):
    source = open_records(dataset(tmp_path / "data", i2={"caption": "0123456789"}))
    for _ in range(2):
        assert bytes(one(source, 2)["text"]) == b"01234567"
    told = [message for message in caplog.messages if message.startswith("captions longer than the model reads")]
    assert len(told) == 1 and "(model.text_length)" in told[0]
    assert one(source, 3)["text_length"] < LENGTH
    assert (source.truncated, source.skipped) == (2, 0)


def test_text_is_utf8_padded_with_zeros():
    text, length = decode.encode_text(["", "é", "abcde"], 4)
    np.testing.assert_array_equal(text, [[0, 0, 0, 0], [0xC3, 0xA9, 0, 0], list(b"abcd")])
    np.testing.assert_array_equal(length, [0, 2, 4])
    assert (text.dtype, length.dtype) == (np.uint8, np.int32)


def test_fixed_examples_stand_for_all(clean):
    """In data sorted by class, they include some of every class."""
    examples = data.fixed_examples(clean, 3)
    assert examples["label"].tolist() == [0, 6, 13]
    assert data.fixed_examples(clean, COUNT)["label"].tolist() == list(range(COUNT))
    assert examples["image"].shape == (3, *SIZE, 3)
    with pytest.raises(UserError, match="21 examples requested, but the split has only 20"):
        data.fixed_examples(clean, COUNT + 1)


@pytest.mark.parametrize("split", ["train[:0]", "train[5:3]"])
def test_an_empty_split_is_refused(split, tiny_text, shapes_data):
    with pytest.raises(UserError, match=f"^{re.escape(f'{shapes_data}: split {split!r} is empty')}$"):
        data.open_records(tiny_text(), split)


def test_a_weight_that_is_too_small_is_refused_when_records_are_opened(tiny_text, shapes_data):
    """Later, a workdir would hold the mistake."""
    with pytest.raises(UserError, match=r"data\.path: one dataset has 0.0005 of the sum of weights"):
        data.open_records(tiny_text(data={"path": f"{shapes_data}=1,{shapes_data}=2000"}), "train")


@pytest.fixture
def mixture_of_classes(tiny, tmp_path):
    """Config of a mixture of two datasets with these names of classes."""

    def make(*names):
        for place, classes in zip("ab", names, strict=True):
            with records.create(tmp_path / place, "data", records.pixel_features(classes)) as writer:
                writer.write("train", image=png(0), caption="", short_caption="", label=0, key="0")
        return tiny(data={"path": f"{tmp_path}/a=1,{tmp_path}/b=1"})

    return make


def test_datasets_that_number_classes_differently_are_refused(mixture_of_classes, tmp_path):
    config = mixture_of_classes(["cat", "dog"], ["ant", "cat"])
    with pytest.raises(UserError, match=rf"class 0 is 'cat' in {tmp_path}/a, but 'ant' in {tmp_path}/b"):
        data.open_records(config, "train")


@pytest.mark.parametrize("others", [["cat", "dog"], ["cat"], []], ids=str)
def test_datasets_that_number_classes_alike_are_mixed(others, mixture_of_classes):
    assert len(data.open_records(mixture_of_classes(["cat", "dog"], others), "train")) == 2


def test_worker_processes_give_the_same_batches(tmp_path):
    flags.FLAGS.mark_as_parsed()  # grain reads absl's flags, which programs have parsed
    directory = dataset(tmp_path / "data", i4={"image": b"no image"}, i2={"caption": "0123456789"})
    runs = {}
    for workers in (0, 2):
        source = open_records(directory)
        runs[workers] = batches(source, 5, workers=workers)
        assert (source.skipped, source.truncated) == (1, 2)
    for threads, processes in zip(runs[0], runs[2], strict=True):
        for name, array in threads.items():
            np.testing.assert_array_equal(array, processes[name])


def test_a_worker_that_was_killed_is_no_bug_but_asks_for_a_restart(tmp_path):
    flags.FLAGS.mark_as_parsed()
    source = open_records(dataset(tmp_path / "data"))
    running = data.training_batches(source, global_batch=6, seed=1, start_step=0, workers=1)
    next(running)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(TransientFailure, match="a data-loading process was killed by signal 9"):
        while True:
            next(running)


def test_workers_end_with_their_parent_and_not_by_its_signals(tmp_path):
    """They hold the parent's output pipe, so whoever reads it to the end waits for them, too."""
    code = f"""
import multiprocessing, os, signal, sys, time
from absl import flags
sys.path.insert(0, {str(Path(__file__).parent)!r})
from lina_jax import data
import test_data

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    source = test_data.open_records({str(dataset(tmp_path / "data"))!r})
    running = data.training_batches(source, global_batch=6, seed=1, start_step=0, workers=1)
    next(running)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    for _ in range(20):
        next(running)
    print("ended", flush=True)
    os._exit(3)
"""
    program = tmp_path / "program.py"
    program.write_text(code)
    result = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout) == (3, "ended\n"), result.stderr


def test_real_processes_make_the_same_global_batches(tmp_path):
    """One, two and four Python processes; two start at step 2 of the first one's batches, four at step 4."""
    directories = [dataset(tmp_path / "a"), dataset(tmp_path / "b", i3={"image": b"no image"})]

    def run(processes, start_step, steps):
        code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_data
source = test_data.open_records(*{[str(d) for d in directories]}, weights={WEIGHTS!r}, short_caption=0.5, flip=True)
place = dict(rows=test_data.block(int(sys.argv[1]), {processes}), start_step={start_step})
for batch in test_data.batches(source, {steps}, **place):
    print([[int(l), bytes(t).hex()] for l, t in zip(batch["label"], batch["text"])])
"""
        code = code.replace("Fraction(", "test_data.Fraction(")
        started = [
            subprocess.Popen([sys.executable, "-c", code, str(p)], stdout=subprocess.PIPE, text=True)
            for p in range(processes)
        ]
        blocks = [[json.loads(line.replace("'", '"')) for line in p.communicate()[0].splitlines()] for p in started]
        return [list(chain(*parts)) for parts in zip(*blocks, strict=True)]

    whole = run(1, 0, 6)
    assert len(whole) == 6
    assert run(2, 2, 4) == whole[2:]
    assert run(4, 4, 2) == whole[4:]


WEIGHTS = (Fraction(3, 4), Fraction(1, 4))


def test_a_mixture_keeps_its_weights(clean, tmp_path):
    other = dataset(tmp_path / "data", **{f"i{i}": {"label": 100 + i} for i in range(COUNT)})
    source = open_records(dataset(tmp_path / "first"), other, weights=WEIGHTS)
    drawn = np.concatenate([batch["label"] for batch in batches(source, 4, global_batch=256)])
    assert (drawn >= 100).sum() == 256
    assert len(set(drawn[drawn >= 100])) == COUNT


def test_validation_of_a_mixture_has_some_of_each(tmp_path):
    other = dataset(tmp_path / "data", **{f"i{i}": {"label": 100 + i} for i in range(COUNT)})
    source = open_records(dataset(tmp_path / "first"), other, weights=WEIGHTS)
    assert len(source) == 26  # the first dataset's 20 records are three in four
    assert data.fixed_examples(source, 8)["label"].tolist() == [0, 3, 6, 10, 13, 16, 100, 110]


def test_short_captions_are_shown_by_chance_where_there_are_any(tmp_path):
    short = {f"i{i}": {"short_caption": "short"} for i in range(COUNT // 2)}
    source = open_records(dataset(tmp_path / "data", **short), short_caption=0.5)
    seen = [
        (int(label), bytes(text).startswith(b"short"))
        for batch in batches(source, 100)
        for label, text in zip(batch["label"], batch["text"], strict=True)
    ]
    with_one = [shown for label, shown in seen if label < COUNT // 2]
    assert abs(np.mean(with_one) - 0.5) < 0.1  # over 400 draws: four standard deviations
    assert not any(shown for label, shown in seen if label >= COUNT // 2)


def test_flips_and_short_captions_are_drawn_apart(tmp_path):
    """Shares of 4000 positions, whose standard deviation is 0.7 %."""
    shown = Counter(open_records(dataset(tmp_path / "data"), short_caption=0.5, flip=True).variants(1, range(4000)))
    assert len(shown) == 4
    assert all(abs(count / 4000 - 0.25) < 0.04 for count in shown.values())


def test_flips_are_by_chance_and_follow_from_seed_and_position(tmp_path):
    picture = np.zeros((*SIZE, 3), np.uint8)
    picture[:, 0] = 255
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    directory = dataset(tmp_path / "data", **{f"i{i}": {"image": out.getvalue()} for i in range(COUNT)})

    def flipped(steps, flip=True, **kwargs):
        drawn = batches(open_records(directory, flip=flip), steps, **kwargs)
        images = np.concatenate([batch["image"] for batch in drawn])
        assert all(np.array_equal(i, picture) or np.array_equal(i, picture[:, ::-1]) for i in images)
        return [image[0, 0, 0] == 0 for image in images]

    whole = flipped(50)
    assert abs(np.mean(whole) - 0.5) < 0.1
    assert flipped(10, start_step=40) == whole[-80:]
    assert flipped(50, seed=2) != whole
    assert not any(flipped(4, flip=False))
