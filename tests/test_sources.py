"""Readers of raw collections: every item comes once, in order, and damage costs only what is damaged."""

import errno
import io
import json
import os
import re

import fsspec
import numpy as np
import pytest
from PIL import Image

from lina_jax import records
from lina_jax.errors import UserError
from lina_jax.sources import base
from lina_jax.sources.base import Example, Fields, Reject
from lina_jax.sources.folder import FolderSource
from lina_jax.sources.tfds import TfdsSource


def refusing(number: int):
    """A function that fails as the system does with this errno."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    return refuse


def png(value: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("L", (4, 4), value).save(out, "PNG")
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


def test_an_unknown_protocol_and_an_impossible_pattern_are_named(tmp_path):
    with pytest.raises(UserError, match="cannot open nope://bucket/"):
        base.find_files("nope://bucket/a.tar")
    with pytest.raises(UserError, match="Invalid pattern"):
        base.find_files(f"{tmp_path}/a**b/*.tar")


@pytest.mark.parametrize("name", ["part[1].tar", "what?.tar", "*.tar"])
def test_a_file_whose_name_looks_like_a_pattern_is_found(tmp_path, name):
    for file in (name, "part1.tar"):
        (tmp_path / file).write_bytes(b"tar")
    assert base.find_files(f"{tmp_path}/{name}") == {f"{tmp_path}/{name}": 3}


def test_a_directory_is_no_file(tmp_path):
    (tmp_path / "tars").mkdir()
    for place in (tmp_path, f"memory://{tmp_path}"):
        fs, inner = base.filesystem(f"{place}/tars")
        fs.makedirs(inner, exist_ok=True)
        with pytest.raises(UserError, match=r"no file matches .*tars', a directory; did you mean .*tars/\*\?"):
            base.find_files(f"{place}/tars")


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


@pytest.mark.parametrize("name", [b"caf\xe9", b"cat ", b"a\nb"])
def test_folders_whose_names_no_class_can_have_are_refused(tmp_path, name):
    """TFDS keeps names as lines of UTF-8, without the spaces around them."""
    place = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(place)
    with open(os.path.join(place, b"0.png"), "wb") as file:
        file.write(png())
    with pytest.raises(UserError, match="cannot be the name of a class"):
        FolderSource(str(tmp_path), Fields(), 100)


def test_linked_folders_are_read(folder, tmp_path):
    """As in subsets of ImageNet. A link back to the whole folder would never end, and adds nothing."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(png(1))
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "cat" / "all").symlink_to(tmp_path / "photos")
    source = folder({"cat/2.png": png(2)})
    assert source.label_names == ("cat", "dog")
    assert {item.key: item.label for item in items(source)} == {"cat/2.png": 0, "dog/1.png": 1}


def test_a_pipe_is_left_out_and_named(folder, tmp_path, caplog):
    """Reading it would wait for a writer."""
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    os.mkfifo(tmp_path / "photos" / "cat" / "1.png")
    assert [item.key for item in items(folder({"cat/2.png": png(2)}))] == ["cat/2.png"]
    assert "cat/1.png: left out, as it is not a file" in caplog.text


def test_pipes_that_are_named_are_not_read(folder, tmp_path, caplog):
    (tmp_path / "photos").mkdir()
    os.mkfifo(tmp_path / "photos" / "pipe.png")
    (tmp_path / "photos" / "1.parquet").touch()
    source = folder({"metadata.jsonl": b'{"file_name": "pipe.png", "text": "a"}'}, Fields("", "text", "", ""))
    assert items(source) == [Reject("pipe.png", "not a file")]
    caplog.clear()
    assert list(base.find_files(f"{tmp_path}/photos/*p*")) == [f"{tmp_path}/photos/1.parquet"]
    assert "pipe.png: left out, as it is not a file" in caplog.text


@pytest.mark.parametrize(
    ("header", "columns"), [("filename,text", "filename, text"), ("file_name;text", "file_name;text")]
)
def test_metadata_without_file_names_is_refused(header, columns, folder):
    message = f"metadata.csv: no row has a file_name; its columns: {columns}"
    with pytest.raises(UserError, match=re.escape(message)):
        folder({"metadata.csv": f"{header}\n1.png,a\n".encode()}, Fields("", "text", "", ""))


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


def test_a_picture_without_permission_ends_it(folder, monkeypatch):
    """A whole class may lack permission, so nothing is rejected; a directory in place of a picture is damage."""
    source = folder({"cat/1.png": png(1)})
    monkeypatch.setattr(base, "read_bytes", refusing(errno.EACCES))
    with pytest.raises(PermissionError):
        items(source)
    monkeypatch.setattr(base, "read_bytes", refusing(errno.EISDIR))
    assert reasons(source) == {"cat/1.png": "unreadable file: Is a directory"}


def test_images_without_a_row_are_counted(folder, caplog):
    line = b'{"file_name": "a.png", "text": "a"}'
    files = {"a.png": png(1), "b.png": png(2), "c/d.JPG": b"x", "metadata.jsonl": line}
    items(folder(files, Fields("", "text", "", "")))
    assert "2 images have no metadata row, such as b.png" in caplog.text


