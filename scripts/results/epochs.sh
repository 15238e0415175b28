#!/usr/bin/env bash
# Does SupCon catch up when it is trained to its end, and what is it good for? On all 50,000 CIFAR-10 images, with the small
# network: top-1 of each method against the images seen, and against time; then corrupted images, retrieval, other images,
# other classes, wrong labels, few labels.
#   bash scripts/results/epochs.sh --budget cpu          a day on two cores; `timeout 1h bash ...`, repeated, in parts
#   bash scripts/results/epochs.sh --budget gpu          the curves alone, resnet18 at 32 pixels; `timeout 9m bash ...`
# Options, and what is written where: rows.sh.
source "$(dirname "$0")/rows.sh"

declare -A options_of=(
    [supcon]='' [ce-sim]='--augment_policy sim' [supcon-ce]='--ce_weight 1' [simclr]='--method SimCLR'
    [sincere]='--method SINCERE' [genscl-mix]='--method GenSCL --mix mixup_cutmix' [ce]='')
methods='supcon ce-sim supcon-ce simclr sincere genscl-mix ce'
linear='--epochs 30 --batch_size 512 --lr 1 --cosine --no_warm --cache_features'
network="$network_small --amp"
[ $budget = cpu ] || network='--model resnet18 --amp --compile'

trained() {         # name, seed, data, method, epochs of two views (of one view twice as many), options; rows first
    local options=$(echo --cosine --warm --warm_epochs 1 ${options_of[$4]} $6)
    case $4 in
        ce*) classifier "$1" $2 "$3 $network --epochs $(($5 * 2)) $options" ;;
        *) pretrained "$1" $2 "$3 $network" "--epochs $5 $options" "$linear" "${@:7}" ;;
    esac
}

if [ $budget = gpu ]; then      # settings as the trials on a CPU chose them, but for a larger batch and its rate
    train='--lr 0.6 --weight_decay 5e-4 --batch_size 512'
    for epochs in 16 64; do
        trained supcon-ce-$epochs 0 "$cifar" supcon-ce $epochs "$train --temp 0.1"
        trained supcon-$epochs 0 "$cifar" supcon $epochs "$train --temp 0.1"
        trained ce-sim-$epochs 0 "$cifar" ce-sim $epochs "$train"
    done
    finish
fi

# Learning rate, weight decay, batch size and temperature are chosen among six short trials of each method, on nine tenths of
# the training images of each class; the accuracy of a trial is that on the last tenth.
[ -n "$data" ] || reject '--data is missing, expected an ImageFolder copy of CIFAR-10: a tenth of its train/ is held out'
trial() { trained "trial-$1$2" 0 "--dataset path --data_folder $data/train --cache_dir data/cache" $1 6 "$3"; }

for method in $methods; do
    temp='--temp 0.1' last='-temp-0.2 --batch_size 256 --temp 0.2'
    case $method in
        ce*) temp='' last='-batch-128 --batch_size 128' ;;
        simclr) temp='--temp 0.5' ;;
    esac
    trial $method '' "--lr 0.3 --weight_decay 5e-4 --batch_size 256 $temp"
    trial $method -lr-0.1 "--lr 0.1 --weight_decay 5e-4 --batch_size 256 $temp"
    trial $method -lr-1 "--lr 1 --weight_decay 5e-4 --batch_size 256 $temp"
    trial $method -wd-1e-4 "--lr 0.3 --weight_decay 1e-4 --batch_size 256 $temp"
    trial $method -batch-512 "--lr 0.6 --weight_decay 5e-4 --batch_size 512 $temp"
    trial $method ${last%% *} "--lr 0.3 --weight_decay 5e-4 ${last#* }"
done

