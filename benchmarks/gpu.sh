#!/usr/bin/env bash
# All measurements that need a GPU, in under 25 minutes, into one JSON: benchmarks/records/gpu.json.
#   bash benchmarks/gpu.sh                      again: measures what is missing
#   bash benchmarks/gpu.sh --only training-img512-s-fp16
# Needs an environment with this project's packages and a CUDA build of PyTorch. Nothing else should use the GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" -m benchmarks.gpu "$@"