def test_one_process_lists_a_bucket_for_the_images_without_a_row(monkeypatch, caplog):
    """The process that makes the first unit lists it, not every process that opens the source."""
    files = fsspec.filesystem("memory")
    lines = "\n".join(json.dumps({"file_name": f"{i}.png", "text": "a"}) for i in range(2))
    files.pipe({f"/photos/{i}.png": png(i) for i in range(3)} | {"/photos/metadata.jsonl": lines.encode()})
    try:
        with monkeypatch.context() as patch:
            patch.setattr(base, "files_below", lambda *_: pytest.fail("it was listed"))
            source = FolderSource("memory://photos", Fields("", "text", "", ""), 1)
            with source.open(source.units[1]) as (_, made):
                assert len(list(made)) == 1
        with source.open(source.units[0]) as (_, made):
            assert len(list(made)) == 1
        assert "1 images have no metadata row, such as 2.png" in caplog.text
    finally:
        files.rm("/photos", recursive=True)


def test_a_picture_has_one_name(folder, caplog):
    """Paths that are written differently may name the same file."""
    names = ["a.png", "./a.png", "b//c.png"]
    lines = "\n".join(json.dumps({"file_name": name, "text": "x"}) for name in names).encode()
    source = folder({"a.png": png(1), "b/c.png": png(2), "metadata.jsonl": lines}, Fields("", "text", "", ""))
    assert reasons(source) == {"./a.png": "duplicate key"}
    assert [item.key for item in items(source) if isinstance(item, Example)] == ["a.png", "b//c.png"]
    assert "no metadata row" not in caplog.text


def test_metadata_may_be_csv(folder):
    table = "\ufefffile_name,text,label\na.png,größer,3\nb.png,".encode() + b"\xff\xfe,4\n"
    source = folder({"a.png": png(1), "b.png": png(2), "metadata.csv": table}, Fields("", "text", "", "label"))
    assert items(source)[0] == Example("a.png", png(1), "größer", "", 3)
    assert reasons(source) == {"b.png": "caption is not UTF-8"}


def test_a_quote_that_is_not_closed_is_named_with_what_it_takes(folder):
    table = b'file_name,text\na.png,"a cat\non a mat"\nb.png,"a dog\nc.png,a hen\nd.png,a fox\n'
    source = folder({"a.png": png(1), "b.png": png(2), "metadata.csv": table}, Fields("", "text", "", ""))
    assert items(source)[0].caption == "a cat\non a mat"
    reason = "unclosed quote in metadata, which takes in the last 3 lines"
    assert reasons(source) == {"metadata.csv:4": reason}


def test_a_header_that_cannot_be_read_is_named(folder):
    table = b'file_name,"text\n' + b"a.png,a cat\n" * 20_000
    with pytest.raises(UserError, match=r"metadata\.csv: unreadable header: field larger than"):
        folder({"a.png": png(1), "metadata.csv": table}, Fields("", "text", "", ""))


def test_two_columns_of_one_name_are_refused(folder):
    with pytest.raises(UserError, match=r"metadata\.csv: several columns named 'text'$"):
        folder({"a.png": png(1), "metadata.csv": b"file_name,text,text\na.png,a cat,a dog\n"}, Fields(caption="text"))


def test_two_files_of_metadata_are_refused(folder):
    files = {"metadata.jsonl": b'{"file_name": "a.png", "text": "a"}', "metadata.csv": b"file_name,text\na.png,b\n"}
    with pytest.raises(UserError, match=r"photos has metadata\.jsonl and metadata\.csv: remove the one"):
        folder(files, Fields(caption="text"))


def test_rows_are_named_by_their_lines(folder):
    fields = Fields("", "text", "", "")
    source = folder({"metadata.jsonl": b'{"file_name": "a.png", "text": "a"}\n\n{"text": "b"}\n'}, fields)
    assert "metadata.jsonl:3" in reasons(source)


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
        (2.5, "label is not a whole number"),
        (np.array([1, 2]), "label is not a number"),
        (2**70, "label is too large"),
        (5, "label is not one of the 5 classes"),
    ],
)
def test_labels_that_are_none_are_named(label, reason):
    """By one reason for all values, which counts them, and by the value."""
    reject = base.checked("key", Fields(label="label"), b"image", None, None, label, classes=5)
    assert reject == Reject("key", reason, "" if isinstance(label, str) else repr(label))
    for two in (np.float32(2), "2", "2.0"):  # pandas writes columns with gaps as floats
        assert base.checked("key", Fields(label="label"), b"image", None, None, two).label == 2


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
            "give --caption_column .* has file_name, title",
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


def test_a_missing_tfds_directory_is_no_split(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    for place in ("/absent", "/ab:sent/tiny", ":train"):
        with pytest.raises(UserError, match=f"--input={place}: not a TFDS dataset directory"):
            TfdsSource(place, Fields("image"), 2)


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
