#!/usr/bin/env bash
# GKE by XPK: launch/gke_xpk.sh COMMAND [NAME] [OPTIONS] [-- ...]
#
#   cluster --cluster C --tpu-type v5p-64 [--num-slices 2] --spot | --on-demand | --reservation R [-- XPK's further flags]
#   run NAME --cluster C --tpu-type v5p-64 [--num-slices 2] --image IMAGE [--max-restarts 50] -- COMMAND...
#   status NAME --cluster C
#   logs NAME [--follow]           of the first worker of the first slice
#   delete NAME --cluster C        the run, not the cluster
#
# --dry-run prints the commands instead of running them. --project and --zone are XPK's own; without them gcloud's
# configuration holds. XPK makes the cluster with Kueue and JobSet, queues the run as a JobSet and GKE tells each pod
# its place in the slice and among the slices, where JAX finds it.
#
# A pod that is taken away gets SIGTERM, saves, and ends with status 1; so does one whose run failed. Either way the
# JobSet starts all pods again, --max-restarts times, and they resume from the last checkpoint. A wrong call (status 2)
# ends the run. kubectl must be set to the cluster for `logs`: gcloud container clusters get-credentials C
#
# Source of the flags: XPK 1.16, src/xpk/parser (pip install xpk).
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"
# shellcheck source=launch/xla_flags.sh
source "$root/launch/xla_flags.sh"

COMMANDS=(cluster run status logs delete)
NAMELESS=(cluster)

read_command "$@"
set -- "${arguments[@]}"

cluster='' tpu='' slices=1 image='' restarts=50 capacity=() place=() follow=() rest=()
while [ $# -gt 0 ]; do
  case $1 in
    --cluster) allowed "$1" cluster run status delete; value "$@"; cluster=$2; shift ;;
    --tpu-type) allowed "$1" cluster run; value "$@"; tpu=$2; shift ;;
    --num-slices) allowed "$1" cluster run; value "$@"; slices=$2; shift ;;
    --image) allowed "$1" run; value "$@"; image=$2; shift ;;
    --max-restarts) allowed "$1" run; value "$@"; restarts=$2; shift ;;
    --spot | --on-demand) allowed "$1" cluster; capacity+=("$1") ;;
    --reservation) allowed "$1" cluster; value "$@"; capacity+=("$1=$2"); shift ;;
    --project | --zone) allowed "$1" cluster run status delete; value "$@"; place+=("$1=$2"); shift ;;
    --follow) allowed "$1" logs; follow=(--follow) ;;
    --dry-run) dry_run=1 ;;
    --) allowed "what follows --" cluster run; rest=("${@:2}"); break ;;
    *) fail "no option '$1'; launch/gke_xpk.sh --help lists them" ;;
  esac
  shift
done

read_tpus() {
  needed --cluster "$cluster"
  needed --tpu-type "$tpu"
  matches --tpu-type "$tpu" '(v4|v5litepod|v5p|v6e|tpu7x)-[1-9][0-9]*(x[1-9][0-9]*){0,2}' \
    "v4-N, v5litepod-N, v5p-N, v6e-N or tpu7x-N, N a number or a topology such as 4x4x4"
  matches --num-slices "$slices" '[1-9][0-9]*' "a whole number from 1"
}

do_cluster() {
  read_tpus
  [ ${#capacity[@]} -eq 1 ] || fail "exactly one of --spot, --on-demand, --reservation must be given;" \
    "there are ${#capacity[@]}: ${capacity[*]}"
  run xpk cluster create --cluster="$cluster" --tpu-type="$tpu" --num-slices="$slices" "${capacity[@]}" "${place[@]}" "${rest[@]}"
}

do_run() {
  read_tpus
  needed --image "$image"
  matches --max-restarts "$restarts" '[0-9]+' "a whole number from 0"
  [ ${#rest[@]} -gt 0 ] || fail "the command is missing: run NAME ... -- COMMAND..."
  local platform=${tpu%%-*} variable settings=()
  xla_flags "${platform/v5litepod/v5e}" "$slices"
  for variable in "${xla_environment[@]}"; do settings+=("--env=$variable"); done
  # exec: XPK signals the shell that it starts, which must be the command itself.
  run xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$tpu" --num-slices="$slices" \
    --docker-image="$image" "${settings[@]}" --max-restarts="$restarts" --restart-on-exit-codes=1 \
    --termination-grace-period-seconds=300 "${place[@]}" "--command=exec $(quoted "${rest[@]}")"
}

do_status() {
  needed --cluster "$cluster"
  run xpk workload list --cluster="$cluster" --filter-by-job="$name" "${place[@]}"
}

do_logs() {
  run kubectl logs --all-containers --prefix --tail=1000 "${follow[@]}" \
    "--selector=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

do_delete() {
  needed --cluster "$cluster"
  run xpk workload delete --workload="$name" --cluster="$cluster" "${place[@]}"
}

"do_$command"
