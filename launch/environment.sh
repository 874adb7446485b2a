# Sourced by the scripts here. The settings that make runs faster are here and in lina_jax/xla_flags.py.
#
# glibc.malloc.hugetlb=1: XLA allocates its temporaries anew in each step. With huge pages the kernel has far fewer
# pages to clear: a step of configs/bench.py took 4.3 to 4.4 s without and 3.7 to 3.8 s with it (2 cores, jax 0.10.2).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# usage: print the header comment of the script that was started, and exit.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$root/launch/${0##*/}"
  exit 0
}

# refuse MESSAGE...: print an error and exit with 2.
refuse() {
  echo "error: $*" >&2
  exit 2
}

# find_python: print $PYTHON, or the first Python on the path, that runs and is new enough.
find_python() {
  local candidate candidates=${PYTHON:-python3 python3.12 python3.11 python3.13}
  for candidate in $candidates; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer among: $candidates (set PYTHON=...)" >&2
  return 2
}

# make_environment DIR [EXTRA,...]: make a virtual environment in DIR, once per set of requirements, and put it on PATH.
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
  PATH="$(cd "$directory" && pwd)/bin:$PATH"
}

# accelerator_flags tpu|gpu|cpu: export the settings that make training faster there. What the user has set wins.
#
# XLA's own flags, with their reasons, are in lina_jax/xla_flags.py: the planner compiles with the same ones.
accelerator_flags() {
  local flags=""
  case $1 in
    tpu | gpu) flags=$("$(find_python)" "$root/lina_jax/xla_flags.py" "$1") || return 2 ;;
  esac
  case $1 in
    tpu) export LIBTPU_INIT_ARGS="$flags ${LIBTPU_INIT_ARGS-}" ;;
    gpu)
      export XLA_FLAGS="$flags ${XLA_FLAGS-}"
      # By default JAX takes 75 % of the memory, and the rest is idle. NCCL keeps its own buffers in what is left.
      export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
      # Report which link failed. Which link to use depends on the cluster: NCCL_SOCKET_IFNAME, NCCL_IB_HCA.
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
