#!/usr/bin/env bash
# From nothing to three accuracies: makes the environment, then trains SupCon, SimCLR and cross-entropy on scikit-learn's
# handwritten digits, which need no download. Two to four minutes on two CPU cores after the installation.
# Options are added to every command that knows them: bash scripts/quickstart.sh --epochs 2
source "$(dirname "$0")/recipe.sh"
begin quickstart "$@"
join ${words[@]+"${words[@]}"}
source scripts/env.sh requirements.txt

common=(--dataset digits --batch_size 128 --cosine --print_freq 12 --overwrite)
network=(--model resnet18 --width 0.25)
ckpt=("output/$name-"{ce,simclr,supcon}"/trial=$trial/last.ckpt")

stage main_supcon "${common[@]}" "${network[@]}" --learning_rate 0.1 --temp 0.1 --epochs 40 \
    --output_name "$name-supcon"
stage main_linear "${common[@]}" --ckpt "${ckpt[2]}" --learning_rate 1 --epochs 20 --output_name "$name-supcon-linear"

stage main_supcon "${common[@]}" "${network[@]}" --method SimCLR --learning_rate 0.1 --temp 0.5 --epochs 60 --warm \
    --output_name "$name-simclr"
stage main_linear "${common[@]}" --ckpt "${ckpt[1]}" --learning_rate 1 --epochs 20 --output_name "$name-simclr-linear"

stage main_ce "${common[@]}" "${network[@]}" --learning_rate 0.2 --epochs 40 --output_name "$name-ce"
go

python scripts/plot_features.py --ckpt "${ckpt[@]}" --output "output/$name.png"
echo "Curves and pictures of these runs: .venv/bin/tensorboard --logdir output"

accuracy() { sed -n 's/^best accuracy: //p' "output/$name-$1/trial=$trial/log.txt" | tail -n 1; }
echo "SupCon $(accuracy supcon-linear)"
echo "SimCLR $(accuracy simclr-linear)"
echo "cross-entropy $(accuracy ce)"
