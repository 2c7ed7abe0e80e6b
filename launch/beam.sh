#!/usr/bin/env bash
# Runs a Beam job in an environment of its own: launch/beam.sh JOB --input ... --output ... [pipeline options]
#
# JOB is a module of data_pipelines/convert (rlds_to_array_record, lerobot_to_rlds, annotate_job, stats_job); what it
# takes, `launch/beam.sh JOB --help` says. All else goes to Beam: without --runner the job runs on this machine.
#
#   bash launch/beam.sh rlds_to_array_record --input data/bridge_dataset/1.0.0 --output data/bridge_steps \
#     --direct_num_workers 8 --direct_running_mode multi_processing
#   BEAM_EXTRAS='apache-beam[gcp] gcsfs' bash launch/beam.sh stats_job --input gs://bucket/bridge_dataset/1.0.0 \
#     --output gs://bucket/bridge_statistics.json --runner DataflowRunner --project P --region R \
#     --temp_location gs://bucket/tmp --sdk_container_image R-docker.pkg.dev/P/lara/beam
#   bash launch/beam.sh annotate_job --input /shared/bridge_dataset/1.0.0 --output /shared/bridge.jsonl \
#     --runner FlinkRunner --flink_master host:8081 --environment_type DOCKER --environment_config IMAGE
#   bash launch/beam.sh stats_job ... --runner SparkRunner --spark_master_url spark://host:7077
#
# Workers on other machines need the package and its requirements: an image made of Beam's own, such as
#   FROM apache/beam_python3.11_sdk:2.77.0
#   COPY . /lara_jax
#   RUN pip install -r /lara_jax/requirements/convert.txt && pip install --no-deps /lara_jax
# and they must reach input and output: buckets or a shared disk.
#
# BEAM_ENV       where the environment is (default .venv-beam)
# BEAM_EXTRAS    more packages, in versions that fit to requirements/convert.txt: apache-beam[gcp] for Dataflow and gs://
#                in Beam, gcsfs and s3fs for gs:// and s3:// in our own readers
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "usage: launch/beam.sh JOB --input ... --output ... [pipeline options]" >&2
  exit 2
fi
job=$1
shift
root=$(realpath "$(dirname "$0")/..")
environment=$(realpath -m "${BEAM_ENV:-$root/.venv-beam}")
jobs=$(cd "$root/data_pipelines/convert" && grep -lF 'pipeline.call(main)' -- *.py | sed 's/\.py$//')
if ! grep -qxF -- "$job" <<<"$jobs"; then
  echo "no job $job; there are: ${jobs//$'\n'/, }" >&2
  exit 2
fi

bash "$root/launch/make_env.sh" --alone "$environment" requirements/convert.txt
if [ -n "${BEAM_EXTRAS:-}" ]; then
  read -ra extras <<<"$BEAM_EXTRAS"
  "$environment/bin/python" -m pip install --quiet --constraint "$root/requirements/convert.txt" "${extras[@]}" >&2
fi
export JAX_PLATFORMS=cpu
exec "$environment/bin/python" -m "data_pipelines.convert.$job" "$@"
