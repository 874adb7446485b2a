"""Topologies: TPU slices and GPU nodes that are not there, and their devices for compilers."""

import dataclasses
import importlib.util
import math
import os
import re
from importlib import resources

import jax
from jax.experimental import topologies

from lina_jax import xla_flags
from lina_jax.chips import CHIPS, Chip
from lina_jax.errors import UserError, first_line

# libtpu queries the machine for these, and gets no answer on one without a TPU.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and their arrangement: v5p:4x4x4 is one slice, v5p:4x4x4*2 two, h200:8 one node, h200:4x8 four."""

    name: str
    chip: Chip
    shape: tuple[int, ...]  # TPU: chips along each dimension of a slice; GPU: (nodes, GPUs per node)
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)


def parse(text: str) -> Topology:
    """The topology that a --topology flag names. Raises UserError with what is allowed."""
    example = "expected CHIP:SHAPE like v5e:16x16, v5p:4x4x4, v5p:4x4x4*2 (two slices), h200:8 or h200:4x8 (four nodes)"
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", text)
    if not match:
        raise UserError(f"--topology={text!r}: {example}")
    name, shape, slices = match[1], tuple(map(int, match[2].split("x"))), int(match[3] or 1)
    if name not in CHIPS:
        raise UserError(f"--topology={text!r}: {name!r} is unknown, expected one of {', '.join(CHIPS)}")
    if not all((*shape, slices)):
        raise UserError(f"--topology={text!r}: {example}")
    chip = CHIPS[name]
    if chip.torus:
        if len(shape) != chip.torus:
            raise UserError(f"--topology={text!r}: a slice of {name} has {chip.torus} dimensions, not {len(shape)}")
        if chip.torus == 2 and max(shape) > chip.wrap:  # a slice cannot be larger than a pod
            pod = f"{chip.wrap}x{chip.wrap}"
            raise UserError(f"--topology={text!r}: a slice of {name} has at most {pod} chips (four: {name}:{pod}*4)")
    elif len(shape) > 2 or slices > 1:
        raise UserError(f"--topology={text!r}: GPUs are {name}:GPUS or {name}:NODESxGPUS")
    elif len(shape) == 1:
        shape = (1, *shape)
    elif shape[0] > 1 and shape[1] == 1:  # `mesh.nodes` would regard them as GPUs of one node
        raise UserError(f"--topology={text!r}: nodes with a single GPU cannot be planned")
    return Topology(name, chip, shape, slices)


def devices(topology: Topology) -> list[jax.Device]:
    """The devices of a topology. Raises UserError if their compiler is not installed or knows no such slice.

    Call this before the process uses any JAX backend: it makes the CPU the default.
    """
    jax.config.update("jax_platforms", "cpu")
    chip = topology.chip
    if chip.torus:
        _require("libtpu", topology, "pip install -e '.[tpu]'")
        os.environ.update(_TPU_ENVIRONMENT)
        name = f"{topology.name}:{'x'.join(map(str, topology.shape))}"
        options = dict(chip.options) | ({"num_slices": topology.slices} if topology.slices > 1 else {})
        if math.prod(topology.shape) == 1:  # libtpu assumes four chips per host
            options["chips_per_host_bounds"] = (1, 1, 1)
    else:
        _require("jax_cuda12_plugin", topology, "pip install -e '.[plan-gpu]'")
        os.environ["XLA_FLAGS"] = " ".join([*xla_flags.GPU, os.environ.get("XLA_FLAGS", "")])
        name = topology.name.upper()
        target = resources.files("lina_jax").joinpath(f"targets/{topology.name}.txtpb").read_text()
        options = {"target_config": target, "topology": "1x" + "x".join(map(str, topology.shape))}
    try:
        return list(topologies.get_topology_desc(name, platform=chip.platform, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology: the compiler does not know this slice: {first_line(error)}") from error


def compiler_options(topology: Topology) -> dict[str, object]:
    """Compiler options: those that launchers set on such devices, or that are needed because they are not there."""
    if topology.chip.torus:
        return xla_flags.tpu_options(topology.name)
    # Autotuning would need the device, and without it XLA's choice of Triton tiles fails for some matmuls (jax 0.10.2).
    return {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def _require(package: str, topology: Topology, remedy: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--topology={topology.name}: its compiler is not installed; {remedy}")
