#!/usr/bin/env bash
# Table 1: cross-entropy, SimCLR, SupCon and GenSCL with the same network, epochs and images; top-1 and kNN accuracy; top-1 on
# corrupted images; what t-SNE makes of the features.
#   bash scripts/results/methods.sh --budget cpu         handwritten digits, and CIFAR-10 with 100 images of each class
#   bash scripts/results/methods.sh --budget gpu         CIFAR-10, all images; `timeout 9m bash ...`, repeated, in parts
# Options, and what is written where: rows.sh. A seed selects the images of each class, the weights and the views.
source "$(dirname "$0")/rows.sh"

methods() {         # name, options of data and network, of training the network, of the linear evaluation
    local name=$1 data=$2 train=$3 linear=$4 seed run
    local ckpt=output/$runs-$name
    for seed in $seeds; do
        classifier "$name-ce" $seed "$data $train"
        classifier "$name-ce-sim" $seed "$data $train --augment_policy sim"
        pretrained "$name-simclr" $seed "$data" "$train --method SimCLR --temp 0.5" "$linear"
        pretrained "$name-supcon" $seed "$data" "$train --temp 0.1" "$linear"
        pretrained "$name-supcon-ce" $seed "$data" "$train --temp 0.1 --ce_weight 1" "$linear"
        pretrained "$name-supcon-in" $seed "$data" "$train --temp 0.1 --summation_location in" "$linear"
        pretrained "$name-genscl-mix" $seed "$data" "$train --method GenSCL --mix mixup_cutmix --temp 0.1" "$linear"
    done
    wait            # the classifiers are the teachers
    for seed in $seeds; do
        pretrained "$name-genscl-kd" $seed "$data" "$train --method GenSCL --mix mixup_cutmix --temp 0.1 \
--KD --teacher_path $ckpt-ce/trial=$seed" "$linear" "@$name-ce-$seed"
    done
    wait
    row "$name-features" 0 "@$name-ce-0" "@$name-simclr-0" "@$name-supcon-0" \
        "scripts/plot_features.py --output $into/$name-features.png \
--ckpt $ckpt-ce/trial=0/last.ckpt $ckpt-simclr/trial=0/last.ckpt $ckpt-supcon/trial=0/last.ckpt"
    wait
}

corruptions() {     # name
    local seed run
    for seed in $seeds; do
        for run in $1-ce $1-ce-sim $1-simclr-linear $1-supcon-linear; do
            row "${run%-linear}-corrupted" $seed "@${run%-linear}-$seed" \
                "scripts/evaluate.py --ckpt output/$runs-$run/trial=$seed/last.ckpt --corruptions --max_pictures 2000"
        done
    done
}

if [ $budget = cpu ]; then
    seeds='0 1 2'
    methods digits '--dataset digits --model resnet18 --width 0.25' '--epochs 40 --batch_size 128 --lr 0.1 --cosine --warm' \
        '--epochs 20 --batch_size 128 --lr 0.1 --cosine --no_warm'
    methods cifar "$cifar_small" "--epochs 150 $train_small" "$linear_small"
else
    seeds=0
    network="$cifar --model resnet18 --amp" train='--batch_size 512 --lr 0.3 --cosine --warm'
    # As many views, and as much time, as SupCon.
    classifier cifar-ce-sim-2x 0 "$network --epochs 100 $train --augment_policy sim"
    methods cifar "$network" "--epochs 50 $train" '--epochs 10 --batch_size 512 --lr 0.1 --cosine --no_warm'
fi
corruptions cifar
finish
