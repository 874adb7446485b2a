#!/usr/bin/env bash
# Start a worker that outlives this connection, or find it running, and follow its log. The exit code is the worker's,
# or 124 if it is still at work after half an hour: gcloud reports a lost worker only when all connections have ended.
# usage: launch/detached.sh RUN ARGUMENTS...     (of worker.sh; RUN.pid, .log, .code and .lock are written here)
#
# A run that has ended is started again if the code, ../RUN.tgz, was copied after it ended, or if it ended with 75, as
# it does when its machine is shut down.
set -euo pipefail
run=$1
shift

# RUN.pid also has the start time of the process: after a reboot, another process may have the same number.
started() { cut -d' ' -f22 "/proc/$1/stat" 2>/dev/null; }
running() { read -r pid at <"$run.pid" && [ -n "$at" ] && [ "$(started "$pid")" = "$at" ]; } 2>/dev/null
exec {lock}>"$run.lock" # of several calls at the same time, one starts it
flock "$lock"
if ! running && { ! [ "$run.code" -nt "../$run.tgz" ] || [ "$(cat "$run.code")" = 75 ]; }; then
  rm -f "$run.code"
  touch "$run.log" # tail needs it at once
  setsid nohup bash "$(dirname "${BASH_SOURCE[0]}")/worker.sh" --code_file="$PWD/$run.code" "$@" \
    >>"$run.log" 2>&1 </dev/null {lock}>&- &
  echo "$! $(started $!)" >"$run.pid"
fi
exec {lock}>&-
follow=()
if running; then follow=(-f --pid="$pid"); fi
timeout "${LINA_FOLLOW_SECONDS:-1800}" tail -n 20 "${follow[@]}" "$run.log" || true
if running; then exit 124; fi
exit "$(cat "$run.code" 2>/dev/null || echo 137)" # no code: it was killed
