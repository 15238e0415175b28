#!/usr/bin/env bash
# Accuracy of SupCon and cross-entropy against temperature, batch size and learning rate, one varied at a time: the paper's
# claim that SupCon is the more stable of the two. Both see SupCon's views; the learning rate follows the batch size.
#   bash scripts/results/stability.sh --budget cpu       CIFAR-10, 100 images of each class
#   bash scripts/results/stability.sh --budget gpu       all images, 5 epochs; `timeout 9m bash ...` for parts
# Options, and what is written where: rows.sh.
source "$(dirname "$0")/rows.sh"

if [ $budget = cpu ]; then
    data=$cifar_small train='--epochs 80 --cosine --warm' linear=$linear_small
    batches='32:0.05 128:0.2 256:0.4' center=64 rates='0.01 0.03 0.3 1'
else
    data="$cifar --model resnet18 --amp" train='--epochs 5 --cosine --warm' center=512
    linear='--epochs 5 --batch_size 512 --lr 0.1 --cosine --no_warm'
    batches='128:0.025 256:0.05 1024:0.2 2048:0.4' rates='0.01 0.03 0.3 1'
fi

supcon() { pretrained "supcon$1" 0 "$data" "$train --batch_size $2 --lr $3 --temp $4" "$linear"; }
ce() { classifier "ce$1" 0 "$data $train --batch_size $2 --lr $3 --augment_policy sim"; }

supcon '' $center 0.1 0.1
ce '' $center 0.1
for temp in 0.05 0.07 0.2 0.5; do supcon "-temp-$temp" $center 0.1 $temp; done
for batch in $batches; do
    supcon "-batch-${batch%:*}" ${batch%:*} ${batch#*:} 0.1
    ce "-batch-${batch%:*}" ${batch%:*} ${batch#*:}
done
for rate in $rates; do
    supcon "-lr-$rate" $center $rate 0.1
    ce "-lr-$rate" $center $rate
done
finish
