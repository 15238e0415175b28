#!/usr/bin/env bash
# Linear evaluation of simclr_cifar10.sh. Published: 93.6 % top-1 (ResNet-50).
cd "$(dirname "$0")/.."
run=SimCLR_cifar10_resnet50_lr_0.5_decay_0.0001_bsz_1024_temp_0.5_trial_0_cosine_warm
python main_linear.py --batch_size 512 --learning_rate 1 --ckpt "output/$run/trial=0/last.ckpt" "$@"
