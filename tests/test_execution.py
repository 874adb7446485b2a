"""How layers run when a config leaves it open."""

import dataclasses
import types

import numpy as np
import pytest

from lina_jax import drawing, execution, generate, kernel_check, state
from lina_jax.chips import CHIPS
from lina_jax.errors import UserError
from lina_jax.train import train
from lina_jax.workdir import write_config

GIB = 2**30
SCANNED = {"scan_layers": True, "attention_kernel": "xla"}
UNROLLED = {"scan_layers": False, "attention_kernel": "pallas"}
SOFTMAX = {"attention": "softmax", "kv_gate": "none", "depthwise_conv": False}


@pytest.fixture
def of_preset(load_preset):
    """A preset with `images` per device on eight devices, and changed fields of its model."""

    def make(name, images=8, **model):
        config = load_preset(name)
        return dataclasses.replace(config, batch_size=8 * images, model=dataclasses.replace(config.model, **model))

    return make


def on(platform, config, chosen=execution.resolve, memory=CHIPS["h200"].memory, kind="", **held):
    """The choice for eight devices with `memory` bytes each that hold an eighth of the state each."""
    stats = {"bytes_limit": memory} if memory else None
    device = types.SimpleNamespace(platform=platform, device_kind=kind, process_index=0, memory_stats=lambda: stats)
    mesh = types.SimpleNamespace(devices=np.array([device] * 8), shape={"fsdp": 8, "tensor": 1}, size=8)
    return execution.choices_of(chosen(config, mesh, **held).model)


def test_each_platform_runs_layers_in_its_way(of_preset):
    config = of_preset("t2i:256")
    assert on("tpu", config) == {"remat": "dots"} | SCANNED
    assert on("gpu", config) == {"remat": "none"} | UNROLLED
    assert on("cpu", config) == {"remat": "none"} | SCANNED
    assert on("gpu", config, execution.for_inference) == {"remat": "none"} | UNROLLED | {"scan_layers": True}
    assert execution.choices_of(execution.for_all_platforms(config).model) == {"remat": "none"} | SCANNED


def test_what_a_config_sets_stays(of_preset):
    for name, value in {"remat": "full", "scan_layers": True, "attention_kernel": "xla"}.items():
        assert on("gpu", of_preset("t2i:256", **{name: value}))[name] == value
    assert on("gpu", of_preset("t2i:256", scan_layers=True))["attention_kernel"] == "pallas"
    assert not on("gpu", of_preset("t2i:256", scan_layers=False), execution.for_inference)["scan_layers"]


@pytest.mark.parametrize(
    "without_kernels",
    [SOFTMAX, {"heads": 8}, {"dtype": "float32"}],
    ids=["softmax", "heads of 192 channels", "float32 heads of 96"],
)
def test_gpus_without_kernels_for_a_model_unroll_layers_without(without_kernels, of_preset):
    assert on("gpu", of_preset("t2i:256", **without_kernels))["attention_kernel"] == "xla"


def test_of_tpus_v5p_has_kernels_where_few_heads_share_a_tile(of_preset):
    def kernel(preset="t2i:256", kind="TPU v5", **model):
        return on("tpu", of_preset(preset, **model), kind=kind)["attention_kernel"]

    assert kernel() == kernel("imagenet256_c2i:w1024") == kernel(attention="hybrid") == "pallas"
    others = [kernel(**SOFTMAX), kernel(dtype="float32"), kernel(heads=6, width=576)]
    assert {*others, kernel(kind="TPU v5 lite"), kernel(kind="TPU v6 lite"), kernel(kind="TPU7x")} == {"xla"}


def test_gpus_keep_for_the_gradient_what_fits(of_preset):
    """At the published batch an H200 keeps everything (planned: 90 of 129 GiB), an H100 only matmuls (52 of 73 GiB)."""
    config = of_preset("t2i:256", 96)
    assert on("gpu", config)["remat"] == "none"
    assert on("gpu", config, memory=CHIPS["h100"].memory)["remat"] == "dots"
    assert on("gpu", config, memory=30 * GIB)["remat"] == "full"
    assert on("gpu", config, memory=None)["remat"] == "dots"
    assert on("gpu", config, encoders=50 * GIB)["remat"] == "dots"


