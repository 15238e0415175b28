#!/usr/bin/env bash
# SupCon on CIFAR-10, ResNet-50, with the SupCon paper's settings (those of SupContrast: supcon_cifar10.sh).
exec python "$(dirname "$0")/launch.py" "$0" '
    main_supcon.py --output_name {name} --dataset cifar10 --model resnet50
        --temp 0.1 --base_temperature 1 --head 2048,128
        --batch_size 4096 --epochs 1000 --base_lr 0.5 --weight_decay 1e-4
        --cosine --lr_decay_rate 0 --warm --warmup_from 0' '
    main_linear.py --output_name {name}-linear --ckpt output/{name}/trial={trial}/last.ckpt --dataset cifar10
        --batch_size 4096 --epochs 100 --base_lr 2.5 --cosine --lr_decay_rate 0' -- --mode=train_then_eval "$@"
