#!/usr/bin/env bash
# Run on the GPUs of a SLURM cluster: submit a batch job that requeues itself when the run must be restarted.
#
# usage: launch/slurm.sh [--dry-run] --name=RUN --nodes=N [OPTIONS] -- train ARGUMENTS...
#
#   --name             name of the run and its job; the log is NAME-JOB.log in the current directory
#   --nodes            number of nodes
#   --gpus_per_node    all GPUs of a node, default 8
#   --cpus_per_task    CPUs per GPU, default 8, which every node with 8 GPUs has; readers are threads (data.threads)
#   --partition        default: the cluster's
#   --time             limit of one start, as sbatch takes it (24:00:00); the next start resumes the run
#   --setup            shell command that each task runs first: module load ..., source .venv/bin/activate
#   --extra            more arguments for sbatch: --extra='--account=NAME --mem=0'
#   --grace            seconds of notice before the time limit, default 120: enough to finish a step and save
#   --max_restarts     how often the job may be requeued, default 100
#   --dry-run          print the job and the command that would run, and exit
#
# Each option can also be given as LINA_NAME, LINA_NODES, ... in the environment.
#
# This directory and its environment (pip install -e '.[cuda]') must be visible on all nodes. Each GPU has its own task:
# under SLURM, JAX gives a task the GPU of its number on the node and no other (prepare takes that one, too), and NCCL
# and data loading get a process for each GPU. The tasks get SIGTERM before the time limit, save, and end with 75; then
# the job requeues itself, as it does when one of them was killed (137). If a node fails, or the cluster preempts the
# job, SLURM itself requeues it (--requeue). scancel --name=RUN stops a run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

nodes='' gpus_per_node=8 cpus_per_task=8
read_arguments "nodes gpus_per_node cpus_per_task partition time grace" "$@"
need name nodes
whole nodes 1
whole gpus_per_node 1
whole cpus_per_task 1
batch_limits

worker=$(quoted launch/worker.sh --accelerator=gpu ${setup:+--setup="$setup"} -- "${words[@]}")
[[ $worker != *$'\n'* ]] || refuse "the command and --setup must be one line each"

# A task that ends early must not end others that are still saving, neither at once nor after the cluster's WaitTime; a
# task that hangs is ended by its watchdog. Since SLURM 22.05, srun does not inherit sbatch's --cpus-per-task.
perform sbatch "$(sbatch_with '' "#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus_per_node
#SBATCH --gpus-per-node=$gpus_per_node
#SBATCH --cpus-per-task=$cpus_per_task
#SBATCH --output=$name-%j.log" \
  "srun --kill-on-bad-exit=0 --wait=0 --cpus-per-task=$cpus_per_task --gpu-bind=none $worker")"
