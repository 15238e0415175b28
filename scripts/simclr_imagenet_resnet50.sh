#!/usr/bin/env bash
# SimCLR on ImageNet (./data/imagenet), ResNet-50, as the SupCon paper ran it; see --accum_steps.
exec python "$(dirname "$0")/launch.py" "$0" '
    main_supcon.py --output_name {name} --dataset imagenet --model resnet50 --method SimCLR
        --temp 0.1 --base_temperature 1 --head 2048,2048,128 --head_bn
        --batch_size 6144 --epochs 100 --base_lr 0.3 --LARS --weight_decay 1e-4
        --cosine --lr_decay_rate 0 --warm --warm_epochs 12 --warmup_from 0 --amp
        --augment_policy sim --jitter_strength 1 --blur_p 0.5' '
    main_linear.py --output_name {name}-linear --ckpt output/{name}/trial={trial}/last.ckpt --dataset imagenet
        --batch_size 6144 --epochs 90 --base_lr 0.1 --nesterov --weight_decay 1e-6
        --exp_decay 0.97 --exp_decay_epochs 0.5 --label_smoothing 0.05 --amp' -- --mode=train_then_eval "$@"
