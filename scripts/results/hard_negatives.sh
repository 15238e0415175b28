#!/usr/bin/env bash
# Table 2: the three experiments with synthetic images (../mvip_experiments.sh) on CIFAR-10, with as many steps in each, so
# that only the images differ. Out-of-distribution detection is measured on ood images that are made of test images.
#   bash scripts/results/hard_negatives.sh --budget cpu  100 images of each class, 16 of them with 4 synthetic ones each;
#                                                        and with 5,000, 400 of them
#   bash scripts/results/hard_negatives.sh --budget gpu  1,000 of each class, 160 of them; `timeout 9m bash ...` for parts
# Options, and what is written where: rows.sh. A seed selects the images, the synthetic ones made of them, weights and views.
source "$(dirname "$0")/rows.sh"

make_augs() {       # seed, images that they are made of, names of the folders, where
    python scripts/make_augs.py $images --samples_per_class $count --per_class $sources --seed "$1" --split "$2" \
        --aug_name_id "$3" --aug_name_ood "$4" --aug_root data/augs --aug_output_name "$5"
}

synthetic() {       # seed: make the images, unless they are there or no row needs them
    local experiment folder=$(augs_of "$1")
    for experiment in 1-real 2-id 3-id-ood; do
        local row=$prefix$experiment-$1
        if ((jobs)) && [[ $row == $only && ! -e $into/$table/$row.log && ! -d data/augs/$folder ]]; then
            rm -rf "data/augs/$folder-partial"
            make_augs "$1" train augs-id augs-ood "$folder-partial"
            make_augs "$1" val new-id new-ood "$folder-partial"
            mv "data/augs/$folder-partial" "data/augs/$folder"
        fi
    done
}

augs_of() { echo "$runs-$1-$(cksum <<< "$images $count $sources" | cut -d ' ' -f 1)"; }

experiment() {      # name, seed, --aug_mode of pretraining, of the linear evaluation, epochs of both
    local augs="$data --aug_root data/augs --aug_output_name $(augs_of "$2") --aug_name_id augs-id"
    pretrained "$prefix$1" "$2" "$augs" "--epochs $5 $train --temp 0.1 --aug_mode $3 --aug_name_ood augs-ood" \
        "--epochs $6 $linear --aug_mode $4 --aug_name_ood new-ood"
}

experiments() {     # seeds; epochs of pretraining and of the linear evaluation, and which images, are set before
    local seed
    for seed in $1; do synthetic $seed; done
    for seed in $1; do
        experiment 1-real $seed none none ${epochs[0]} ${linear_epochs[0]}
        experiment 2-id $seed with_id with_id ${epochs[1]} ${linear_epochs[1]}
        experiment 3-id-ood $seed with_both with_id ${epochs[2]} ${linear_epochs[2]}
    done
}

prefix=''
if [ $budget = cpu ]; then              # 1000, 1640 and 2280 images; then 50,000, 66,000 and 82,000
    count=100 sources=16 epochs=(182 111 80) linear_epochs=(49 30 30)
    data=$cifar_small train=$train_small linear=${linear_small#--epochs 30 }
    experiments '0 1 2'
    prefix=all- count=5000 sources=400 epochs=(16 12 10) linear_epochs=(30 23 23)
    data="$cifar $network_small --amp" train='--batch_size 256 --lr 0.3 --weight_decay 5e-4 --cosine --warm --warm_epochs 1'
    linear='--batch_size 512 --lr 1 --cosine --no_warm --cache_features'
    experiments '0 1 2'
else
    count=1000 sources=160 epochs=(46 28 20) linear_epochs=(16 10 10)
    data="$cifar --samples_per_class 1000 --model resnet18 --amp"
    train='--batch_size 256 --lr 0.2 --cosine --warm' linear='--batch_size 256 --lr 0.1 --cosine --no_warm'
    experiments 0
fi
finish
