#!/usr/bin/env bash
# SupCon on CIFAR-10, ResNet-50, with the SupCon paper's settings (those of SupContrast: supcon_cifar10.sh).
source "$(dirname "$0")/recipe.sh"
pretraining=(--dataset cifar10 --model resnet50 --base_temperature 1 --head 2048,128
    --cosine --lr_decay_rate 0 --warm --warmup_from 0 --weight_decay 1e-4 --temp 0.1 --batch_size 4096 --epochs 1000 --base_lr 0.5)
linear=(--dataset cifar10 --batch_size 4096 --epochs 100 --base_lr 2.5 --cosine --lr_decay_rate 0)
recipe supcon_cifar10_resnet50 "$@"
