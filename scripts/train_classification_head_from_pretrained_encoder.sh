#!/usr/bin/env bash
# Linear evaluation as in the ImageNet recipes, for any encoder:
#   bash scripts/train_classification_head_from_pretrained_encoder.sh --ckpt FILE
exec python "$(dirname "$0")/launch.py" "$0" '
    main_linear.py --output_name {name} --dataset imagenet
        --batch_size 6144 --epochs 90 --base_lr 0.05 --optim_kind RMSPropTF --optim_eps 0.001 --weight_decay 1e-6
        --exp_decay 0.97 --exp_decay_epochs 0.5 --label_smoothing 0.05 --amp' -- --mode=train_then_eval "$@"
