"""Batches follow from (seed, step) alone, whatever the processes and the restarts, and survive bad records."""

import io
import logging
import re
from itertools import chain, islice

import numpy as np
import pytest
from PIL import Image

from lina_jax import data, records
from lina_jax.errors import UserError

COUNT, SIZE, LENGTH = 20, (4, 6), 8


def png(value, size=SIZE):
    out = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def dataset(directory, **changed):
    """Write COUNT records made of their index, with `changed` fields: i3={"caption": "other"}."""
    with records.create(directory, "tiny", records.pixel_features()) as writer:
        for i in range(COUNT):
            record = {"image": png(i), "caption": f"nº {i}", "short_caption": "", "label": i, "key": str(i)}
            writer.write("train", **record | changed.get(f"i{i}", {}))
    return directory


def open_records(directory, **kwargs):
    return data.Records(records.open_split(directory, "train"), image_size=SIZE, text_length=LENGTH, **kwargs)


def batches(source, steps, **kwargs):
    settings = {"global_batch": 8, "seed": 1, "start_step": 0, "threads": 2, "prefetch": 4}
    return list(islice(data.training_batches(source, **settings | kwargs), steps))


def labels(source, steps, **kwargs):
    return [batch["label"].tolist() for batch in batches(source, steps, **kwargs)]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return open_records(dataset(tmp_path_factory.mktemp("data") / "clean"))


def test_a_record_decoded(clean):
    record = clean[3]
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
    assert labels(clean, 12, threads=1, prefetch=1) == whole


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_read_contiguous_blocks_of_the_same_global_batches(clean, processes):
    parts = [labels(clean, 4, start_step=3, process_index=p, process_count=processes) for p in range(processes)]
    assert [list(chain(*blocks)) for blocks in zip(*parts, strict=True)] == labels(clean, 4, start_step=3)


def test_a_batch_may_exceed_the_dataset(clean):
    (batch,) = labels(clean, 1, global_batch=50)
    assert sorted(batch[:40]) == sorted(2 * list(range(COUNT)))


def test_an_indivisible_batch_is_refused(clean):
    with pytest.raises(UserError, match="global batch 8 is not divisible by 3"):
        data.training_batches(clean, global_batch=8, seed=0, start_step=0, process_count=3, threads=1, prefetch=1)


@pytest.mark.parametrize(
    ("bad", "kwargs", "reason"),
    [
        ({"image": b"no image"}, {}, "cannot identify image"),
        ({"image": png(0)[:-24]}, {}, "truncated"),
        ({"image": png(0, (6, 4))}, {}, r"the image is \(6, 4\), expected \(4, 6\)"),
        ({"caption": " "}, {"text_required": True}, "the caption is empty"),
        ({"caption": b"\xff\xfe"}, {}, "can't decode"),
        ({"label": -1}, {"num_classes": COUNT}, "the label is -1, expected 0 to 19"),
    ],
)
def test_a_bad_record_is_replaced_by_the_next(tmp_path, caplog, bad, kwargs, reason):
    source = open_records(dataset(tmp_path / "data", i5=bad), **kwargs)
    with caplog.at_level(logging.WARNING):
        assert [source[5]["label"], source[5]["label"]] == [6, 6]
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
    parts = [labels(open_records(directory), 6, process_index=p, process_count=2) for p in range(2)]
    assert [list(chain(*blocks)) for blocks in zip(*parts, strict=True)] == expected


def test_a_flipped_byte_in_a_shard_costs_one_record(tmp_path):
    directory = dataset(tmp_path / "data", i7={"caption": "a mark"})
    (shard,) = directory.glob("*.array_record*")
    content = shard.read_bytes()
    assert content.count(b"a mark") == 1
    shard.write_bytes(content.replace(b"a mark", b"a mask"))
    source = open_records(directory)
    assert [int(source[i]["label"]) for i in range(COUNT)] == [*range(7), 8, *range(8, COUNT)]


def test_a_lost_shard_ends_with_its_name(tmp_path):
    directory = dataset(tmp_path / "data")
    (shard,) = directory.glob("*.array_record*")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"20 bad records in a row, the last one record .* of {shard}"):
        batches(open_records(directory), 1)


def test_long_captions_are_cut_and_counted(tmp_path):
    source = open_records(dataset(tmp_path / "data", i2={"caption": "0123456789"}))
    assert bytes(source[2]["text"]) == b"01234567"
    assert source[2]["text_length"] == LENGTH
    assert (source.truncated, source.skipped) == (2, 0)


def test_text_is_utf8_padded_with_zeros():
    text, length = data.encode_text(["", "é", "abcde"], 4)
    np.testing.assert_array_equal(text, [[0, 0, 0, 0], [0xC3, 0xA9, 0, 0], list(b"abcd")])
    np.testing.assert_array_equal(length, [0, 2, 4])
    assert (text.dtype, length.dtype) == (np.uint8, np.int32)


def test_fixed_examples_are_the_first(clean):
    examples = data.fixed_examples(clean, 3)
    assert examples["label"].tolist() == [0, 1, 2]
    assert examples["image"].shape == (3, *SIZE, 3)
    with pytest.raises(UserError, match="21 examples asked, but the split has only 20"):
        data.fixed_examples(clean, COUNT + 1)
