#!/usr/bin/env bash
# Cross-entropy on ImageNet (./data/imagenet), ResNet-50, the baseline of the SupCon paper; see --accum_steps.
exec python "$(dirname "$0")/launch.py" "$0" '
    main_ce.py --output_name {name} --dataset imagenet --model resnet50
        --batch_size 6144 --epochs 200 --base_lr 0.1 --nesterov --weight_decay 1e-4
        --cosine --lr_decay_rate 0 --warm --warm_epochs 12 --warmup_from 0 --amp
        --augment_policy auto --label_smoothing 0.05' -- --mode=train_then_eval "$@"
