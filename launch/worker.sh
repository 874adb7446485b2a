#!/usr/bin/env bash
# What every machine of a run executes: set-up, accelerator flags, the command. The launchers for clusters call it, and
# the images of launch/Dockerfile start it.
#
# usage: launch/worker.sh [--dry-run] --accelerator=tpu|gpu|cpu [--setup=COMMAND] [--requirements=EXTRA]
#                         [--max_restarts=N] [--code_file=FILE] -- COMMAND...
#
#   --accelerator    tpu, gpu or cpu: whose flags to set
#   --setup          shell command to run first (mount a bucket, load modules); the command sees what it exports
#   --requirements   make the environment .venv with this extra of pyproject.toml (tpu, cuda), and use it
#   --max_restarts   how often to restart the command when it was preempted, stalled or killed by a signal; not after a
#                    SIGTERM, which is passed on. Default 0: the command replaces this script
#   --code_file      file for the last exit code
#   --dry-run        print what would run, and exit; run as a script, the command runs once
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

# Launchers pass everything as flags. LINA_* variables are meant for them alone: a batch job inherits them, and then
# both the job and each of its tasks would apply LINA_MAX_RESTARTS.
accelerator='' requirements='' code_file='' max_restarts=0 from_environment=''
read_arguments "accelerator requirements code_file" "$@"

finish() {
  local code=$1
  if [ "$code" -eq 124 ]; then code=1; fi # detached.sh returns 124 for a run that is at work
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
  max_restarts=0 # the inner script counts them
else
  trap 'finish 75' TERM # as in `setting_up`
  if [ -n "$requirements" ]; then make_environment .venv "$requirements" || finish $set_up_failed; fi
  accelerator_flags "$accelerator" || finish 2
  trap - TERM
fi
if [ "$max_restarts" -eq 0 ] && [ -z "$code_file" ]; then exec "${words[@]}"; fi

code=0
with_restarts "${words[@]}" || code=$?
finish "$code"
