"""Frozen encoders: every published layout loads, and across meshes and dtypes values differ by rounding alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import repeat
from encoder_checkpoints import write_autoencoder, write_phi, write_tokenizer
from flax import nnx
from flax.traverse_util import flatten_dict
from golden_case import by_published_names

from lina_jax import mesh, torch_layout
from lina_jax.config import MeshConfig
from lina_jax.encoders import Encoders, load_autoencoder, load_text_encoder
from lina_jax.models import vae
from lina_jax.models.text import Phi, PhiConfig

CAPTIONS = ["a large red circle", "", "two green squares " * 200, "Ünï 猫 🙂"]

# Relative differences in the Euclidean norm; bounds are four times the measured values. Between one device and eight,
# and between transformers and us, only the order of sums may differ (measured: 5.6e-7, 3.9e-7). Between dtypes, the
# 8 bits of bfloat16 accumulate errors over a few layers (measured: 0.012, 0.015, 0.0055).
FLOAT32_TOLERANCE = 2.2e-6
BFLOAT16_TOLERANCE = {"encode": 0.05, "decode": 0.06, "features": 0.022}
# Group norms and attention see only tiles of 24 x 24 of the 48 x 40 latents. Measured: 0.11 with random weights.
TILED_DIFFERENCE = 0.2


def noise(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


@pytest.fixture(scope="module")
def vae_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vae")
    write_autoencoder(directory, mar=True)
    return directory


@pytest.fixture(scope="module")
def phi_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("phi")
    write_phi(directory)
    return directory


@pytest.fixture(scope="module")
def autoencoder(vae_directory):
    return load_autoencoder(vae_directory, dtype="float32")


@pytest.fixture(scope="module")
def text_encoder(phi_directory):
    return load_text_encoder(phi_directory, length=16, dtype="float32")


# Layouts


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", [{}, {"shards": 3}, {"old_names": True}, {"mar": True}], ids=str)
def test_every_layout_of_an_autoencoder_loads(tmp_path, layout, dtype):
    written = write_autoencoder(tmp_path, dtype=dtype, **layout)
    described, params = load_autoencoder(tmp_path, dtype="float32")
    assert described.config.last_level_attention == ("mar" in layout)
    named = by_published_names(list(torch_layout.autoencoder(described.config)), params)
    assert named.keys() == written.keys()
    assert all(np.array_equal(named[name], written[name].astype(np.float32)) for name in written)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_every_layout_of_a_text_encoder_loads(tmp_path, shards, dtype):
    written = write_phi(tmp_path, dtype=dtype, shards=shards)
    described, params = load_text_encoder(tmp_path, dtype="float32")
    named = by_published_names(list(torch_layout.phi(described.config)), params)
    assert named.keys() == written.keys()
    assert all(np.array_equal(named[name], written[name].astype(np.float32)) for name in written)


def test_parameters_are_held_in_the_dtype_asked_for_and_norms_in_float32(vae_directory, phi_directory):
    for _, params in (load_autoencoder(vae_directory), load_text_encoder(phi_directory)):
        for path, leaf in flatten_dict(params).items():
            norm = any("norm" in name for name in path)
            assert leaf.dtype == (jnp.float32 if norm else jnp.bfloat16), path


@pytest.mark.parametrize(
    ("given", "scaling", "shift"),
    [
        ({"mar": True}, 0.2325, 0.0),
        ({}, 0.13025, 0.0),
        ({"mar": True, "scaling_factor": 0.5}, 0.5, 0.0),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, 0.3611, 0.1159),
    ],
    ids=str,
)
def test_scale_and_shift_come_from_the_files_and_are_applied(tmp_path, given, scaling, shift):
    write_autoencoder(tmp_path, **given)
    described, params = load_autoencoder(tmp_path, dtype="float32")
    assert (described.config.scaling_factor, described.config.shift_factor) == (scaling, shift)
    moments, epsilon = noise(2, 4, 4, 8), noise(2, 4, 4, 4, seed=1)
    mean, logvar = np.split(np.asarray(moments), 2, -1)
    want = (mean + np.exp(logvar / 2) * epsilon - shift) * scaling
    drawn = vae.scale(described.config, vae.draw_latents(moments, epsilon))
    np.testing.assert_allclose(drawn, want, rtol=1e-6, atol=1e-6)
    unscaled = jnp.asarray(want) / scaling + shift
    got = described.decode(params, jnp.asarray(want))
    np.testing.assert_array_equal(got, nnx.merge(described.graphdef, params).decode(unscaled))


def test_published_sizes_have_the_published_number_of_parameters():
    def count(make):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(make))))

    sdxl = vae.VaeConfig((128, 256, 512, 512), 2, 4, 0.13025)
    assert count(lambda: vae.AutoencoderKL(sdxl, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)) == 83_653_863
    phi2 = PhiConfig(2560, 32, 32, 10_240, 51_200, 0.4, 1e-5, 10_000.0)
    head = 51_200 * 2560 + 51_200
    assert count(lambda: Phi(phi2, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)) + head == 2_779_683_840


# Values


def test_encoders_are_static_arguments(autoencoder, text_encoder, vae_directory):
    described, params = autoencoder
    again, _ = load_autoencoder(vae_directory, dtype="float32")
    assert (again, hash(again)) == (described, hash(described))

    def encode(encoder, params, images):
        return encoder.encode(params, images)

    run = jax.jit(encode, static_argnums=0)
    moments = run(described, params, noise(1, 16, 8, 3))
    assert (moments.shape, moments.dtype) == ((1, 8, 4, 8), jnp.float32)
    run(again, params, noise(1, 16, 8, 3))
    assert run._cache_size() == 1
    assert (described.stride, described.latent_channels, text_encoder[0].dim) == (2, 4, 32)
    assert isinstance(hash(text_encoder[0]), int)


def test_latents_are_clamped_and_pixels_truncated():
    moments = jnp.asarray([[1.0, 2.0, -100.0, 100.0]])
    np.testing.assert_allclose(
        vae.draw_latents(moments, jnp.ones((1, 2))), [[1 + math.exp(-15), 2 + math.exp(10)]], rtol=1e-6
    )
    np.testing.assert_array_equal(
        vae.to_uint8(jnp.asarray([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])), [0, 0, 127, 254, 255, 255]
    )


class Enlarged(vae.AutoencoderKL):
    """Decodes each latent by itself, so tiling must not show."""

    def decode(self, latents):
        return repeat(latents[..., :3], "b h w c -> b (h p) (w q) c", p=self.stride, q=self.stride)


@pytest.mark.parametrize(("size", "tile", "overlap"), [((37, 21), 16, 5), ((17, 16), 16, 8), ((40, 9), 12, 0)])
def test_tiles_cover_every_pixel_once(size, tile, overlap):
    config = vae.VaeConfig((32, 32), 1, 4, 1.0)
    enlarged = nnx.eval_shape(lambda: Enlarged(config, rngs=nnx.Rngs(0), dtype=jnp.float32))  # its weights are not used
    latents = noise(2, *size, 4)
    np.testing.assert_allclose(enlarged.decode_tiled(latents, tile, overlap), enlarged.decode(latents), atol=1e-6)


def test_tiled_decoding_is_near_whole_decoding(autoencoder, error_between):
    described, params = autoencoder
    latents = noise(1, 48, 40, 4) * described.config.scaling_factor
    whole = jax.jit(described.decode)(params, latents)
    tiles = jax.jit(described.decode_tiled, static_argnums=(2, 3))
    np.testing.assert_array_equal(tiles(params, latents, 64, 16), whole)
    tiled = tiles(params, latents, 24, 8)
    assert error_between(tiled, whole) < TILED_DIFFERENCE


def test_tiles_must_be_longer_than_their_overlap(autoencoder):
    described, params = autoencoder
    with pytest.raises(ValueError, match=r"overlap=8 is not in \[0, tile=8\)"):
        described.decode_tiled(params, noise(1, 16, 16, 4), 8, 8)


@pytest.mark.parametrize("kind", ["encode", "decode", "features"])
def test_bfloat16_is_near_float32(kind, vae_directory, phi_directory, error_between):
    def run(dtype):
        if kind == "features":
            described, params = load_text_encoder(phi_directory, length=16, dtype=dtype)
            return described.features(params, described.tokenize(CAPTIONS)[0])
        described, params = load_autoencoder(vae_directory, dtype=dtype)
        given = noise(2, 16, 16, 3) if kind == "encode" else noise(2, 8, 8, 4) * described.config.scaling_factor
        return jax.jit(getattr(described, kind))(params, given)

    got = run("bfloat16")
    assert got.dtype == jnp.float32
    assert error_between(got, run("float32")) < BFLOAT16_TOLERANCE[kind]


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}], ids=str)
def test_eight_devices_compute_what_one_computes(
    sizes, vae_directory, phi_directory, autoencoder, text_encoder, error_between
):
    devices = mesh.build(MeshConfig(**sizes))

    def check(loaded, params, name, given):
        described, alone = loaded
        with jax.set_mesh(devices):
            got = jax.jit(getattr(described, name))(params, given)
        want = jax.jit(getattr(described, name))(alone, given)
        assert error_between(got, want) < FLOAT32_TOLERANCE

    _, params = load_text_encoder(phi_directory, length=16, dtype="float32", mesh=devices)
    assert params["blocks"]["mlp"]["fc1"]["kernel"].sharding.spec == mesh.spec(None, "embed", "mlp")
    check(text_encoder, params, "features", np.tile(text_encoder[0].tokenize(CAPTIONS)[0], (2, 1)))
    _, params = load_autoencoder(vae_directory, dtype="float32", mesh=devices)
    assert params["encoder"]["conv_in"]["kernel"].sharding.spec == mesh.spec(None, None, None, "embed")
    check(autoencoder, params, "encode", noise(8, 16, 16, 3))
    check(autoencoder, params, "decode", noise(8, 8, 8, 4))


def test_each_device_decodes_one_picture_at_a_time(vae_directory, autoencoder, error_between):
    devices = mesh.build(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    described, params = load_autoencoder(vae_directory, dtype="float32", mesh=devices)
    encoders = Encoders(described, weights={"autoencoder": params})

    def compiled(latents):
        with jax.set_mesh(devices):
            return jax.jit(encoders.pixels).lower(encoders.weights, latents).compile()

    latents = jax.device_put(noise(16, 16, 16, 4), mesh.sharding(devices, "batch"))
    four_each, one_each = compiled(latents), compiled(latents[:4])
    _, alone = autoencoder
    want = jax.jit(described.decode)(alone, latents)
    assert error_between(four_each(encoders.weights, latents), want) < FLOAT32_TOLERANCE
    room = [program.memory_analysis().temp_size_in_bytes for program in (four_each, one_each)]
    assert room[0] < 1.5 * room[1], room


def test_an_axis_that_the_mesh_does_not_divide_stays_whole(tmp_path):
    write_phi(tmp_path, width=12, heads=3)
    _, params = load_text_encoder(tmp_path, mesh=mesh.build(MeshConfig(tensor=8)))
    assert params["blocks"]["qkv"]["kernel"].sharding.spec == mesh.spec(None, "embed", "parts", None, None)
    assert params["blocks"]["mlp"]["fc1"]["kernel"].sharding.spec == mesh.spec(None, "embed", "mlp")


# Text


def test_tokens_spell_the_captions(text_encoder):
    described, _ = text_encoder
    ids, lengths, _ = described.tokenize(CAPTIONS)
    assert (ids.shape, ids.dtype, lengths.dtype) == ((4, 16), np.int32, np.int32)
    assert lengths[1] == 0 and lengths[2] == 16 and 0 < lengths[0] < 16
    assert not ids[np.arange(16) >= lengths[:, None]].any()
    for i in (0, 3):
        assert described.tokenizer.decode(ids[i, : lengths[i]]) == CAPTIONS[i]
    assert CAPTIONS[2].startswith(described.tokenizer.decode(ids[2]))


def test_the_tokenizer_is_found_beside_the_encoder(tmp_path, text_encoder):
    write_phi(tmp_path / "text_encoder", tokenizer=False)
    write_tokenizer(tmp_path / "tokenizer" / "tokenizer.json")
    beside, _ = load_text_encoder(tmp_path / "text_encoder", length=16)
    np.testing.assert_array_equal(beside.tokenize(CAPTIONS)[0], text_encoder[0].tokenize(CAPTIONS)[0])


def test_features_do_not_depend_on_padding(text_encoder):
    described, params = text_encoder
    ids, lengths, _ = described.tokenize(CAPTIONS)
    present = np.arange(described.length) < lengths[:, None]
    other = np.where(present, ids, 7)
    got, want = described.features(params, other), described.features(params, ids)
    np.testing.assert_array_equal(np.asarray(got)[present], np.asarray(want)[present])
    assert not np.array_equal(got, want)


def test_features_are_those_of_transformers(tmp_path, error_between):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    torch.manual_seed(0)
    theirs = transformers.PhiForCausalLM(
        transformers.PhiConfig(**sizes, vocab_size=320, partial_rotary_factor=0.5, initializer_range=0.2)
    ).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    write_tokenizer(tmp_path / "tokenizer.json")
    described, params = load_text_encoder(tmp_path, length=16, dtype="float32")
    ids, _ = described.tokenize(CAPTIONS)
    with torch.no_grad():
        want = theirs.model(torch.from_numpy(ids).long()).last_hidden_state.numpy()
    assert error_between(described.features(params, ids), want) < FLOAT32_TOLERANCE
