#!/usr/bin/env bash
# The three experiments on MVIP with synthetic pictures, both stages, and their table. Published top-1: 71.4 with real
# pictures, 77.5 with id pictures in both stages, 75.3 with ood pictures in pretraining too; see the README.
# One GPU. Options are added to every command that knows them, those in PRETRAIN and LINEAR to one stage; e.g. on a CPU:
#   python scripts/make_augs.py --dataset digits --aug_output_name mvip-test-dafusion
#   PRETRAIN="--epochs 40 --lr 0.1" LINEAR="--epochs 20 --lr 1" bash scripts/mvip_experiments.sh --dataset digits \
#       --model resnet18 --width 0.25 --image_size 16 --batch_size 128
source "$(dirname "$0")/recipe.sh"
begin mvip "$@"
join ${words[@]+"${words[@]}"} ${PRETRAIN:-} ${LINEAR:-}
[[ " $* ${PRETRAIN:-} ${LINEAR:-} " != *" --aug"[_-]"mode"[\ =]* ]] || refuse '--aug_mode: each experiment has its own'
augs=(--aug_output_name mvip-test-dafusion --aug_name_id augs-id --aug_name_ood augs-ood)
common=(--dataset mvip --model resnet-50 --image_size 224 --batch_size 16 --num_workers 4 --lr 0.001 --lr_cosine)

experiment() {      # name, --aug_mode of pretraining, of the linear stage
    more=${PRETRAIN:-}
    stage main_supcon "${common[@]}" "${augs[@]}" --method SupCon --epochs 110 \
        --output_name "$name-$1-pre" --aug_mode "$2"
    more=${LINEAR:-}
    stage main_linear "${common[@]}" "${augs[@]}" --epochs 50 --ckpt "output/$name-$1-pre/trial=$trial/last.ckpt" \
        --output_name "$name-$1-lin" --aug_mode "$3"
}

experiment 1-real none none
experiment 2-id with_id with_id
experiment 3-id-ood with_both with_id
go

row() {             # experiment, title; of a run that was resumed the last result
    local log="output/$name-$1-lin/trial=$trial/log.txt"
    printf '%-40s %6s %8s %8s %11s %7s %7s\n' "$2" "$(sed -n 's/^best accuracy: //p' "$log" | tail -n 1)" \
        $(awk '/^confidence id/ {found = $3 " " $5 " " $7 " " $9 " " $11} END {print found}' "$log")
}
printf '%-40s %6s %8s %8s %11s %7s %7s\n' experiment top-1 conf.id conf.ood difference AUROC FPR95
row 1-real '1 real pictures'
row 2-id '2 + id pictures, both stages'
row 3-id-ood '3 + ood pictures in pretraining'
