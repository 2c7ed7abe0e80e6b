#!/usr/bin/env bash
# TPU VMs by queued resources: launch/tpu_vm.sh COMMAND NAME [OPTIONS] [-- ...]
#
#   create NAME --accelerator-type v5p-64 [--node-count 2] [--spot | --reserved] [-- gcloud's further flags]
#   status NAME                    state of the request: WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, ...
#   sync NAME [--revision HEAD]    sends a revision of this repository to all workers and makes its environment there
#   sync NAME --pip REQUIREMENT    installs a release instead, say 'lara-jax[tpu,cloud]==0.1.0'
#   run NAME --accelerator-type v5p-64 [--node-count 2] -- COMMAND...    starts it on all workers and returns
#   logs NAME [--follow] [--node 0] [--worker 0]
#   workers NAME                   on each worker: is the command active, how often it started, its last exit status
#   stop NAME                      SIGTERM on all workers: the run saves and ends
#   delete NAME [-- gcloud's further flags]
#
# --dry-run prints the commands instead of running them. --node-count N above 1 makes N slices, joined by the
# data-centre network. --topology 2x2x4 --type v4 can stand for --accelerator-type. --runtime-version is the machine's
# image, chosen by type unless given. --project and --zone are gcloud's own; without them its configuration holds.
# --internal-ip or --tunnel-through-iap say how ssh gets there. Before, once: ssh-add ~/.ssh/google_compute_engine
#
# On each worker `run` makes a transient systemd service, lara. systemd keeps it when ssh goes, sends it SIGTERM at
# `stop` and when the machine shuts down (a preempted spot machine has 30 s), keeps its log, and starts it again when it
# failed: all workers fail together, start together and resume from the last checkpoint. A wrong call (exit status 2)
# is not repeated, nor is anything after ten starts in an hour. JAX finds coordinator, processes and slices in the
# machines' metadata.
#
# Source of the flags: gcloud compute tpus queued-resources create|ssh|scp --help (Google Cloud SDK 528);
# cloud.google.com/tpu/docs/runtimes for the images.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"
# shellcheck source=launch/xla_flags.sh
source "$root/launch/xla_flags.sh"

COMMANDS=(create status sync run logs workers stop delete)
UV=https://astral.sh/uv/0.13.9/install.sh # the images' own Python is too old
PYTHON=3.11

read_command "$@"
set -- "${arguments[@]}"

accelerator='' topology='' type='' image='' slices=1 capacity=() place=() reach=()
revision='' requirement='' follow=() node=0 worker=0 rest=()

while [ $# -gt 0 ]; do
  case $1 in
    --accelerator-type) allowed "$1" create run; value "$@"; accelerator=$2; shift ;;
    --topology) allowed "$1" create run; value "$@"; topology=$2; shift ;;
    --type) allowed "$1" create run; value "$@"; type=$2; shift ;;
    --node-count) allowed "$1" create run; value "$@"; slices=$2; shift ;;
    --runtime-version) allowed "$1" create; value "$@"; image=$2; shift ;;
    --spot | --reserved) allowed "$1" create; capacity+=("$1") ;;
    --revision) allowed "$1" sync; value "$@"; revision=$2; shift ;;
    --pip) allowed "$1" sync; value "$@"; requirement=$2; shift ;;
    --follow) allowed "$1" logs; follow=(--follow) ;;
    --node) allowed "$1" logs; value "$@"; node=$2; shift ;;
    --worker) allowed "$1" logs; value "$@"; worker=$2; shift ;;
    --project | --zone) value "$@"; place+=("$1=$2"); shift ;;
    --internal-ip | --tunnel-through-iap) allowed "$1" sync run logs workers stop; reach+=("$1") ;;
    --dry-run) dry_run=1 ;;
    --) allowed "what follows --" create run delete; rest=("${@:2}"); break ;;
    *) fail "no option '$1'; launch/tpu_vm.sh --help lists them" ;;
  esac
  shift
done

platform='' # of xla_flags.sh
read_accelerator() {
  if [ -n "$accelerator" ]; then
    [ -z "$topology$type" ] || fail "--accelerator-type and --topology with --type exclude each other"
    matches --accelerator-type "$accelerator" '(v4|v5litepod|v5p|v6e)-[1-9][0-9]*' \
      "v4-N, v5litepod-N, v5p-N or v6e-N (tpu7x is had through GKE only)"
    platform=${accelerator%-*}
  else
    [ -n "$topology" ] && [ -n "$type" ] || fail "--accelerator-type is missing (or --topology with --type)"
    one_of --type "$type" v4 v5litepod v5p v6e
    matches --topology "$topology" '[1-9][0-9]*x[1-9][0-9]*(x[1-9][0-9]*)?' "like 4x4 or 2x2x4"
    platform=$type
  fi
  platform=${platform/v5litepod/v5e}
  matches --node-count "$slices" '[1-9][0-9]*' "a whole number from 1"
}

gcloud_tpu() { # command of queued-resources, arguments...
  run gcloud compute tpus queued-resources "$@" "${place[@]}"
}

on_workers() { # nodes, workers, command line for their shell
  gcloud_tpu ssh "$name" --node="$1" --worker="$2" --batch-size=all --command="$3" "${reach[@]}"
}

