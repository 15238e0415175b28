#!/usr/bin/env bash
# GenSCL pretraining on CIFAR-10, or --dataset cifar100, with mixup, cutmix and the teacher of genscl_cifar_teacher.sh,
# of the same --trial. Published, with genscl_cifar_linear.sh after it: 97.6 % top-1, CIFAR-100 84.7 % (ResNet-50, first
# version of the paper). A teacher elsewhere: --teacher-path FOLDER, with ckpt_best.pth in it.
exec python "$(dirname "$0")/launch.py" "$0" '
    main_supcon.py --method GenSCL --dataset {dataset} --mix mixup_cutmix --KD --KD-alpha 1
        --teacher-path output/efficientnetv2_rw_m_mixup_cutmix_{dataset}_Adam/trial={trial}' -- "$@"
