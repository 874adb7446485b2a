#!/usr/bin/env bash
# Run on TPU slices of a GKE cluster, as an xpk workload, from an image built with launch/Dockerfile.
#
# usage: launch/gke.sh [--dry-run] --name=RUN --topology=v5p:4x4x4 --cluster=CLUSTER --image=IMAGE [OPTIONS]
#                      -- train ARGUMENTS...
#
#   --name             name of the run and its workload
#   --topology         one slice of v4, v5e, v5p, v6e or tpu7x, as lina_jax.plan takes it
#   --slices           number of slices, default 1; the config's replica axis runs over slices
#   --cluster          name of the cluster, made with "xpk cluster create"
#   --zone, --project  where the cluster is; default: gcloud's own
#   --image            the image: docker build -f launch/Dockerfile --target=tpu -t IMAGE . && docker push IMAGE
#   --setup            shell command that each container runs first
#   --extra            more arguments for "xpk workload create": --extra='--spot --priority=low'
#   --grace            seconds from the notice of an eviction to the kill, default 120
#   --max_restarts     how often the whole job may be restarted, default 100
#   --dry-run          print the command that would run, and exit
#
# Each option can also be given as LINA_NAME, LINA_ZONE, ... in the environment.
#
# When one container ends with 75, all are restarted together. xpk adds the codes 42 and 127 to 255: deaths by signals,
# on which the other launchers restart, too, but also 130 and 143, on which they do not. On 1 or 2 the job ends.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

topology='' slices=1 cluster='' zone='' project='' image='' grace=120
read_arguments "topology slices cluster zone project image grace" "$@"
need name topology cluster image
split_topology
whole slices 1
whole grace 0

# exec: the notice of an eviction goes to the process that xpk started, which must be the training itself.
run="exec $(quoted /opt/lina_jax/launch/worker.sh --accelerator=tpu ${setup:+--setup="$setup"} -- "${words[@]}")"
[[ $run != *$'\n'* ]] || refuse "the command and --setup must be one line each"

perform xpk "$(quoted xpk workload create --workload="$name" --cluster="$cluster" \
  ${zone:+--zone="$zone"} ${project:+--project="$project"} --tpu-type="$tpu_type-$shape" --num-slices="$slices" \
  --docker-image="$image" --max-restarts="$max_restarts" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds="$grace" --command="$run") $extra"
