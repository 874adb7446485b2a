"""All compiler flags, each with its reason. Most let collectives overlap with computation.

`python lina_jax/xla_flags.py tpu|gpu` prints the flags for this machine. `launch/environment.sh` passes them to runs as
LIBTPU_INIT_ARGS and XLA_FLAGS, `plan` to its compilers. XLA ends a process over a flag that it does not know, so
tests check these against the installed jaxlib and libtpu. The effects of flags for TPUs and GPUs that are given here
come from programs compiled for absent pods (fully sharded train steps, scanned unless noted; libtpu 0.0.42 for 16
chips, jaxlib 0.10.2 for 8 H200 and for several such nodes). Their speed on real hardware has not been measured.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

TPU = (  # of all kinds
    # Schedule computation while collectives are under way. The default; set explicitly as the others depend on it.
    "--xla_tpu_enable_latency_hiding_scheduler=true",
    # What it may move apart; the means to run it beside computation depend on the kind.
    "--xla_enable_async_all_gather=true",
    "--xla_enable_async_collective_permute=true",
    # Do not combine the gradient reductions of several matrices: the first would wait for the last, which ends a loop
    # iteration. A stack at 128 tokens takes 3 % less time on v5p, 1 % less on v5e.
    "--xla_tpu_ars_combiner_threshold_in_bytes=1",
    # On 16 chips, the partitioner would turn the matmul of every gathered weight into a loop of small matmuls and
    # permutes ("windowed einsum"): three times the step time, as planned. No weight reaches this threshold of 1 GiB.
    "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1024",
)
# A v5e has no SparseCore: its core advances collectives in steps, within the fusions that compute meanwhile. libtpu
# 0.0.50 refuses this on all other kinds, where it may give wrong results.
V5E = (
    *TPU,
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    # The same for gradient reductions. With the small default limit of on-chip memory the fusions do not compile. The
    # flags for all-reduces change nothing here.
    "--xla_enable_async_reduce_scatter_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter=true",
    "--xla_tpu_scoped_vmem_limit_kib=24576",
)
# v5p, v6e and TPU7x have SparseCores, which run collectives beside the computation: around the rings of one axis of the
# torus, or with 2d, 3d and nd of all axes that a group spans. Without these flags all gathers are synchronous.
SPARSE_CORE = (
    *TPU,
    "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true",
    "--xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true",
    "--xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=true",
    "--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true",
    "--xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter=true",
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
)
OF_TPU = {"v5e": V5E, "v5p": SPARSE_CORE, "v6e": SPARSE_CORE, "tpu7x": SPARSE_CORE}  # others: TPU
_TPUS = {"0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "tpu7x"}  # PCI device numbers, as in JAX
GPU = (
    # As for TPUs.
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    # In a scan over layers, overlap the collectives of a layer with the next iteration. 14 % more temporary memory.
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_reduce_scatter=true",
    "--xla_gpu_enable_pipelined_all_reduce=true",
    # Loops that gather a layer ahead would copy it from one iteration to the next: a tenth of the step at width 1536.
    "--xla_gpu_enable_while_loop_double_buffering=true",
    # Do not merge matmuls of one array with several matrices: their result would have to be sliced.
    "--xla_gpu_dot_merger_threshold_mb=0",
    # Keep values that are rounded to bfloat16. By default XLA skips the rounding if a wider type follows: gradient sums
    # in float32 then read float32 copies, which have to be written (c2i on 8 H200: 33.0 ms per step instead of 32.5).
    "--xla_allow_excess_precision=false",
    # Combine the collectives of a layer's many small arrays, as small ones leave bandwidth unused; but only of few
    # layers, as nothing is left to overlap with the first all-gather and the last reduction of a step.
    "--xla_gpu_all_gather_combine_threshold_bytes=67108864",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=16777216",
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
)
# The rest are not flags of a process but options of programs: of those that make gradients, or that run once.
# On CPUs: together 1.1 times as fast (a step of configs/bench.py, 2 cores with AVX-512). They slow sampling.
CPU_TRAINING = {
    # Matmuls by Eigen, at 145 GFLOP/s instead of 125 by the default, YNNPACK.
    "xla_cpu_experimental_ynn_fusion_type": "",
    # Use all of the vector registers of processors with 512 bits; the default is 256.
    "xla_cpu_prefer_vector_width": "512",
}
# In the program that draws the first parameters, LLVM's optimisations take 2 of 5 s for the quickstart's model, and 24
# of 27 s for a tiny one on eight devices; the parameters are bit-identical without.
CPU_ONCE = {"xla_backend_optimization_level": "0"}
# On several GPU nodes, together with `transformer.overlap_grad_reduction` (docs/planning.md has their effect in
# plans). With these options, scanned layers take 3 % longer, and unrolled layers on one node 10 % longer.
GPU_NODES = {
    # Allow a collective within nodes and one between nodes at the same time; the default is one.
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
    # A reduction waits for the gradients of only few layers.
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 8_388_608,
    "xla_gpu_all_reduce_combine_threshold_bytes": 8_388_608,
}


def training_options(platform: str, *, overlap_grad_reduction: bool = False) -> dict[str, str | int]:
    """Options of programs that compute gradients, on cpu, gpu or tpu.

    `overlap_grad_reduction` is for programs traced inside `transformer.overlap_grad_reduction(True)`.
    """
    return _not_set(CPU_TRAINING if platform == "cpu" else GPU_NODES if overlap_grad_reduction else {})


def init_options(platform: str) -> dict[str, str | int]:
    """Options of programs that create a run's first state, and run once."""
    return _not_set(CPU_ONCE if platform == "cpu" else {})


def tpu_options(kind: str) -> dict[str, str | int]:
    """`of_tpu` as options of a program, for a process that compiles for several kinds."""
    return _not_set(dict(flag.removeprefix("--").split("=") for flag in of_tpu(kind)), "LIBTPU_INIT_ARGS")


def _not_set(options: Mapping[str, str | int], variable: str = "XLA_FLAGS") -> dict[str, str | int]:
    """The options without those that the user sets in an environment variable, which they would override."""
    of_launchers = {*GPU, *V5E, *SPARSE_CORE}
    given = [flag for flag in os.environ.get(variable, "").split() if flag not in of_launchers]
    set_here = {flag.split("=")[0].replace("--noxla_", "--xla_") for flag in given}
    return {name: value for name, value in options.items() if f"--{name}" not in set_here}


def of_tpu(kind: str) -> tuple[str, ...]:
    """The flags for a kind of TPU, as named in `chips.CHIPS`."""
    return OF_TPU.get(kind, TPU)


def here(accelerator: str, bus: Path = Path("/sys/bus/pci/devices")) -> tuple[str, ...]:
    """The flags for this machine's chips, tpu or gpu; PCI numbers identify the kind of TPU."""
    numbers = {tuple((device / name).read_text().strip() for name in ("vendor", "device")) for device in bus.glob("*")}
    kind = next((kind for device, kind in _TPUS.items() if ("0x1ae0", device) in numbers), "")
    return {"tpu": of_tpu(kind), "gpu": GPU}[accelerator]


if __name__ == "__main__":
    print(*here(sys.argv[1]))
