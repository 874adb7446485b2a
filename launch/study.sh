#!/usr/bin/env bash
# Train and evaluate the variants of configs/ablation.py, one after the other or as an array of SLURM jobs.
#
# usage: launch/study.sh [--dry-run] --name=STUDY --dir=DIR [OPTIONS] -- TRAINING FLAGS...
#
#   --name             of the study and its jobs
#   --dir              where the runs go, DIR/VARIANT-seedS; like other paths here, from the root of the repository
#   --normalizations   default division,subtraction
#   --convolutions     default none,conv
#   --gates            default none
#   --widths           default 128
#   --others           more variants, as configs/ablation.py names them: softmax-128,hybrid-division-conv-head-128
#   --seeds            default 0
#   --evaluate         flags for the evaluation of each run: --evaluate='--scenes=240'
#   --index            do the run of this number alone, from 0
#   --slurm            yes: submit an array of jobs, each of one node, instead of running here
#   --gpus             of each job, default 1
#   --partition        default: the cluster's
#   --time             limit of one start of a job, as sbatch takes it
#   --setup            shell command that each job runs first
#   --extra            more arguments for sbatch
#   --max_restarts     of a run that ended with 75, default 100
#   --dry-run          print what would run, and end
#
# Each option can also be given as LINA_NAME, LINA_DIR, ... in the environment. All runs have the training flags after --
# in common, and so the same budget: --config.steps=2000 --config.data.path=DATA. A run that was evaluated is skipped;
# one that was stopped goes on; one that fails is named at the end. After the last run, here,
# `python -m lina_jax.evaluate --study=DIR` gathers them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

dir='' normalizations=division,subtraction convolutions=none,conv gates=none widths=128 others='' seeds=0
evaluate='' index='' slurm='' gpus=1 partition='' time=''
given=()
for argument; do
  if [ "$argument" != --dry-run ]; then given+=("$argument"); fi
done
read_arguments "dir normalizations convolutions gates widths others seeds evaluate index slurm gpus partition time" "$@"
need name dir
whole gpus 1
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
  perform "$(
    cat <<END
sbatch $extra <<'END_OF_JOB'
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --array=0-$((${#runs[@]} - 1))
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=$gpus
${partition:+#SBATCH --partition=$partition
}${time:+#SBATCH --time=$time
}#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$name-%A-%a.log

cd $(quoted "$root") || exit
${setup:+$setup
}export LINA_INDEX=\$SLURM_ARRAY_TASK_ID
exec $(quoted launch/study.sh "${given[@]}")
END_OF_JOB
END
  )"
  exit
fi

# with_restarts COMMAND...: again while it ends with 75 or 134.
with_restarts() {
  local code restarts=0
  while true; do
    code=0
    "$@" || code=$?
    if ! restarts_on "$code" || [ "$restarts" -ge "$max_restarts" ]; then return "$code"; fi
    restarts=$((restarts + 1))
  done
}

python=$(find_python)
if [ -n "$index" ]; then
  whole index 0
  [ "$index" -lt ${#runs[@]} ] || refuse "--index=$index: there are ${#runs[@]} runs, from 0"
  runs=("${runs[$index]}")
fi
read -ra measuring <<<"$evaluate"
failed=()
for run in "${runs[@]}"; do
  read -r variant seed <<<"$run"
  workdir=$dir/$variant-seed$seed
  train=("$python" -m lina_jax.train "--config=$root/configs/ablation.py:$variant" "--workdir=$workdir"
    "--config.seed=$seed" "${words[@]}")
  judge=("$python" -m lina_jax.evaluate "--workdir=$workdir" ${measuring[@]+"${measuring[@]}"})
  if [ -n "$dry_run" ]; then
    quoted "${train[@]}"
    quoted "${judge[@]}"
  elif [ -e "$workdir/evaluation/score.json" ]; then
    echo "$variant, seed $seed: complete, skipped"
  else
    echo "$variant, seed $seed"
    { with_restarts "${train[@]}" && with_restarts "${judge[@]}"; } || {
      code=$?
      case $code in 130 | 143) exit "$code" ;; esac # stopped by somebody: so is the study
      failed+=("$variant, seed $seed: exit code $code")
    }
  fi
done
if [ -z "$index" ]; then
  gather=("$python" -m lina_jax.evaluate "--study=$dir")
  if [ -n "$dry_run" ]; then quoted "${gather[@]}"; else "${gather[@]}"; fi
fi
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
