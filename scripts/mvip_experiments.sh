#!/usr/bin/env bash
# The three experiments on MVIP with synthetic pictures, both stages, and their table. Published top-1: 71.4 with real
# pictures, 77.5 with id pictures in both stages, 75.3 with ood pictures in pretraining too; see the README.
# One GPU. Options are added to every command, those in PRETRAIN and LINEAR to one stage; e.g. on digits, on a CPU:
#   python scripts/make_augs.py --dataset digits --aug_output_name mvip-test-dafusion
#   PRETRAIN="--epochs 40 --lr 0.1" LINEAR="--epochs 20 --lr 1" bash scripts/mvip_experiments.sh --dataset digits \
#       --model resnet18 --width 0.25 --image_size 16 --batch_size 128
set -euo pipefail
cd "$(dirname "$0")/.."
augs=(--aug_output_name mvip-test-dafusion --aug_name_id augs-id --aug_name_ood augs-ood)
common=(--dataset mvip --model resnet-50 --image_size 224 --batch_size 16 --num_workers 4 --lr 0.001 --lr_cosine)

experiment() {      # name, --aug_mode of pretraining, of the linear stage, further options
    local name=$1 pretraining=$2 linear=$3; shift 3
    python main_supcon.py "${common[@]}" "${augs[@]}" --method SupCon --epochs 110 \
        --output_name "$name-pre" --aug_mode "$pretraining" "$@" ${PRETRAIN:-}
    python main_linear.py "${common[@]}" "${augs[@]}" --epochs 50 --ckpt "output/$name-pre/trial=0/last.ckpt" \
        --output_name "$name-lin" --aug_mode "$linear" "$@" ${LINEAR:-}
}

experiment mvip-1-real none none "$@"
experiment mvip-2-id with_id with_id "$@"
experiment mvip-3-id-ood with_both with_id "$@"

row() {             # name, title
    local log="output/$1/trial=0/log.txt"
    printf '%-40s %6s %8s %8s %11s %7s %7s\n' "$2" "$(sed -n 's/^best accuracy: //p' "$log")" \
        $(awk '/^confidence id/ {print $3, $5, $7, $9, $11}' "$log")
}
printf '%-40s %6s %8s %8s %11s %7s %7s\n' experiment top-1 conf.id conf.ood difference AUROC FPR95
row mvip-1-real-lin '1 real pictures'
row mvip-2-id-lin '2 + id pictures, both stages'
row mvip-3-id-ood-lin '3 + ood pictures in pretraining'
