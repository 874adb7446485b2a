"""Preparation keeps the good items, accounts for all others, and never leaves half a dataset."""

import errno
import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_webdataset
from PIL import Image
from test_prepare_units import SMALL

from lina_jax import reading, records, tf_example
from lina_jax.errors import UserError
from lina_jax.prepare import Settings, Share, prepare

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(value: int, mode="RGB", size=(12, 9), kind="PNG") -> bytes:
    data = io.BytesIO()
    value %= 256
    Image.new(mode, size, value if mode in "LP" else (value,) * len(mode)).save(data, kind)
    return data.getvalue()


def parquet(directory, rows, name="a.parquet", image_type=IMAGE):
    """Write rows (image bytes, caption, label), in row groups of 4."""
    directory.mkdir(exist_ok=True)
    images, captions, labels = zip(*rows, strict=True)
    if image_type is IMAGE:
        images = [image and {"bytes": image, "path": None} for image in images]
    columns = {
        "image": pa.array(images, image_type),
        "text": pa.array(captions, pa.string()),
        "label": pa.array(labels, pa.int64()),
    }
    pq.write_table(pa.table(columns), directory / name, row_group_size=4)
    return str(directory / "*.parquet")


def good(count):
    return [(encoded(i), f"picture {i}", i % 2) for i in range(count)]


def settings(pattern, **changes):
    return Settings(**{"source": "parquet", "input": pattern, "resolution": 8, "validation": 3} | changes)


def read(directory, split):
    source = reading.open_split(directory, split)
    rows = (tf_example.parse(source[i]) for i in range(len(source)))
    return [{name: v if isinstance(v, int) else bytes(v) for name, v in row.items()} for row in rows]


def test_every_row_arrives_once(tmp_path):
    parquet(tmp_path / "raw", good(300))
    pattern = parquet(tmp_path / "raw", good(10), "b.parquet", image_type=pa.binary())
    (tmp_path / "raw" / "labels.txt").write_text("sea lion\ndog\n")
    totals = prepare(tmp_path / "out", settings(pattern))
    assert totals == {"images": {"train": 307, "validation": 3}, "rejected": {}, "truncated_captions": 0}
    rows = read(tmp_path / "out", "train") + read(tmp_path / "out", "validation")
    names = [("a", 300), ("b", 10)]
    assert sorted(row["key"].decode() for row in rows) == sorted(f"{f}.parquet:{i}" for f, n in names for i in range(n))
    for row in rows:
        number = int(row["key"].decode().split(":")[1])
        image = np.asarray(Image.open(io.BytesIO(row["image"])))
        np.testing.assert_array_equal(image, np.full((8, 8, 3), number % 256))
        assert (row["caption"].decode(), row["label"]) == (f"picture {number}", number % 2)
    assert (tmp_path / "out" / "label.labels.txt").read_text().split("\n")[0] == "sea lion"


def test_validation_rows_follow_from_the_seed(tmp_path):
    pattern = parquet(tmp_path / "raw", good(30))
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        prepare(tmp_path / name, settings(pattern, seed=seed))
    one, same, other = ([r["key"] for r in read(tmp_path / n, "validation")] for n in ("one", "same", "other"))
    assert one == same != other


def test_rejects_are_accounted_for(tmp_path):
    bad = {
        "missing image": (None, "a", 0),
        "undecodable image: UnidentifiedImageError": (b"not an image", "b", 0),
        "truncated image": (encoded(1, size=(64, 64), kind="JPEG")[:-40], "c", 0),
        "empty caption": (encoded(1), " \n", 0),
        "missing label": (encoded(1), "d", None),
        "label is not one of the 2 classes": (encoded(1), "e", 7),
    }
    pattern = parquet(tmp_path / "raw", [*bad.values(), (encoded(1), None, 0), *good(10)])
    (tmp_path / "raw" / "labels.txt").write_text("cat\ndog\n")
    totals = prepare(tmp_path / "out", settings(pattern, validation=0), max_reject_fraction=0.5)
    assert totals["images"] == {"train": 10}
    assert totals["rejected"] == dict.fromkeys(bad, 1) | {"empty caption": 2}
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["totals"] == totals
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert lines[0] == {"source": pattern, "key": "a.parquet:0", "reason": "missing image"}
    assert [line["reason"] for line in lines] == [*bad, "empty caption"]


def test_captions_and_labels_are_optional(tmp_path):
    pattern = parquet(tmp_path / "raw", [(encoded(i), None, None) for i in range(5)])
    prepare(tmp_path / "out", settings(pattern, caption_column="", label_column="", validation=1))
    assert {(row["caption"], row["label"]) for row in read(tmp_path / "out", "train")} == {(b"", -1)}


