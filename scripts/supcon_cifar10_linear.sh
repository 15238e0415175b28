#!/usr/bin/env bash
# Linear evaluation of supcon_cifar10.sh. Published: 96.0 % top-1 (ResNet-50).
cd "$(dirname "$0")/.."
run=SupCon_cifar10_resnet50_lr_0.5_decay_0.0001_bsz_1024_temp_0.1_trial_0_cosine_warm
python main_linear.py --batch_size 512 --learning_rate 5 --ckpt "output/$run/trial=0/last.ckpt" "$@"
