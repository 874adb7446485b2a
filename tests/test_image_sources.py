"""Images to measure are read by number from folders, files and datasets; errors name what cannot be measured."""

import io
import os
import threading

import numpy as np
import pytest
from PIL import Image

from lina_jax import data, image_sources, images, records, shapes, state
from lina_jax.errors import UserError
from lina_jax.prepare import Settings, prepare


def test_the_first_pictures_of_a_sorted_folder_stand_for_all(one_device, tmp_path):
    """The folder holds three classes in turn. Files that `sample` and operating systems add are ignored."""
    for number in range(60):
        Image.new("L", (8, 8), 100 * (number // 20)).save(tmp_path / f"{number:03d}.png")
    for name in ("grid.png", "settings.json", "._000.png"):
        (tmp_path / name).touch()
    folder = image_sources.open_images(tmp_path, one_device)
    assert folder.count == 60
    assert set(np.asarray(folder.batch(np.arange(12)))[:, 0, 0, 0].tolist()) == {0, 100, 200}
    numbers = np.asarray(folder.batch(np.arange(60)))[:, 0, 0, 0].tolist()
    assert sorted(numbers) == [0] * 20 + [100] * 20 + [200] * 20


def test_a_folder_drawn_anew_is_another(one_device, tmp_path):
    """Pictures of uncompressed formats have the same size whatever they show."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "0.bmp")
    before = image_sources.open_images(tmp_path, one_device).facts
    assert image_sources.open_images(tmp_path, one_device).facts == before
    about = (tmp_path / "0.bmp").stat()
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "0.bmp")
    os.utime(tmp_path / "0.bmp", ns=(about.st_mtime_ns + 1, about.st_mtime_ns + 1))  # clocks of files may be coarse
    assert (tmp_path / "0.bmp").stat().st_size == about.st_size
    assert image_sources.open_images(tmp_path, one_device).facts != before


def test_compressed_and_damaged_npz_files(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    np.savez_compressed(tmp_path / "small.npz", arr_0=array)
    np.testing.assert_array_equal(image_sources.npz_array(tmp_path / "small.npz", "arr_0"), array)
    content = (tmp_path / "small.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:200])
    (tmp_path / "flipped.npz").write_bytes(content[:60] + bytes(byte ^ 255 for byte in content[60:80]) + content[80:])
    for name in ("cut", "flipped"):
        with pytest.raises(UserError, match=f"{name}.npz: not a complete .npz file"):
            image_sources.npz_array(tmp_path / f"{name}.npz", "arr_0")


def test_a_folder_of_pictures_may_link_others_and_hides_what_is_hidden(one_device, tmp_path):
    for place in ("all/a", "all/.thumbs", "elsewhere"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / place / "caf\udce9.png")
    (tmp_path / "all" / "b").symlink_to(tmp_path / "elsewhere")
    assert image_sources.open_images(tmp_path / "all", one_device).count == 2


def test_a_record_that_cannot_be_measured_is_named(one_device, tmp_path):
    """Training would use the next record instead."""
    with records.create(tmp_path / "data", "data", records.pixel_features([])) as writer:
        for i in range(4):
            picture = io.BytesIO()
            Image.new("RGB", (4 + 4 * (i == 2), 4)).save(picture, "PNG")
            writer.write("train", image=picture.getvalue(), caption="", short_caption="", label=-1, key=str(i))
    source = image_sources.open_images(tmp_path / "data", one_device)
    with pytest.raises(UserError, match=r"record 2 of .*data-train"):
        source.batch(np.arange(4))
    with pytest.raises(UserError, match=r"split 'train\[:0\]' is empty"):
        image_sources.open_images(tmp_path / "data", one_device, "train[:0]")


def test_a_dataset_whose_first_shard_is_cut_is_named(one_device, tmp_path):
    prepare(tmp_path / "data", Settings(resolution=8, train=4, validation=2))
    (shard,) = (tmp_path / "data").glob("*train*")
    os.truncate(shard, 100)
    with pytest.raises(UserError, match=f"record 0 of {shard}: "):
        image_sources.open_images(tmp_path / "data", one_device)


def test_pictures_of_a_folder_are_read_at_once(one_device, tmp_path, monkeypatch):
    """Each read from remote storage takes a while; the images keep their order."""
    for number in range(4):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    folder = image_sources.open_images(tmp_path, one_device)
    alone, together, decode = np.asarray(folder.batch(np.arange(4))), threading.Barrier(4), images.decode

    def decoded(content):
        together.wait(timeout=60)
        return decode(content)

    monkeypatch.setattr(images, "decode", decoded)
    np.testing.assert_array_equal(np.asarray(folder.batch(np.arange(4))), alone)


def test_text_models_draw_the_captions_of_the_data(tiny_text):
    config = tiny_text()
    records = data.open_records(config, "validation")
    rows = image_sources.captions_of(records, 100)(np.array([0, 7, 8, 9]))
    assert len(records) == 8
    np.testing.assert_array_equal(rows["text"][2:], image_sources.captions_of(records, 100)(np.array([0, 1]))["text"])
    caption = shapes.scene("validation", 0).caption.encode()[:24]
    assert bytes(rows["text"][0][: rows["text_length"][0]]) == caption


def test_pictures_of_other_shares_of_the_same_datasets_are_others(tiny_text, shapes_data, one_device):
    """Other shares choose other captions, so that an interrupted measurement must not go on with them."""

    def facts(path):
        config = tiny_text(data={"path": path})
        plan = state.make_blueprint(config, one_device)
        records = data.open_records(config, "train")
        return image_sources.generated_images(plan, config.sample, records, 9, seed=0, facts={}).facts

    first, second = (facts(f"{shapes_data}={a},{shapes_data}={b}") for a, b in ((1, 2), (2, 1)))
    assert first != second and facts(f"{shapes_data}=2,{shapes_data}=4") == first
