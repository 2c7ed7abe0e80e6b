#!/usr/bin/env bash
# Runs the tests on two cores; arguments go to pytest. Uses the active virtual environment, else makes .venv with everything in it.
#
# LARA_TORCH=0 leaves PyTorch out of that environment; the tests that need it then skip and say so.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
  requirements=(requirements/dev.txt)
  [ "${LARA_TORCH:-1}" = 0 ] || requirements+=(requirements/torch.txt)
  bash launch/make_env.sh .venv "${requirements[@]}"
  # shellcheck disable=SC1091  # written by python -m venv
  source .venv/bin/activate
fi
exec python -m pytest -n 2 --dist loadfile "$@"
