"""The platform that is traced for, choices that depend on it, and the cache of programs compiled for it."""

from collections.abc import Callable
from pathlib import Path

import jax

from lina_jax import output_files


def platform() -> str:
    """The platform (cpu, gpu or tpu) that is traced for: that of the mesh in use, else that of this process."""
    device_mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if device_mesh.empty else device_mesh.abstract_device.platform


# portable(True): what is traced within must run on every platform (exports).
portable = jax.make_user_context(default_value=False)


def one_cpu() -> bool:
    """Whether what is traced is to run on a single CPU device, and nowhere else."""
    device_mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and not portable.value and (device_mesh.empty or device_mesh.size == 1)


def by_platform(*args, default: Callable, **functions: Callable):
    """Apply the function (cpu, cuda, tpu) of the current `platform`, or else `default`, to the arguments.

    It is chosen while tracing, except for `portable` programs: with jax.lax.platform_dependent, remat would also keep
    the results of the functions that do not run, as zeros.
    """
    if portable.value:
        return jax.lax.platform_dependent(*args, default=default, **functions)
    known = platform()
    return functions.get("cuda" if known == "gpu" else known, default)(*args)


def loops_gather_late() -> bool:
    """Whether the compiler leaves a loop's all-gathers of weights in the iteration that uses them, which has to wait.

    Compilers for TPUs do; those for GPUs move the gathers to the previous iteration (`xla_flags`).
    """
    return platform() == "tpu" and jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1


def cache_programs(directory: Path) -> None:
    """Cache compiled programs in a directory, if it is writable, so that the next start does not compile them again."""
    if jax.config.jax_compilation_cache_dir is None and output_files.writable(directory):
        jax.config.update("jax_compilation_cache_dir", str(directory.resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