def test_too_many_rejects_end_it_and_may_be_allowed(tmp_path):
    pattern = parquet(tmp_path / "raw", [(b"broken", "x", 0), (b"broken", "x", 0), *good(10)])
    with pytest.raises(UserError, match=r"2 of 12 items rejected.*undecodable image: UnidentifiedImageError \(2\)"):
        prepare(tmp_path / "out", settings(pattern), max_reject_fraction=0.1)
    assert not (tmp_path / "out").exists()
    (listed,) = (tmp_path / "out.partial" / "units").glob("*/rejects.jsonl")
    assert len(listed.read_text().splitlines()) == 2
    assert [path.name for path in listed.parent.iterdir()] == ["rejects.jsonl"]
    assert prepare(tmp_path / "out", settings(pattern), max_reject_fraction=0.2)["images"]["train"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_a_corrupt_row_group_loses_its_rows_only(tmp_path):
    pattern = parquet(tmp_path / "raw", good(12))
    path = tmp_path / "raw" / "a.parquet"
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 16] = b"\xff" * 16
    path.write_bytes(data)
    totals = prepare(tmp_path / "out", settings(pattern, validation=0), max_reject_fraction=0.5)
    assert totals["images"] == {"train": 8}
    assert [row["key"] for row in read(tmp_path / "out", "train")][4] == b"a.parquet:8"
    assert sum(totals["rejected"].values()) == 4


def test_a_finished_dataset_is_kept(tmp_path, capsys):
    pattern = parquet(tmp_path / "raw", good(10))
    totals = prepare(tmp_path / "out", settings(pattern))
    before = (tmp_path / "out" / "prepare.json").stat().st_mtime_ns
    assert prepare(tmp_path / "out", settings(pattern)) == totals
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(UserError, match="resolution=8, requested 16"):
        prepare(tmp_path / "out", settings(pattern, resolution=16))
    assert (tmp_path / "out" / "prepare.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="is not a dataset made by"):
        prepare(tmp_path / "raw", settings(pattern))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"crane\nmaillot\ncrane\n", r"labels.txt: 'crane' is in lines 1 and 3; names must differ"),
        (b"cat\n\ndog\n", r"labels.txt: line 2 is blank"),
        (b"", r"labels.txt: line 1 is blank"),
        (b"caf\xe9\n", r"labels.txt is not UTF-8"),
    ],
)
def test_names_that_cannot_be_those_of_classes_are_refused(tmp_path, content, message):
    pattern = parquet(tmp_path / "raw", good(10))
    (tmp_path / "raw" / "labels.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", settings(pattern))


def test_class_names_that_changed_are_noticed(tmp_path, monkeypatch):
    """Units made with different class names do not fit together."""
    monkeypatch.setattr(records, "SHARD_RECORDS", 30)
    pattern = parquet(tmp_path / "raw", good(40))
    assert prepare(tmp_path / "out", settings(pattern), share=Share(0, 2)) is None
    (tmp_path / "raw" / "labels.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"has changed since .* was started"):
        prepare(tmp_path / "out", settings(pattern), share=Share(1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "tar"}, "--source='tar' is unknown"),
        ({"input": "/absent/*.parquet"}, "no file matches '/absent/"),
        ({"caption_column": "words"}, "--caption_column='words'.* its columns: image, text, label"),
        ({"image_column": "text"}, "--image_column='text'.* holds string there"),
        ({"label_column": "text"}, "--label_column='text'.* not an integer"),
        ({"train": 5}, "--train=5 does not apply"),
        ({"source": "webdataset", "image_column": "png"}, "--image_column='png' does not apply to --source=webdataset"),
        ({"text_encoder": "phi"}, "--text_encoder='phi' does not apply to pixels"),
        ({"quality": 101}, "--quality=101"),
        ({"resolution": 0}, "--resolution=0"),
        ({"resolution": 10**11}, "--resolution=100000000000: more than 134217728 pixels"),
        ({"image_column": ""}, "--image_column='': --source=parquet needs the name of a column"),
        ({"validation": 10}, "--validation=10 leaves none of the 10 items"),
    ],
)
def test_errors_name_the_flag(tmp_path, changes, message):
    pattern = parquet(tmp_path / "raw", good(10))
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", settings(pattern, **changes))
    assert not (tmp_path / "out").exists()


