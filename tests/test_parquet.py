"""Parquet files: rows come once, whatever the row groups, and damage costs only what is damaged."""

import errno
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import items, png, reasons, refusing

from lina_jax.errors import UserError
from lina_jax.sources import parquet as parquet_source
from lina_jax.sources.base import Fields
from lina_jax.sources.parquet import ParquetSource


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


def test_a_parquet_file_with_a_damaged_column_name_is_one_reject(tmp_path):
    parquet(tmp_path / "a.parquet", 3)
    parquet(tmp_path / "b.parquet", 3)
    path = tmp_path / "b.parquet"
    path.write_bytes(path.read_bytes().replace(b"label", b"\xffabel"))
    source = ParquetSource(str(tmp_path / "*.parquet"), Fields("image", "text"), 100)
    assert list(reasons(source)) == ["b.parquet"]
    assert len(items(source)) == 4


def test_rows_that_a_damaged_parquet_file_keeps_back_are_rejects(tmp_path, monkeypatch):
    """A few kinds of damage make Arrow deliver fewer rows than the footer promises, without an error."""
    inner = pq.ParquetFile.iter_batches

    def short(file, *args, row_groups, **options):
        yield from (
            batch.slice(0, 1 if row_groups == [1] else None)
            for batch in inner(file, *args, row_groups=row_groups, **options)
        )

    parquet(tmp_path / "a.parquet", 10)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", short)
    source = ParquetSource(str(tmp_path / "*.parquet"), Fields("image", "text"), 100)
    assert reasons(source) == dict.fromkeys(
        [f"a.parquet:{row}" for row in (5, 6, 7)], "unreadable row group: it ends early"
    )
    assert len(items(source)) == 10


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOENT], ids=os.strerror)
def test_a_parquet_file_that_the_system_refuses_ends_it(tmp_path, monkeypatch, number):
    parquet(tmp_path / "a.parquet", 3)
    monkeypatch.setattr(parquet_source, "_opened", refusing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        ParquetSource(str(tmp_path / "*.parquet"), Fields("image", "text"), 100)


def test_memory_that_is_short_is_no_damage(tmp_path, monkeypatch):
    """Neither for a footer nor for a row group."""

    def short_of_memory(*_, **__):
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    parquet(tmp_path / "a.parquet", 3)
    source = ParquetSource(str(tmp_path / "*.parquet"), Fields("image", "text"), 100)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", short_of_memory)
    with pytest.raises(MemoryError):
        items(source)
    monkeypatch.setattr(parquet_source, "_opened", short_of_memory)
    with pytest.raises(MemoryError):
        ParquetSource(str(tmp_path / "*.parquet"), Fields("image", "text"), 100)


def test_directories_of_one_collection_name_classes_alike(tmp_path):
    for place, names in (("1", "cat\ndog\n"), ("2", "dog\ncat\n")):
        (tmp_path / place).mkdir()
        pq.write_table(pa.table({"image": [b""], "label": [0]}), tmp_path / place / "a.parquet")
        (tmp_path / place / "labels.txt").write_text(names)
    with pytest.raises(UserError, match=r"/1 and .*/2 must have the same labels.txt, or none"):
        ParquetSource(f"{tmp_path}/*/*.parquet", Fields("image", "", "", "label"), 100)


def test_a_column_that_a_file_has_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([b""]), pa.array(["a"]), pa.array(["b"])], ["image", "text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"--caption_column='text': .*a.parquet has several columns of that name"):
        ParquetSource(f"{tmp_path}/a.parquet", Fields("image", "text"), 100)
