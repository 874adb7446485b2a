#!/usr/bin/env bash
# Set up an environment, check the model and benchmark it on this machine's accelerator, in one go.
# usage: launch/benchmark.sh [--accelerator=gpu|tpu|cpu] [--out=FILE] [--python=PYTHON] [--dry-run]
#
#   --accelerator  default: what this machine has
#   --out          new file for the output of `python -m lina_jax.benchmark`, default benchmark-ACCELERATOR.jsonl
#   --python       a Python with all requirements and pytest; default: an environment made in .venv-benchmark
#   --dry-run      print the commands that would run on one device, and exit
#
# Checks: the recorded fixtures in float32, bfloat16 against float32, kernels against XLA. Failures, and batches that
# do not fit, are listed at the end (exit code 1); the rest is measured regardless. Each size runs in its own process,
# so that its peak memory is its own.
#
# With several devices, layers are measured on one device, models are sharded over all of them, and batch sizes are per
# device. To measure a batch of one image, use a machine with one device, or CUDA_VISIBLE_DEVICES=0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

accelerator='' out='' python='' dry_run=''
for argument; do
  case $argument in
    -h | --help) usage ;;
    --accelerator=* | --out=* | --python=*) printf -v "$(sed 's/^--//; s/=.*//' <<<"$argument")" %s "${argument#*=}" ;;
    --dry-run | --dry_run) dry_run=yes ;;
    *) refuse "$argument: expected --accelerator=gpu|tpu|cpu, --out=FILE, --python=PYTHON, --dry-run" ;;
  esac
done
if [ -z "$accelerator" ]; then
  if nvidia-smi -L >/dev/null 2>&1; then
    accelerator=gpu
  elif compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
    accelerator=tpu
  else
    accelerator=cpu
  fi
fi
PYTHON=${python:-${PYTHON-}} accelerator_flags "$accelerator"
out=${out:-benchmark-$accelerator.jsonl}
[ ! -e "$out" ] || refuse "--out=$out already exists"

case $accelerator in
  gpu) platforms=cuda,cpu extras=cuda,test ;;
  tpu) platforms=tpu,cpu extras=tpu,test ;;
  cpu) platforms=cpu extras=test ;;
esac
export JAX_PLATFORMS=$platforms
if [ -z "$dry_run" ] && [ -z "$python" ]; then make_environment .venv-benchmark "$extras"; fi
python=${python:-python}

failed=() lines=$out
# A dry run prints the commands on stdout; otherwise they go to stderr.
if [ -n "$dry_run" ]; then lines=/dev/null told=1; else told=2; fi
exec 3>&$told
# attempt COMMAND...: run it, and note if it failed.
attempt() {
  printf '%q ' "$@" >&3
  echo >&3
  if [ -n "$dry_run" ]; then return; fi
  local code=0
  timeout --foreground 1800 "$@" || code=$? # in the foreground, so that Ctrl-C reaches it
  if [ "$code" -eq 130 ]; then exit 130; fi
  if [ "$code" -ne 0 ]; then
    failed+=("$*")
    return 1
  fi
}
# measured COMMAND...: append the lines that it prints to the file.
measured() { attempt "$python" -m lina_jax.benchmark "$@" >>"$lines"; }
# sweep COMMAND CONFIG BATCH... [-- FLAG...]: these batch sizes per device, until one fails.
sweep() {
  local command=$1 config=$2 batches=() mesh=()
  shift 2
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    batches+=("$1")
    shift
  done
  shift $(($# > 0))
  if [ "$devices" -gt 1 ]; then mesh=(--config.mesh.data=1 --config.mesh.fsdp=-1); fi
  for batch in "${batches[@]}"; do
    measured "$command" --config="$config" --batches=$((batch * devices)) "${mesh[@]}" "$@" || return 0
  done
}

attempt env JAX_DEFAULT_MATMUL_PRECISION=highest "$python" -m pytest tests/test_golden.py || true
attempt "$python" -m pytest tests/test_state.py tests/test_encoders.py -k bfloat16_ || true
attempt "$python" -m pytest tests/test_attention_kernel.py -k 'plain_path or many_tiles' || true
attempt "$python" -m pytest tests/test_gradients.py -k convolution || true

if [ "$accelerator" = cpu ]; then
  for config in configs/bench.py configs/bench.py:softmax; do
    measured train --config=$config || true
    measured sample --config=$config || true
  done
  measured attention || true
else
  devices=1
  if [ -z "$dry_run" ]; then devices=$("$python" -c 'import jax; print(jax.device_count())'); fi
  for kernel in xla pallas; do
    measured attention --tokens=320,1280,5120 --batches=8 --attention_kernel=$kernel || true
    sweep train configs/imagenet256_c2i.py:w1536 8 16 32 64 128 -- --config.model.attention_kernel=$kernel
    sweep train configs/t2i.py:256 8 16 32 64 -- --config.model.attention_kernel=$kernel
    sweep train configs/t2i.py:512 2 4 8 16 32 -- --config.model.attention_kernel=$kernel
    sweep train configs/t2i.py:1024 1 2 4 8 -- --config.model.attention_kernel=$kernel
  done
  if [ "$accelerator" = gpu ]; then
    # What unrolled layers are worth, and what they cost to compile.
    sweep train configs/t2i.py:256 8 32 -- --config.model.scan_layers=True --config.model.remat=dots
    sweep sample configs/t2i.py:1024 1 -- --config.model.scan_layers=False --autoencoder --repeats=3
  fi
  sweep sample configs/t2i.py:1024 1 8 -- --autoencoder --repeats=3
fi

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