@pytest.mark.parametrize(
    ("name", "remat", "few", "many", "planned"),
    [
        ("t2i:256", "none", 8, 96, 90.0 - 12.6),
        ("imagenet256_c2i:w1536", "none", 16, 96, 72.1 - 15.9),
        ("t2i:512", "none", 4, 24, 71.9 - 16.3),
        ("t2i:256", "dots", 0, 96, 52.5 - 5.6),
    ],
)
def test_the_estimate_of_activations_is_near_what_compilers_plan(name, remat, few, many, planned, of_preset):
    """In GiB; plans are for h200:8, from docs/planning.md."""
    config = of_preset(name, **UNROLLED, remat=remat)
    estimated = execution.activation_bytes(config, many) - execution.activation_bytes(config, few)
    assert estimated / GIB == pytest.approx(planned, rel=0.1)


def test_wide_numbers_and_scores_of_softmax_are_counted(of_preset):
    def size(**model):
        return execution.activation_bytes(of_preset("t2i:1024", **SCANNED, remat="none", **model), 1)

    assert size(dtype="float32") == 2 * size()
    # One block's scores for 5,120 tokens alone are 2.3 GiB; three images are planned to exceed an H200's memory.
    assert size(**SOFTMAX) > 30 * GIB > size()


def test_kernels_are_not_expected_to_save_memory_in_scanned_layers(of_preset):
    def size(**model):
        return execution.activation_bytes(of_preset("t2i:256", remat="dots", **model), 8)

    assert size(scan_layers=True, attention_kernel="pallas") == size(**SCANNED) > size(**UNROLLED)


def test_micro_batches_take_turns_in_the_memory_of_one(of_preset):
    def size(accumulate):
        config = of_preset("t2i:256", **SCANNED, remat="none")
        return execution.activation_bytes(
            dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate=accumulate)), 8
        )

    assert size(accumulate=4) == size(accumulate=1) / 4


def test_a_step_needs_room_for_its_part_of_float32_gradients(of_preset):
    """Only matrices of blocks count: 1.36e9 of the preset's 1.45e9 parameters."""
    config = of_preset("t2i:256", **SCANNED, remat="none")
    gradients = execution.step_bytes(config, 8, parts=16, gathered=0.0) - execution.activation_bytes(config, 8)
    assert gradients == pytest.approx(4 * 1.36e9 / 16, rel=0.01)


def test_programs_without_gradients_have_a_way_of_their_own(tiny, one_device, monkeypatch):
    """As on GPUs, where training unrolls layers and sampling scans them; the pictures are the same."""
    inputs = {"label": np.array([0, 2], np.int32)}, np.arange(2, dtype=np.int32), np.int32(0)
    scanned = state.make_blueprint(tiny(model={"scan_layers": True, "image_depth": 4}), one_device)
    run = scanned.init()
    drawn = [np.asarray(generate.make_sampler(scanned, scanned.config.sample)(run.params, run.frozen, *inputs))]
    monkeypatch.setattr(
        execution, "scan_and_kernel_options", lambda *_: [{"scan_layers": False, "attention_kernel": "xla"}]
    )
    mixed = state.make_blueprint(tiny(model={"scan_layers": None, "image_depth": 4}), one_device)
    assert not mixed.config.model.scan_layers
    assert mixed.inference_graphdef == scanned.inference_graphdef != mixed.graphdef
    drawn.append(np.asarray(generate.make_sampler(mixed, mixed.config.sample)(run.params, run.frozen, *inputs)))
    assert (drawn[0] == drawn[1]).all()


def test_training_and_sampling_ask_whether_kernels_agree_first(tiny_text, tmp_path, monkeypatch):
    def refuse(config, devices):
        raise UserError(f"asked about kernels: {config.model.attention_kernel}")

    monkeypatch.setattr(kernel_check, "resolve_kernel", refuse)
    config = tiny_text()
    with pytest.raises(UserError, match="asked about kernels: auto"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    write_config(tmp_path / "imported", config)
    with pytest.raises(UserError, match="asked about kernels: auto"):
        drawing.load(tmp_path / "imported")
