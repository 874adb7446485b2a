# Sourced by the launchers: arguments, quoting, dry runs, restarts, SLURM jobs.
#
# All launchers are called in the same way:
#
#   launch/WHERE.sh [--dry-run] --name=RUN [--OPTION=VALUE ...] -- COMMAND...
#
# COMMAND is an entry point of lina_jax (train, sample, evaluate, prepare, convert, benchmark, plan) with its arguments,
# or any other command line. local.sh adds flags to it, so it takes only commands that run in many processes. Each
# option can also come from the environment: LINA_ZONE=... instead of --zone=... . The shell variable of an option has
# the option's name; the value that a launcher gives it before `read_arguments` is the default.

# shellcheck disable=SC2034 # the launchers read these variables and those that `split_topology` sets
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
name='' setup='' extra='' topology='' partition='' time='' grace=120 max_restarts=100 dry_run='' from_environment=yes
words=() child='' stopped='' interrupted=''
# EX_CONFIG. Tasks that wait for a machine whose set-up failed end with 75, and srun returns the highest code: this one.
set_up_failed=78

# restarts_on CODE: whether to restart a run that ended with this code. 75: it was preempted and saved, its watchdog
# ended it, or a peer is gone. Above 128: a signal killed it, such as SIGKILL (137) on a host that is out of memory; but
# 130 and 143 (SIGINT, SIGTERM) mean that somebody stopped it. Anything else needs a person. launch/processes.py has the
# same rule; programs that run elsewhere contain this function.
restarts_on() { [ "$1" -eq 75 ] || { [ "$1" -gt 128 ] && [ "$1" -ne 130 ] && [ "$1" -ne 143 ]; }; }

# quoted WORD...: the words as one line that a shell reads back as the same words.
quoted() {
  local word line='' apostrophe="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$apostrophe}'" ;;
    esac
    line+=${line:+ }$word
  done
  printf '%s\n' "$line"
}

# read_arguments "OPTION..." ARGUMENT...: set the variables of the options, and `words` to the command after --.
read_arguments() {
  local known=" name setup extra max_restarts $1 " option variable
  shift
  for option in $known; do
    variable=LINA_$(tr '[:lower:]' '[:upper:]' <<<"$option")
    if [ -n "$from_environment" ] && [ -n "${!variable-}" ]; then printf -v "$option" %s "${!variable}"; fi
  done
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage ;;
      --dry-run | --dry_run) dry_run=yes ;;
      --)
        shift
        words=("$@")
        break
        ;;
      --*=*)
        option=${1%%=*} option=${option#--} option=${option//-/_}
        [[ $known == *" $option "* ]] || refuse "unknown option --$option, expected one of: ${known# }"
        printf -v "$option" %s "${1#*=}"
        ;;
      --*) refuse "$1 needs a value: $1=...; options of the command go after --" ;;
      *) refuse "unexpected argument '$1': the command to run goes after --" ;;
    esac
    shift
  done
  [ ${#words[@]} -gt 0 ] || refuse "no command: for example -- train --config=configs/t2i.py:256 --workdir=WORKDIR"
  case ${words[0]} in
    train | sample | evaluate | prepare | convert | benchmark | plan)
      words=(python -m "lina_jax.${words[0]}" "${words[@]:1}")
      ;;
  esac
  whole max_restarts 0
}

