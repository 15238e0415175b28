#!/usr/bin/env bash
# GenSCL pretraining with mixup, cutmix and the teacher of genscl_cifar10_teacher.sh, of the same --trial. Published, with
# genscl_cifar10_linear.sh after it: 97.6 % top-1 (ResNet-50, first version of the paper). A teacher elsewhere:
# --teacher-path FOLDER, with ckpt_best.pth in it.
source "$(dirname "$0")/recipe.sh"
words=("$@")
take --trial 0
python main_supcon.py --method GenSCL --dataset cifar10 --mix mixup_cutmix --KD --KD-alpha 1 \
    --teacher-path "output/efficientnetv2_rw_m_mixup_cutmix_cifar10_Adam/trial=$value" "$@"
