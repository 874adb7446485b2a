"""Flags that let compilers run collectives beside computation: the planner compiles with them, and runs need them."""

# LIBTPU_INIT_ARGS: all-gathers become chains of steps inside the fusions that compute meanwhile.
TPU = (
    "--xla_enable_async_all_gather=true",
    "--xla_enable_async_collective_permute=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
)
