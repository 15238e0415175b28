# Sourced by the tables of this folder. Each is rows: `row NAME SEED COMMAND...` runs the commands of a row, as many rows at
# once as there are cores (on a GPU one), and writes what they print to <into>/<table>/NAME-SEED.log; a row whose log is
# there is left alone. `finish` waits for all and makes the table, and the figures of the logs.
#   bash scripts/results/<table>.sh --budget cpu|gpu [--data FOLDER] [--into FOLDER] [--only PATTERN] [--jobs N]
#       [--with "OPTIONS"]
# --data: an ImageFolder copy of CIFAR-10 (train/ and test/); default: data/cifar10_jpeg where that is, else the published
# CIFAR-10, downloaded into data/. --into: logs, table and figures, default scripts/results/<budget>; it is a part of the
# runs' names, so that another folder trains everything anew. Both are relative to the repository. --only: rows whose NAME-SEED
# matches, such as '*-0'. --jobs: how many rows at once; 0 makes the table of the logs that are there. --with: options for
# every training command. Stopped by Ctrl-C, or by `timeout 9m bash ...`, a table goes on where it was when it is called
# again.
set -euo pipefail
shopt -s extglob
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONUTF8=1                     # logs and tables are the same in every locale
table=$(basename "$0" .sh) budget='' data='' into='' only='*' with='' jobs=''

reject() { echo "$table.sh: error: $1" >&2; exit 2; }

while (($#)); do
    (($# > 1)) || reject "$1: no value is given"
    case $1 in
        --data | --into) [ -n "${2%%+(/)}" ] || reject "$1 '$2': expected a folder" ;;&
        --budget) budget=$2 ;;
        --data) data=${2%%+(/)} ;;
        --into) into=${2%%+(/)} ;;
        --only) only=$2 ;;
        --jobs) [[ $2 =~ ^[0-9]+$ ]] || reject "--jobs '$2': expected a number"; jobs=$2 ;;
        --with) with+=" $2" ;;
        *) reject "$1: unknown, expected --budget, --data, --into, --only, --jobs or --with" ;;
    esac
    shift 2
done
case $budget in cpu | gpu) ;; *) reject "--budget '$budget', expected cpu or gpu" ;; esac
[[ $into$data != *[][[:space:]*?\'\"\\]* ]] ||
    reject "--into $into, --data $data: expected folders without spaces, quotes or wildcards in their names"
[[ $with != *--@(trial|seed|output[_-]name|desc|ckpt|pretrained|resume|overwrite|evaluate)* && $with != *$'\n'* ]] ||
    reject "--with$with: expected options that rows do not have themselves, in one line"
into=${into:-scripts/results/$budget}
runs=results-${into#scripts/results/}   # how the names of the runs begin
runs=${runs//\//-}
python -c 'from importlib.util import find_spec as f; import sys
sys.exit(not all(map(f, ("torch", "torchvision", "sklearn", "matplotlib", "tensorboard_logger", "tqdm", "timm"))))' ||
    source scripts/env.sh requirements.txt
case $budget in
    cpu) export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=''       # a thread for each row: the same bits on any number of cores
         cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)')
         jobs=${jobs:-$cores} ;;
    gpu) python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || reject '--budget gpu: no GPU is found'
         jobs=${jobs:-1} ;;
esac

archive=../shared/data/cifar10_jpeg.tar.xz      # where it lies beside the repository, it is unpacked
if [ -z "$data" ] && [ ! -d data/cifar10_jpeg ] && [ -f $archive ]; then
    unpacked=$(mkdir -p data && mktemp -d data/unpacking.XXXX)
    tar xJf $archive -C "$unpacked"
    mv "$unpacked/cifar10_jpeg" data/ || [ -d data/cifar10_jpeg/train ]         # another table was faster
    rm -rf "$unpacked"
fi
[ -n "$data" ] || [ ! -d data/cifar10_jpeg ] || data=data/cifar10_jpeg
[ -z "$data" ] || [ -d "$data/train" -a -d "$data/test" ] || reject "--data $data: expected a folder with train/ and test/"
images=${data:+--dataset path --data_folder $data}
images=${images:---dataset cifar10}
cifar="$images${data:+ --cache_dir data/cache}"
# What two cores can train in minutes: 100 images of each class, at 16 pixels, where the same time has four times the steps
# of 32 pixels; contrastive learning needs some thousand.
network_small='--size 16 --model resnet18 --width 0.25'
cifar_small="$cifar --samples_per_class 100 $network_small"
train_small='--batch_size 64 --lr 0.1 --cosine --warm'
linear_small='--epochs 30 --batch_size 64 --lr 0.1 --cosine --no_warm'

failures=$(mktemp)
trap 'rm -f "$failures"' EXIT
trap 'wait; exit 143' TERM              # programs that are stopped write a checkpoint first
trap 'wait; exit 130' INT
names=()                                # of all rows, NAME-SEED
declare -A commands_of                  # of each, one in a line

row() {             # name, seed, commands; @NAME-SEED stands for those of another row, which has been waited for
    local commands=() command
    for command in "${@:3}"; do
        case $command in
            @*) mapfile -t -O ${#commands[@]} commands <<< "${commands_of[${command#@}]}" ;;
            *) commands+=("$command") ;;
        esac
    done
    commands_of[$1-$2]=$(printf '%s\n' "${commands[@]}")
    [[ $1-$2 == $only ]] || return 0
    names+=("$1-$2")
    ((jobs)) || return 0
    while (($(jobs -rp | wc -l) >= jobs)); do wait -n || true; done
    { trap '' INT TERM; python scripts/results/row.py "$into/$table/$1-$2.log" "${commands[@]}" || echo "$1-$2" >> "$failures"; } &
}

pretrained() {      # name, seed, options of both stages, of pretraining, of the linear evaluation; rows that come first
    row "$1" "$2" "${@:6}" "main_supcon.py $3 $4 $(of_run "$1" "$2")" \
        "main_linear.py $3 --ckpt output/$runs-$1/trial=$2/last.ckpt $5 $(of_run "$1-linear" "$2")"
}

classifier() {      # name, seed, options
    row "$1" "$2" "main_ce.py $3 $(of_run "$1" "$2")" "scripts/evaluate.py --ckpt output/$runs-$1/trial=$2/last.ckpt"
}

of_run() { echo "--seed $2 --eval_freq 0 --print_freq 1000 --output_name $runs-$1 --trial $2 --resume$with"; }

finish() {
    local status=0
    wait
    ((${#names[@]})) || reject "--only $only: no row has such a name"
    sort -o "$failures" "$failures"
    python scripts/results/report.py "$table" "$into" "$failures" "${names[@]}" || status=1
    [ ! -s "$failures" ] || { echo "$table.sh: error: not filled: $(tr '\n' ' ' < "$failures")" >&2; status=1; }
    exit $status
}
