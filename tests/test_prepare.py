"""Preparation keeps what is good, accounts for what is not, and never leaves half a dataset."""

import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lina_jax import example, reading
from lina_jax.errors import UserError
from lina_jax.prepare import Settings, prepare, resize_and_crop

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
    rows = (example.parse(source[i]) for i in range(len(source)))
    return [{name: v if isinstance(v, int) else bytes(v) for name, v in row.items()} for row in rows]


def test_every_row_arrives_once(tmp_path):
    parquet(tmp_path / "raw", good(300))
    pattern = parquet(tmp_path / "raw", good(10), "b.parquet", image_type=pa.binary())
    (tmp_path / "raw" / "labels.txt").write_text("sea lion\ndog\n")
    totals = prepare(tmp_path / "out", settings(pattern))
    assert totals == {"images": {"train": 307, "validation": 3}, "rejected": {}}
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
        "undecodable image: OSError": (encoded(1, size=(64, 64), kind="JPEG")[:-40], "c", 0),
        "empty caption": (encoded(1), " \n", 0),
        "missing label": (encoded(1), "d", None),
        "label 7 is not one of the 2 in labels.txt": (encoded(1), "e", 7),
    }
    pattern = parquet(tmp_path / "raw", [*bad.values(), (encoded(1), None, 0), *good(10)])
    (tmp_path / "raw" / "labels.txt").write_text("cat\ndog\n")
    totals = prepare(tmp_path / "out", settings(pattern, validation=0), max_reject_fraction=0.5)
    assert totals == {"images": {"train": 10}, "rejected": dict.fromkeys(bad, 1) | {"empty caption": 2}}
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["totals"] == totals
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert lines[0] == {"source": pattern, "key": "a.parquet:0", "reason": "missing image"}
    assert [line["reason"] for line in lines] == [*bad, "empty caption"]


def test_captions_and_labels_are_optional(tmp_path):
    pattern = parquet(tmp_path / "raw", [(encoded(i), None, None) for i in range(5)])
    prepare(tmp_path / "out", settings(pattern, caption_column="", label_column="", validation=1))
    assert {(row["caption"], row["label"]) for row in read(tmp_path / "out", "train")} == {(b"", -1)}


def test_other_image_modes_become_rgb(tmp_path):
    images = [encoded(7, "L"), encoded(7, "P"), encoded(7, "RGBA"), encoded(7, "CMYK", kind="JPEG")]
    pattern = parquet(tmp_path / "raw", [(image, "x", 0) for image in images])
    prepare(tmp_path / "out", settings(pattern, validation=0))
    assert [Image.open(io.BytesIO(r["image"])).mode for r in read(tmp_path / "out", "train")] == ["RGB"] * 4


def test_too_many_rejects_leave_nothing(tmp_path):
    pattern = parquet(tmp_path / "raw", [(b"broken", "x", 0), (b"broken", "x", 0), *good(10)])
    with pytest.raises(UserError, match=r"2 of 12 items rejected.*undecodable image: UnidentifiedImageError \(2\)"):
        prepare(tmp_path / "out", settings(pattern), max_reject_fraction=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


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
    with pytest.raises(UserError, match="resolution=8, asked 16"):
        prepare(tmp_path / "out", settings(pattern, resolution=16))
    assert (tmp_path / "out" / "prepare.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="is not a dataset made by"):
        prepare(tmp_path / "raw", settings(pattern))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "tar"}, "--source='tar' is unknown"),
        ({"input": "/absent/*.parquet"}, "no file matches '/absent/"),
        ({"caption_column": "words"}, "--caption_column='words'.* its columns: image, text, label"),
        ({"image_column": "text"}, "--image_column='text'.* holds string there"),
        ({"label_column": "text"}, "--label_column='text'.* not an integer"),
        ({"train": 5}, "--train=5 does not apply"),
        ({"resolution": 0}, "--resolution=0"),
        ({"validation": 10}, "--validation=10 leaves nothing of the 10 rows"),
    ],
)
def test_errors_name_the_flag(tmp_path, changes, message):
    pattern = parquet(tmp_path / "raw", good(10))
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", settings(pattern, **changes))
    assert not (tmp_path / "out").exists()


def test_resize_keeps_the_middle_of_the_shorter_side():
    image = Image.fromarray(np.repeat(np.arange(0, 240, 20, dtype=np.uint8)[None, :, None], 4, 0).repeat(3, 2))
    np.testing.assert_array_equal(np.asarray(resize_and_crop(image, 4))[0, :, 0], [80, 100, 120, 140])
    assert resize_and_crop(Image.new("RGB", (100, 33)), 8).size == (8, 8)
    assert resize_and_crop(Image.new("RGB", (5, 3)), 8).size == (8, 8)
    same = Image.effect_noise((8, 8), 50).convert("RGB")
    np.testing.assert_array_equal(np.asarray(resize_and_crop(same, 8)), np.asarray(same))


def test_shapes_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "lina_jax.prepare", f"--out={tmp_path}/out", "--resolution=16"]
    done = subprocess.run([*command, "--train=6", "--validation=2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/out: 6 train images, 2 validation images\n"
    assert done.stderr == ""
    rows = read(tmp_path / "out", "train")
    assert all(Image.open(io.BytesIO(row["image"])).size == (16, 16) and row["caption"] for row in rows)

    # Made again in another process, the dataset has the same bytes.
    prepare(tmp_path / "again", Settings(resolution=16, train=6, validation=2))
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name

    failed = subprocess.run([*command, "--train=7", "--validation=2"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr == f"error: --out={tmp_path}/out holds a dataset with other settings: train=6, asked 7\n"


def test_scenes_of_another_version_are_not_taken_for_ours(tmp_path):
    made = Settings(resolution=8, train=4, validation=1)
    prepare(tmp_path / "out", made)
    summary = json.loads((tmp_path / "out" / "prepare.json").read_text())
    summary["settings"]["scenes"] = "older"
    (tmp_path / "out" / "prepare.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match="holds a dataset with other settings: scenes='older', asked"):
        prepare(tmp_path / "out", made)
