"""Cached latents and text features come out padded, complete and as the config needs them."""

import io

import numpy as np
import pytest
from numbered_records import SIZE, batches, dataset, one, png
from PIL import Image

from lina_jax import data, decode, reading, records
from lina_jax.errors import UserError

MOMENTS, ROWS, DIM = (4, 2, 3), 6, 5


@pytest.fixture(scope="module")
def latents_directory(tmp_path_factory):
    """Record i: moments of i, 1 + i rows of text of i + 1 and, where i is odd, a row of short text of -i - 1."""
    directory = tmp_path_factory.mktemp("data") / "latents"
    with records.create(directory, "tiny", records.latent_features(MOMENTS, DIM)) as writer:
        for i in range(9):
            text, short = np.full((1 + i, DIM), i + 1, np.float16), np.full((i % 2, DIM), -i - 1, np.float16)
            said = {"caption": "", "short_caption": "", "label": i, "key": ""}
            writer.write("train", moments=np.full(MOMENTS, i, np.float16), text=text, short_text=short, **said)
    return directory


@pytest.fixture(scope="module")
def latents(latents_directory):
    columns = [decode.Label(), decode.Moments(MOMENTS), decode.Features(ROWS, DIM)]
    return data.Records([reading.open_split(latents_directory, "train")], columns, threads=2)


def test_latents_are_padded_with_zeros(latents):
    for _ in range(3):  # buffers are reused
        for batch in batches(latents, 20, global_batch=4):
            assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
                "label": (np.int32, (4,)),
                "moments": (np.float16, (4, *MOMENTS)),
                "text": (np.float16, (4, ROWS, DIM)),
                "text_length": (np.int32, (4,)),
            }
            for label, moments, text, length in zip(
                *(batch[n] for n in ("label", "moments", "text", "text_length")), strict=True
            ):
                assert (moments == label).all()
                assert length == min(label + 1, ROWS)
                assert (text[:length] == label + 1).all()
                assert (text[length:] == 0).all()


def test_batches_that_are_kept_stay_as_they_are(latents):
    kept = batches(latents, 30, global_batch=4)
    rows = [batch["text"][0] for batch in kept]  # views keep their buffers, too
    labels_of = [int(batch["label"][0]) for batch in kept]
    del kept
    batches(latents, 30, global_batch=4)
    assert all(row[0, 0] == label + 1 for row, label in zip(rows, labels_of, strict=True))


def test_text_features_beyond_the_length_are_cut_and_counted(latents):
    before = latents.truncated
    assert one(latents, 7)["text_length"] == ROWS
    assert latents.truncated == before + 1


def test_short_text_features(latents):
    record = one(latents, 3, short=True)
    assert record["text_length"] == 1
    assert (record["text"][0] == -4).all()
    assert one(latents, 4, short=True)["text_length"] == 5


def test_pictures_of_another_size_are_resized_on_request(tmp_path):
    directory = dataset(tmp_path / "data", i5={"image": png(9, (40, 60))})
    columns = [decode.Label(), decode.Pixels(SIZE, resize=True)]
    source = data.Records([reading.open_split(directory, "train")], columns)
    assert (one(source, 5)["image"] == 9).all()
    assert source.skipped == 0


@pytest.mark.parametrize("size", [(40, 90), (90, 60)], ids=["wide", "high"])
def test_pictures_of_another_shape_are_cut_to_their_center(size, tmp_path):
    """A dark center between bright margins; the filter reaches slightly past the edge. Measured: 24."""
    height, width = size
    pixels = np.full((*size, 3), 200, np.uint8)
    pixels[(height - 40) // 2 : (height + 40) // 2, (width - 60) // 2 : (width + 60) // 2] = 9
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    directory = dataset(tmp_path / "data", i5={"image": file.getvalue()})
    source = data.Records([reading.open_split(directory, "train")], [decode.Pixels(SIZE, resize=True)])
    assert (one(source, 5)["image"] < 50).all()


@pytest.fixture(scope="module")
def latent_config(tiny):
    def make(path, **changes):
        model = {"condition": "text", "text_encoder": "features", "text_dim": DIM, "text_length": ROWS}
        model |= {"latent_channels": 2, "patch_size": 1, "image_grid": (2, 3)}
        changes = {
            name: model | value if name == "model" else value for name, value in ({"model": {}} | changes).items()
        }
        data_changes = {"path": str(path)} | changes.pop("data", {})
        return tiny(autoencoder={"kind": "sdxl", "stride": 8}, data=data_changes, **changes)

    return make


def test_a_config_opens_latents(latent_config, latents_directory):
    source = data.open_records(latent_config(latents_directory), "train")
    assert one(source, 3)["text"].shape == (ROWS, DIM)
    assert data.fixed_examples(source, 2)["moments"].shape == (2, *MOMENTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"flip": True}}, "data.flip=True: latents cannot be flipped"),
        ({"model": {"image_grid": (3, 3)}}, r"holds latents of \(4, 2, 3\), .* need \(4, 3, 3\)"),
        ({"model": {"text_dim": 8}}, "holds text features of 5, but model.text_dim=8"),
    ],
)
def test_latents_that_do_not_fit_the_config_are_refused(latent_config, latents_directory, changes, message):
    with pytest.raises(UserError, match=message):
        data.open_records(latent_config(latents_directory, **changes), "train")


def test_pixels_and_latents_are_not_taken_for_each_other(latent_config, latents_directory, tiny, tmp_path):
    with pytest.raises(UserError, match="holds pixels"):
        data.open_records(latent_config(dataset(tmp_path / "data")), "train")
    with pytest.raises(UserError, match=r"latents of \(4, 2, 3\), but autoencoder.kind=identity trains on pixels"):
        data.open_records(tiny(data={"path": str(latents_directory)}), "train")
