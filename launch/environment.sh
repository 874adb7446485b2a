# Shared by the scripts here; to be sourced. The one place for flags that make runs faster.
#
# glibc.malloc.hugetlb=1: XLA allocates its temporaries anew at each step. With huge pages the kernel has far fewer of
# them to clear: a step of the quickstart's model at batch 64 took 0.73 s without and 0.48 s with it (2 cores, jax
# 0.10.2).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# find_python: $PYTHON, or the first Python on the path that runs and is new enough.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer among: ${PYTHON:-python3 python3.12 python3.11 python3.13} (set PYTHON=...)" >&2
  return 2
}

# make_environment DIR [EXTRA,...]: a virtual environment in DIR with the requirements, made once per set of them.
make_environment() {
  local python directory=$1 extra=${2:-} wanted
  python=$(find_python) || return 2
  wanted=$("$python" --version && echo "$extra" && cat "$root/requirements.txt" "$root/pyproject.toml")
  if [ ! -f "$directory/ready" ] || [ "$(cat "$directory/ready")" != "$wanted" ]; then
    echo "setting up $directory with $("$python" --version)"
    "$python" -m venv --clear "$directory" &&
      "$directory/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root${extra:+[$extra]}" &&
      printf '%s' "$wanted" >"$directory/ready" || return 1
  fi
  PATH="$directory/bin:$PATH"
}

# accelerator_flags tpu|gpu|cpu: export what makes training faster there. What the user has set comes last and wins.
#
# XLA ends a process over a flag that it does not know, so tests hold these against the installed jaxlib and libtpu.
# What is said of their effect was read off programs compiled for pods that were not there (a scanned, remat, FSDP
# train step; libtpu 0.0.42 for 16 chips, jaxlib 0.10.2 for 8 H200). Speed on the real thing has yet to be measured.
accelerator_flags() {
  local tpu gpu
  tpu=(
    # Compute runs while collectives are under way. The default; stated because all else rests on it.
    --xla_tpu_enable_latency_hiding_scheduler=true
    # FSDP's all-gathers become asynchronous, in fusions with the products that run meanwhile. v5e does so anyway; on
    # v5p and v6e all of them stayed synchronous without these three together. 6 to 11 % more temporary memory.
    --xla_enable_async_all_gather=true
    --xla_tpu_enable_async_collective_fusion=true
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  )
  gpu=(
    # As for TPUs.
    --xla_gpu_enable_latency_hiding_scheduler=true
    # In a scan over layers, collectives of one layer move into the time of the next: 14 % more temporary memory.
    --xla_gpu_enable_pipelined_all_gather=true
    --xla_gpu_enable_pipelined_reduce_scatter=true
    --xla_gpu_enable_pipelined_all_reduce=true
    # One large collective for the many small arrays of a layer; small ones leave the network's bandwidth unused.
    --xla_gpu_all_gather_combine_threshold_bytes=134217728
    --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
    --xla_gpu_all_reduce_combine_threshold_bytes=134217728
  )
  case $1 in
    tpu) export LIBTPU_INIT_ARGS="${tpu[*]} ${LIBTPU_INIT_ARGS-}" ;;
    gpu)
      export XLA_FLAGS="${gpu[*]} ${XLA_FLAGS-}"
      # JAX takes 75 % of the memory unless told; the rest would be idle. NCCL keeps its own buffers in what is left.
      export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
      # Say which link failed. Which one to use is the cluster's business: NCCL_SOCKET_IFNAME, NCCL_IB_HCA.
      export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
      # Up to Hopper: kernels start in XLA's order, so that no collective is stuck behind compute.
      export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
      ;;
    cpu) ;;
    *)
      echo "error: accelerator '$1': expected tpu, gpu or cpu" >&2
      return 2
      ;;
  esac
}
