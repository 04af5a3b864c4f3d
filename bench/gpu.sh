#!/usr/bin/env bash
# Everything that a machine with a GPU is for, in one command: builds the library with its CUDA
# kernels, runs bench/gpu.py, compute-sanitizer on small shapes in every regime, and the GPU tests;
# then tables and a picture. What hangs is ended. No network.
#
#   bench/gpu.sh [--dry-run] [--budget SECONDS] [--out DIRECTORY]
#
# The budget is the benchmark's, 480 by default; the rest takes a few minutes. --dry-run needs no
# GPU: Triton's interpreter, and tiny shapes. PYTHON (python3) has torch, triton, setuptools, ninja.
set -euo pipefail

dry= budget=480 out=
while [[ $# -gt 0 ]]; do
  case $1 in
    --dry-run) dry=1 ;;
    --budget) budget=$2; shift ;;
    --out) out=$2; shift ;;
    *) echo "usage: bench/gpu.sh [--dry-run] [--budget SECONDS] [--out DIRECTORY]" >&2; exit 2 ;;
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
RNNKERN_BUILD=1 "$python" setup.py -q build_ext --inplace

echo "== benchmark"
# First, because it checks what it times, and the time on a GPU may end.
status=0
timeout $((budget + 300)) "$python" bench/gpu.py ${dry:+--dry-run} --budget "$budget" \
  --out "$out/gpu.jsonl" || status=$?
"$python" bench/report.py "$out/gpu.jsonl" >"$out/gpu.md"
if "$python" -c "import matplotlib" 2>/dev/null; then
  "$python" bench/report.py "$out/gpu.jsonl" --picture "$out/gpu.png" >/dev/null
fi

echo "== compute-sanitizer"
sanitize() {  # tool, backend
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 300 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" bench/gpu.py --small --backend "$2" || status=$?
}
if [[ -n $dry ]] || ! command -v compute-sanitizer >/dev/null; then
  echo "not run: it needs a GPU and the tool"
else
  sanitize memcheck triton
  if "$python" -c "import rnnkern, sys; sys.exit(bool(rnnkern.explain('cuda')['cuda']))"; then
    for regime in warp block cluster grid; do
      for tool in memcheck racecheck; do
        echo "-- $tool, $regime"
        RNNKERN_CUDA_REGIME=$regime sanitize "$tool" cuda
      done
    done
  fi
fi

echo "== tests"
if "$python" -c "import pytest" 2>/dev/null; then
  if [[ -n $dry ]]; then
    TRITON_INTERPRET=1 "$python" -m pytest -q tests/test_triton.py -k "warmup or block_edges" || status=$?
  else
    timeout 1200 "$python" -m pytest -q -m gpu tests || status=$?
  fi
else
  echo "not run: there is no pytest; the benchmark has checked parity"
fi
echo "== in $out: $(ls "$out" | tr '\n' ' ')"
exit $status
