#!/usr/bin/env bash
# Linear evaluation of genscl_cifar10.sh. Published: 97.6 % top-1 (ResNet-50, first version of the paper).
cd "$(dirname "$0")/.."
python main_linear.py --dataset cifar10 --pretrained cifar10_bsz_1024_mixup_cutmix_1.0_KD_1.0_SGD_lr_0.5 \
    --augment-policy no --amp "$@"
