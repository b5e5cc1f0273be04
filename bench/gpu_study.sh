#!/usr/bin/env bash
# Trains one full-size cell of the VAE-SAE study on a GPU (dSprites, Top-k, 50 epochs of 716,800
# images) and leaves its report in FOLDER: how long the study's unit of work takes.
#
#     bench/gpu_study.sh [FOLDER]
#
# Needs what bench/gpu.sh needs, and the packages of the extra "data". FOLDER defaults to $OUT/study,
# else bench/out/study. Started again it goes on. Exit codes: 0 done, 1 a step failed, 2 no GPU.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

readonly FOLDER=${1:-${OUT:-bench/out}/study}
readonly SECONDS_FOR_TRAINING=${SECONDS_FOR_TRAINING:-560}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MPLBACKEND=Agg

if ! python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu_study.sh: torch sees no GPU" >&2
  exit 2
fi
arch=$(python3 -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
SPARSEKERN_BUILD=cpu,cuda SPARSEKERN_CUDA_ARCHS=${SPARSEKERN_CUDA_ARCHS:-$arch} \
  python3 setup.py build_ext --inplace >/dev/null || exit 1
# SIGTERM lets it save; the same command then goes on.
timeout "$SECONDS_FOR_TRAINING" python3 -m sparsekern reproduce vae-sae --preset full \
  --datasets dsprites --arms topk --seeds 1 --set extra_epochs=0 --out "$FOLDER"
status=$?
# Checkpoints are large; the report and the numbers behind it are not.
rm -f "$FOLDER"/cells/*/checkpoint-*.safetensors
exit $((status != 0))
