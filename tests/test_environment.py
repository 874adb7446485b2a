"""What launchers set up is what there is: flags that compilers know, images and extras that can be installed."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"


def flags_of(kind: str) -> dict[str, str]:
    """The environment that `accelerator_flags` adds."""
    text = f"source {LAUNCH}/environment.sh && accelerator_flags {kind} && env -0"
    bare = {"PATH": os.environ["PATH"]}
    lines = subprocess.run(["bash", "-c", text], env=bare, capture_output=True, text=True, check=True).stdout.split(
        "\0"
    )
    return dict(line.partition("=")[::2] for line in lines if line) | bare


def test_jaxlib_knows_the_gpu_flags():
    """XLA ends a process over an unknown flag; its CPU build knows those of GPUs too."""
    env = os.environ | flags_of("gpu") | {"JAX_PLATFORMS": "cpu"}
    count = env["XLA_FLAGS"].count("--xla_gpu_")
    result = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=env, capture_output=True, text=True
    )
    assert count > 0 and result.returncode == 0, result.stderr


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental.topologies import get_topology_desc
device = get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
jax.jit(jnp.tanh).lower(x).compile()
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_libtpu_knows_the_tpu_flags():
    env = os.environ | flags_of("tpu") | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    env |= {
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    result = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_flags_of_the_user_come_last():
    text = f"source {LAUNCH}/environment.sh && accelerator_flags gpu && echo $XLA_FLAGS"
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false"
    env = {"PATH": os.environ["PATH"], "XLA_FLAGS": mine}
    result = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True)
    assert result.stdout.split()[-1] == mine and len(result.stdout.split()) > 1


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
