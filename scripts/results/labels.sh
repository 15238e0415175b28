#!/usr/bin/env bash
# Accuracy of SupCon and cross-entropy against the number of labeled images of each class, with as many steps for each and
# SupCon's views for both.
#   bash scripts/results/labels.sh --budget cpu          10 to 240 images of each class of CIFAR-10, 2,400 steps
#   bash scripts/results/labels.sh --budget gpu          200 to 5,000 images of each class, 2,000 steps of 250 images
# Options, and what is written where: rows.sh. A seed selects the images, the weights and the views.
source "$(dirname "$0")/rows.sh"

# 240 and not 250, whose last batch would be 4 images.
if [ $budget = cpu ]; then      # images of each class : epochs : epochs of warm-up : epochs of the linear evaluation
    seeds=0 network="$cifar $network_small" train=$train_small linear='--batch_size 64 --lr 0.1 --cosine --no_warm'
    points='10:1200:80:240 25:600:40:120 50:300:20:60 100:150:10:30 240:63:4:13'
else
    seeds=0 network="$cifar --model resnet18 --amp" train='--batch_size 250 --lr 0.2 --cosine --warm'
    linear='--batch_size 250 --lr 0.1 --cosine --no_warm'
    points='200:250:25:100 1000:50:5:20 5000:10:1:4'
fi

for seed in $seeds; do
    for point in $points; do
        IFS=: read -r count epochs warm linear_epochs <<< "$point"
        options="--epochs $epochs $train --warm_epochs $warm"
        pretrained "supcon-labels-$count" $seed "$network --samples_per_class $count" "$options --temp 0.1" \
            "--epochs $linear_epochs $linear"
        classifier "ce-labels-$count" $seed "$network --samples_per_class $count $options --augment_policy sim"
    done
done
finish
