#!/usr/bin/env bash
# SupCon pretraining on CIFAR-10. Published, with supcon_cifar10_linear.sh after it: 96.0 % top-1 (ResNet-50).
# Published on several GPUs; all in CUDA_VISIBLE_DEVICES are used. The learning rate belongs to this batch size.
exec python "$(dirname "$0")/launch.py" "$0" \
    'main_supcon.py --batch_size 1024 --learning_rate 0.5 --temp 0.1 --cosine' -- "$@"
