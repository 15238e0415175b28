#!/usr/bin/env bash
# A long tail: cross-entropy, logit-adjusted cross-entropy, SupCon and BCL on CIFAR-10 with imbalance 50, with as many steps
# and SupCon's views for each; accuracy over all classes and over those with many, medium and few training images.
#   bash scripts/results/longtail.sh --budget cpu        500 images of the largest class, 10 of the smallest; 2,400 steps
#   bash scripts/results/longtail.sh --budget gpu        5,000 of the largest, 100 of the smallest; `timeout 9m bash ...`
# Options, and what is written where: rows.sh. A seed selects the images, the weights and the views.
source "$(dirname "$0")/rows.sh"

if [ $budget = cpu ]; then
    seeds='0 1 2' data="$cifar --samples_per_class 500 --imbalance 50 $network_small"
    train="--epochs 109 $train_small" linear=$linear_small
else
    seeds=0 data="$cifar --imbalance 50 --model resnet18 --amp"
    train='--epochs 60 --batch_size 256 --lr 0.2 --cosine --warm'
    linear='--epochs 10 --batch_size 256 --lr 0.1 --cosine --no_warm'
fi

adjusted() {        # name, seed: another linear evaluation of the row NAME-SEED, with logit adjustment
    row "$1-la" "$2" "@$1-$2" "main_linear.py $data --ckpt output/$runs-$1/trial=$2/last.ckpt $linear \
--logit_adjustment 1 $(of_run "$1-la" "$2")"
}

for seed in $seeds; do
    classifier longtail-ce $seed "$data $train --augment_policy sim"
    classifier longtail-ce-la $seed "$data $train --augment_policy sim --logit_adjustment 1"
    pretrained longtail-supcon $seed "$data" "$train --temp 0.1" "$linear"
    pretrained longtail-bcl $seed "$data" "$train --method BCL" "$linear"
done
wait                # for the encoders
for seed in $seeds; do
    for name in supcon bcl; do adjusted longtail-$name $seed; done
done
finish
