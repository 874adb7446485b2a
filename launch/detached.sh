#!/usr/bin/env bash
# Start a worker that outlives this connection, or find it running; show its log; end with its exit code, or with 124
# where it is at work after half an hour: gcloud tells of a worker that was lost only when all connections have ended.
# usage: launch/detached.sh RUN ARGUMENTS...     (of worker.sh; RUN.pid, .log, .code and .lock are written here)
#
# A run that has ended is started anew where ../RUN.tgz, the code, has come since, or where it asks for that (75), as it
# does when its machine is shut down.
set -euo pipefail
run=$1
shift

# RUN.pid has the time of its start, too: after a restart of the machine, another process may have the number.
started() { cut -d' ' -f22 "/proc/$1/stat" 2>/dev/null; }
running() { read -r pid at <"$run.pid" && [ -n "$at" ] && [ "$(started "$pid")" = "$at" ]; } 2>/dev/null
exec {lock}>"$run.lock" # of calls at the same time one starts it
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
