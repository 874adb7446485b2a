#!/usr/bin/env bash
# Run on a Cloud TPU pod: request a queued resource, wait for it, copy the code to every worker, start and follow.
#
# usage: launch/tpu_pod.sh [--dry-run] --name=RUN --topology=v5e:16x16 --zone=ZONE [OPTIONS] -- train ARGUMENTS...
#
#   --name             name of the run, the queued resource and the TPU
#   --topology         one slice of v4, v5e, v5p or v6e, as lina_jax.plan takes it (several slices: launch/gke.sh)
#   --zone, --project  where the TPU is; default project: gcloud's own
#   --runtime_version  image of the TPU VMs; default: the one that suits the topology
#   --requirements     extra of pyproject.toml to install on the workers, default tpu; empty: the machine's own Python
#   --setup            shell command that each worker runs first: mount the bucket, set variables
#   --extra            more arguments for "queued-resources create": --extra='--spot --network=NAME'
#   --max_restarts     how often each worker may restart the command, and this script the run; default 100
#   --dry-run          print the program that would run, and exit
#
# Each option can also be given as LINA_NAME, LINA_ZONE, ... in the environment.
#
# Workers run independently of this script. If it is interrupted or the connection breaks, the run continues, and the
# same command follows it again. Each worker restarts the command when it ends with 75 (preempted and saved, stalled, or
# a peer is gone) or is killed by a signal; a worker whose machine was rebooted is found and started within half an
# hour. A preempted TPU VM disappears with its disk, and its queued resource is suspended for good: the script deletes
# it, requests another and starts the run there. The workdir must therefore be in a bucket. If gcloud itself fails, it
# is called again. When the run has ended, the TPU stays and costs money: the last line says how to delete it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

topology='' zone='' project='' runtime_version='' requirements=tpu
read_arguments "topology zone project runtime_version requirements" "$@"
need name topology zone
split_topology
case $tpu_type in
  v4) image='tpu-ubuntu2204-base' ;;
  v5litepod) image=v2-alpha-tpuv5-lite ;;
  v5p) image=v2-alpha-tpuv5 ;;
  v6e) image=v2-alpha-tpuv6e ;;
  *) refuse "--topology=$topology: there are no queued resources of $tpu_type; launch/gke.sh runs on it" ;;
esac

tpus="gcloud compute tpus"
where=(--zone="$zone" ${project:+--project="$project"})
queue() { quoted "$1" "$name" "${where[@]}" "${@:2}"; }
# The image's Python may be too old. On a machine that has just booted, updates hold apt's lock.
python='command -v python3.11 || { sudo add-apt-repository -y ppa:deadsnakes/ppa && '
python+='sudo apt-get -o DPkg::Lock::Timeout=600 install -y python3.11-venv; }'
prepare=${requirements:+$python}
if [ -n "$setup" ]; then prepare+="${prepare:+ && }{"$'\n'"$setup"$'\n'"}"; fi
start="mkdir -p $name && cd $name && "
# Do not unpack under a run that is at work, which launch/detached.sh recognises in the same way.
start+="{ { read -r pid at <$name.pid && [ -n \"\$at\" ] && "
start+="[ \"\$(cut -d' ' -f22 /proc/\$pid/stat)\" = \"\$at\" ]; } 2>/dev/null || tar -xzf ../$name.tgz; } && "
start+="bash launch/detached.sh $(quoted "$name" --accelerator=tpu --setup="$prepare" --requirements="$requirements" \
  --max_restarts="$max_restarts" -- "${words[@]}")"
# A record older than the archive is that of an earlier start.
record="[ $name/$name.code -nt $name.tgz ] && grep -H . $name/$name.code"
archive=${TMPDIR:-/tmp}/$name.tgz errors=${TMPDIR:-/tmp}/$name.err

perform gcloud "$(
  cat <<END
tar -C $(quoted "$root") --exclude=__pycache__ -czf $(quoted "$archive") \
lina_jax configs launch pyproject.toml requirements.txt README.md LICENSE || exit
# gcloud turns Ctrl-C into an ordinary failure.
trap 'exit 130' INT
$(declare -f restarts_on)
attempts=0 known=''
again() {
  if [ \$attempts -ge $max_restarts ]; then echo "$name: \$1; --max_restarts=$max_restarts reached" >&2 && exit 75; fi
  attempts=\$((attempts + 1))
  echo "$name: \$1; restart \$attempts of at most $max_restarts" >&2
}
pause() {
  echo "$name: \$1"
  sleep "\${LINA_POLL_SECONDS:-30}"
}
# gcloud's own failures use the same exit codes as mistakes; the run's code is in a worker's record. If one worker must
# not restart, the others would wait in vain.
end_with_workers() {
  local ended
  for ended in \$($tpus tpu-vm $(queue ssh --worker=all --command="$record") | sed -n 's,.*/$name\.code:,,p'); do
    [ \$ended -eq 0 ] || restarts_on \$ended || exit \$ended
  done
}
while :; do
  if ! state=\$($tpus queued-resources $(queue describe --format='value(state.state)') 2>$(quoted "$errors")); then
    # After any other failure the TPU may exist and be at work.
    if ! grep -q NOT_FOUND $(quoted "$errors"); then
      cat $(quoted "$errors") >&2
      [ -n "\$known" ] || exit 1 # no login, no project: it would say so for ever
      pause "gcloud does not say whether there is a TPU; asking again"
      continue
    fi
    state=NONE
  fi
  known=yes
  case \$state in
    NONE)
      # gcloud's stable commands can choose shapes of v4 only.
      ${tpus/gcloud/gcloud alpha} queued-resources $(queue create --node-id="$name" --type="$tpu_type" \
        --topology="$shape" --runtime-version="${runtime_version:-$image}") $extra || {
        code=\$?
        if [ \$attempts -eq 0 ]; then exit \$code; fi
        again "the request for a TPU ended with \$code"
        pause "waiting"
      }
      ;;
    ACTIVE)
      if $tpus tpu-vm $(quoted scp "$archive" "$name:$name.tgz" --worker=all "${where[@]}"); then
        # 124: still at work; the next call starts a worker that was lost meanwhile. A dead worker must not keep the
        # connection.
        code=124
        while [ \$code -eq 124 ]; do
          $tpus tpu-vm $(queue ssh --worker=all --ssh-flag=-oServerAliveInterval=30 --command="$start")
          code=\$?
          [ \$code -eq 0 ] || end_with_workers
        done
        if [ \$code -eq 0 ]; then break; fi
        again "ended with \$code"
      else
        again "copying the code failed"
      fi
      pause "waiting"
      ;;
    SUSPENDED)
      again "preempted"
      $tpus queued-resources $(queue delete --force --quiet) || pause "deletion failed"
      ;;
    FAILED)
      $tpus queued-resources $(queue describe) >&2
      echo "$name: the request failed; delete it before another: $tpus queued-resources $(queue delete --force)" >&2
      exit 1
      ;;
    *) pause "\$state" ;;
  esac
done
echo "$name: done; delete the TPU: $tpus queued-resources $(queue delete --force)"
END
)"
