"""Collections with every kind of bad input: preparation survives, names it, and keeps everything that is good."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_images
import test_webdataset
from test_sources import png
from test_webdataset import pairs, tar

from lina_jax.errors import UserError
from lina_jax.prepare import Settings, prepare

LONG = 60  # bytes of caption allowed
GOOD = test_images.GOOD | {"wrong extension": (png(7), 7)}
IMAGES = {re.sub(r"\W", "_", name): reason for name, (_, reason) in test_images.BAD.items()}
IMAGES["empty"] = "missing image"
TAR = {key: reason for key, (_, reason) in test_webdataset.TAR_DAMAGE.items()}
JSON = dict(zip((f"json{i}" for i in range(12)), test_webdataset.JSON_DAMAGE.values(), strict=True))


def images_and_captions(raw):
    """One tar of bad images, odd images that can be used, bad captions and broken members."""
    members = []
    for names in (test_images.BAD, GOOD):
        for name, (data, _) in names.items():
            key = re.sub(r"\W", "_", name)
            members += [(f"{key}.jpg", data), (f"{key}.txt", b"a caption")]
    for key, (sample, _) in test_webdataset.TAR_DAMAGE.items():
        members += [(name.replace("x.", f"{key}.", 1), data) for name, data in sample]
    members += [("long.png", png()), ("long.txt", b"x" * (LONG + 1)), *pairs(["again", "other", "again"])]
    members += [("caf\udce9.txt", b"no image, and a name that is not UTF-8")]
    (raw / "a.tar").write_bytes(tar(members))
    bad = IMAGES | TAR | {"long": f"caption longer than {LONG} bytes", "again": "duplicate key"}
    bad["caf\\udce9"] = "missing image"
    return {"source": "webdataset", "input": f"{raw}/*.tar"}, {f"a.tar:{k}": v for k, v in bad.items()}, len(GOOD) + 2


def descriptions(raw):
    """One tar with captions and labels in JSON."""
    members = pairs_of_json([*test_webdataset.JSON_DAMAGE, b'{"c": "fine", "l": 1}'])
    (raw / "a.tar").write_bytes(tar(members))
    settings = {"source": "webdataset", "input": f"{raw}/*.tar", "caption_column": "json.c", "label_column": "json.l"}
    return settings, {f"a.tar:{key}": reason for key, reason in JSON.items()}, 1


def pairs_of_json(contents):
    return [m for i, c in enumerate(contents) for m in ((f"json{i}.jpg", png()), (f"json{i}.json", c))]


def archives(raw):
    """Tars that are damaged as archives."""
    broken = bytearray(tar(pairs("abc")))
    broken[4 * 512 : 4 * 512 + 99] = b"\xff" * 99
    (raw / "broken.tar").write_bytes(broken)
    (raw / "cut.tar").write_bytes(tar(pairs("ab"))[: 5 * 512 + 10])
    (raw / "empty.tar").write_bytes(b"")
    (raw / "html.tar").write_bytes(b"<html>" * 999)
    bad = {
        "broken.tar:byte 2048": "broken tar member", "broken.tar:b": "missing image",
        "cut.tar:b": "truncated tar member", "empty.tar": "not a tar archive: .*", "html.tar": "not a tar archive: .*",
    }  # fmt: skip
    return {"source": "webdataset", "input": f"{raw}/*.tar"}, bad, 3


def folder(raw):
    rows = [
        {"file_name": "a.png", "text": "good"}, {"file_name": "gone.png", "text": "x"},
        {"file_name": "a.png", "text": "twice"}, {"text": "of nothing"}, {"file_name": "b.png", "text": ["x"]},
        {"file_name": "nul\0.png", "text": "x"},
    ]  # fmt: skip
    (raw / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nno json")
    for name in "ab":
        (raw / f"{name}.png").write_bytes(png())
    bad = {
        "gone.png": "missing file", "a.png": "duplicate key", "b.png": "caption is not text but list",
        "metadata.jsonl:4": "metadata row without file_name", "metadata.jsonl:7": "metadata row without file_name",
        "nul\0.png": "missing file",
    }  # fmt: skip
    return {"source": "folder", "input": str(raw), "caption_column": "text"}, bad, 1


def parquet(raw):
    rows = [(png(), "good", 0), (None, "x", 0), (png(), None, 0), (png(), "x", None), (png(), "x", 9), (b"?", "x", 0)]
    table = pa.table(dict(zip(("image", "text", "label"), zip(*rows, strict=True), strict=True)))
    pq.write_table(table, raw / "a.parquet")
    (raw / "b.parquet").write_bytes(b"PAR1")
    (raw / "labels.txt").write_text("cat\ndog\n")
    bad = {
        "a.parquet:1": "missing image", "a.parquet:2": "empty caption", "a.parquet:3": "missing label",
        "a.parquet:4": "label is not one of the 2 classes", "a.parquet:5": "undecodable image: .*",
        "b.parquet": "unreadable file: .*",
    }  # fmt: skip
    return {"source": "parquet", "input": f"{raw}/*.parquet"}, bad, 1


COLLECTIONS = (images_and_captions, descriptions, archives, folder, parquet)


@pytest.mark.parametrize("make", COLLECTIONS)
def test_bad_input_is_survived_and_named(tmp_path, make):
    raw = tmp_path / "raw"
    raw.mkdir()
    settings, bad, good = make(raw)
    common = {"resolution": 4, "min_size": 4, "max_caption_bytes": LONG, "validation": 0}
    totals = prepare(tmp_path / "out", Settings(**settings, **common), max_reject_fraction=1.0)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(bad)
    for line in lines:
        assert re.fullmatch(bad[line["key"]], line["reason"]), line
        assert line["source"] == settings["input"]
    assert totals["images"] == {"train": good}
    assert sum(totals["rejected"].values()) == len(bad)


def test_there_are_forty_kinds(tmp_path):
    kinds = set()
    for make in COLLECTIONS:
        raw = tmp_path / make.__name__
        raw.mkdir()
        kinds |= {(make.__name__, key) for key in make(raw)[1]}
    kinds.discard(("archives", "broken.tar:b"))  # loses its image by the same damage as byte 2048
    assert len(kinds) >= 40


def test_a_wrong_column_is_noticed_before_the_end(tmp_path, monkeypatch):
    """Here the number of items is unknown, and so is the number of rejects that is too many."""
    monkeypatch.setattr("lina_jax.rejects.ALL_REJECTED", 40)
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(4):
        (raw / f"{i}.tar").write_bytes(tar(pairs(map(str, range(30)))))
    made = {"source": "webdataset", "input": f"{raw}/*.tar", "resolution": 4, "validation": 6}
    wrong = Settings(**made, caption_column="json.text")
    said = r"the first 40 items are all rejected: empty caption \(40\); check .* --caption_column=json.text, "
    with pytest.raises(UserError, match=said):
        prepare(tmp_path / "out", wrong)
    with pytest.raises(UserError, match=said):  # the first unit is already made
        prepare(tmp_path / "out", wrong)
    with pytest.raises(UserError, match=r"nothing to train on: empty caption \(120\)"):
        prepare(tmp_path / "out", wrong, max_reject_fraction=1)
    # One good item shows that the columns are right.
    (raw / "0.tar").write_bytes(tar([*pairs("a"), ("b.jpg", b"?"), ("b.txt", b"b")] * 60))
    assert prepare(tmp_path / "right", Settings(**made), max_reject_fraction=0.9)["images"]
