#!/usr/bin/env bash
# Cross-entropy on ImageNet (./data/imagenet), ResNet-50, the baseline of the SupCon paper; see --accum_steps.
source "$(dirname "$0")/recipe.sh"
pretraining=() program=main_ce
linear=(--dataset imagenet --model resnet50 --batch_size 6144 --epochs 200 --base_lr 0.1 --nesterov --weight_decay 1e-4
    --cosine --lr_decay_rate 0 --warm --warm_epochs 12 --warmup_from 0 --augment_policy auto --label_smoothing 0.05 --amp)
recipe cross_entropy_imagenet_resnet50 "$@"
