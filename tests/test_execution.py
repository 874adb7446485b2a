"""How layers run where a config leaves it open."""

import dataclasses
import types

import numpy as np
import pytest

from lina_jax import execution

GIB = 2**30
SCANNED = {"scan_layers": True, "attention_kernel": "xla"}
UNROLLED = {"scan_layers": False, "attention_kernel": "pallas"}
SOFTMAX = {"attention": "softmax", "kv_gate": "none", "depthwise_conv": False}


@pytest.fixture
def of_preset(load_preset):
    """A preset with so many images for each of eight devices, and fields of its model."""

    def make(name, images=8, **model):
        config = load_preset(name)
        return dataclasses.replace(config, batch_size=8 * images, model=dataclasses.replace(config.model, **model))

    return make


def on(kind, config, chosen=execution.settled):
    """What is chosen for eight devices of a kind that hold an eighth of the state each."""
    platform = {"NVIDIA": "gpu", "TPU": "tpu"}.get(kind.split()[0], "cpu")
    devices = np.array([types.SimpleNamespace(device_kind=kind, platform=platform)] * 8)
    mesh = types.SimpleNamespace(devices=devices, shape={"fsdp": 8, "tensor": 1}, size=8)
    return execution.of(chosen(config, mesh).model)


def test_each_platform_runs_layers_in_its_way(of_preset):
    config = of_preset("t2i:256")
    assert on("TPU v5", config) == {"remat": "dots"} | SCANNED
    assert on("NVIDIA H200", config) == {"remat": "none"} | UNROLLED
    assert on("cpu", config) == {"remat": "none"} | SCANNED
    assert on("NVIDIA of tomorrow", config) == {"remat": "dots"} | SCANNED
    assert on("NVIDIA H200", config, execution.for_sampling) == {"remat": "none"} | UNROLLED | {"scan_layers": True}
    assert execution.of(execution.for_all_platforms(config).model) == {"remat": "none"} | SCANNED


def test_what_a_config_sets_stays(of_preset):
    given = {"remat": "full", "scan_layers": True, "attention_kernel": "xla"}
    for name, value in given.items():
        assert on("NVIDIA H200", of_preset("t2i:256", **{name: value}))[name] == value
    assert on("NVIDIA H200", of_preset("t2i:256", scan_layers=True))["attention_kernel"] == "pallas"
    unrolled = of_preset("t2i:256", scan_layers=False)
    assert not on("NVIDIA H200", unrolled, execution.for_sampling)["scan_layers"]


@pytest.mark.parametrize("without_kernels", [SOFTMAX, {"heads": 8}], ids=["softmax", "heads of 192 channels"])
def test_gpus_without_kernels_for_a_model_unroll_layers_without(without_kernels, of_preset):
    assert on("NVIDIA H200", of_preset("t2i:256", **without_kernels))["attention_kernel"] == "xla"


def test_gpus_keep_for_the_gradient_what_fits(of_preset):
    """Of the published batch an H200 keeps everything (planned: 90 of 129 GiB), an H100 matrix products (52 of 73)."""
    assert on("NVIDIA H200", of_preset("t2i:256", 96))["remat"] == "none"
    assert on("NVIDIA H100 80GB HBM3", of_preset("t2i:256", 96))["remat"] == "dots"
    assert on("NVIDIA H200", of_preset("t2i:256", 1_000))["remat"] == "full"


@pytest.mark.parametrize(
    ("name", "few", "many", "planned"),
    [("t2i:256", 8, 96, 90.0 - 12.6), ("imagenet256_c2i:w1536", 16, 96, 72.1 - 15.9), ("t2i:512", 4, 24, 71.9 - 16.3)],
)
def test_the_estimate_of_activations_is_near_what_compilers_plan(name, few, many, planned, of_preset):
    """GiB of h200:8, docs/planning.md."""
    config = of_preset(name, **UNROLLED, remat="none")
    estimated = execution.activations(config, many) - execution.activations(config, few)
    assert estimated / GIB == pytest.approx(planned, rel=0.1)
