#!/usr/bin/env bash
# Everything that a machine with a GPU is for, in one command: builds the library with its CUDA
# kernels, runs bench/gpu.py, compute-sanitizer on small shapes in every regime, and the GPU tests;
# then tables and a picture. What hangs is ended. No network.
#
#   bench/gpu.sh [--dry-run] [--budget SECONDS] [--out DIRECTORY] [--built]
#
# --built: the library is there already. The budget is the benchmark's, 480 by default; the rest
# takes a few minutes. --dry-run needs no GPU: Triton's interpreter, and tiny shapes. PYTHON
# (python3) has torch, triton, setuptools, ninja.
set -euo pipefail

dry= budget=480 out= built=
while [[ $# -gt 0 ]]; do
  case $1 in
    --dry-run) dry=1 ;;
    --built) built=1 ;;
    --budget) budget=$2; shift ;;
    --out) out=$2; shift ;;
    *) echo "usage: bench/gpu.sh [--dry-run] [--budget SECONDS] [--out DIRECTORY] [--built]" >&2; exit 2 ;;
  esac
  shift
done
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${out:-$(mktemp -d)}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

echo "== build"
# Without an nvcc it warns, and Triton's kernels are what there is to measure.
[[ -n $built ]] || RNNKERN_BUILD=1 "$python" setup.py -q build_ext --inplace

echo "== benchmark"
# First, because it checks what it times, and the time on a GPU may end.
status=0
timeout $((budget + 300)) "$python" bench/gpu.py ${dry:+--dry-run} --budget "$budget" \
  --out "$out/gpu.jsonl" || status=$?
"$python" bench/report.py "$out/gpu.jsonl" >"$out/gpu.md"
if "$python" -c "import matplotlib" 2>/dev/null; then
  "$python" bench/report.py "$out/gpu.jsonl" --picture "$out/gpu.png" >/dev/null
fi

echo "== what a step is made of"
nvcc=$(command -v nvcc || command -v /usr/local/cuda/bin/nvcc || true)
if [[ -n $dry || -z $nvcc ]]; then
  echo "not run: it needs a GPU and nvcc"
else
  # Of Hopper's instructions; elsewhere it says that it cannot.
  "$nvcc" -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -Icsrc/cuda bench/gpu_micro.cu -o "$out/micro" &&
    timeout 120 "$out/micro" | tee "$out/micro.jsonl" || status=$?
  rm -f "$out/micro"
fi

# From here on nothing is timed, so that what can runs side by side.
echo "== compute-sanitizer"
# memcheck of our kernels alone, of either backend: to look at torch's takes much longer. (racecheck
# died of an error of its own when told to.)
ours=()
for name in scan_kernel step_kernel table_kernel; do ours+=(--kernel-name "kns=$name"); done
sanitize() {  # tool, backend, regime or nothing
  local log="$logs/$1-${3:-$2}" which=()
  [[ $1 == racecheck ]] || which=("${ours[@]}")
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 RNNKERN_CUDA_REGIME=${3:-} timeout 900 compute-sanitizer \
    --tool "$1" --error-exitcode 9 "${which[@]}" "$python" bench/gpu.py --small --backend "$2" >"$log" 2>&1 ||
    { echo "$1, ${3:-$2}: exit status $?"; tail -n 20 "$log"; false; }
  echo "$1, ${3:-$2}: $(grep '^========= ' "$log" | tail -n 1)"
}
if [[ -n $dry ]] || ! command -v compute-sanitizer >/dev/null; then
  echo "not run: it needs a GPU and the tool"
else
  jobs=() logs=$(mktemp -d)
  sanitize memcheck triton & jobs+=($!)
  if "$python" -c "import rnnkern, sys; sys.exit(bool(rnnkern.explain('cuda')['cuda']))"; then
    for regime in warp block cluster grid fma; do
      for tool in memcheck racecheck; do
        sanitize "$tool" cuda "$regime" & jobs+=($!)
      done
    done
  fi
  for job in "${jobs[@]}"; do wait "$job" || status=$?; done
  cat "$logs"/* >"$out/sanitizer.log"
  rm -r "$logs"
fi

echo "== tests"
if ! "$python" -c "import pytest" 2>/dev/null; then
  echo "not run: there is no pytest; the benchmark has checked parity"
elif [[ -n $dry ]]; then
  TRITON_INTERPRET=1 "$python" -m pytest -q tests/test_triton.py -k "warmup or block_edges" || status=$?
else
  many=()
  if "$python" -c "import xdist" 2>/dev/null; then many=(-n "$(nproc)"); fi
  timeout 1200 "$python" -m pytest -q -m gpu "${many[@]}" tests || status=$?
fi
echo "== in $out: $(ls "$out" | tr '\n' ' ')"
exit $status
