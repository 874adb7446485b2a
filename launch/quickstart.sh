#!/usr/bin/env bash
# From a fresh clone to pictures: environment, data, training, samples, score. Takes about ten minutes on two CPU cores.
# usage: launch/quickstart.sh [--config.any.field=value ...]     (arguments are passed on to training)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [[ " $* " =~ " -h "|" --help " ]]; then usage; fi
cd "$root"
started=$SECONDS
stage() { printf '\n[%3d s] %s\n' $((SECONDS - started)) "$1"; }

make_environment .venv
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
out=quickstart

stage "rendering captioned scenes"
python -m lina_jax.prepare --source=shapes --out=$out/data --train=20000 --validation=500
stage "training a text-to-image model (curves: tensorboard --logdir $out/run)"
python -m lina_jax.train --config=configs/shapes_t2i.py --workdir=$out/run --config.data.path=$out/data "$@"
stage "drawing and judging samples"
python -m lina_jax.evaluate --workdir=$out/run --scenes=240 --out=$out
cp $out/run/loss.png $out/loss.png
stage "done"
echo "pictures:   $out/samples.png"
echo "loss curve: $out/loss.png"
echo "score:      $out/score.json"
echo "draw your own: .venv/bin/python -m lina_jax.sample --workdir=$out/run --prompt='a large red circle' --out=$out/mine"
