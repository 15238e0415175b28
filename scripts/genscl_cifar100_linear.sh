#!/usr/bin/env bash
# Linear evaluation of genscl_cifar100.sh. Published: 84.7 % top-1 (ResNet-50, first version of the paper).
cd "$(dirname "$0")/.."
python main_linear.py --dataset cifar100 --pretrained cifar100_bsz_1024_mixup_cutmix_1.0_KD_1.0_SGD_lr_0.5 \
    --augment-policy no --amp "$@"
