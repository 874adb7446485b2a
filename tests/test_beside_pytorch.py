"""The PyTorch model used for speed comparisons computes the published mathematics, and the command compares."""

import json
import subprocess
import sys
from pathlib import Path

import golden_models
import pytest
from golden_case import Case

from lina_jax import decoding_schedule
from lina_jax.config import Config, LossConfig, ModelConfig, SampleConfig

torch = pytest.importorskip("torch")

import pytorch_lina  # noqa: E402  (it needs PyTorch)

ROOT = Path(__file__).parent.parent


def tensor(array):
    return torch.from_numpy(array.copy())  # a fixture's own memory is read-only


@pytest.fixture
def loaded():
    """Load a fixture, and the model with its weights."""

    def load(name):
        case = Case(name)
        model = pytorch_lina.Lina(golden_models.config_of(case))
        model.load_state_dict({key: tensor(value) for key, value in case.weights.items()})
        return case, model

    return load


def test_training_loss_and_gradients(loaded):
    case, model = loaded("transformer_c2i")
    image, ids, mask, index = (tensor(case[name]) for name in ("x", "prev_ids", "mask", "timestep_idx"))
    noise = model.grid(tensor(case["noise"]))
    errors = model.errors(image, tensor(case["label_ids"]).long(), mask, ids.long(), noise, index.flatten(1))
    case.check("outputs.per_token_loss", errors.detach())
    loss = pytorch_lina.masked_mean(errors, mask)
    case.check("outputs.loss", loss.detach()[None])
    loss.backward()
    grads = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    recorded = [name.removeprefix("grads.") for name in case.left if name.removeprefix("grads.") in grads]
    assert len(recorded) > 20
    for key in recorded:
        case.check(f"grads.{key}", grads[key])


def test_pytorch_samples_the_recorded_latents(loaded):
    case, model = loaded("sample_c2i_cfg")
    c = case.config
    settings = SampleConfig(
        steps=c["num_inference_steps"], euler_steps=c["num_diffusion_steps"], guidance=c["guidance_scale"]
    )
    plan = decoding_schedule.make_schedule(
        Config(model=model.config, loss=LossConfig(shift=c["shift"]), sample=settings)
    )
    labels, order = tensor(case["label_ids"])[: c["batch"]].long(), tensor(case["pred_order"]).long()
    case.check("outputs.latents", model.sample(labels, plan, order, tensor(case["noise"]))[:, :, None])


def test_pytorch_softmax_attention_is_the_recorded_one():
    case = Case("attn_softmax")
    layer = pytorch_lina.Attention(
        ModelConfig(width=case.config["dim"], heads=case.config["num_heads"], attention="softmax"), True
    )
    layer.load_state_dict({key: tensor(value) for key, value in case.weights.items()})
    x = tensor(case["x"]).requires_grad_()
    y = layer(x)
    case.check("outputs.y", y.detach())
    y.backward(tensor(case["cotangent"]))
    case.check("grads.x", x.grad)
    case.check("grads.qkv.weight", layer.qkv.weight.grad)


def test_sides_take_turns(one_device_env):
    command = [sys.executable, "tests/beside_pytorch.py", "attention", "--tokens=20", "--turns=2", "--calls=1"]
    result = subprocess.run(command, cwd=ROOT, env=one_device_env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    ours, theirs = map(json.loads, result.stdout.splitlines())
    assert (ours["side"], theirs["side"]) == ("lina_jax:linear", "pytorch:linear")
    assert ours["of"].keys() == {"pytorch:linear"} and ours["of"]["pytorch:linear"] > 0
