"""Writing makes a complete TFDS dataset or none at all, and never overwrites one."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tiny_dataset import captions, png, write

from lina_jax import records
from lina_jax.errors import UserError


def test_tfds_reads_what_we_write(tmp_path):
    builder = tfds.builder_from_directory(write(tmp_path / "tiny"))
    assert builder.info.features["label"].names == ["cat", "dog"]
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 5, "validation": 1}
    for i, record in enumerate(builder.as_data_source("train")):
        np.testing.assert_array_equal(record["image"], np.full((4, 6, 3), i))
        assert record["caption"].decode() == f"nº {i}"
        assert record["label"] == i % 3 - 1
        assert record["key"] == f"file:{i}".encode()


def test_nothing_appears_when_writing_fails(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        records.create(tmp_path / "deep" / "tiny", "tiny", records.pixel_features()) as writer,
    ):
        writer.write("train", image=png(0), label=-1, key="0", **captions(""))
        _ = 1 / 0
    assert not list((tmp_path / "deep").iterdir())


def test_an_existing_dataset_is_not_overwritten(tmp_path):
    before = (write(tmp_path / "tiny") / "dataset_info.json").read_bytes()
    with pytest.raises(UserError, match="tiny"):
        write(tmp_path / "tiny", count=2)
    assert (tmp_path / "tiny" / "dataset_info.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_descriptions_are_never_seen_half_written(tmp_path):
    """Several processes may write the metadata, and the first to finish renames the directory: none writes in place."""
    directory, features = write(tmp_path / "tiny"), records.pixel_features(["cat", "dog"])
    files = ("dataset_info.json", "features.json", "label.labels.txt")
    before = {name: ((directory / name).stat().st_ino, (directory / name).read_bytes()) for name in files[1:]}
    records.assemble(directory, "tiny", features, {})
    for name, (place, content) in before.items():
        assert (directory / name).stat().st_ino != place
        assert (directory / name).read_bytes() == content
    assert sorted(path.name for path in directory.iterdir() if "array_record" not in path.name) == sorted(files)


def test_tfds_reads_latents(tmp_path):
    moments = np.arange(2 * 3 * 4, dtype=np.float16).reshape(2, 3, 4)
    text = np.arange(15, dtype=np.float16).reshape(3, 5)
    with records.create(tmp_path / "tiny", "tiny", records.latent_features(moments.shape, 5)) as writer:
        said = captions("three") | {"label": -1, "key": "0"}
        writer.write("train", moments=moments, text=text, short_text=text[:0], **said)
    (record,) = tfds.builder_from_directory(tmp_path / "tiny").as_data_source("train")
    np.testing.assert_array_equal(record["moments"], moments)
    np.testing.assert_array_equal(record["text"], text)
    assert record["moments"].dtype == record["text"].dtype == np.float16
    assert record["short_text"].shape == (0, 5)
