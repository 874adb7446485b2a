#!/usr/bin/env bash
# Train and evaluate variants of configs/ablation.py, one after the other or as an array of SLURM jobs.
#
# usage: launch/study.sh [--dry-run] --name=STUDY --dir=DIR [OPTIONS] -- TRAINING FLAGS...
#
#   --name             name of the study and its jobs
#   --dir              directory of the runs, DIR/VARIANT-seedS; paths here are relative to the root of the repository
#   --normalizations   comma-separated, like the next ones; default division,subtraction
#   --convolutions     default none,conv
#   --gates            default none
#   --widths           default 128
#   --others           more variants, as configs/ablation.py names them: softmax-128,hybrid-division-conv-head-128
#   --seeds            default 0
#   --evaluate         flags for the evaluation of each run: --evaluate='--scenes=240'
#   --index            do only the run of this number, from 0, and exit with its exit code (75: call again)
#   --slurm            yes: submit an array of one-node jobs, and one that gathers the results, instead of running here
#   --gpus             GPUs per job, default 1
#   --partition        default: the cluster's
#   --time             limit of one start of a job, as sbatch takes it; the next start resumes the run
#   --grace            seconds of notice before that limit, default 120: enough to finish a step and save
#   --setup            shell command that each job runs first
#   --extra            more arguments for sbatch
#   --max_restarts     how often to restart a run, or with --slurm its job, that was preempted or killed, default 100
#   --dry-run          print what would run, and exit
#
# Each option can also be given as LINA_NAME, LINA_DIR, ... in the environment.
#
# All runs share the flags after --, such as --config.steps=2000 --config.data.path=DATA. Variants whose budgets or
# recipes then differ (as between widths up to 128 and widths from 768) are refused before anything is trained, with
# exit code 2; in an array, by each job.
#
# Call the same command again after an interruption: runs that were stopped resume, and complete ones are skipped. A run
# is complete when evaluation/complete.txt in its directory says that it was trained and evaluated with exactly these
# flags. With more steps it resumes, and is evaluated again; other changes are refused as by lina_jax.train. Runs that
# fail are named at the end. After the last run, `python -m lina_jax.evaluate --study=DIR` gathers them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

dir='' normalizations=division,subtraction convolutions=none,conv gates=none widths=128 others='' seeds=0
evaluate='' index='' slurm='' gpus=1
given=() command='' # all arguments but --dry-run, unless it belongs to the command
for argument; do
  if [ "$argument" = -- ]; then command=yes; fi
  case $command$argument in
    --dry-run | --dry_run) ;;
    *) given+=("$argument") ;;
  esac
done
read_arguments \
  "dir normalizations convolutions gates widths others seeds evaluate index slurm gpus partition time grace" "$@"
need name dir
whole gpus 1
batch_limits
if [ "$slurm" != yes ]; then
  for option in partition time setup extra; do
    [ -z "${!option}" ] || refuse "--$option=${!option}: only for SLURM jobs (--slurm=yes)"
  done
fi
cd "$root"

runs=()
for seed in ${seeds//,/ }; do
  whole seed 0
  for width in ${widths//,/ }; do
    for normalization in ${normalizations//,/ }; do
      for convolution in ${convolutions//,/ }; do
        for gate in ${gates//,/ }; do runs+=("$normalization-$convolution-$gate-$width $seed"); done
      done
    done
  done
  for other in ${others//,/ }; do runs+=("$other $seed"); done
done
[ ${#runs[@]} -gt 0 ] || refuse "no runs: --seeds and the variants must not be empty"

if [ "$slurm" = yes ] && [ -z "$index" ]; then
  cpus=$((8 * gpus)) # as in launch/slurm.sh, which says why srun needs them, too
  node="#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus"
  worker="srun --cpus-per-task=$cpus $(quoted launch/worker.sh --accelerator=gpu ${setup:+--setup="$setup"}) --"
  array=$(sbatch_with --parsable "$node
#SBATCH --array=0-$((${#runs[@]} - 1))
#SBATCH --output=$name-%A-%a.log" "LINA_INDEX=\$SLURM_ARRAY_TASK_ID $worker $(quoted launch/study.sh "${given[@]}")")
  # shellcheck disable=SC2016 # a variable of the program
  gather=$(sbatch_with '--dependency=afterany:"${array%%;*}"' "$node
#SBATCH --output=$name-%j.log" "$worker $(quoted evaluate "--study=$dir")")
  perform sbatch "array=\$($array
) || exit
echo \"Submitted array \${array%%;*}; once all its jobs have ended, the next job gathers the results\"
$gather"
  exit
fi

python=$(find_python) config=$root/configs/ablation.py
variants=("${runs[@]% *}") # of all runs, even if only one runs here
if [ -n "$index" ]; then
  whole index 0
  [ "$index" -lt ${#runs[@]} ] || refuse "--index=$index: there are ${#runs[@]} runs, from 0"
  runs=("${runs[$index]}") max_restarts=0 # the caller restarts it
fi
check=("$python" -m lina_jax.study "--config=$config" "--variants=$(IFS=, && echo "${variants[*]}")"
  "${words[@]/#/--flag=}")
if [ -n "$dry_run" ]; then quoted "${check[@]}"; else with_restarts "${check[@]}" || exit "${stopped:-$?}"; fi
read -ra measuring <<<"$evaluate"
failed=()
for run in "${runs[@]}"; do
  read -r variant seed <<<"$run"
  workdir=$dir/$variant-seed$seed
  train=("$python" -m lina_jax.train "--config=$config:$variant" "--workdir=$workdir"
    "--config.seed=$seed" "${words[@]}")
  judge=("$python" -m lina_jax.evaluate "--workdir=$workdir" ${measuring[@]+"${measuring[@]}"})
  record=$workdir/evaluation/complete.txt
  asked=$(quoted "$variant" "--config.seed=$seed" "${words[@]}" && quoted ${measuring[@]+"${measuring[@]}"})
  if [ -n "$dry_run" ]; then
    quoted "${train[@]}"
    quoted "${judge[@]}"
  elif [ -e "$workdir/evaluation/score.json" ] && [ "$(cat "$record" 2>/dev/null)" = "$asked" ]; then
    echo "$variant, seed $seed: complete, skipped"
  else
    echo "$variant, seed $seed"
    code=0
    {
      rm -f "$record" && with_restarts "${train[@]}" && with_restarts "${judge[@]}" &&
        printf '%s\n' "$asked" >"$record.partial" && mv "$record.partial" "$record"
    } || code=$?
    if [ -n "$stopped$index" ]; then exit "${stopped:-$code}"; fi
    case $code in
      0) ;;
      130 | 143) exit "$code" ;; # somebody stopped it, and so the study
      *) failed+=("$variant, seed $seed: exit code $code") ;;
    esac
  fi
done
if [ -z "$index" ]; then
  gather=("$python" -m lina_jax.evaluate "--study=$dir")
  if [ -n "$dry_run" ]; then quoted "${gather[@]}"; else "${gather[@]}" || failed+=("gathering: exit code $?"); fi
fi
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
