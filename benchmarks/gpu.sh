#!/usr/bin/env bash
# All measurements that need a GPU, into one JSON: benchmarks/records/gpu.json. A call takes at most nine minutes; the
# next one goes on, until all items are complete (about ten calls).
#   bash benchmarks/gpu.sh
#   bash benchmarks/gpu.sh --minutes 60         all in one call
#   bash benchmarks/gpu.sh --no-compile         first what needs no compiling: most items take a minute
#   bash benchmarks/gpu.sh --only training-img512-s-fp16
# Needs an environment with this project's packages and a CUDA build of PyTorch. Nothing else should use the GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" -m benchmarks.gpu "$@"
