#!/usr/bin/env bash
# Everything that needs a GPU, in two commands of at most 9 minutes: correctness, compute-sanitizer, benchmarks, figures.
#   benchmarks/gpu_suite.sh [--dry-run] [kernels|rounds]      the kernels by default, or whole federated rounds
# Needs torch >= 2.11 with CUDA, triton, peft, matplotlib, pytest and hypothesis; no network. PYTHON names the
# interpreter. A step that fails or runs past its limit stops no later one; the exit status is 1 if any did. Records go
# to benchmarks/results/ and, with the figures and all output, to $OUT where that is set.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
dry=
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
suite=${1:-kernels}
case $suite in
  kernels | rounds) ;;
  *) echo "usage: benchmarks/gpu_suite.sh [--dry-run] [kernels|rounds]" >&2; exit 2 ;;
esac
part=$suite # that the next steps belong to
export PYTHONUNBUFFERED=1
sanitizer=$(command -v compute-sanitizer || find /usr/local -name compute-sanitizer -type f 2> /dev/null | head -n 1)
out=${OUT:-$(mktemp -d)}
table=federa_kernels/lora_linear/dispatch.json
results=()
failed=0
total=0

# step NAME SECONDS COMMAND...: runs it within its time, keeps its output
step() {
  local name=$1 limit=$2 status=0 start=$SECONDS
  shift 2
  if [ "$part" != "$suite" ]; then return; fi
  if [ -n "$dry" ]; then
    printf '%-13s %4d s  %s\n' "$name" "$limit" "$*"
    total=$((total + limit))
    return
  fi
  echo "== $name, at most $limit s: $*" | tee -a "$out/gpu_suite.log"
  timeout --kill-after=5 "$limit" "$@" > "$out/step.log" 2>&1 || status=$?
  tail -n 12 "$out/step.log"
  cat "$out/step.log" >> "$out/gpu_suite.log"
  cp benchmarks/results/*-cuda.jsonl "$table" "$out" 2> /dev/null # at once: a later step may be the last
  if [ "$status" -ne 0 ]; then failed=1; fi
  case $status in
    0) results+=("ok     $name $((SECONDS - start)) s") ;;
    124 | 137) results+=("LATE   $name: past $limit s") ;;
    *) results+=("FAILED $name: status $status after $((SECONDS - start)) s") ;;
  esac
}

# skip NAME REASON
skip() {
  if [ "$part" != "$suite" ]; then return; fi
  if [ -n "$dry" ]; then printf '%-13s skipped: %s\n' "$1" "$2"; else results+=("skip   $1: $2"); fi
}

step device 20 "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'
if command -v nvcc > /dev/null && "$python" -c "import pybind11" 2> /dev/null; then
  step build 50 "$python" setup.py build_ext --inplace
else
  skip build "nvcc or pybind11 is not installed; Triton needs neither"
fi
part=rounds
step rounds_right 90 "$python" -m pytest -q --maxfail=20 --no-header -p no:cacheprovider -m gpu tests/federa tests/federa_kernels/test_attention.py
step rounds 300 "$python" -m benchmarks federated_round --device cuda --record --part table
part=kernels
step correctness 130 "$python" -m pytest -q --maxfail=20 --no-header -p no:cacheprovider -m gpu tests/federa_kernels tests/benchmarks
if [ -n "$sanitizer" ]; then # it slows a test tenfold and more: the small ones
  step sanitizer 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --error-exitcode 9 --target-processes all \
    "$python" -m pytest -q -x --no-header -p no:cacheprovider -m gpu -k M37 tests/benchmarks
else
  skip sanitizer "compute-sanitizer is not installed"
fi
# Which kernels each kind of problem takes from here on: written to federa_kernels/lora_linear/dispatch.json.
step dispatch 60 "$python" -m benchmarks dispatch --device cuda --record --budget 46
step lora_linear 90 "$python" -m benchmarks lora_linear --device cuda --record --budget 72
step clients 35 "$python" -m benchmarks lora_linear_clients --device cuda --record --budget 22
step compiled 40 "$python" -m benchmarks lora_linear --device cuda --record --compile --only RoBERTa-M8192 --budget 22
if [ -e benchmarks/truncated_svd.py ]; then
  step truncated_svd 45 "$python" -m benchmarks truncated_svd --device cuda --record
else
  skip truncated_svd "benchmarks/truncated_svd.py is not there"
fi
part=$suite
step plot 15 "$python" -m benchmarks plot
step targets 10 "$python" -m benchmarks targets
if [ -n "$dry" ]; then
  printf '%-13s %4d s\n' "at most" "$total"
  exit 0
fi

rm -f "$out/step.log"
tar czf "$out/gpu_suite.tar.gz" README.md benchmarks/results benchmarks/plots "$table" || failed=1
printf '%s\n' "== summary, files in $out" "${results[@]}" | tee -a "$out/gpu_suite.log"
exit "$failed"
