"""Readers of raw collections: every item comes once, in order, and what is broken costs itself alone."""

import errno
import gzip
import io
import itertools
import json
import os
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lina_jax import records
from lina_jax.errors import UserError
from lina_jax.sources import base
from lina_jax.sources import webdataset as webdataset_source
from lina_jax.sources.base import Example, Fields, Reject
from lina_jax.sources.folder import FolderSource
from lina_jax.sources.parquet import ParquetSource
from lina_jax.sources.tfds import TfdsSource
from lina_jax.sources.webdataset import WebDatasetSource


def png(value: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("L", (4, 4), value).save(out, "PNG")
    return out.getvalue()


def tar(members: list[tuple[str, bytes]], **notes: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", pax_headers=notes) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def items(source) -> list[Example | Reject]:
    found = []
    for unit in source.units:
        with source.open(unit) as (count, of_unit):
            of_unit = list(of_unit)
        assert len(of_unit) == count
        found += of_unit
    return found


def reasons(source) -> dict[str, str]:
    return {item.key: item.reason for item in items(source) if isinstance(item, Reject)}


def pairs(keys) -> list[tuple[str, bytes]]:
    return [(f"{key}.{kind}", data) for key in keys for kind, data in (("jpg", png()), ("txt", key.encode()))]


@pytest.fixture
def webdataset(tmp_path):
    def make(data: bytes, fields=Fields(caption="txt"), name="a.tar"):  # noqa: B008
        (tmp_path / name).write_bytes(data)
        return WebDatasetSource(str(tmp_path / "*.tar"), fields, 100)

    return make


def test_samples_are_consecutive_members(webdataset):
    more = json.dumps({"short": "s", "class": 4}).encode()
    source = webdataset(
        tar([("d/0.JPG", png(1)), ("d/0.txt", "größer".encode()), ("d/0.json", more), *pairs(["d/1"])]),
        Fields(caption="txt", short_caption="", label=""),
    )
    assert [(i.key, i.caption) for i in items(source)] == [("a.tar:d/0", "größer"), ("a.tar:d/1", "d/1")]
    source = webdataset(
        tar([("0.png", png(1)), ("0.json", more)]), Fields("", "json.short", "json.short", "json.class")
    )
    assert items(source) == [Example("a.tar:0", png(1), "s", "s", 4)]


def test_several_tars_are_several_units(webdataset):
    webdataset(tar(pairs("ab")), name="b.tar")
    source = webdataset(tar(pairs("ab")), name="a.tar")
    assert [item.key for item in items(source)] == ["a.tar:a", "a.tar:b", "b.tar:a", "b.tar:b"]
    assert len(source.units) == 2


TAR_DAMAGE = {
    "no caption": ([("x.jpg", png())], "empty caption"),
    "blank caption": ([("x.jpg", png()), ("x.txt", b" \n")], "empty caption"),
    "no image": ([("x.txt", b"x")], "missing image"),
    "empty image": ([("x.jpg", b""), ("x.txt", b"x")], "missing image"),
    "not UTF-8": ([("x.jpg", png()), ("x.txt", b"\xff\xfe")], "caption is not UTF-8"),
    "member twice": ([("x.jpg", png()), ("x.txt", b"x"), ("x.txt", b"y")], "duplicate key"),
}


@pytest.mark.parametrize("name", TAR_DAMAGE)
def test_a_bad_sample_costs_itself(webdataset, name):
    members, reason = TAR_DAMAGE[name]
    source = webdataset(tar([*pairs(["a"]), *members, *pairs(["b"])]))
    assert reasons(source) == {"a.tar:x": reason}
    assert [item.key for item in items(source) if isinstance(item, Example)] == ["a.tar:a", "a.tar:b"]


JSON_DAMAGE = {
    b"{": "json is not valid JSON",
    b"[1]": "json is not a JSON object",
    b'{"c": 3}': "caption is not text but int",
    b'{"c": "\\ud800"}': "caption is not UTF-8",
    b"{}": "empty caption",
    b'{"c": "x"}': "missing label",
    b'{"c": "x", "l": "cat"}': "label 'cat' is not a number",
    b'{"c": "x", "l": -1}': "missing label",
    b"\xff{}": "json is not valid JSON",
    b"[" * 200_000: "json is not valid JSON",
    b'{"c": "x", "l": 1e999}': "label inf is not a number",
    b'{"c": "x", "l": 99999999999999999999}': "label 99999999999999999999 is too large",
}


@pytest.mark.parametrize("content", JSON_DAMAGE, ids=lambda content: content[:20].decode(errors="replace"))
def test_bad_json_is_named(webdataset, content):
    source = webdataset(tar([("x.jpg", png()), ("x.json", content)]), Fields("", "json.c", "", "json.l"))
    assert reasons(source) == {"a.tar:x": JSON_DAMAGE[content]}


def test_a_key_that_comes_back_is_a_duplicate(webdataset):
    source = webdataset(tar([*pairs("ab"), *pairs("a"), *pairs("c")]))
    assert [type(item) for item in items(source)] == [Example, Example, Reject, Example]
    assert reasons(source) == {"a.tar:a": "duplicate key"}


def test_a_broken_header_costs_its_sample(webdataset):
    data = bytearray(tar(pairs("abcd")))
    data[4 * 512 : 4 * 512 + 100] = b"\xff" * 100  # the header of b.jpg
    source = webdataset(bytes(data))
    assert reasons(source) == {"a.tar:byte 2048": "broken tar member", "a.tar:b": "missing image"}
    assert [item.caption for item in items(source) if isinstance(item, Example)] == ["a", "c", "d"]


@pytest.mark.parametrize(
    ("size", "good", "bad"),
    [
        (512 + 30, [], {"a.tar:a": "truncated tar member"}),
        (2048 + 30, ["a"], {"a.tar:byte 2048": "broken tar member"}),
        (2048 + 512 + 30, ["a"], {"a.tar:b": "truncated tar member"}),
    ],
)
def test_a_tar_may_end_anywhere(webdataset, size, good, bad):
    source = webdataset(tar(pairs("ab"))[:size])
    assert reasons(source) == bad
    assert [item.caption for item in items(source) if isinstance(item, Example)] == good


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
def test_a_damaged_compressed_tar_is_survived(webdataset, kind):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{kind}") as archive:
        for name, data in pairs("abcdefgh"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    data = bytearray(out.getvalue())
    for at in range(20, len(data), 37):
        broken = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        assert all(isinstance(item, Example | Reject) for item in items(webdataset(bytes(broken))))


def test_joined_and_compressed_tars_are_read(webdataset, tmp_path):
    assert len(items(webdataset(tar(pairs("a")) + tar(pairs("b"))))) == 2
    noted = tar(pairs("a"), comment="of git archive") + tar(pairs("b"), comment="n" * 2000)
    assert [item.key for item in items(webdataset(noted))] == ["a.tar:a", "a.tar:b"]
    assert reasons(webdataset(noted)) == {}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.size = len(png())
        archive.addfile(info, io.BytesIO(png()))
    assert [item.key for item in items(webdataset(out.getvalue(), Fields()))] == ["a.tar:a"]


@pytest.mark.parametrize("data", [b"", b"no archive at all" * 200])
def test_what_is_no_tar_is_one_reject(webdataset, data):
    (reason,) = reasons(webdataset(data)).values()
    assert reason.startswith("not a tar archive")


def test_a_sparse_file_without_sense_costs_itself(webdataset):
    """Its note is one that Python's reader does not expect."""
    source = webdataset(tar(pairs("a"), **{"GNU.sparse.map": "a,b"}))
    assert list(reasons(source)) == ["a.tar"]


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "compressed"])
@pytest.mark.parametrize("read", [0, 1])
def test_storage_that_fails_once_is_no_damage(webdataset, read, compress, monkeypatch):
    """It may be back soon, and a reject would be for ever."""

    def readinto(file, buffer):
        if next(reads) != read:
            return whole(file, buffer)
        kept = os.dup(file.fileno())
        with open("/proc/self/mem", "rb") as unreadable:
            os.dup2(unreadable.fileno(), file.fileno())
        try:
            return whole(file, buffer)
        finally:
            os.dup2(kept, file.fileno())
            os.close(kept)

    reads, whole = itertools.count(), webdataset_source._File.readinto
    monkeypatch.setattr(webdataset_source._File, "readinto", readinto)
    noise = np.random.default_rng(0).bytes(2**18)  # of which one read does not get all
    source = webdataset(compress(tar([*pairs("ab"), ("c.jpg", noise), ("c.txt", b"c")])))
    try:
        found = items(source)
    except OSError as error:
        assert error.errno == errno.EIO
    else:  # it was read again
        assert [item.key for item in found if isinstance(item, Example)] == ["a.tar:a", "a.tar:b", "a.tar:c"]


def test_what_libraries_of_buckets_raise_is_of_the_storage(monkeypatch):
    class NoCredentials(Exception):
        pass

    def refused():
        raise NoCredentials("log in")

    monkeypatch.setattr("lina_jax.retry.FIRST_PAUSE_S", 0)
    with pytest.raises(UserError, match="cannot read s3://bucket: NoCredentials: log in"):
        base.patient("s3://bucket", refused)


def test_a_bucket_is_read_like_a_disk():
    with fsspec.open("memory://bucket/a.tar", "wb") as file:
        file.write(tar(pairs("ab")))
    source = WebDatasetSource("memory://bucket/*.tar", Fields(caption="txt"), 100)
    assert [item.key for item in items(source)] == ["a.tar:a", "a.tar:b"]
    with fsspec.open("memory://bucket/c.parquet", "wb") as file:
        pq.write_table(pa.table({"image": [png(3)], "text": ["three"]}), file)
    source = ParquetSource("memory://bucket/*.parquet", Fields("image", "text"), 100)
    assert items(source) == [Example("c.parquet:0", png(3), "three", "", -1)]


def test_an_unknown_protocol_is_named():
    with pytest.raises(UserError, match="cannot open nope://bucket/"):
        base.matching("nope://bucket/a.tar")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"

    def make(files: dict[str, bytes], fields=Fields(), unit_items=100):  # noqa: B008
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return FolderSource(str(root), fields, unit_items)

    return make


def test_class_folders_are_labels(folder):
    source = folder(
        {"dog/1.png": png(1), "cat/a/2.png": png(2), "cat/3.png": png(3), "cat/.DS_Store": b"", "x.png": png()}
    )
    assert source.label_names == ("cat", "dog")
    assert {item.key: item.label for item in items(source) if isinstance(item, Example)} == {
        "cat/3.png": 0, "cat/a/2.png": 0, "dog/1.png": 1,
    }  # fmt: skip
    assert reasons(source) == {"x.png": "not in a class folder"}


def test_linked_folders_are_read(folder, tmp_path):
    """As subsets of ImageNet are made; a link back to the whole has no end and adds nothing."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(png(1))
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "cat" / "all").symlink_to(tmp_path / "photos")
    source = folder({"cat/2.png": png(2)})
    assert source.label_names == ("cat", "dog")
    assert {item.key: item.label for item in items(source)} == {"cat/2.png": 0, "dog/1.png": 1}


def test_metadata_rows_are_items(folder):
    rows = [
        {"file_name": "a.png", "text": "first", "short": "1", "label": 2},
        {"file_name": "absent.png", "text": "gone"},
        {"file_name": "a.png", "text": "again"},
        {"text": "of nothing"},
        {"file_name": "b.png"},
    ]
    lines = "\n".join([*map(json.dumps, rows), "{broken"]).encode()
    source = folder(
        {"a.png": png(1), "b.png": png(2), "metadata.jsonl": lines}, Fields("", "text", "", ""), unit_items=4
    )
    assert len(source.units) == 2
    assert items(source)[0] == Example("a.png", png(1), "first", "", -1)
    assert [item.reason for item in items(source)[1:]] == [
        "missing file", "duplicate key", "metadata row without file_name", "empty caption",
        "metadata row without file_name",
    ]  # fmt: skip


def test_rows_stay_in_the_folder(folder, tmp_path):
    (tmp_path / "other.png").write_bytes(png())
    names = ["../other.png", str(tmp_path / "other.png"), "a/../../other.png"]
    lines = "\n".join(json.dumps({"file_name": name, "text": "not ours"}) for name in names)
    source = folder({"metadata.jsonl": lines.encode()}, Fields("", "text", "", ""))
    assert reasons(source) == dict.fromkeys(names, "outside the folder")


def test_images_without_a_row_are_counted(folder, caplog):
    line = b'{"file_name": "a.png", "text": "a"}'
    folder({"a.png": png(1), "b.png": png(2), "c/d.JPG": b"x", "metadata.jsonl": line}, Fields("", "text", "", ""))
    assert "2 images have no row of metadata, such as b.png" in caplog.text


def test_metadata_may_be_csv(folder):
    table = "\ufefffile_name,text,label\na.png,größer,3\nb.png,".encode() + b"\xff\xfe,4\n"
    source = folder({"a.png": png(1), "b.png": png(2), "metadata.csv": table}, Fields("", "text", "", "label"))
    assert items(source)[0] == Example("a.png", png(1), "größer", "", 3)
    assert reasons(source) == {"b.png": "caption is not UTF-8"}


def test_a_comma_too_many_costs_a_row_of_csv(folder):
    table = b"file_name,text\na.png,a cat, on a mat\nb.png,a dog\n"
    source = folder({"a.png": png(1), "b.png": png(2), "metadata.csv": table}, Fields("", "text", "", ""))
    assert reasons(source) == {"a.png": "more fields than columns"}
    with pytest.raises(UserError, match=r"caption_column='title': not in metadata; it has file_name, text$"):
        folder({}, Fields("", "title", "", ""))


@pytest.mark.parametrize(
    ("files", "changed"),
    [
        ({"cat/a.png": b"a picture"}, {"cat/a.png": b"another picture"}),
        (
            {"metadata.jsonl": b'{"file_name": "a.png", "text": "a"}'},
            {"metadata.jsonl": b'{"file_name": "a.png", "text": "b"}'},
        ),
    ],
)
def test_a_folder_that_changed_is_noticed(folder, files, changed):
    fields = Fields("", "text" if "metadata.jsonl" in files else "", "", "")
    assert folder(files, fields).contents == folder(files, fields).contents != folder(changed, fields).contents


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("", "missing label"),
        (2.5, "label 2.5 is not a whole number"),
        (np.array([1, 2]), "label array([1, 2]) is not a number"),
    ],
)
def test_labels_that_are_none_are_named(label, reason):
    assert base.checked("key", Fields(label="label"), b"image", None, None, label) == Reject("key", reason)
    assert base.checked("key", Fields(label="label"), b"image", None, None, np.float32(2)).label == 2


@pytest.mark.parametrize(
    ("files", "fields", "message"),
    [
        ({"a.png": b"x"}, Fields(), "neither class sub-folders nor metadata"),
        (
            {"metadata.jsonl": b'{"file_name": "a.png", "title": "x"}'},
            Fields(caption="text"),
            "caption_column='text'.* title",
        ),
        (
            {"metadata.jsonl": b'{"file_name": "a.png", "title": "x"}'},
            Fields(),
            "name --caption_column .* has file_name, title",
        ),
        ({"cat/a.png": b"x"}, Fields(caption="text"), "caption_column='text'.* no metadata"),
    ],
)
def test_folders_that_make_no_sense_are_refused(folder, files, fields, message):
    with pytest.raises(UserError, match=message):
        folder(files, fields)


def test_a_missing_folder_is_named():
    with pytest.raises(UserError, match="--input=/absent: no such directory"):
        FolderSource("/absent", Fields(), 100)


@pytest.fixture
def prepared(tmp_path):
    with records.create(tmp_path / "tiny", "tiny", records.pixel_features(["cat", "dog"])) as writer:
        for i in range(5):
            writer.write("train", image=png(i), caption=f"nº {i}", short_caption="", label=i % 2, key=str(i))
        writer.write("test", image=png(9), caption="last", short_caption="", label=0, key="9")
    return tmp_path / "tiny"


def test_tfds_datasets_are_read(prepared):
    source = TfdsSource(str(prepared), Fields("image", "caption", "", "label"), 2)
    assert source.label_names == ("cat", "dog")
    assert [unit.count for unit in source.units] == [2, 2, 1]
    assert items(source) == [Example(f"train:{i}", png(i), f"nº {i}", "", i % 2) for i in range(5)]
    assert [item.caption for item in items(TfdsSource(f"{prepared}:test", Fields("image", "caption"), 2))] == ["last"]


def test_shards_of_tfds_that_were_read_are_closed(prepared):
    source = TfdsSource(str(prepared), Fields("image", "caption", "", "label"), 2)

    def held():
        links = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
        return [path for path in links if path.startswith(str(prepared))]

    assert len(items(source)) == 5
    assert held() == []


def test_what_tfds_cannot_give_is_named(prepared, tmp_path):
    with pytest.raises(UserError, match="not a TFDS dataset directory"):
        TfdsSource(str(tmp_path), Fields("image"), 2)
    with pytest.raises(UserError, match="no split 'dev'; its splits: "):
        TfdsSource(f"{prepared}:dev", Fields("image"), 2)
    with pytest.raises(UserError, match="--image_column='img': records have"):
        TfdsSource(str(prepared), Fields("img"), 2)
    info = json.loads((prepared / "dataset_info.json").read_text())
    (prepared / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="prepare it with `tfds build tiny --file_format=array_record`"):
        TfdsSource(str(prepared), Fields("image"), 2)


def parquet(path, count: int, first: int = 0) -> None:
    values = range(first, first + count)
    table = {"image": [png(i) for i in values], "text": [f"nº {i}" for i in values], "label": list(values)}
    pq.write_table(pa.table(table), path, row_group_size=4)


@pytest.mark.parametrize("unit_items", [3, 4, 7, 100])
def test_units_cut_row_groups_anywhere(tmp_path, unit_items):
    parquet(tmp_path / "a.parquet", 10)
    parquet(tmp_path / "b.parquet", 3, first=10)
    source = ParquetSource(str(tmp_path / "*.parquet"), Fields("image", "text", "", "label"), unit_items)
    assert [(item.label, item.caption) for item in items(source)] == [(i, f"nº {i}") for i in range(13)]
    assert np.max([unit.count for unit in source.units]) <= unit_items


def test_an_unreadable_parquet_file_is_one_reject(tmp_path):
    parquet(tmp_path / "a.parquet", 3)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and then nothing")
    source = ParquetSource(str(tmp_path / "*.parquet"), Fields("image", "text"), 100)
    ((key, reason),) = reasons(source).items()
    assert key == "b.parquet"
    assert reason.startswith("unreadable file")
    assert len(items(source)) == 4
    with pytest.raises(UserError, match=r"cannot read .*b.parquet"):
        ParquetSource(str(tmp_path / "b.parquet"), Fields("image", "text"), 100)
