"""What programs start with: imported modules, flags that compilers know, container images, extras to install."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import jax
import pytest

from lina_jax import xla_flags
from lina_jax.chips import CHIPS

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"


def flags_of(kind: str, **given: str) -> dict[str, str]:
    """The environment after `accelerator_flags`, starting from PATH and `given`."""
    text = f"source {LAUNCH}/environment.sh && accelerator_flags {kind} && env -0"
    bare = {"PATH": os.environ["PATH"]} | given
    lines = subprocess.run(["bash", "-c", text], env=bare, capture_output=True, text=True, check=True).stdout.split(
        "\0"
    )
    return dict(line.partition("=")[::2] for line in lines if line)


ENTRY_POINTS = ("train", "sample", "evaluate", "prepare", "convert", "benchmark", "plan", "demo")


def test_programs_start_without_plots_and_other_frameworks():
    """Every run, and every process of a pod, waits for its imports; matplotlib alone would be a fifth of that time."""
    program = f"from lina_jax import {', '.join(ENTRY_POINTS)}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    loaded = set(result.stdout.split())
    assert "lina_jax.train" in loaded, result.stderr
    assert not loaded & {"matplotlib", "tensorflow", "torch", "transformers", "gradio"}


def test_jaxlib_knows_the_gpu_flags():
    """XLA aborts on an unknown flag; its CPU build knows the GPU flags, too."""
    env = os.environ | flags_of("gpu") | {"JAX_PLATFORMS": "cpu"}
    count = env["XLA_FLAGS"].count("--xla_gpu_")
    result = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=env, capture_output=True, text=True
    )
    assert count > 0 and result.returncode == 0, result.stderr


@pytest.mark.parametrize("options", [xla_flags.CPU_TRAINING, xla_flags.CPU_ONCE, xla_flags.GPU_NODES], ids=str)
def test_jaxlib_knows_the_options_of_programs(options):
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


def test_options_of_training_give_way_to_flags_that_somebody_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", " ".join(xla_flags.GPU))  # as launchers do
    assert xla_flags.training_options("gpu", overlap_grad_reduction=True) == xla_flags.GPU_NODES
    monkeypatch.setenv("XLA_FLAGS", " ".join([*xla_flags.GPU, "--xla_gpu_all_reduce_combine_threshold_bytes=1"]))
    left = xla_flags.training_options("gpu", overlap_grad_reduction=True)
    assert xla_flags.GPU_NODES.keys() - left.keys() == {"xla_gpu_all_reduce_combine_threshold_bytes"}


COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lina_jax import topology

for place in sys.argv[1:]:
    where = topology.parse(place)
    mesh = Mesh(np.array(topology.devices(where)), "x")
    cut, rows = NamedSharding(mesh, PartitionSpec(None, "x")), NamedSharding(mesh, PartitionSpec("x"))
    weights = jax.ShapeDtypeStruct((2, 512, 512), jnp.float32, sharding=cut)
    x = jax.ShapeDtypeStruct((64, 16, 512), jnp.bfloat16, sharding=rows)

    def layer(x, w):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w.astype(x.dtype)), rows), None

    def loss(weights, x):
        return jnp.sum(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32))

    program = jax.jit(jax.grad(loss), out_shardings=cut).lower(weights, x)
    program = program.compile(compiler_options=topology.compiler_options(where))
    text, means = program.as_text(), ("sparsecore", "async_collective_fusion_config")
    print("reduce-scatter" in text, *(word for word in means if word in text))
"""
OVERLAPS = {"v4": "", "v5e": " async_collective_fusion_config"}  # others: " sparsecore"
TPUS = [name for name, chip in CHIPS.items() if chip.torus]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_libtpu_compiles_sharded_layers_with_the_flags_for_each_kind_of_tpu():
    """libtpu aborts on unknown flags, and refuses some on some kinds or for what on-chip memory they ask for.

    Collectives overlap with computation by the means that the kind has.
    """
    places = [f"{name}:{'x'.join(['2', '2', '1'][: CHIPS[name].torus])}" for name in TPUS]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "LIBTPU_"))}
    result = subprocess.run([sys.executable, "-c", COMPILE, *places], env=env, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines() == [f"True{OVERLAPS.get(name, ' sparsecore')}" for name in TPUS]


def test_the_table_of_chips_and_the_flags_agree_on_sparse_cores():
    flagged = {name for name in CHIPS if xla_flags.of_tpu(name) == xla_flags.SPARSE_CORE}
    assert flagged == {name for name, chip in CHIPS.items() if chip.sparse_cores}


@pytest.mark.parametrize(
    ("number", "flags"),
    [("0x005e", xla_flags.TPU), ("0x0063", xla_flags.V5E), ("0x0062", xla_flags.SPARSE_CORE)],
    ids=["v4", "v5e", "v5p"],
)
def test_a_machine_gets_the_flags_of_its_tpus(tmp_path, number, flags):
    assert flags_of("tpu")["LIBTPU_INIT_ARGS"].split() == list(xla_flags.TPU)
    for name, numbers in {"a": ("0x1ae0", number), "b": ("0x8086", "0x1237")}.items():
        device = tmp_path / name
        device.mkdir()
        for file, text in zip(("vendor", "device"), numbers, strict=True):
            (device / file).write_text(text + "\n")
    assert xla_flags.here("tpu", tmp_path) == flags
    assert xla_flags.here("gpu", tmp_path) == xla_flags.GPU


@pytest.mark.parametrize(
    ("kind", "variable", "mine"),
    [
        ("gpu", "XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false"),
        ("tpu", "LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=16384"),
    ],
)
def test_flags_of_the_user_come_last(kind, variable, mine):
    *others, last = flags_of(kind, **{variable: mine})[variable].split()
    assert last == mine and others


def test_gpus_get_settings_that_the_user_may_change():
    """Most of the memory, kernels in XLA's order, and NCCL warnings, which name the link that failed."""
    settings = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_DEBUG": "WARN"}
    assert settings.items() <= flags_of("gpu").items()
    mine = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5", "CUDA_DEVICE_MAX_CONNECTIONS": "8", "NCCL_DEBUG": "INFO"}
    assert mine.items() <= flags_of("gpu", **mine).items()


def test_the_images_copy_and_install_what_there_is():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    stages = [line.split(" AS ")[1] for line in lines if line.startswith("FROM ")]
    assert {"tpu", "gpu"} <= set(stages)
    sent = {line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    for line in lines:
        words = line.split()
        if line.startswith("COPY --from="):
            assert words[1].removeprefix("--from=") in stages
        elif line.startswith("COPY "):
            assert all((ROOT / source).exists() and source.split("/")[0] in sent for source in words[1:-1]), line
    installed = re.findall(r"'\.\[(\w+)\]'", "\n".join(lines))
    assert sorted(installed) == ["cuda", "tpu"] and set(installed) <= extras.keys()
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER ${USER_ID}"] * 2 and "ARG USER_ID=1000" in lines


def test_accelerator_extras_are_extras_of_jax():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    of_jax = metadata.metadata("jax").get_all("Provides-Extra")
    for extra in ("tpu", "cuda"):
        [requirement] = project[extra]
        assert re.match(r"jax\[(\w+)\]", requirement)[1] in of_jax
    assert not any("[" in line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] != "#")
