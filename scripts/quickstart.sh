#!/usr/bin/env bash
# From nothing to three accuracies: makes the environment, then trains SupCon, SimCLR and cross-entropy on scikit-learn's
# handwritten digits, which need no download. Two to four minutes on two CPU cores after the installation.
# Options are added to every command: bash scripts/quickstart.sh --epochs 2
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/env.sh requirements.txt

common=(--dataset digits --batch_size 128 --cosine --print_freq 12 --overwrite)
network=(--model resnet18 --width 0.25)
run() { echo "$ python $*"; python "$@"; }

run main_supcon.py "${common[@]}" "${network[@]}" --learning_rate 0.1 --temp 0.1 --epochs 40 \
    --output_name quickstart-supcon "$@"
run main_linear.py "${common[@]}" --ckpt output/quickstart-supcon/trial=0/last.ckpt --learning_rate 1 --epochs 20 \
    --output_name quickstart-supcon-linear "$@"

run main_supcon.py "${common[@]}" "${network[@]}" --method SimCLR --learning_rate 0.1 --temp 0.5 --epochs 60 --warm \
    --output_name quickstart-simclr "$@"
run main_linear.py "${common[@]}" --ckpt output/quickstart-simclr/trial=0/last.ckpt --learning_rate 1 --epochs 20 \
    --output_name quickstart-simclr-linear "$@"

run main_ce.py "${common[@]}" "${network[@]}" --learning_rate 0.2 --epochs 40 --output_name quickstart-ce "$@"

run scripts/plot_features.py --ckpt output/quickstart-{ce,simclr,supcon}/trial=0/last.ckpt --output output/quickstart.png
echo "Curves and pictures of these runs: .venv/bin/tensorboard --logdir output"

accuracy() { sed -n 's/^best accuracy: //p' "output/$1/trial=0/log.txt"; }
echo "SupCon $(accuracy quickstart-supcon-linear)"
echo "SimCLR $(accuracy quickstart-simclr-linear)"
echo "cross-entropy $(accuracy quickstart-ce)"