# need OPTION...: refuse if one is missing. The run's name must be valid for TPU VMs, Kubernetes and files alike.
need() {
  local option
  for option; do
    [ -n "${!option}" ] || refuse "--$option=... is missing (see --help)"
  done
  [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    refuse "--name=$name: expected up to 40 of a-z, 0-9 and -, starting with a letter and not ending with -"
}

# whole OPTION LEAST: refuse unless the option is a whole number, at least LEAST.
whole() {
  [[ ${!1} =~ ^(0|[1-9][0-9]{0,8})$ ]] && [ "${!1}" -ge "$2" ] || refuse "--$1=${!1}: expected a whole number from $2"
}

# split_topology: split --topology=v5e:16x16, as lina_jax.plan takes it, into `tpu_type` (v5litepod), `shape` (16x16).
split_topology() {
  local edge='[1-9][0-9]{0,2}'
  [[ $topology =~ ^(v5e|v6e):($edge(x$edge))$ || $topology =~ ^(v4|v5p|tpu7x):($edge(x$edge){2})$ ]] ||
    refuse "--topology=$topology: expected v5e or v6e with two dimensions, as in v5e:16x16," \
      "or v4, v5p or tpu7x with three, as in v5p:4x4x4 (several slices: launch/gke.sh --slices=N)"
  tpu_type=${BASH_REMATCH[1]/v5e/v5litepod} shape=${BASH_REMATCH[2]}
}

# setting_up OPTION...: make `words` a shell of its own that runs the set-up, then this script with these options and
# the command, without --setup. The script sees variables that the set-up exports and limits that it sets, nothing else.
setting_up() {
  local option given=()
  for option; do given+=("--$option=${!option}"); done
  words=(bash -c "trap 'exit 75' TERM # preempted before there is a command that could save
trap 'code=\$?
[ \$code -eq 75 ] || [ \$code -gt 128 ] || { echo \"error: the set-up exited its shell with \$code\" >&2; exit $set_up_failed; }' EXIT
eval $(quoted "$setup") || { echo 'error: the set-up failed' >&2; exit $set_up_failed; }
trap - EXIT
cd $(quoted "$PWD") || exit
exec $(quoted env -u LINA_SETUP bash "$root/launch/${0##*/}" "${given[@]}" -- "${words[@]}")")
}

# with_restarts COMMAND...: run it, and restart it while `restarts_on` its exit code, at most `max_restarts` times.
# SIGTERM is passed on to it, and Ctrl-C as SIGTERM, because a shell's background jobs ignore SIGINT. After either it is
# not restarted: if the signal killed it (143), the code is `stopped` (75, after Ctrl-C 130), otherwise its own.
with_restarts() {
  local code='' restarts=0
  trap 'stop 75' TERM
  trap 'stop 130' INT
  while [ -z "$stopped" ]; do
    "$@" &
    child=$!
    if [ -n "$stopped" ]; then stop "$stopped"; fi # the signal came before the child's id was known
    while
      code=0 interrupted=''
      wait "$child" || code=$?
      [ -n "$interrupted" ] # then a signal ended `wait`, and the child is still running
    do :; done
    child=''
    if [ -n "$stopped" ] && [ "$code" -eq 143 ]; then code=$stopped; fi # it had no signal handler yet: nothing to save
    if [ -n "$stopped" ] || ! restarts_on "$code"; then break; fi
    if [ "$restarts" -ge "$max_restarts" ]; then
      if [ "$restarts" -gt 0 ]; then echo "ended with $code after $restarts restarts, the maximum allowed" >&2; fi
      break
    fi
    restarts=$((restarts + 1))
    echo "ended with $code: restart $restarts of at most $max_restarts" >&2
  done
  trap - TERM INT
  return "${code:-$stopped}"
}

stop() {
  stopped=$1 interrupted=yes
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}

# batch_limits: refuse a --time that sbatch does not accept, and a --grace beyond what its --signal accepts.
batch_limits() {
  [[ $time =~ ^([0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}|UNLIMITED|INFINITE|)$ ]] ||
    refuse "--time=$time: expected MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]]" \
      "or UNLIMITED"
  whole grace 0
  [ "$grace" -le 65535 ] || refuse "--grace=$grace: SLURM takes up to 65535 seconds"
}

# sbatch_with OPTIONS LINES COMMAND: print a program that submits COMMAND, an srun, as the job `name`, with OPTIONS and
# --extra as sbatch's options and LINES of #SBATCH. The tasks get SIGTERM before the time limit. The job requeues itself
# if `restarts_on` srun's exit code, the highest of the tasks', or if the tasks alone were asked to end.
sbatch_with() {
  cat <<END
sbatch ${1:+$1 }$extra <<'END_OF_JOB'
#!/usr/bin/env bash
#SBATCH --job-name=$name
$2
${partition:+#SBATCH --partition=$partition
}${time:+#SBATCH --time=$time
}#SBATCH --signal=TERM@$grace
#SBATCH --requeue
#SBATCH --open-mode=append

$(declare -f restarts_on)
cd $(quoted "$root") || exit
# SLURM signals the batch shell itself on scancel and on its own requeueing: then there is nothing to do here.
stopped=
trap 'stopped=yes' TERM
$3
code=\$?
# A SIGTERM that only the tasks got was the warning before the time limit; some were still importing.
if [ \$code -eq 143 ] && [ -z "\$stopped" ]; then code=75; fi
if ! restarts_on \$code || [ -n "\$stopped" ]; then exit \$code; fi
restarts=\${SLURM_RESTART_COUNT:-0}
if [ "\$restarts" -ge $max_restarts ]; then
  echo "ended with \$code after \$restarts restarts, the maximum allowed" >&2
  exit \$code
fi
echo "ended with \$code: restart \$((restarts + 1)) of at most $max_restarts" >&2
# The job id of an array element is that of the whole array, and would requeue all elements.
scontrol requeue "\${SLURM_ARRAY_JOB_ID:-\$SLURM_JOB_ID}\${SLURM_ARRAY_TASK_ID:+_\$SLURM_ARRAY_TASK_ID}"
END_OF_JOB
END
}

# perform TOOL PROGRAM: run the program, which calls the tool, in a shell, or print the same text for --dry-run.
perform() {
  if [ -n "$dry_run" ]; then
    printf '%s\n' "$2"
  else
    command -v "$1" >/dev/null || refuse "there is no $1 on this machine (--dry-run prints what would run)"
    exec bash -c "$2"
  fi
}
