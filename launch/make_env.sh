#!/usr/bin/env bash
# Makes or refreshes a virtual environment: launch/make_env.sh [--alone] DIR [requirements file...]
#
# Installs requirements.txt, the given files and the package in editable mode. What was installed is noted with its
# SHA-256 in DIR/installed.sha256, so a second call with unchanged files does nothing. Paths are relative to the
# repository's root. --alone leaves requirements.txt out: convert.txt and rlds.txt are whole environments that
# contradict it.
# PYTHON names the interpreter (default python3); 3.11 and 3.12 are supported.
set -euo pipefail

base=(requirements.txt)
if [ "${1:-}" = --alone ]; then
  base=()
  shift
fi
if [ $# -lt 1 ]; then
  echo "usage: launch/make_env.sh [--alone] DIR [requirements file...]" >&2
  exit 2
fi
environment=$1
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
requirements=("${base[@]}" "${@:2}")
noted=$environment/installed.sha256
wanted=$(sha256sum pyproject.toml "${requirements[@]}")

if [ -f "$noted" ] && ! grep -qvxFf "$noted" <<<"$wanted"; then
  exit 0
fi

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
  3.11 | 3.12) ;;
  *)
    echo "$python is Python $version; lara_jax needs 3.11 or 3.12 (set PYTHON to one)." >&2
    exit 2
    ;;
esac

echo "Making the environment $environment with Python $version (a few minutes the first time)." >&2
[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
rm -f "$noted"
"$environment/bin/python" -m pip install --quiet "${requirements[@]/#/--requirement=}" >&2
"$environment/bin/python" -m pip install --quiet --no-deps --editable . >&2
echo "$wanted" >"$noted"
