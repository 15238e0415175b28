#!/usr/bin/env bash
# The teacher of genscl_cifar.sh, for CIFAR-10 or --dataset cifar100: timm's efficientnetv2_rw_m with a 3x3 stem, mixup
# or cutmix, Adam. No accuracy of it was published; epochs, batch size and learning rate are ours. To use a teacher that
# is there already, see genscl_cifar.sh.
exec python "$(dirname "$0")/launch.py" "$0" '
    main_ce.py --dataset {dataset} --model timm/efficientnetv2_rw_m --mix mixup_cutmix --optim_kind Adam
        --learning_rate 0.001 --weight_decay 0 --batch_size 128 --epochs 200 --cosine --amp
        --output_name efficientnetv2_rw_m_mixup_cutmix_{dataset}_Adam' -- "$@"
