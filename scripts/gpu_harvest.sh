#!/usr/bin/env bash
# All that a GPU can tell, in three calls of under 8 minutes each, for a machine rented by the minute:
#
#   OUT=results scripts/gpu_harvest.sh part1     versions, build, tests of the kernels, of the model; ops in CUDA graphs
#   OUT=results scripts/gpu_harvest.sh part2     ops against PyTorch, decoding, three kernels under ncu
#   OUT=results scripts/gpu_harvest.sh part3     training steps, memcheck, tests of more than 2^31 elements
#   scripts/gpu_harvest.sh build                 only build
#   scripts/gpu_harvest.sh all                   the three parts, each item with four times its time
#
# Needs bash, a Python (PYTHON, default python3) with torch, triton, pytest, pytest-benchmark and what builds the
# package, and nvcc; no network, no make. What was done is left out when a part is called again (its marks are in STATE,
# default build/harvest). After every item OUT holds its log, the table of items, and the numbers, which go into
# benchmarks/results/CARD.json, row by row: put that file back there before the next part on another machine. The table
# of items is printed last.
#   DRY=1        lists the items of a part with their limits and commands
#   REHEARSE=1   on a machine without a GPU: the same commands at smoke size; what needs the card is skipped
#   WHEELS=DIR   pure Python packages to be put on the path first (such as mamba-ssm's without its CUDA code)
root=$(realpath "$(dirname "$0")/..") || exit
STATE=$(realpath -m "${STATE:-$root/build/harvest}")
OUT=$(realpath -m "${OUT:-$STATE}")
export STATE
cd "$root" || exit
source scripts/items.sh
PYTHON=${PYTHON:-python3}
export PYTHON PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=2 HNET_CUDA=ON
SELF=scripts/gpu_harvest.sh
CARD='import sys, torch; torch.cuda.is_available() or sys.exit(f"{sys.executable}: torch {torch.__version__} sees no CUDA device"); '

# --- items that are more than one command; each can be called by its name ---------------------------------------------

versions() {
  for tool in nvidia-smi nvcc g++ cmake ninja ncu compute-sanitizer make; do type -P $tool || echo "$tool: not found"; done
  nvidia-smi
  nvcc --version
  "$PYTHON" -m pip list 2>/dev/null |
    grep -iE '^(torch|triton|numpy|safetensors|click|rich|pytest.*|scikit.build.core|pybind11|mamba.*|causal.*|flash.*|einops) '
  "$PYTHON" -c 'import platform, torch, triton; print("Python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)'
}

# Editable, for the card that is here. HNET_CUDA=ON: without the CUDA kernels it is an error, not a line in a log.
build() {
  local install=(-m pip --disable-pip-version-check --no-input -v) arch
  local here=(--no-index --no-build-isolation --no-deps)
  if [ -n "${REHEARSE:-}" ]; then
    command -v nvcc >/dev/null || { echo "no nvcc to rehearse with"; return 77; }
    "$PYTHON" -c 'import pybind11, scikit_build_core' 2>/dev/null || { echo "no pybind11 and scikit-build-core to rehearse with"; return 77; }
    CMAKE_ARGS="${CMAKE_ARGS:-} -DCMAKE_CUDA_ARCHITECTURES=90-real" \
      "$PYTHON" "${install[@]}" wheel "${here[@]}" -w "$STATE/wheel" -C build-dir="$STATE/cmake" .
    return
  fi
  arch=$("$PYTHON" -c "$CARD"'print("%d%d-real" % torch.cuda.get_device_capability())') || return
  CMAKE_ARGS="${CMAKE_ARGS:-} -DCMAKE_CUDA_ARCHITECTURES=$arch" "$PYTHON" "${install[@]}" install "${here[@]}" -e . || return
  "$PYTHON" -m hnet_kernels.info || return
  "$PYTHON" -c 'from hnet_kernels import _C; assert _C.has_cuda(), "built without CUDA"; print("CUDA kernels for", _C.cuda_archs())'
}

