#!/usr/bin/env bash
# The quick start, on a fresh machine with Python 3.11 or 3.12 and two cores: launch/quickstart.sh [OUTPUT_DIR]
#
# Makes an environment (.venv), writes a small simulated robot data set, trains the debug recipe on it through the
# three stages, and shows what came of it: losses, held-out action error against two trivial baselines, closed-loop
# success over 20 episodes, a plot and a GIF. The last line says the result. Run again, it goes on where it stopped.
# The output goes to OUTPUT_DIR, else $QUICKSTART_DIR, else runs/quickstart.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
out=$(realpath -m "${1:-${QUICKSTART_DIR:-$root/runs/quickstart}}")
cd "$root"
version=$out/data/lara_tabletop/1.0.0

bash launch/make_env.sh .venv
# shellcheck disable=SC1091  # written by python -m venv
source .venv/bin/activate
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # huge pages: a step takes less time (docs/performance.md)

if [ ! -f "$version/dataset_info.json" ]; then
  lara data make-tabletop --episodes 200 --workers 2 --out "$out/data"
fi
lara train --config configs/debug.py --workdir "$out" "--config.data.path=$version"
lara eval --workdir "$out" --suite tabletop --episodes 20 --gif "$out/episodes.gif" --json >"$out/eval.json"
python -m lara_jax.evals.quickstart_report --workdir "$out"
