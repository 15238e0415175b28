# Sourced by the launch files whose stages follow one another. `begin NAME "$@"` reads the command line, `stage PROGRAM
# OPTIONS` plans a command, `go` checks the options of all that are planned, then runs them. What is given on the command
# line goes to each stage that knows it; all have the same --trial, and --output_name is how the runs' names begin.
# LAUNCH is what starts a program: LAUNCH="torchrun --nproc_per_node 8", instead of python.
#
# The SupCon paper's recipes set `pretraining` and `linear`, the options of the two stages (without pretraining:
# `program` and its options in `linear`), and call: recipe NAME "$@". Theirs are --mode, train, eval or train_then_eval
# (the default), and --use_labels=False: SupCon becomes SimCLR. A learning rate is overridden with --base_lr.
set -euo pipefail
shopt -s extglob
CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.."

refuse() { echo "${0##*/}: error: $1" >&2; exit 2; }

take() {            # spellings of an option, its default: takes it out of `words`; sets `value`, to the last one given
    local rest=()
    value=$2
    set -- "$1" ${words[@]+"${words[@]}"}
    while (($# > 1)); do
        case $2 in
            $1) (($# > 2)) || refuse "$2: no value is given"
                value=$3; set -- "$1" "${@:4}" ;;
            $1=*) value=${2#*=}; set -- "$1" "${@:3}" ;;
            *) rest+=("$2"); set -- "$1" "${@:3}" ;;
        esac
    done
    words=(${rest[@]+"${rest[@]}"})
}

default_encoder() { # --ckpt or --pretrained, its value: sets `encoder` to both, unless one of the two is given
    encoder=("$@")
    take '--@(ckpt|pretrained)' ''
    [ -z "$value" ] || encoder=()
}

begin() {           # default name, the command line: sets name, trial and words
    case " ${*:2} " in *' --help '* | *' -h '*)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "scripts/${0##*/}"
        echo 'Options: python main_supcon.py --help, and of main_linear.py and main_ce.py'
        exit ;;
    esac
    words=("${@:2}") planned=() more=''
    take '@(--output[_-]name|--desc)' "$1"; name=$value
    take --trial 0; trial=$value
}

join() {            # words: refuses those by which a stage would not go on from the one before it
    while (($#)); do
        case $1=${2:-} in
            --trial=* | --output[_-]name=* | --desc=*) refuse "${1%%=*}: expected for all stages, not for one" ;;
            --ckpt=* | --pretrained=* | --pretrained[_-]ckpt=* | --evaluate=*)
                refuse "${1%%=*}: the encoder is the one that this command trains, for another: main_linear.py" ;;
            --resume= | --resume=-* | --resume=auto*) ;;
            --resume=*) refuse '--resume: a file is given, expected --resume alone: each stage finds its own' ;;
        esac
        shift
    done
}

stage() {           # program, its options; they are followed by those of `words` that it knows, and by `more`
    local program=$1 word mine=(); shift
    while IFS= read -r -d '' word; do mine+=("$word"); done < <(
        python util/options.py "$program" ${words[@]+"${words[@]}"} && printf 'whole\0')
    [ "${mine[*]: -1}" = whole ] || refuse 'the options could not be sorted'
    unset "mine[${#mine[@]}-1]"
    set -- "$program.py" "$@" --trial "$trial" ${mine[@]+"${mine[@]}"} $more
    planned+=($# "$@")
}

go() {
    python -c '
import sys, util

def check():
    words = sys.argv[1:]
    while words:
        count = int(words[0])
        sys.argv[0] = words[1]
        util.parse(words[1].removesuffix(".py"), "", words[2:count + 1])
        del words[:count + 1]

util.run(check)' "${planned[@]}"
    set -- "${planned[@]}"
    while (($#)); do
        echo "${LAUNCH:-python} ${*:2:$1}"
        ${LAUNCH:-python} "${@:2:$1}"
        shift $(($1 + 1))
    done
}

recipe() {          # name, the command line
    local mode
    begin "$@"
    take --mode train_then_eval; mode=$value
    case $mode in train | eval | train_then_eval) ;; *)
        refuse "--mode $mode, expected train, eval or train_then_eval" ;;
    esac
    take '--use[_-]labels' ''
    case $value in
        '') ;;
        [Tt]rue) words+=(--method SupCon) ;;
        [Ff]alse) words+=(--method SimCLR) ;;
        *) refuse "--use_labels $value, expected True or False" ;;
    esac
    if ((${#pretraining[@]})); then
        join ${words[@]+"${words[@]}"}
        [ "$mode" = eval ] || stage main_supcon "${pretraining[@]}" --output_name "$name"
        linear=(main_linear "${linear[@]}" --ckpt "output/$name/trial=$trial/last.ckpt" --output_name "$name-linear")
    else            # one program, which is given all words, to refuse what it does not know
        linear=("$program" "${linear[@]}" --output_name "$name" ${words[@]+"${words[@]}"})
        words=()
    fi
    [ "$mode" = eval ] || stage "${linear[@]}"
    [ "$mode" = train ] || stage "${linear[@]}" --evaluate
    go
}
