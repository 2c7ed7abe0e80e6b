#!/usr/bin/env bash
# The compiler's flags and the runtime's variables of each platform: the one place where they are.
#
#   bash launch/xla_flags.sh PLATFORM [SLICES]     prints NAME=VALUE lines
#   source launch/xla_flags.sh                     defines `xla_flags PLATFORM [SLICES]`, which fills the array
#                                                  xla_environment; export "${xla_environment[@]}" sets them
#
# PLATFORM is v4, v5e, v5p, v6e, tpu7x or cuda; SLICES (default 1) the number of TPU slices joined by the data-centre
# network. LIBTPU_INIT_ARGS and XLA_FLAGS that are set already are kept and come last, so that they win. A flag is here
# because it departs from a default and somebody says why; all names are known to the pinned libtpu and jaxlib, which
# refuse unknown ones. Nothing here was measured on a chip yet.

# All-gathers of the next layer's weights start while this layer computes: a scanned decoder under FSDP is such a loop.
# Costs the memory of the layer that is fetched ahead (a scan of 8 MLP layers of 67 MB each, compiled for v5e:4x4, needs
# 678 instead of 474 MB of temporaries); take it out where memory is what fails.
# Source: OpenXLA, docs/flags_guidance.md, "Pipelining": off by default, suggested together.
TPU_FLAGS=(
  --xla_should_allow_loop_variant_parameter_in_chain=enabled
  --xla_should_add_loop_invariant_op_in_chain=enabled
  --xla_tpu_enable_ici_ag_pipelining=true
)
# All-reduces of gradients run beside the computation; only v5e needs to be told.
# Source: OpenXLA, docs/flags_guidance.md, "v5e/Async": off by default, suggested.
V5E_FLAGS=(
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true
)
# Slices exchange gradients over the data-centre network, which is slow: these all-reduces are spread over the backward
# pass, also where their sizes differ. Source: MaxText, benchmarks/xla_flags_library.py, DATA_PARALLEL_OVERLAP.
SLICES_FLAGS=(
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)
# Left out: xla_tpu_scoped_vmem_limit_kib=98304, which MaxText sets on v6e for dense models. The same scan, compiled for
# v6e:4x4, then needs 28 % more temporaries; what it gains only a chip can tell.

# Collectives overlap with computation, also across the iterations of a scan.
# Source: NVIDIA JAX-Toolbox, docs/GPU_performance.md, "Optimization level".
CUDA_FLAGS=(
  --xla_gpu_enable_latency_hiding_scheduler=true
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_all_reduce=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
)
# Collectives are merged up to the size of one decoder layer: large ones use the links better. A layer of the 4b decoder
# has 101 M parameters, 202 MB in bfloat16. Source: the same page, "FSDP communication".
CUDA_FLAGS+=(
  --xla_gpu_all_gather_combine_threshold_bytes=268435456
  --xla_gpu_all_reduce_combine_threshold_bytes=268435456
  --xla_gpu_reduce_scatter_combine_threshold_bytes=268435456
)
CUDA_VARIABLES=(
  # JAX takes 75 % of the memory unless told; CUDA and NCCL need about a tenth. Source: the same page, "memory".
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
  # NCCL says what fails, and nothing else. Source: NCCL user guide, "Environment variables".
  NCCL_DEBUG=WARN
)
# Left out: CUDA_DEVICE_MAX_CONNECTIONS=1. The same page advises it on Hopper and warns of it on Blackwell.

XLA_PLATFORMS=(v4 v5e v5p v6e tpu7x cuda)

xla_flags() { # platform, slices
  local platform=$1 slices=${2:-1}
  local flags=("${TPU_FLAGS[@]}")
  case $platform in
    v5e) flags+=("${V5E_FLAGS[@]}") ;;
    v4 | v5p | v6e | tpu7x) ;;
    cuda)
      xla_environment=("XLA_FLAGS=${CUDA_FLAGS[*]}${XLA_FLAGS:+ $XLA_FLAGS}" "${CUDA_VARIABLES[@]}")
      return
      ;;
    *)
      echo "xla_flags.sh: PLATFORM is '$platform'; it must be one of: ${XLA_PLATFORMS[*]}" >&2
      return 2
      ;;
  esac
  if ! [[ $slices =~ ^[1-9][0-9]*$ ]]; then
    echo "xla_flags.sh: SLICES is '$slices'; it must be a whole number from 1" >&2
    return 2
  fi
  [ "$slices" = 1 ] || flags+=("${SLICES_FLAGS[@]}")
  # shellcheck disable=SC2034  # read by those who source this file
  xla_environment=("LIBTPU_INIT_ARGS=${flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}")
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: launch/xla_flags.sh PLATFORM [SLICES]" >&2
    exit 2
  fi
  xla_flags "$@"
  printf '%s\n' "${xla_environment[@]}"
fi
