#!/usr/bin/env bash
# Lint, format check, type check and tests. Arguments go to pytest and are relative to the checkout:
#   bash scripts/test.sh -k phema        bash scripts/test.sh tests/test_house.py        bash scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy  # edm2kit, with the settings in pyproject.toml
if (($#)); then
    "$python" -m pytest "$@"
else
    "$python" -m pytest -n 2 --dist loadfile # two files at a time; the tests use one thread each
fi
