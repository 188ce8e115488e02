#!/usr/bin/env bash
# Every benchmark that needs no GPU, one after the other, then the documents. Nothing else should run at the same time.
#   bash benchmarks/run_all.sh              bash benchmarks/run_all.sh memory growth
#   bash benchmarks/run_all.sh --quick      every speed on a CPU in 10 to 20 minutes: three rounds each; without what
#                                           measures no speed (fuzz), memory, or many sizes and ranks (growth, scaling)
# If a benchmark fails, the others still run; it is listed at the end, and the exit code is 1. Needs an environment with
# this project's packages (scripts/test.sh makes one). For a GPU there is benchmarks/gpu.sh.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python}"
failed=()
quick=""
if [[ ${1:-} == --quick ]]; then
    quick=yes
    shift
    if [[ $# -eq 0 ]]; then set -- data ema end_to_end inference metrics sampling snapshots toy training_step; fi
fi
for file in benchmarks/*.py; do
    name="$(basename "$file" .py)"
    if ! grep -q '^if __name__ == "__main__":' "$file" || [[ $name == report || $name == gpu ]]; then continue; fi
    if [[ $# -gt 0 && " $* " != *" $name "* ]]; then continue; fi
    echo "== $name"
    options=()
    if [[ -n $quick ]] && grep -q "runs_option" "$file"; then options=(--runs 3); fi
    "$python" -m "benchmarks.$name" "${options[@]}" || failed+=("$name")
done
"$python" -m benchmarks.report || failed+=(report)
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
