#!/usr/bin/env bash
# Writes requirements.txt and requirements/*.txt anew from pyproject.toml and requirements/rlds.in. Needs `uv`.
#
# requirements.txt pins the package and its simulator; dev, lerobot, cloud, torch, tpu and gpu hold only what their extra adds on
# top of it, so that any of them installs together with it. One set of versions serves Python 3.11 and 3.12: what
# 3.11 resolves to is resolved again for 3.12, and a difference is an error.
# convert and rlds hold complete environments: their packages contradict requirements.txt.
set -euo pipefail
cd "$(dirname "$0")/.."

resolve() { # python, output, arguments of uv...
  local python=$1 output=$2
  shift 2
  uv pip compile --quiet --no-header --annotation-style line --python-platform x86_64-manylinux_2_31 \
    --python-version "$python" --output-file "$output" "$@"
}

header() { # file, sentence: the file gets a first line that says what it is, and loses all comments but "via"
  { printf '# %s\n# Written by requirements/compile.sh.\n' "$2"; grep -vE '^(#|$)' "$1"; } >"$1.tmp"
  mv "$1.tmp" "$1"
}

package() { # file, sentence, arguments of uv...
  local file=$1 sentence=$2
  shift 2
  rm -f "$file"
  resolve 3.11 "$file" --extra sim "$@" pyproject.toml
  resolve 3.12 "$file.312" --extra sim --constraint "$file" "$@" pyproject.toml
  diff <(sed 's/ *#.*//' "$file") <(sed 's/ *#.*//' "$file.312")
  rm "$file.312"
  header "$file" "$sentence"
}

package requirements.txt "The package and its built-in simulator: pip install -r requirements.txt -e ."

pinned=()
while read -r name; do pinned+=(--no-emit-package "$name"); done < <(grep -oE '^[^ #=]+' requirements.txt)
extra() { # name, sentence, arguments of uv...
  local name=$1 sentence=$2
  shift 2
  package "requirements/$name.txt" "$sentence" \
    --extra "$name" --constraint requirements.txt "${pinned[@]}" "$@"
}
extra dev "Tests, linters, types; beside requirements.txt."
extra lerobot "LeRobot sets: video and parquet; beside requirements.txt."
extra cloud "Data on gs://, s3:// and http://; beside requirements.txt."
extra tpu "JAX on TPU; beside requirements.txt."
extra gpu "JAX on NVIDIA GPUs, CUDA 12 from pip; beside requirements.txt."
# What torch needs on Linux are CUDA libraries that only some of its builds come with; pip adds them where needed.
cuda=()
for name in $(uv pip compile --quiet --no-header --no-annotate --python-platform x86_64-manylinux_2_31 \
  --python-version 3.11 --extra torch pyproject.toml | grep -oE '^(cuda-|nvidia-|triton)[^=]*'); do
  cuda+=(--no-emit-package "$name")
done
extra torch "PyTorch and transformers, for weights both ways and their tests; beside requirements.txt." "${cuda[@]}"

resolve 3.11 requirements/convert.txt --extra convert pyproject.toml
header requirements/convert.txt "Beam jobs: an environment of its own (apache-beam wants an older pyarrow and protobuf)."
resolve 3.11 requirements/rlds.txt requirements/rlds.in
header requirements/rlds.txt "The rlds package: an environment of its own (TensorFlow 2.15, dm-reverb, Python 3.11)."
