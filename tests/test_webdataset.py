"""WebDataset tars: every sample comes once, in order, whatever is damaged; failing storage is not damage."""

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
from test_sources import items, png, reasons

from lina_jax.sources import webdataset as webdataset_source
from lina_jax.sources.base import Example, Fields, Reject
from lina_jax.sources.parquet import ParquetSource
from lina_jax.sources.webdataset import WebDatasetSource


def tar(members: list[tuple[str, bytes]], **notes: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", pax_headers=notes) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


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


def test_links_are_what_they_point_to(webdataset):
    """GNU tar writes files that share an inode as links to the first of them."""
    out = io.BytesIO(tar(pairs("a")))
    with tarfile.open(fileobj=out, mode="a") as archive:
        for name, target, kind in [
            ("b.jpg", "a.jpg", tarfile.LNKTYPE),
            ("b.txt", "a.txt", tarfile.SYMTYPE),
            ("c.jpg", "absent.jpg", tarfile.LNKTYPE),
            ("d.jpg", "d.jpg", tarfile.SYMTYPE),
        ]:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    source = webdataset(out.getvalue())
    assert [(item.key, item.image) for item in items(source)[:2]] == [("a.tar:a", png()), ("a.tar:b", png())]
    assert reasons(source) == dict.fromkeys(("a.tar:c", "a.tar:d"), "link without a target in tar")


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
    b'{"c": "x", "l": "cat"}': "label is not a number",
    b'{"c": "x", "l": -1}': "missing label",
    b"\xff{}": "json is not valid JSON",
    b"[" * 200_000: "json is not valid JSON",
    b'{"c": "x", "l": 1e999}': "label is not a number",
    b'{"c": "x", "l": 99999999999999999999}': "label is too large",
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
    """Its pax header has a value that Python's reader does not expect."""
    source = webdataset(tar(pairs("a"), **{"GNU.sparse.map": "a,b"}))
    assert list(reasons(source)) == ["a.tar"]


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "compressed"])
@pytest.mark.parametrize("read", [0, 1])
def test_storage_that_fails_once_is_no_damage(webdataset, read, compress, monkeypatch):
    """It may recover, and a reject would be permanent."""

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
    noise = np.random.default_rng(0).bytes(2**18)  # more than one read returns
    source = webdataset(compress(tar([*pairs("ab"), ("c.jpg", noise), ("c.txt", b"c")])))
    try:
        found = items(source)
    except OSError as error:
        assert error.errno == errno.EIO
    else:  # it was read again
        assert [item.key for item in found if isinstance(item, Example)] == ["a.tar:a", "a.tar:b", "a.tar:c"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ENOENT], ids=os.strerror)
def test_a_tar_that_the_system_refuses_ends_it(webdataset, monkeypatch, number):
    """It may hold ten thousand samples, and can be read once the user has fixed what is wrong."""

    def refuse(path):
        raise OSError(number, os.strerror(number), path)

    source = webdataset(tar(pairs("a")))
    monkeypatch.setattr(webdataset_source, "_File", refuse)
    with pytest.raises(OSError, match=rf"{os.strerror(number)}: .*a\.tar"):
        items(source)


def test_a_tar_that_cannot_be_opened_is_one_reject(webdataset, tmp_path):
    (tmp_path / "b.tar").write_bytes(b"")
    source = webdataset(tar(pairs("a")))
    (tmp_path / "b.tar").unlink()
    (tmp_path / "b.tar").mkdir()
    assert list(reasons(source)) == ["b.tar"] and len(items(source)) == 2


def test_a_bucket_is_read_like_a_disk():
    with fsspec.open("memory://bucket/a.tar", "wb") as file:
        file.write(tar(pairs("ab")))
    source = WebDatasetSource("memory://bucket/*.tar", Fields(caption="txt"), 100)
    assert [item.key for item in items(source)] == ["a.tar:a", "a.tar:b"]
    with fsspec.open("memory://bucket/c.parquet", "wb") as file:
        pq.write_table(pa.table({"image": [png(3)], "text": ["three"]}), file)
    source = ParquetSource("memory://bucket/*.parquet", Fields("image", "text"), 100)
    assert items(source) == [Example("c.parquet:0", png(3), "three", "", -1)]
