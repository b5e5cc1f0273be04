#!/usr/bin/env bash
# Builds, checks and measures on a GPU machine, in under nine minutes and without a network.
#
#     bench/gpu.sh [FOLDER]
#
# Needs python3 with torch, pybind11, setuptools and ninja, a C++ compiler, nvcc, and a GPU. Leaves
# rows, plots, one log and a summary in FOLDER (default: $OUT, else bench/out). A stage that fails
# or runs out of its time does not stop the later ones. Without a GPU, the stages that need one are
# skipped and the rest runs. Exit codes: 0 every stage passed, 1 one did not, 2 something is missing.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

readonly OUT_FOLDER=${1:-${OUT:-bench/out}}
readonly TOTAL_SECONDS=${TOTAL_SECONDS:-525}
# What runs on a CPU is tested elsewhere: here only what a GPU adds.
readonly TESTS=(python_tests/{ops,nn,sae,dispatch} -k "native-cuda or triton-cuda or reference-cuda")
# Seconds for what an interrupted command has to say: pytest ends its workers within 10 s and then
# prints the failures so far.
readonly GRACE=20 MOST_REASONS=100
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MPLBACKEND=Agg COLUMNS=200

mkdir -p "$OUT_FOLDER" || exit 2
readonly LOG=$OUT_FOLDER/gpu.log SUMMARY=$OUT_FOLDER/summary.txt
: >"$LOG"
: >"$SUMMARY"
failures=0
gpu=no

say() { printf '%s\n' "$*" | tee -a "$SUMMARY"; }

# stage NAME SECONDS RESERVE COMMAND...: runs a command for at most SECONDS, then interrupts it, and
# never reaches into the last RESERVE seconds of the whole time; its output goes to the log. A command
# that fails leaves its last lines in the summary, and the tests that failed.
stage() {
  local name=$1 seconds=$2 reserve=$3 began=$SECONDS status
  local log_began=$(($(wc -l <"$LOG") + 1))
  shift 3
  local left=$((TOTAL_SECONDS - reserve - GRACE - SECONDS))
  ((seconds > left)) && seconds=$left
  if ((seconds < 5)); then
    say "$(printf '%-8s left out: no time for it' "$name")"
    failures=$((failures + 1))
    return 1
  fi
  printf '\n==== %s: %s\n' "$name" "$*" >>"$LOG"
  # Only the command itself is interrupted, once: a second time would end what it has to say. And
  # what a shell in the background starts would ignore interrupts.
  timeout --foreground --signal=INT --kill-after=$GRACE "$seconds" \
    env --default-signal=INT "$@" >>"$LOG" 2>&1
  status=$?
  local verdict=passed
  if ((status == 124 || status == 137)); then
    verdict="interrupted after $seconds s"
  elif ((status != 0)); then
    verdict="failed, exit code $status"
  fi
  say "$(printf '%-8s %s (%d s)' "$name" "$verdict" $((SECONDS - began)))"
  ((status == 0)) && return 0
  failures=$((failures + 1))
  local reasons
  reasons=$(tail -n +"$log_began" "$LOG" | grep -E '^(FAILED|ERROR) ' | head -n $MOST_REASONS)
  say "$({ [[ -n $reasons ]] && echo "$reasons"; tail -n 3 "$LOG"; } | sed 's/^/         /')"
  return 1
}

# gpu_stage: a stage that is skipped, and says so, where there is no GPU.
gpu_stage() {
  if [[ $gpu == no ]]; then
    say "$(printf '%-8s skipped: needs a GPU' "$1")"
    return 0
  fi
  stage "$@"
}

# requirements: what is missing, one line each; sets gpu and the build's settings.
requirements() {
  local missing=()
  command -v python3 >/dev/null || missing+=("python3")
  local module
  for module in torch pybind11 setuptools; do
    python3 -c "import $module" 2>/dev/null || missing+=("the Python package $module")
  done
  python3 -c "import ninja" 2>/dev/null || command -v ninja >/dev/null || missing+=("ninja")
  command -v "${CXX:-g++}" >/dev/null || command -v clang++ >/dev/null || missing+=("g++")
  if python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
    gpu=yes
    [[ -n ${CUDA_HOME:-} && -x ${CUDA_HOME:-}/bin/nvcc ]] || command -v nvcc >/dev/null ||
      missing+=("nvcc (put it on PATH or set CUDA_HOME)")
  fi
  if ((${#missing[@]})); then
    printf 'gpu.sh: missing: %s\n' "${missing[@]}" | tee -a "$SUMMARY" >&2
    exit 2
  fi
}

build_settings() {
  export SPARSEKERN_BUILD=cpu
  if [[ $gpu == yes ]]; then
    SPARSEKERN_BUILD=cpu,cuda
    local arch
    arch=$(python3 -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
    export SPARSEKERN_CUDA_ARCHS=${SPARSEKERN_CUDA_ARCHS:-$arch}
  fi
}

main() {
  requirements
  build_settings
  local name="no GPU"
  [[ $gpu == yes ]] && name=$(python3 -c "import torch; print(torch.cuda.get_device_name())")
  say "machine: $name; results in $OUT_FOLDER"
  stage build 240 150 python3 setup.py build_ext --inplace
  stage info 40 150 python3 -m sparsekern info
  # Every kernel is compared with the reference before it is timed.
  gpu_stage lines 150 90 python3 bench/run.py --device cuda --seconds 1 --results "$OUT_FOLDER"
  gpu_stage sweep 90 60 python3 bench/sweep.py --device cuda --limit 85 --results "$OUT_FOLDER"
  gpu_stage plots 40 15 python3 bench/plots.py --results "$OUT_FOLDER"
  local options=()
  python3 -c "import xdist" 2>/dev/null && options+=(-n 14 --dist worksteal)
  python3 -c "import pytest_timeout" 2>/dev/null && options+=(--timeout 120)
  gpu_stage tests 300 5 python3 -m pytest -o addopts=-rfE -q -m "not slow" --tb=short \
    --durations=10 "${options[@]}" "${TESTS[@]}"
  say ""
  python3 bench/table.py --device cuda --results "$OUT_FOLDER" | tee -a "$SUMMARY"
  ((PIPESTATUS[0] == 0)) || failures=$((failures + 1))
  say "$failures stages failed; $SECONDS s in all"
  ((failures == 0))
}

main
