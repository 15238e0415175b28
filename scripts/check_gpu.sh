#!/usr/bin/env bash
# Makes the environment and checks on this machine's GPUs, in at most ten minutes, what no other machine can show:
# bash scripts/check_gpu.sh [--only NAME ...]
set -euo pipefail
CDPATH='' cd -- "$(dirname "$0")/.."
source scripts/env.sh requirements.txt
python scripts/check_gpu.py "$@"
