#!/usr/bin/env bash
# GenSCL pretraining with mixup, cutmix and the teacher of genscl_cifar100_teacher.sh, of the same --trial. Published, with
# genscl_cifar100_linear.sh after it: 84.7 % top-1 (ResNet-50, first version of the paper). A teacher elsewhere:
# --teacher-path FOLDER, with ckpt_best.pth in it.
source "$(dirname "$0")/recipe.sh"
words=("$@")
take --trial 0
python main_supcon.py --method GenSCL --dataset cifar100 --mix mixup_cutmix --KD --KD-alpha 1 \
    --teacher-path "output/efficientnetv2_rw_m_mixup_cutmix_cifar100_Adam/trial=$value" "$@"