do_create() {
  read_accelerator
  [ ${#capacity[@]} -le 1 ] || fail "--spot and --reserved exclude each other"
  if [ -z "$image" ]; then
    case $platform in
      v4) image=tpu-ubuntu2204-base ;;
      v5e) image=v2-alpha-tpuv5-lite ;;
      v5p) image=v2-alpha-tpuv5 ;;
      v6e) image=v2-alpha-tpuv6e ;;
    esac
  fi
  local what=("--accelerator-type=$accelerator") nodes=("--node-id=$name")
  [ -n "$accelerator" ] || what=("--type=$type" "--topology=$topology")
  [ "$slices" = 1 ] || nodes=("--node-count=$slices" "--node-prefix=$name")
  gcloud_tpu create "$name" "${what[@]}" "--runtime-version=$image" "${nodes[@]}" "${capacity[@]}" "${rest[@]}"
}

do_status() {
  gcloud_tpu describe "$name" '--format=value(state.state)'
}

# Both ways end with the command `lara` in ~/lara_jax/.venv. Huge pages: libtpu starts and stops faster with them on
# v5e and newer (JAX warns where they are off).
do_sync() {
  [ -z "$requirement" ] || [ -z "$revision" ] || fail "--pip and --revision exclude each other"
  # shellcheck disable=SC2016  # for the workers' shells
  local uv='uv=$HOME/.local/bin/uv' install
  local steps=("$uv" "{ [ -x \"\$uv\" ] || curl -LsSf $UV | sh; }" 'mkdir -p ~/lara_jax' 'cd ~/lara_jax')
  if [ -n "$requirement" ]; then
    printf -v install %q "$requirement"
    steps+=("\"\$uv\" venv --allow-existing --python $PYTHON .venv"
      "\"\$uv\" pip install --python .venv/bin/python $install")
  else
    if [ -z "$revision" ]; then
      revision=HEAD
      [ -z "$(git -C "$root" status --porcelain)" ] || fail "there are changes that are not committed, and only" \
        "revisions are sent: commit them, or leave them out with --revision HEAD"
    fi
    git -C "$root" rev-parse --quiet --verify "$revision^{commit}" >/dev/null || fail "--revision is '$revision';" \
      "it must be a revision of $root"
    local archive=${TMPDIR:-/tmp}/lara_jax.tar.gz
    run git -C "$root" archive --format=tar.gz --output="$archive" "$revision"
    gcloud_tpu scp "$archive" "$name:lara_jax.tar.gz" --node=all --worker=all --batch-size=all "${reach[@]}"
    # Files that the last revision had and this one has not must not stay.
    steps+=("{ [ ! -f .sent ] || xargs -d '\\n' rm -f <.sent; }" 'tar -xzf ~/lara_jax.tar.gz'
      "tar -tzf ~/lara_jax.tar.gz | grep -v '/\$' >.sent" "\"\$uv\" python install $PYTHON"
      "PYTHON=\$(\"\$uv\" python find --managed-python $PYTHON) bash launch/make_env.sh .venv requirements/tpu.txt requirements/cloud.txt")
  fi
  steps+=('echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null')
  local line
  printf -v line ' && %s' "${steps[@]}"
  on_workers all all "set -o pipefail; ${line# && }"
}

do_run() {
  read_accelerator
  [ ${#rest[@]} -gt 0 ] || fail "the command is missing: run NAME ... -- COMMAND..."
  # Of the launcher's own shell nothing is passed on but flags that were set on purpose.
  xla_flags "$platform" "$slices"
  local variable settings=()
  for variable in "${xla_environment[@]}"; do settings+=("--setenv=$variable"); done
  # vfio pins the memory it transfers: libtpu needs the limit on locked memory lifted, which ssh has and services have not.
  local properties=(--property=LimitMEMLOCK=infinity --property=LimitNOFILE=65536
    --property=TimeoutStopSec=300
    --property=Restart=on-failure --property=RestartSec=15 --property=RestartPreventExitStatus=2
    --property=StartLimitIntervalSec=3600 --property=StartLimitBurst=10)
  # shellcheck disable=SC2016  # for the workers' shells
  local there='--uid="$(id -u)" --working-directory="$HOME/lara_jax" --setenv=PATH="$HOME/lara_jax/.venv/bin:$PATH"'
  on_workers all all "sudo systemd-run --unit=lara --collect $there $(quoted "${settings[@]}" "${properties[@]}") -- /usr/bin/env $(quoted "${rest[@]}")"
}

do_logs() {
  matches --node "$node" '[0-9]+' "a whole number from 0"
  matches --worker "$worker" '[0-9]+' "a whole number from 0"
  on_workers "$node" "$worker" "$(quoted sudo journalctl --unit=lara --output=cat --lines=1000 "${follow[@]}")"
}

do_workers() {
  on_workers all all 'hostname; systemctl show lara --property=ActiveState,NRestarts,ExecMainStatus'
}

do_stop() {
  on_workers all all 'sudo systemctl stop lara'
}

do_delete() {
  gcloud_tpu delete "$name" --force "${rest[@]}"
}

"do_$command"
