#!/usr/bin/env bash
# Every benchmark that needs no GPU, one after the other, then the documents. Nothing else should run at the same time.
#   bash benchmarks/run_all.sh              bash benchmarks/run_all.sh memory growth
# If a benchmark fails, the others still run; it is listed at the end, and the exit code is 1. Needs an environment with
# this project's packages (scripts/test.sh makes one). For a GPU there is benchmarks/gpu.sh.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python}"
failed=()
for file in benchmarks/*.py; do
    name="$(basename "$file" .py)"
    if ! grep -q __main__ "$file" || [[ $name == report || $name == gpu ]]; then continue; fi
    if [[ $# -gt 0 && " $* " != *" $name "* ]]; then continue; fi
    echo "== $name"
    "$python" -m "benchmarks.$name" || failed+=("$name")
done
"$python" -m benchmarks.report || failed+=(report)
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
