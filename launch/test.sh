#!/usr/bin/env bash
# Set up an environment and run all checks: lint, format, tests. Takes about twenty minutes on two CPU cores.
# usage: [LINA_TEST_EXTRAS=test,tpu,plan-gpu] launch/test.sh [pytest arguments]
# With the extras tpu and plan-gpu, programs are also compiled for TPU pods and GPUs; no such device is needed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [[ " $* " =~ " -h "|" --help " ]]; then usage; fi
cd "$root"

make_environment .venv-test "${LINA_TEST_EXTRAS:-test}"
export JAX_PLATFORMS=cpu
ruff check .
ruff format --check .
# Several processes, because XLA compiles on one core most of the time; one per file, which makes its fixtures once.
python -m pytest --numprocesses=auto --dist=loadfile "$@"
