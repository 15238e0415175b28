#!/usr/bin/env bash
# Linear evaluation of genscl_cifar.sh, of the same --dataset and --trial. Published: 97.6 % top-1, CIFAR-100 84.7 %
# (ResNet-50, first version of the paper). For another encoder: --pretrained NAME.
exec python "$(dirname "$0")/launch.py" "$0" '
    main_linear.py --dataset {dataset} --pretrained {dataset}_bsz_1024_mixup_cutmix_1.0_KD_1.0_SGD_lr_0.5
        --augment-policy no --amp' -- "$@"
