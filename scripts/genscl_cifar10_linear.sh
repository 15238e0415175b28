#!/usr/bin/env bash
# Linear evaluation of genscl_cifar10.sh, of the same --trial. Published:
# 97.6 % top-1 (ResNet-50, first version of the paper).
source "$(dirname "$0")/recipe.sh"
words=("$@")
default_encoder --pretrained cifar10_bsz_1024_mixup_cutmix_1.0_KD_1.0_SGD_lr_0.5
python main_linear.py --dataset cifar10 ${encoder[@]+"${encoder[@]}"} --augment-policy no --amp "$@"
