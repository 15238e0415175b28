#!/usr/bin/env bash
# The three experiments on MVIP with synthetic images, both stages, and their table. Published top-1: 71.4 with real
# images, 77.5 with id images in both stages, 75.3 with ood images in pretraining too; see docs/mvip.md.
# One GPU. Options are added to every command that has them, those in PRETRAIN and LINEAR to one stage; e.g. on a CPU:
#   python scripts/make_augs.py --dataset digits --aug_output_name mvip-test-dafusion
#   PRETRAIN="--epochs 40 --lr 0.1" LINEAR="--epochs 20 --lr 1" bash scripts/mvip_experiments.sh --dataset digits \
#       --model resnet18 --width 0.25 --image_size 16 --batch_size 128
common='--dataset mvip --model resnet-50 --image_size 224 --batch_size 16 --num_workers 4 --lr 0.001 --lr_cosine
    --aug_output_name mvip-test-dafusion --aug_name_id augs-id --aug_name_ood augs-ood'
pretrain="main_supcon.py $common --method SupCon --epochs 110"
linear="main_linear.py $common --epochs 50"

exec python "$(dirname "$0")/launch.py" "$0" \
    "$pretrain --aug_mode none --output_name {name}-1-real-pre" \
    "$linear --aug_mode none --output_name {name}-1-real-lin --ckpt output/{name}-1-real-pre/trial={trial}/last.ckpt" \
    "$pretrain --aug_mode with_id --output_name {name}-2-id-pre" \
    "$linear --aug_mode with_id --output_name {name}-2-id-lin --ckpt output/{name}-2-id-pre/trial={trial}/last.ckpt" \
    "$pretrain --aug_mode with_both --output_name {name}-3-id-ood-pre" \
    "$linear --aug_mode with_id --output_name {name}-3-id-ood-lin
        --ckpt output/{name}-3-id-ood-pre/trial={trial}/last.ckpt" \
    'scripts/accuracies.py "1 real images" output/{name}-1-real-lin/trial={trial}
        "2 + id images, both stages" output/{name}-2-id-lin/trial={trial}
        "3 + ood images in pretraining" output/{name}-3-id-ood-lin/trial={trial}' -- --output_name=mvip "$@"
