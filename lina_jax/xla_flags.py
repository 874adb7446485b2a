"""Flags of compilers, each with its reason: the one place for them. Most let collectives run beside computation.

`python lina_jax/xla_flags.py tpu|gpu` prints those for this machine: `launch/environment.sh` gives them to runs, as
LIBTPU_INIT_ARGS and XLA_FLAGS, and `plan` to its compilers. XLA ends a process over a flag that it does not know, so
tests hold these against the installed jaxlib and libtpu. What is said of the effect of flags for TPUs and GPUs was
read off programs compiled for pods that were not there (fully sharded train steps, scanned unless it says otherwise;
libtpu 0.0.42 for 16 chips, jaxlib 0.10.2 for 8 H200 and for several such nodes). Speed on the real thing has yet to be
measured.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

TPU = (
    # Compute runs while collectives are under way. The default; stated because all else rests on it.
    "--xla_tpu_enable_latency_hiding_scheduler=true",
    # All-gathers of weights become chains of steps inside the fusions that compute meanwhile. v5e does so anyway; on
    # v5p and v6e all of them stayed synchronous without these. 6 to 11 % more temporary memory.
    "--xla_enable_async_all_gather=true",
    "--xla_enable_async_collective_permute=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    # The same for the sums of gradients. With the small default of memory on chip the fusions do not compile; with
    # twice this, they exceed what v5p has. Those of all-reduces do nothing here, and beside all-to-alls and a Pallas
    # kernel on v6e they made NaN (MaxDiffusion #429).
    "--xla_enable_async_reduce_scatter_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter=true",
    "--xla_tpu_scoped_vmem_limit_kib=24576",
    # Sums of several matrices' gradients are not joined: the first would wait for the last, with which a loop ends. A
    # stack at 128 tokens takes 3 % less on v5p, 1 % on v5e.
    "--xla_tpu_ars_combiner_threshold_in_bytes=1",
    # On 16 chips the partitioner would make loops of small products and permutes of every gathered weight ("windowed
    # einsum"): planned at three times the step. No weight here has a gigabyte.
    "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1024",
)
# A v4 has 16 MiB of memory on chip: fusions with sums of gradients do not compile, whatever share of it they may use.
V4 = tuple(flag for flag in TPU if "reduce_scatter" not in flag and "scoped_vmem" not in flag)
GPU = (
    # As for TPUs.
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    # In a scan over layers, collectives of one layer move into the time of the next: 14 % more temporary memory.
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_reduce_scatter=true",
    "--xla_gpu_enable_pipelined_all_reduce=true",
    # Loops that fetch a layer ahead would copy it from one iteration to the next: a tenth of the step at width 1536.
    "--xla_gpu_enable_while_loop_double_buffering=true",
    # Products of one array with several matrices stay apart: joined, their results would be cut.
    "--xla_gpu_dot_merger_threshold_mb=0",
    # What is rounded to bfloat16 stays so. By default XLA leaves rounding out where a wider number follows: sums of
    # gradients in float32 then read float32 copies, which have to be written (c2i on 8 H200: 33.0 ms a step for 32.5).
    "--xla_allow_excess_precision=false",
    # Collectives of the many small arrays of a layer are joined, as small ones leave a network's bandwidth unused, but
    # those of few layers: for the first gather and the last sum of a step nothing is left to compute meanwhile.
    "--xla_gpu_all_gather_combine_threshold_bytes=67108864",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=16777216",
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
)
# Not flags of a process but options of programs: those that make gradients, and those that run once.
# On CPUs: together 1.1 times as fast (a step of configs/bench.py, 2 cores with AVX-512); sampling is as fast without.
CPU_TRAINING = {
    # Matrix products by Eigen: YNNPACK's, the default, do 125 GFLOP/s where Eigen's do 145.
    "xla_cpu_experimental_ynn_fusion_type": "",
    # All of a vector register, where a processor has 512 bits; the default is 256.
    "xla_cpu_prefer_vector_width": "512",
}
# LLVM's optimisations of the program that draws the first parameters take 2 of 5 s for the quickstart's model, 24 of 27
# for a tiny one on eight devices; what is drawn is the same to the bit.
CPU_ONCE = {"xla_backend_optimization_level": "0"}
# On several nodes of GPUs, with sums of gradients that end in time (`transformer.sums_in_time`; docs/planning.md says
# what both are worth in plans). Scanned layers take 3 % longer with these, unrolled ones on one node a tenth.
GPU_NODES = {
    # A collective within nodes and one between them are under way at once; the default is one.
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
    # A sum waits for the gradients of few layers.
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 8_388_608,
    "xla_gpu_all_reduce_combine_threshold_bytes": 8_388_608,
}


def of_training(platform: str, *, in_time: bool = False) -> dict[str, str | int]:
    """Options of programs that make gradients, for cpu, gpu or tpu; with sums `in_time` between nodes of GPUs."""
    return _not_set(CPU_TRAINING if platform == "cpu" else GPU_NODES if in_time else {})


def of_first_state(platform: str) -> dict[str, str | int]:
    """Options of programs that make a run's first state, and run once."""
    return _not_set(CPU_ONCE if platform == "cpu" else {})


def _not_set(options: Mapping[str, str | int]) -> dict[str, str | int]:
    """Options would override XLA_FLAGS: what somebody set there is left out."""
    set_here = {flag.split("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in GPU}
    return {name: value for name, value in options.items() if f"--{name}" not in set_here}


def of_tpu(kind: str) -> tuple[str, ...]:
    """For chips of a kind, as `chips.CHIPS` names them."""
    return V4 if kind == "v4" else TPU


def here(accelerator: str, bus: Path = Path("/sys/bus/pci/devices")) -> tuple[str, ...]:
    """For this machine's chips, tpu or gpu. A v4 is known by its PCI numbers, as JAX knows it."""
    numbers = {tuple((device / name).read_text().strip() for name in ("vendor", "device")) for device in bus.glob("*")}
    kind = "v4" if ("0x1ae0", "0x005e") in numbers else ""
    return {"tpu": of_tpu(kind), "gpu": GPU}[accelerator]


if __name__ == "__main__":
    print(*here(sys.argv[1]))
