#!/usr/bin/env bash
# SimCLR on CIFAR-10, ResNet-50, with the SupCon paper's settings (those of SupContrast: simclr_cifar10.sh).
exec python "$(dirname "$0")/launch.py" "$0" '
    main_supcon.py --output_name {name} --dataset cifar10 --model resnet50 --method SimCLR
        --temp 0.5 --base_temperature 1 --head 2048,128
        --batch_size 1024 --epochs 400 --base_lr 0.5 --weight_decay 1e-4
        --cosine --lr_decay_rate 0 --warm --warmup_from 0' '
    main_linear.py --output_name {name}-linear --ckpt output/{name}/trial={trial}/last.ckpt --dataset cifar10
        --batch_size 1024 --epochs 90 --base_lr 0.25 --cosine --lr_decay_rate 0' -- --mode=train_then_eval "$@"
