"""The FID network matches the PyTorch ports and its resize TensorFlow 1; wrong files are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from inception_weights import random_weights, write
from safetensors.numpy import save_file

from lina_jax import inception_weights as weight_files
from lina_jax.errors import UserError
from lina_jax.models import inception


def images(count, height, width):
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), np.uint8)


def features(path, pixels):
    graphdef, weights = weight_files.load(path)
    return jax.jit(lambda weights, pixels: nnx.merge(graphdef, weights)(pixels))(weights, pixels)


def close(got, want, tolerance):
    return np.linalg.norm(np.asarray(got) - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_features_are_those_of_torch_fidelity(tmp_path, suffix):
    """With shared random weights, from 8-bit pixels. Measured: pooled 3e-7, logits 6e-7, spatial 2e-6."""
    torch = pytest.importorskip("torch")
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    weights = random_weights(1)
    torch.save({name: torch.tensor(tensor) for name, tensor in weights.items()}, tmp_path / "weights.pth")
    save_file(weights, tmp_path / "weights.safetensors")
    theirs = fidelity.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "weights.pth")
    )
    seen = []
    # The first branch of TensorFlow's mixed_6, which is the fourth block of 17 x 17.
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pixels = images(2, 32, 48)
    with torch.no_grad():
        pool, logits = theirs(torch.tensor(pixels).permute(0, 3, 1, 2))
    ours = features(tmp_path / f"weights.{suffix}", pixels)
    assert close(ours.pool, pool.numpy(), 2e-6)
    assert close(ours.logits, logits.numpy(), 2e-6)
    assert close(ours.spatial, seen[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1).numpy(), 5e-6)
    assert ours.pool.shape == (2, 2048) and ours.logits.shape == (2, 1008) and ours.spatial.shape == (2, 2023)


@pytest.mark.parametrize("size", [(8, 5), (299, 299), (64, 600)])
def test_the_resize_is_that_of_torch_fidelity(size):
    torch = pytest.importorskip("torch")
    compat = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    pixels = images(1, *size).astype(np.float32)
    theirs = compat.interpolate_bilinear_2d_like_tensorflow1x(
        torch.tensor(pixels).permute(0, 3, 1, 2), size=(299, 299), align_corners=False
    )
    # A few roundings of numbers up to 255.
    np.testing.assert_allclose(inception.resize(jnp.asarray(pixels)), theirs.permute(0, 2, 3, 1), atol=1e-4)


def test_the_resize_starts_at_the_first_pixel_and_repeats_the_last():
    """Output i lies at i * size / 299, without a half-pixel offset, clamped to the last pixel."""
    row = jnp.asarray([0.0, 100.0])
    out = np.asarray(inception.resize(jnp.broadcast_to(row[None, None, :, None], (1, 2, 2, 3))))[0, 0, :, 0]
    np.testing.assert_allclose(out, np.minimum(np.arange(299) * 2 / 299, 1) * 100, atol=1e-4)


def test_average_pools_leave_the_padding_out():
    np.testing.assert_allclose(inception._average_pool(jnp.full((1, 4, 4, 2), 3.0)), 3.0, rtol=1e-6)


def test_a_picture_does_not_depend_on_its_company(tmp_path):
    path, pixels = write(tmp_path / "thin.safetensors"), images(4, 16, 16)
    together, other = features(path, pixels), features(path, pixels[[2, 0, 3, 1]])
    np.testing.assert_array_equal(together.pool[2], other.pool[0])
    np.testing.assert_array_equal(together.spatial[2], other.spatial[0])


def test_files_that_are_not_the_network_are_named(tmp_path):
    weights = random_weights(32)
    del weights["Mixed_6d.branch1x1.bn.bias"]
    weights["fc.weight"] = weights["fc.weight"][:1000]
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"Mixed_6d.branch1x1.bn.bias is absent; fc.weight is \(1000, 64\), expected"):
        weight_files.load(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no such file; expected the FID weights"):
        weight_files.load(tmp_path / "absent.pth")