def test_shapes_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "lina_jax.prepare", f"--out={tmp_path}/out", "--resolution=16"]
    done = subprocess.run([*command, "--train=6", "--validation=2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/out: 6 train images, 2 validation images\n"
    assert done.stderr == ""
    rows = read(tmp_path / "out", "train")
    assert all(Image.open(io.BytesIO(row["image"])).size == (16, 16) and row["caption"] for row in rows)

    # Another process makes a dataset of the same bytes.
    prepare(tmp_path / "again", Settings(resolution=16, train=6, validation=2))
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name

    failed = subprocess.run([*command, "--preview=gs://bucket/p.png"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: --preview=gs:/bucket: a URL; mount the bucket")

    failed = subprocess.run([*command, "--train=7", "--validation=2"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr == f"error: --out={tmp_path}/out holds a dataset with other settings: train=6, requested 7\n"


def test_scenes_of_another_version_are_not_taken_for_ours(tmp_path):
    made = Settings(resolution=8, train=4, validation=1)
    prepare(tmp_path / "out", made)
    summary = json.loads((tmp_path / "out" / "prepare.json").read_text())
    summary["settings"]["scenes"] = "older"
    (tmp_path / "out" / "prepare.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match="holds a dataset with other settings: scenes='older', requested"):
        prepare(tmp_path / "out", made)


def test_a_collection_that_changed_is_refused(tmp_path):
    pattern = parquet(tmp_path / "raw", good(10), "b.parquet")
    monkey = settings(pattern, validation=0, shard_mb=1)
    prepare(tmp_path / "out", monkey, share=Share(1, 2))
    parquet(tmp_path / "raw", good(5), "a.parquet")
    with pytest.raises(UserError, match=r"parquet has changed since .*out.partial was started"):
        prepare(tmp_path / "out", monkey, share=Share(0, 2))


@pytest.mark.parametrize("first", [0, 3])
def test_one_bad_tar_of_many_is_no_end(tmp_path, first):
    """Rejects are judged by the whole collection, whichever process meets them."""
    (tmp_path / "raw").mkdir()
    for i in range(4):
        data = b"garbage" * 100 if i == first else test_webdataset.tar(test_webdataset.pairs(map(str, range(30))))
        (tmp_path / "raw" / f"{i}.tar").write_bytes(data)
    made = Settings(source="webdataset", input=f"{tmp_path}/raw/*.tar", resolution=4, validation=6)
    for index in range(3):
        assert prepare(tmp_path / "out", made, share=Share(index, 4)) is None
    totals = prepare(tmp_path / "out", made, share=Share(3, 4))
    assert sum(totals["images"].values()) == 90
    assert sum(totals["rejected"].values()) == 1


def test_places_are_looked_at_before_encoders_are_loaded(tmp_path, monkeypatch):
    latents = Settings(resolution=8, train=8, validation=2, autoencoder=str(tmp_path / "absent"))

    def rename(before, after):
        raise OSError(errno.EMFILE, "Too many open files")  # as in buckets without directories

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        with pytest.raises(UserError, match=r"--out=.*cannot be renamed there \(Too many open files\)"):
            prepare(tmp_path / "out", latents)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=rf"--out={tmp_path}: {tmp_path} cannot be written"):
        prepare(tmp_path / "out", latents)
    assert list(tmp_path.iterdir()) == []


def test_out_may_be_a_link_but_no_mount_point(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    prepare(tmp_path / "out", Settings(**SMALL))
    assert (tmp_path / "disk" / "prepare.json").exists()
    assert (tmp_path / "out").is_symlink()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")  # mounting takes root
    (tmp_path / "volume").mkdir()
    with pytest.raises(UserError, match="volume: a mount point"):
        prepare(tmp_path / "volume", Settings(**SMALL))


def test_out_may_not_be_within_the_collection(tmp_path):
    """What a killed preparation leaves would be part of it."""
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"--out=.*/photos/out: lies in --input=.*/photos; choose a directory outside"):
        prepare(tmp_path / "photos" / "out", Settings(source="folder", input=str(tmp_path / "photos"), validation=0))


def test_out_may_be_beside_images_that_metadata_lists(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "black"}')
    listed = Settings(source="folder", input=str(tmp_path), caption_column="text", resolution=8, validation=0)
    assert prepare(tmp_path / "out", listed)["images"] == {"train": 1}


def test_a_device_that_fails_is_no_fault_of_the_place(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: device lost")

    monkeypatch.setattr("lina_jax.prepare.make_records", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="device lost"):
        prepare(tmp_path / "out", Settings(**SMALL))
