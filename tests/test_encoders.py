"""Frozen encoders: every published layout loads, every mistake has its line, and meshes and dtypes change no values."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import repeat
from encoder_checkpoints import write_autoencoder, write_phi, write_tokenizer
from flax import nnx
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from lina_jax import mesh, torch_layout
from lina_jax.config import MeshConfig
from lina_jax.encoders import load_autoencoder, load_text_encoder
from lina_jax.errors import UserError
from lina_jax.models import vae
from lina_jax.models.text import Phi, PhiConfig

CAPTIONS = ["a large red circle", "", "two green squares " * 200, "Ünï 猫 🙂"]

# Relative differences in the Euclidean norm; bounds are four times what was measured. One device against eight, and
# transformers against us: only the order of sums may differ (5.6e-7, 3.9e-7). Between dtypes: what the 8 bits of
# bfloat16 leave after a few layers (0.012, 0.015, 0.0055).
FLOAT32_TOLERANCE = 2.2e-6
BFLOAT16_TOLERANCE = {"encode": 0.05, "decode": 0.06, "features": 0.022}
# Of group norms and attention that see tiles of 24 x 24 of 48 x 40 random latents; measured 0.11 with random weights.
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
    named = torch_layout.to_torch(list(torch_layout.autoencoder(described.config)), params)
    assert named.keys() == written.keys()
    assert all(np.array_equal(named[name], written[name].astype(np.float32)) for name in written)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_every_layout_of_a_text_encoder_loads(tmp_path, shards, dtype):
    written = write_phi(tmp_path, dtype=dtype, shards=shards)
    described, params = load_text_encoder(tmp_path, dtype="float32")
    named = torch_layout.to_torch(list(torch_layout.phi(described.config)), params)
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
def test_scale_and_shift(tmp_path, given, scaling, shift):
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
    """Decodes each latent by itself: tiles must not be seen."""

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
    np.testing.assert_array_equal(jax.jit(described.decode_tiled)(params, latents), whole)
    tiled = jax.jit(described.decode_tiled, static_argnums=(2, 3))(params, latents, 24, 8)
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


def test_the_tokenizer_is_found_beside_the_encoder_or_where_it_is_said_to_be(tmp_path, text_encoder):
    write_phi(tmp_path / "text_encoder", tokenizer=False)
    write_tokenizer(tmp_path / "tokenizer" / "tokenizer.json")
    beside, _ = load_text_encoder(tmp_path / "text_encoder", length=16)
    (tmp_path / "tokenizer").rename(tmp_path / "words")
    given, _ = load_text_encoder(tmp_path / "text_encoder", length=16, tokenizer=tmp_path / "words" / "tokenizer.json")
    want = text_encoder[0].tokenize(CAPTIONS)
    for described in (beside, given):
        np.testing.assert_array_equal(described.tokenize(CAPTIONS)[0], want[0])


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


# Mistakes


def edit(directory, **changes):
    """Change fields of config.json; ... removes one."""
    path = directory / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def rewrite(directory, change):
    """Apply change(tensors) to the tensors of a file of weights."""
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def truncate(directory):
    path = min(directory.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])


def replace(directory, name, text):
    (directory / name).write_text(text)


def leave_out(directory, tensor):
    index = json.loads((directory / VAE_INDEX).read_text())
    del index["weight_map"][tensor]
    replace(directory, VAE_INDEX, json.dumps(index))


VAE_INDEX = "diffusion_pytorch_model.safetensors.index.json"
VAE_MISTAKES = {
    "no config": (1, lambda d: (d / "config.json").unlink(), "/config.json: no such file"),
    "broken config": (1, lambda d: replace(d, "config.json", "{"), "/config.json: not valid JSON (Expecting"),
    "other JSON": (1, lambda d: replace(d, "config.json", "[]"), "/config.json: expected a JSON object, found list"),
    "channels": (
        1, lambda d: edit(d, block_out_channels=[32, 40]),
        "/config.json: block_out_channels=[32, 40] is not a list of multiples of 32",
    ),
    "a field left out": (
        1, lambda d: edit(d, latent_channels=...), "/config.json: latent_channels=None is not a number of type int"
    ),
    "a size of nothing": (1, lambda d: edit(d, layers_per_block=0), "/config.json: layers_per_block=0 is not positive"),
    "no quant_conv": (
        1, lambda d: edit(d, use_quant_conv=False),
        "/config.json: use_quant_conv=False is not supported, only True",
    ),
    "no weights": (
        1, lambda d: (d / "diffusion_pytorch_model.safetensors").unlink(),
        ": no weights; expected diffusion_pytorch_model.safetensors or model.safetensors, or *.safetensors.index.json",
    ),
    "truncated": (1, truncate, "/diffusion_pytorch_model.safetensors: not a whole safetensors file ("),
    "truncated shard": (2, truncate, "/diffusion_pytorch_model-00001-of-00002.safetensors: not a whole safetensors"),
    "absent shard": (
        3, lambda d: (d / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink(),
        f"/{VAE_INDEX}: 1 of 3 files are absent: diffusion_pytorch_model-00002-of-00003.safetensors",
    ),
    "empty index": (2, lambda d: replace(d, VAE_INDEX, "{}"), f'/{VAE_INDEX}: expected "weight_map", an object'),
    "index of another": (
        2, lambda d: replace(d, VAE_INDEX, (d / VAE_INDEX).read_text().replace("conv_in.bias", "conv_in.bia")),
        f"/{VAE_INDEX}: 2 tensors are not in their files, first decoder.conv_in.bia in diffusion",
    ),
    "index that leaves one out": (
        2, lambda d: leave_out(d, "decoder.conv_in.bias"),
        f"/{VAE_INDEX}: does not list 1 tensors of its files, first decoder.conv_in.bias of diffusion_",
    ),
    "integers": (
        1, lambda d: rewrite(d, lambda t: t.update({"quant_conv.bias": np.zeros(8, np.int8)})),
        "/diffusion_pytorch_model.safetensors: tensor quant_conv.bias is I8, not one of F32, F16, BF16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", VAE_MISTAKES)
def test_mistakes_in_an_autoencoder(tmp_path, mistake):
    shards, spoil, message = VAE_MISTAKES[mistake]
    write_autoencoder(tmp_path, shards=shards)
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        load_autoencoder(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}{message}")


PHI_MISTAKES = {
    "another model": ({"model_type": "llama"}, "model_type='llama' is not supported, only 'phi'"),
    "norms of queries": ({"qk_layernorm": True}, "qk_layernorm=True is not supported, only False"),
    "shared keys": ({"num_key_value_heads": 2}, "num_key_value_heads=2 is not num_attention_heads=4"),
    "activation": ({"hidden_act": "relu"}, "hidden_act='relu' is not supported, only 'gelu_new'"),
    "heads": (
        {"num_attention_heads": 3, "num_key_value_heads": 3},
        "hidden_size=32 is not divisible by num_attention_heads=3",
    ),
    "rotation": (
        {"partial_rotary_factor": 0.4},
        "partial_rotary_factor=0.4 rotates 3 of 8 channels; it must be an even number",
    ),
    "words": ({"hidden_size": "32"}, "hidden_size='32' is not a number of type int"),
    "scaled rotation": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "rope_type='linear' is not supported, only 'default'",
    ),
}


@pytest.mark.parametrize("mistake", PHI_MISTAKES)
def test_mistakes_in_the_config_of_a_text_encoder(tmp_path, mistake):
    changes, message = PHI_MISTAKES[mistake]
    write_phi(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        load_text_encoder(tmp_path)
    assert str(error.value) == f"{tmp_path}/config.json: {message}"


def test_a_directory_that_is_not_there(tmp_path):
    for load, expected in ((load_autoencoder, "a diffusers AutoencoderKL"), (load_text_encoder, "a Hugging Face Phi")):
        with pytest.raises(UserError) as error:
            load(tmp_path / "nowhere")
        assert str(error.value).startswith(f"{tmp_path}/nowhere: no such directory; expected {expected}")


def test_all_tensors_that_do_not_fit_are_named_at_once(tmp_path):
    def change(tensors):
        del tensors["model.final_layernorm.bias"]
        tensors["model.layers.0.mlp.fc1.bias"] = np.zeros(7, np.float32)
        tensors["model.layers.2.mlp.fc1.bias"] = np.zeros(128, np.float32)

    write_phi(tmp_path, dtype="float32")
    rewrite(tmp_path, change)
    with pytest.raises(UserError) as error:
        load_text_encoder(tmp_path)
    assert str(error.value).splitlines() == [
        f"{tmp_path}: weights do not fit the model:",
        "  unexpected: model.layers.2.mlp.fc1.bias",
        "  misshaped: model.layers.0.mlp.fc1.bias is (7,), the model has (128,)",
        "  missing: model.final_layernorm.bias",
    ]


def test_mistakes_in_tokenizers(tmp_path):
    encoder = tmp_path / "text_encoder"
    write_phi(encoder, tokenizer=False)
    beside = tmp_path / "tokenizer" / "tokenizer.json"
    with pytest.raises(UserError) as error:
        load_text_encoder(encoder)
    assert str(error.value) == f"no tokenizer: expected {encoder / 'tokenizer.json'} or {beside}"
    with pytest.raises(UserError) as error:
        load_text_encoder(encoder, tokenizer=tmp_path / "words.json")
    assert str(error.value) == f"no tokenizer: expected {tmp_path / 'words.json'}"
    beside.parent.mkdir()
    beside.write_text("{}")
    with pytest.raises(UserError) as error:
        load_text_encoder(encoder)
    assert str(error.value).startswith(f"{beside}: not a tokenizer of the tokenizers library (")
    write_tokenizer(beside)
    edit(encoder, vocab_size=300)
    with pytest.raises(UserError, match=r"token \d+ is beyond vocab_size=300 of"):
        load_text_encoder(encoder)
