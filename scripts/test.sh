#!/usr/bin/env bash
# Makes the environment and runs the whole test suite: bash scripts/test.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh requirements.txt tests/requirements.txt
ruff check .
python -m pytest "$@"