# One launch of each of three kernels. The clocks stay as they are.
ncu() {
  local tool once=("$PYTHON" -m benchmarks.stage)
  tool=$(PATH=$PATH:/usr/local/cuda/bin type -P ncu) || { echo "ncu is not installed"; return 77; }
  "${once[@]}" || return # Triton compiles outside the tool
  for kernel in _route_fwd_kernel _dechunk_fwd_kernel _dechunk_bwd_rows_kernel; do
    "$tool" --clock-control none --section SpeedOfLight --section LaunchStats --section Occupancy \
      --section MemoryWorkloadAnalysis --kernel-name "$kernel" --launch-count 1 "${once[@]}" || return
  done
}

# --- parts -------------------------------------------------------------------------------------------------------------

keep() { # what was measured so far leaves the machine
  cp benchmarks/results/"$card"*.json "$OUT" 2>/dev/null
  return 0
}

part1() {
  begin part1 "$BUDGET"
  item versions 20 $SELF versions
  item build 90 $SELF build
  item kernels 175 "${TESTS[@]}" "${WORKERS[@]}" tests/kernels -k "not reference-gpu and not two_to_the_31"
  item model 115 "${TESTS[@]}" "${WORKERS[@]}" tests --ignore tests/kernels --ignore tests/gpu/test_large.py \
    --ignore tests/gpu/test_sanitizer.py
  item graphs 70 "${BENCH[@]}" benchmarks/test_graphs.py
  finish
}

part2() {
  begin part2 "$BUDGET"
  item build 90 $SELF build
  item ops 145 "${BENCH[@]}" benchmarks/test_gpu_ops.py benchmarks/test_round_trip.py --compile none \
    -k "T8192-D1024-chunk6 or T65536-D1024-chunk6 or T262144-D1024-chunk6 or T262144-D2048-chunk6 or cpu or cuda_graph or decode"
  item compiled 85 "${BENCH[@]}" benchmarks/test_gpu_ops.py benchmarks/test_round_trip.py --compile all -k T65536-D1024-chunk6
  item decode 70 "${BENCH[@]}" benchmarks/test_decode.py
  item ncu 80 $SELF ncu
  finish
}

part3() {
  begin part3 "$BUDGET"
  item build 90 $SELF build
  item steps 215 "${BENCH[@]}" benchmarks/test_train_step.py -k forms
  item memcheck 75 "${TESTS[@]}" tests/gpu/test_sanitizer.py -k memcheck
  item large 90 "${TESTS[@]}" tests/gpu/test_large.py tests/kernels/test_cuda.py -k "test_large or two_to_the_31"
  finish
}

usage() {
  sed -n '2,/^root/{/^#/s/^# \?//p}' $SELF >&2
  exit 2
}

parts=()
if [ -n "${REHEARSE:-}" ]; then BUDGET=${BUDGET:-100000} PATIENCE=${PATIENCE:-4}; fi # here are fewer cores
case ${1:-} in
  versions | build | ncu) "$1"; exit ;;
  part1 | part2 | part3) parts=("$1") BUDGET=${BUDGET:-460} ;;
  all) parts=(part1 part2 part3) BUDGET=${BUDGET:-100000} PATIENCE=${PATIENCE:-4} ;;
  *) usage ;;
esac

if [ -n "${WHEELS:-}" ] && [ -z "${DRY:-}" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$STATE/site" "$WHEELS"/*.whl || exit
  export PYTHONPATH=$STATE/site${PYTHONPATH:+:$PYTHONPATH}
fi
card=rehearsal
TESTS=("$PYTHON" -m pytest -q -m gpu)
BENCH=("$PYTHON" -m pytest -q -s --benchmark-disable)
if [ -n "${REHEARSE:-}" ]; then
  BENCH+=(--smoke)
else
  if [ -z "${DRY:-}" ]; then card=$("$PYTHON" -c "$CARD"'from benchmarks.harness import slug; print(slug(torch.cuda.get_device_name()))') || exit; fi
  BENCH+=(-m gpu --results card --add)
fi
read -ra WORKERS < <("$PYTHON" -c 'import os, xdist; print("-n", min(12, os.cpu_count()))' 2>/dev/null)
status=0
for part in "${parts[@]}"; do "$part" || status=1; done
exit $status
