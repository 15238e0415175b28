#!/usr/bin/env bash
# Cross-entropy on CIFAR-10, ResNet-50, with the SupCon paper's settings (those of SupContrast: ce_cifar10.sh).
exec python "$(dirname "$0")/launch.py" "$0" '
    main_ce.py --output_name {name} --dataset cifar10 --model resnet50
        --batch_size 1024 --epochs 1000 --base_lr 0.1 --nesterov --weight_decay 5e-4
        --cosine --lr_decay_rate 0 --warm --warmup_from 0 --augment_policy sim' -- --mode=train_then_eval "$@"
