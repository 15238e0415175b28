#!/usr/bin/env bash
# SimCLR on CIFAR-10, ResNet-50, with the SupCon paper's settings (those of SupContrast: simclr_cifar10.sh).
source "$(dirname "$0")/recipe.sh"
pretraining=(--dataset cifar10 --model resnet50 --base_temperature 1 --head 2048,128
    --cosine --lr_decay_rate 0 --warm --warmup_from 0 --weight_decay 1e-4 --method SimCLR --temp 0.5 --batch_size 1024 --epochs 400 --base_lr 0.5)
linear=(--dataset cifar10 --batch_size 1024 --epochs 90 --base_lr 0.25 --cosine --lr_decay_rate 0)
recipe simclr_cifar10_resnet50 "$@"
