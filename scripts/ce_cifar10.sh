#!/usr/bin/env bash
# Cross-entropy on CIFAR-10. Published: 95.0 % top-1 (ResNet-50).
# Published on several GPUs; all in CUDA_VISIBLE_DEVICES are used. The learning rate belongs to this batch size.
exec python "$(dirname "$0")/launch.py" "$0" \
    'main_ce.py --batch_size 1024 --learning_rate 0.8 --cosine --syncBN' -- "$@"
