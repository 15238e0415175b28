#!/usr/bin/env bash
# Makes the environment and runs the whole test suite: bash scripts/test.sh [arguments of pytest]
set -euo pipefail
CDPATH='' cd -- "$(dirname "$0")/.."
source scripts/env.sh requirements.txt tests/requirements.txt
ruff check .
# One test on each core, each with one thread: twice as fast as one after the other.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
