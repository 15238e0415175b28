#!/usr/bin/env bash
# Linear evaluation of supcon_cifar10.sh, of the same --dataset and --trial. Published: 96.0 % top-1 (ResNet-50).
# For another encoder: --ckpt FILE.
run=SupCon_{dataset}_resnet50_lr_0.5_decay_0.0001_bsz_1024_temp_0.1_trial_{trial}_cosine_warm
exec python "$(dirname "$0")/launch.py" "$0" \
    "main_linear.py --batch_size 512 --learning_rate 5 --ckpt output/$run/trial={trial}/last.ckpt" -- "$@"
