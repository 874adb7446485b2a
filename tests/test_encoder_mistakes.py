"""Each mistake in the directory of a frozen encoder has a message that names the file and what is expected."""

import json

import numpy as np
import pytest
from encoder_checkpoints import write_autoencoder, write_phi, write_tokenizer
from safetensors.numpy import load_file, save_file

from lina_jax.encoders import load_autoencoder, load_text_encoder
from lina_jax.errors import UserError


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
    "truncated": (1, truncate, "/diffusion_pytorch_model.safetensors: not a complete safetensors file ("),
    "truncated shard": (2, truncate, "/diffusion_pytorch_model-00001-of-00002.safetensors: not a complete safetensors"),
    "absent shard": (
        3, lambda d: (d / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink(),
        f"/{VAE_INDEX}: 1 of 3 files are absent: diffusion_pytorch_model-00002-of-00003.safetensors",
    ),
    "empty index": (2, lambda d: replace(d, VAE_INDEX, "{}"), f'/{VAE_INDEX}: expected "weight_map", an object'),
    "index of counters": (
        2, lambda d: replace(d, VAE_INDEX, '{"weight_map": {"norm.num_batches_tracked": "a.safetensors"}}'),
        f'/{VAE_INDEX}: expected "weight_map", an object',
    ),
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
    assert str(error.value) == (
        f"{tmp_path}: weights do not fit the model: unexpected: model.layers.2.mlp.fc1.bias; "
        "misshaped: model.layers.0.mlp.fc1.bias is (7,), the model has (128,); missing: model.final_layernorm.bias"
    )


def test_mistakes_in_tokenizers(tmp_path):
    encoder = tmp_path / "text_encoder"
    write_phi(encoder, tokenizer=False)
    beside = tmp_path / "tokenizer" / "tokenizer.json"
    with pytest.raises(UserError) as error:
        load_text_encoder(encoder)
    assert str(error.value) == f"no tokenizer: expected {encoder / 'tokenizer.json'} or {beside}"
    beside.parent.mkdir()
    beside.write_text("{}")
    with pytest.raises(UserError) as error:
        load_text_encoder(encoder)
    assert str(error.value).startswith(f"{beside}: not a tokenizer of the tokenizers library (")
    write_tokenizer(beside)
    edit(encoder, vocab_size=300)
    with pytest.raises(UserError, match=r"token \d+ is beyond vocab_size=300 of"):
        load_text_encoder(encoder)
