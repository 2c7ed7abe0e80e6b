#!/usr/bin/env bash
# Builds an image of this repository: launch/docker/build.sh tpu|cuda IMAGE [--user root] [--push] [--dry-run]
#
# IMAGE is the whole name: us-docker.pkg.dev/PROJECT/REPOSITORY/lara:2026-11-23. Processes run as the user lara unless
# --user says root. --push sends it to its registry (once before: gcloud auth configure-docker us-docker.pkg.dev).
# --dry-run prints the commands.
set -euo pipefail
root=$(realpath "$(dirname "$0")/../..")
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

if [ $# -eq 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
  usage "$0"
  exit $(($# == 0 ? 2 : 0))
fi
needed IMAGE "${2:-}"
platform=$1 image=$2
shift 2
one_of PLATFORM "$platform" tpu cuda
matches IMAGE "$image" '[a-z0-9]([a-z0-9._:/-]*[a-z0-9])?(:[A-Za-z0-9_.-]+)?' "a registry's name: HOST/PROJECT/NAME:TAG"

user=lara push=0
while [ $# -gt 0 ]; do
  case $1 in
    --user) value "$@"; user=$2; shift ;;
    --push) push=1 ;;
    --dry-run) dry_run=1 ;;
    *) fail "no option '$1'; there are --user, --push, --dry-run" ;;
  esac
  shift
done
one_of --user "$user" lara root

run docker build --platform=linux/amd64 --file="$root/launch/docker/Dockerfile.$platform" --build-arg=RUN_AS="$user" \
  --tag="$image" "$root"
[ "$push" = 0 ] || run docker push "$image"
