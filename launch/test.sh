#!/usr/bin/env bash
# Set up and run everything that proves the code base: lint, format, tests. Meant for twenty minutes on two CPU cores.
# usage: [LINA_TEST_EXTRAS=test,tpu,plan-gpu] launch/test.sh [pytest arguments]
# With the extras tpu and plan-gpu, programs are compiled for TPU pods and GPUs as well; there need be none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [[ " $* " =~ " -h "|" --help " ]]; then usage; fi
cd "$root"

make_environment .venv-test "${LINA_TEST_EXTRAS:-test}"
export JAX_PLATFORMS=cpu
ruff check .
ruff format --check .
# A file of tests to a process: XLA compiles on one core most of the time, and fixtures are made once for a file.
python -m pytest --numprocesses=auto --dist=loadfile "$@"
