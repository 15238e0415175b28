#!/usr/bin/env bash
# SupCon on ImageNet (./data/imagenet), ResNet-200. Published: 81.4 % top-1, 95.9 % top-5, on TPUs; see --accum_steps.
# Number and magnitude of RandAugment are ours.
exec python "$(dirname "$0")/launch.py" "$0" '
    main_supcon.py --output_name {name} --dataset imagenet --model resnet200
        --temp 0.1 --base_temperature 1 --head 128 --normalize_embedding
        --batch_size 4096 --epochs 700 --base_lr 0.2 --LARS --weight_decay 1e-4
        --cosine --lr_decay_rate 0 --warm --warm_epochs 12 --warmup_from 0 --amp
        --augment_policy stacked_rand --rand_n 2 --rand_m 10' '
    main_linear.py --output_name {name}-linear --ckpt output/{name}/trial={trial}/last.ckpt --dataset imagenet
        --batch_size 4096 --epochs 90 --base_lr 0.05 --optim_kind RMSPropTF --optim_eps 0.001 --weight_decay 1e-6
        --exp_decay 0.97 --exp_decay_epochs 0.5 --label_smoothing 0.05 --amp' -- --mode=train_then_eval "$@"