# What they found; SupCon, SupCon with cross-entropy and cross-entropy with its views were tried before evaluation resized
# JPEG files correctly (docs/results.md).
declare -A chosen=(
    [supcon]='--lr 0.3 --weight_decay 5e-4 --batch_size 256 --temp 0.1'
    [ce-sim]='--lr 0.3 --weight_decay 5e-4 --batch_size 128'
    [supcon-ce]='--lr 0.3 --weight_decay 5e-4 --batch_size 256 --temp 0.1'
    [simclr]='--lr 0.3 --weight_decay 5e-4 --batch_size 256 --temp 0.2'
    [sincere]='--lr 0.1 --weight_decay 5e-4 --batch_size 256 --temp 0.1'
    [ce]='--lr 0.3 --weight_decay 5e-4 --batch_size 128'
    [genscl-mix]='--lr 0.3 --weight_decay 5e-4 --batch_size 256 --temp 0.2'
)
longer() { trained $1-$3 $2 "$cifar" $1 $3 "${chosen[$1]}"; }

for epochs in 8 16 32; do
    for method in $methods; do longer $method 0 $epochs; done
done
for method in $methods; do longer $method 1 32; done
wait                # for the networks of 32 epochs

compared='supcon ce-sim supcon-ce simclr'        # those whose features are compared
encoder() { echo output/$runs-$1/trial=0/last.ckpt; }
of_classifier() { case $1 in ce*) encoder $1 ;; *) encoder $1-linear ;; esac; }
other_images() {    # name, row and run of the encoder, options of data, of the linear evaluation
    row $1 0 "@$2-0" "main_linear.py $3 --ckpt $(encoder $2) --cosine --no_warm --cache_features $4 $(of_run $1-linear 0)" \
        "scripts/evaluate.py --ckpt $(encoder $1-linear)"
}

for method in $compared; do
    row $method-corrupted 0 "@$method-32-0" \
        "scripts/evaluate.py --ckpt $(of_classifier $method-32) --corruptions --max_images 2000"
done
wait
for method in $compared; do
    other_images $method-digits $method-32 "--dataset digits --size 16" '--epochs 100 --batch_size 128 --lr 1'
done

# Networks that are trained as long as for 16 epochs of all images; those of 1 % of the images a quarter of that.
for part in known new; do           # five classes each, in the order of the alphabet
    ((!jobs)) || for split in train test; do
        mkdir -p data/cifar10_$part/$split
        classes=("$data/$split"/*/)
        [ $part = known ] && classes=("${classes[@]:0:5}") || classes=("${classes[@]:5}")
        for link in data/cifar10_$part/$split/*; do     # of another --data
            [ ! -L "$link" ] || [ "$link" -ef "$data/$split/$(basename "$link")" ] || rm "$link"
        done
        for folder in "${classes[@]}"; do
            link=data/cifar10_$part/$split/$(basename "$folder")
            [ -e "$link" ] || ln -s "$(cd -- "$folder" && pwd)" "$link"
        done
    done
done
for method in $compared; do
    options=${chosen[$method]}
    trained $method-known 0 "--dataset path --data_folder data/cifar10_known --cache_dir data/cache" $method 32 "$options"
    [ $method != simclr ] || continue
    for noise in 0.2 0.4; do trained $method-noise-$noise 0 "$cifar --label_noise $noise" $method 16 "$options"; done
    trained $method-few-50 0 "$cifar --samples_per_class 50" $method 400 "$options"
    trained $method-few-500 0 "$cifar --samples_per_class 500" $method 160 "$options"
done
wait
for method in $compared; do
    other_images $method-new $method-known '--dataset path --data_folder data/cifar10_new' '--epochs 30 --batch_size 512 --lr 1'
    [ $method = simclr ] || continue
    for labels in 50 500; do        # of the encoder that has seen all images, without labels
        other_images simclr-few-$labels simclr-32 "$cifar --samples_per_class $labels" '--epochs 100 --batch_size 128 --lr 1'
        wait
    done
done

for method in $methods; do longer $method 0 64; done
options_of[genscl-kd]="${options_of[genscl-mix]} --KD --teacher_path output/$runs-ce-sim-32/trial=0"
trained genscl-kd-32 0 "$cifar" genscl-kd 32 "${chosen[genscl-mix]}" @ce-sim-32-0
finish
