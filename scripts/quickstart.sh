#!/usr/bin/env bash
# From nothing to three accuracies: makes the environment, then trains SupCon, SimCLR and cross-entropy on the handwritten
# digits of scikit-learn, which need no download. Three to seven minutes on two CPU cores after the installation.
# Options are added to every command that has them: bash scripts/quickstart.sh --epochs 2
# Curves and images of these runs: .venv/bin/tensorboard --logdir output
set -euo pipefail
CDPATH='' cd -- "$(dirname "$0")/.."
if [[ " $* " =~ ' '(-h|--help)' ' ]]; then exec "${PYTHON:-python3}" scripts/launch.py "$0" -- --help; fi
source scripts/env.sh requirements.txt

common='--dataset digits --batch_size 128 --cosine --print_freq 12 --overwrite'
network='--model resnet18 --width 0.25'
exec python scripts/launch.py "$0" \
    "main_supcon.py $common $network --learning_rate 0.1 --temp 0.1 --epochs 40 --output_name {name}-supcon" \
    "main_linear.py $common --learning_rate 1 --epochs 20 --output_name {name}-supcon-linear
        --ckpt output/{name}-supcon/trial={trial}/last.ckpt" \
    "main_supcon.py $common $network --method SimCLR --learning_rate 0.1 --temp 0.5 --epochs 60 --warm
        --output_name {name}-simclr" \
    "main_linear.py $common --learning_rate 1 --epochs 20 --output_name {name}-simclr-linear
        --ckpt output/{name}-simclr/trial={trial}/last.ckpt" \
    "main_ce.py $common $network --learning_rate 0.2 --epochs 40 --output_name {name}-ce" \
    'scripts/plot_features.py --output output/{name}.png --ckpt output/{name}-ce/trial={trial}/last.ckpt
        output/{name}-simclr/trial={trial}/last.ckpt output/{name}-supcon/trial={trial}/last.ckpt' \
    'scripts/accuracies.py SupCon output/{name}-supcon-linear/trial={trial}
        SimCLR output/{name}-simclr-linear/trial={trial} cross-entropy output/{name}-ce/trial={trial}' -- "$@"
