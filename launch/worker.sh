#!/usr/bin/env bash
# What every machine of a run does: set-up, flags of its accelerator, the command. The other launchers call it; it is
# also what the images of launch/Dockerfile start.
#
# usage: launch/worker.sh [--dry-run] --accelerator=tpu|gpu|cpu [--setup=COMMAND] [--requirements=EXTRA]
#                         [--max_restarts=N] [--code_file=FILE] -- COMMAND...
#
#   --setup          shell command to run first (mount a bucket, load modules); what it exports, the command sees
#   --requirements   make the environment .venv with this extra of pyproject.toml (tpu, cuda) and use it
#   --max_restarts   start the command again that often when it was preempted, stalled, or killed by a signal; not
#                    after a SIGTERM, which is passed on. Default 0: the command takes this script's place
#   --code_file      write the last exit code there
#   --dry-run        print what would run, and end; as a script the command runs once
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

# Launchers give all by flags. What stands in the environment was meant for them: a job of sbatch inherits it, and both,
# the job and each task, would count LINA_MAX_RESTARTS.
accelerator='' requirements='' code_file='' max_restarts=0 from_environment=''
read_arguments "accelerator requirements code_file" "$@"

finish() {
  local code=$1
  if [ "$code" -eq 124 ]; then code=1; fi # of detached.sh it says that the run is at work
  if [ -n "$code_file" ]; then echo "$code" >"$code_file"; fi
  exit "$code"
}

if [ -n "$dry_run" ]; then
  accelerator_flags "$accelerator" || exit 2
  here="cd $(quoted "$root")"
  echo "$here${setup:+ && eval $(quoted "$setup") && $here} &&"
  echo "  source launch/environment.sh${requirements:+ && make_environment .venv $(quoted "$requirements")} &&"
  echo "  accelerator_flags $accelerator || exit"
  quoted "${words[@]}"
  exit
fi
cd "$root"
if [ -n "$setup" ]; then
  setting_up accelerator requirements max_restarts
  max_restarts=0 # which the inner one counts
else
  trap 'finish 75' TERM # as while setting up
  if [ -n "$requirements" ]; then make_environment .venv "$requirements" || finish $set_up_failed; fi
  accelerator_flags "$accelerator" || finish 2
  trap - TERM
fi
if [ "$max_restarts" -eq 0 ] && [ -z "$code_file" ]; then exec "${words[@]}"; fi

code=0
with_restarts "${words[@]}" || code=$?
finish "$code"
