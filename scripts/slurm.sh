#!/usr/bin/env bash
# A SLURM job that stops before its time is over, is queued again and resumes, until the run is finished:
#   sbatch scripts/slurm.sh main_supcon.py --batch_size 1024 --learning_rate 0.5 --temp 0.1 --cosine --syncBN
#   sbatch --nodes 2 --time 24:00:00 scripts/slurm.sh main_supcon.py ...
# from this folder, whose .venv is used where it is there. One process for each GPU: --ntasks-per-node is --gpus-per-node.
# Two minutes before the end, or when the job is preempted, SLURM signals the processes: they write a checkpoint after the
# current step and end with status 143.
#SBATCH --job-name=supcon
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?is not set: start this script with sbatch}"
if [ -e .venv/bin/activate ]; then source .venv/bin/activate; fi
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

status=0
# shellcheck disable=SC2016  # the variables are those of each process
srun --kill-on-bad-exit=0 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python "$@"' bash "$@" --resume || status=$?
if [ $status = 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $status
