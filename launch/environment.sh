# Shared by the scripts here; to be sourced. The one place for flags that make runs faster.
#
# glibc.malloc.hugetlb=1: XLA allocates its temporaries anew at each step. With huge pages the kernel has far fewer of them
# to clear: a quickstart step took 0.73 s without and 0.48 s with it (2 cores, jax 0.10.2).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# make_environment DIR [EXTRA]: a virtual environment in DIR with the pinned requirements, made once per set of them.
make_environment() {
  local python directory=$1 extra=${2:-} wanted
  python=${PYTHON:-$(command -v python3.12 || command -v python3.11 || command -v python3 || true)}
  [ -n "$python" ] || { echo "error: no python3 found (set PYTHON=...)" >&2; return 2; }
  wanted=$("$python" --version; cat "$root/requirements.txt" "$root/pyproject.toml")
  if [ ! -f "$directory/ready" ] || [ "$(cat "$directory/ready")" != "$wanted" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "error: $python is $("$python" --version 2>&1), Python 3.11 or newer is needed (set PYTHON=...)" >&2
      return 2
    }
    echo "setting up $directory with $("$python" --version)"
    "$python" -m venv --clear "$directory" &&
      "$directory/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root${extra:+[$extra]}" &&
      printf '%s' "$wanted" >"$directory/ready" || return 1
  fi
  PATH="$directory/bin:$PATH"
}
