#!/usr/bin/env bash
# Run N processes on this machine, on its GPUs or on fake CPU devices: to try what a pod will do, or for a GPU node.
#
# usage: launch/local.sh [--dry-run] --name=RUN [--processes=N] [OPTIONS] -- train ARGUMENTS...
#
#   --name             name of the run; prefix of the lines that the launcher prints
#   --processes        number of processes, default 2
#   --accelerator      cpu or gpu; default: gpu if nvidia-smi finds one
#   --devices          devices per process; default: 1 fake CPU device, or an equal share of the GPUs
#   --port             port of the coordinator; default: a free one
#   --setup            shell command to run first
#   --grace            seconds from SIGTERM (or Ctrl-C) to SIGKILL when a process fails or all must end, default 120
#   --max_restarts     how often to restart all processes when one ends with 75 or is killed, default 100
#   --dry-run          print the commands of the processes, and exit; run as a script, they run once
#
# Each option can also be given as LINA_NAME, LINA_PROCESSES, ... in the environment.
#
# --coordinator, --processes and --process_id are added to the command. SIGTERM and SIGINT are passed on to all
# processes, which then save and end; so they do when the terminal closes, unless nohup runs this script. When a process
# ends with 75, or by a signal, all are ended and restarted (not on 130 and 143, which mean that somebody stopped it).
# Any other failure ends all, with its code.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

processes=2 accelerator='' devices='' port='' grace=120
read_arguments "processes accelerator devices port grace" "$@"
need name
case "${words[*]:0:4} " in
  "python -m lina_jax.convert "* | "python -m lina_jax.plan "*) refuse "${words[2]#*.} runs in one process" ;;
  "python -m lina_jax.benchmark attention "* | "python -m lina_jax.benchmark data "*)
    refuse "benchmark ${words[3]} runs in one process"
    ;;
esac
[ -z "$extra" ] || refuse "--extra=$extra: no other command runs here that could take it"
whole processes 1
[ -z "$devices" ] || whole devices 1
whole grace 0
if [ -n "$port" ]; then
  whole port 1
  [ "$port" -lt 65536 ] || refuse "--port=$port: expected a number up to 65535"
fi
if [ -n "$setup" ] && [ -z "$dry_run" ]; then
  setting_up name processes accelerator devices port grace max_restarts
  exec "${words[@]}"
fi
if [ -z "$accelerator" ]; then
  if [ -n "${CUDA_VISIBLE_DEVICES-all}" ] && nvidia-smi -L >/dev/null 2>&1; then accelerator=gpu; else accelerator=cpu; fi
fi
accelerator_flags "$accelerator"

gpus=''
case $accelerator in
  cpu) devices=${devices:-1} ;;
  gpu)
    gpus=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, -)} || gpus=''
    count=$(tr , '\n' <<<"$gpus" | grep -c .) || refuse "--accelerator=gpu: there is no GPU"
    devices=${devices:-$((count / processes))}
    [ $((devices * processes)) -le "$count" ] && [ "$devices" -gt 0 ] ||
      refuse "--processes=$processes with --devices=$devices: there are only $count GPUs"
    ;;
  *) refuse "--accelerator=$accelerator: expected cpu or gpu" ;;
esac

python=$(find_python)
if [ -n "$dry_run" ]; then
  if [ -n "$setup" ]; then echo "eval $(quoted "$setup") && cd $(quoted "$PWD") || exit"; fi
  echo "source $(quoted "$root/launch/environment.sh") && accelerator_flags $accelerator"
fi
exec "$python" "$root/launch/processes.py" --name="$name" --processes="$processes" --devices="$devices" --gpus="$gpus" \
  --port="${port:-0}" --grace="$grace" --max_restarts="$max_restarts" ${dry_run:+--dry_run} -- "${words[@]}"
