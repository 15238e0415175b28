#!/usr/bin/env bash
# Several labels: mosaics of two by two CIFAR-10 images, labeled with the classes in them. mAP after SupCon, SimCLR, GenSCL (which
# weighs an image by the overlap of the labels) and binary cross-entropy, which all see as many views; SupCon and SimCLR at three
# temperatures, and with the usual smaller crops too.
#   bash scripts/results/mosaics.sh --budget cpu        10,000 mosaics at 32 pixels, 12 epochs
#   bash scripts/results/mosaics.sh --budget gpu        50,000 at 64 pixels, 100 epochs; `timeout 9m bash ...` for parts
# Options, and what is written where: rows.sh. A seed selects the weights and the views; the mosaics are always the same.
source "$(dirname "$0")/rows.sh"

if [ $budget = cpu ]; then
    others='1 2' count=10000 epochs=12 data='--size 32 --stem imagenet --model resnet18 --width 0.25'
    train='--batch_size 128 --lr 0.1 --cosine --warm --warm_epochs 2'
else
    others='' count=50000 epochs=100 data='--size 64 --stem imagenet --model resnet18 --amp'
    train='--batch_size 256 --lr 0.2 --cosine --warm'
fi
folder=data/mosaics-$(cksum <<< "$images $count" | cut -d ' ' -f 1)
data="--dataset csv --data_folder $folder $data" linear="--cache_features $linear_small"

mosaics() {         # NAME-SEED of a row: make them, unless they are there or its log is
    [[ $1 != $only ]] || ((jobs == 0)) || [ -e "$into/$table/$1.log" ] || [ -e "$folder" ] ||
        python scripts/make_mosaics.py $images --train $count --val 2000 --side 64 --output "$folder"
}

contrastive() {     # name, seed, method, temperature, smallest crop
    mosaics "$1-$2"
    pretrained "$1" "$2" "$data" "--epochs $epochs $train --method $3 --temp $4 --crop_min $5" "$linear"
}

for seed in 0 $others; do
    contrastive mosaics-supcon $seed SupCon 0.1 0.6
    contrastive mosaics-simclr $seed SimCLR 0.1 0.6
    contrastive mosaics-simclr-crop $seed SimCLR 0.1 0.2
done
contrastive mosaics-genscl 0 GenSCL 0.1 0.6
contrastive mosaics-supcon-crop 0 SupCon 0.1 0.2
for temp in 0.05 0.2; do
    contrastive mosaics-supcon-temp-$temp 0 SupCon $temp 0.6
    contrastive mosaics-simclr-temp-$temp 0 SimCLR $temp 0.6
done
mosaics mosaics-ce-0
classifier mosaics-ce 0 "$data --epochs $((2 * epochs)) $train --crop_min 0.6 --augment_policy sim"
finish
