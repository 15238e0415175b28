#!/usr/bin/env bash
# SupCon on ImageNet (./data/imagenet), ResNet-50. Published: 78.7 % top-1, 94.3 % top-5, on TPUs; batches of 6,144 on a few
# GPUs need --accum_steps.
source "$(dirname "$0")/recipe.sh"
pretraining=(--dataset imagenet --temp 0.1 --base_temperature 1 --head 128 --normalize_embedding
    --LARS --cosine --lr_decay_rate 0 --warm --warm_epochs 12 --warmup_from 0 --amp
    --model resnet50 --batch_size 6144 --epochs 350 --base_lr 0.4 --weight_decay 1e-3 --augment_policy auto)
linear=(--dataset imagenet --batch_size 6144 --epochs 90 --base_lr 0.05 --optim_kind RMSPropTF --optim_eps 0.001
    --weight_decay 1e-6 --exp_decay 0.97 --exp_decay_epochs 0.5 --label_smoothing 0.05 --amp)
recipe supcon_imagenet_resnet50 "$@"
