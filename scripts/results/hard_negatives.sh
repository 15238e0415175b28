#!/usr/bin/env bash
# Table 2: the three experiments with synthetic pictures (../mvip_experiments.sh) on CIFAR-10, and experiment 2 with as many
# steps as experiment 3 has, whose hard negatives make its epochs longer.
#   bash scripts/results/hard_negatives.sh --budget cpu  100 pictures of each class, 16 of them with synthetic ones
#   bash scripts/results/hard_negatives.sh --budget gpu  1,000 of each class, 160 of them; `timeout 9m bash ...` for parts
# Options, and what is written where: rows.sh. A seed draws the pictures, the synthetic ones made of them, weights and views.
source "$(dirname "$0")/rows.sh"

if [ $budget = cpu ]; then
    seeds='0 1 2' count=100 sources=16 epochs=80 more_epochs=111          # 80 * 2280 / 1640
    data=$cifar_small train=$train_small linear=$linear_small
else
    seeds=0 count=1000 sources=160 epochs=60 more_epochs=83               # 60 * 22800 / 16400
    data="$cifar --samples_per_class 1000 --model resnet18 --amp"
    train='--batch_size 256 --lr 0.2 --cosine --warm' linear='--epochs 20 --batch_size 256 --lr 1 --cosine --no_warm'
fi

synthetic() {       # seed: make the pictures, unless they are there
    local made=data/augs/$runs-$1
    [ -d "$made" ] && return
    rm -rf "$made-partial"
    python scripts/make_augs.py $pictures --samples_per_class $count --per_class $sources --seed "$1" \
        --aug_root data/augs --aug_output_name "$runs-$1-partial"
    mv "$made-partial" "$made"
}

experiment() {      # name, seed, --aug_mode of pretraining, of the linear stage, epochs of pretraining
    local augs="$data --aug_root data/augs --aug_output_name $runs-$2 --aug_name_id augs-id --aug_name_ood augs-ood"
    pretrained "$1" "$2" "$augs" "--epochs $5 $train --temp 0.1 --aug_mode $3" "$linear --aug_mode $4"
}

for seed in $seeds; do
    synthetic $seed
    experiment 1-real $seed none none $epochs
    experiment 2-id $seed with_id with_id $epochs
    experiment 3-id-ood $seed with_both with_id $epochs
    experiment 2-id-steps $seed with_id with_id $more_epochs
done
finish
