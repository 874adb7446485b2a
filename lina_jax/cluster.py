"""Which process this is and how many there are, from flags or else from the environment."""

import importlib.util
import os
from collections.abc import Sequence
from typing import NamedTuple

from jax._src.clusters import ClusterEnv  # its rules for pods, Kubernetes, SLURM and Open MPI have no public name

from lina_jax.errors import TransientFailure, UserError


class Cluster(NamedTuple):
    """The place of this process among the processes of a run."""

    address: str  # HOST:PORT of process 0
    processes: int
    process_id: int
    local_devices: Sequence[int] | None = None  # None: all


def find_cluster(
    address: str | None, processes: int | None, process_id: int | None, timeout: float = 600.0
) -> Cluster | None:
    """This process's place, from the three flags or else the environment; None if it runs alone.

    Raises UserError, and TransientFailure if the environment may have the answer later.
    """
    given = f"--coordinator={address} --processes={processes} --process_id={process_id}"
    if processes == 1:
        return None
    if (address, processes, process_id) == (None, None, None):
        return _detected(timeout)
    if None in (address, processes, process_id):
        raise UserError(f"{given}: all three are needed, or none of them")
    if not 0 <= process_id < processes:
        raise UserError(f"{given}: expected 0 <= process_id < processes")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"{given}: expected HOST:PORT with a port from 1 to 65535")
    return Cluster(address, processes, process_id)


def _detected(timeout: float) -> Cluster | None:
    """This process's place by JAX's own rules; None if it runs alone."""
    # A shell in an allocation is a step of one task; JAX reads SLURM_NTASKS, which counts those of the allocation.
    if os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        return None
    given = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(given, None, None, None, None, int(timeout))
    except Exception as error:  # metadata servers, Kubernetes: each raises its own
        # A server that does not answer (errors of requests are OSErrors), or a machine that has no name yet.
        if isinstance(error, OSError) or "recognize coordinator address" in str(error):
            raise TransientFailure(f"cannot tell yet which process this is: {error}") from error
        raise UserError(
            f"cannot tell from the environment which process this is ({error}): give --coordinator=HOST:PORT, "
            "--processes and --process_id, or --processes=1"
        ) from error
    address, processes, process_id, local_devices = found
    number = os.environ.get("JOB_COMPLETION_INDEX")
    if processes is None and number is not None and importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            f"JOB_COMPLETION_INDEX={number}: to find the other pods of a Kubernetes job, JAX needs the package "
            "kubernetes (or give --coordinator, --processes and --process_id; to run alone: --processes=1)"
        )
    if processes is None and given:
        raise UserError(f"JAX_COORDINATOR_ADDRESS={given}: --coordinator, --processes and --process_id are needed too")
    return Cluster(address, processes, process_id, local_devices) if processes and processes > 1 else None
