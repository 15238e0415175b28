# Sourced by the launch files of the SupCon paper's recipes. They set `pretraining` and `linear`, the options of the two
# stages (without pretraining: `program` and its options in `linear`), and call: recipe NAME "$@". Further options override
# those of both stages, as far as a stage knows them; --mode is train, eval or train_then_eval (the default);
# --use_labels=False makes SupCon SimCLR. A learning rate is overridden with --base_lr. LAUNCH is what starts a program:
# LAUNCH="torchrun --nproc_per_node 8", instead of python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

recipe() {
    local name=$1 mode=train_then_eval trial=0 words=() option value; shift
    while (($#)); do
        option=$1
        case $option in
            --mode | --trial | --output[_-]name | --desc | --use[_-]labels)
                (($# > 1)) || refuse "$option: no value is given"
                value=$2; shift ;;
            *) value=${option#*=} ;;
        esac
        shift
        case $option in
            --mode | --mode=*) mode=$value ;;
            --trial | --trial=*) trial=$value ;;
            --output[_-]name | --output[_-]name=* | --desc | --desc=*) name=$value ;;
            --use[_-]labels | --use[_-]labels=*)
                case $value in
                    [Tt]rue) words+=(--method SupCon) ;;
                    [Ff]alse) words+=(--method SimCLR) ;;
                    *) refuse "--use_labels $value, expected True or False" ;;
                esac ;;
            *) words+=("$option") ;;
        esac
    done
    case $mode in train | eval | train_then_eval) ;; *)
        refuse "--mode $mode, expected train, eval or train_then_eval" ;;
    esac
    if ((${#pretraining[@]})); then
        [ "$mode" = eval ] || stage main_supcon "${pretraining[@]}" --output_name "$name"
        linear=(main_linear "${linear[@]}" --ckpt "output/$name/trial=$trial/last.ckpt" --output_name "$name-linear")
    else
        linear=("$program" "${linear[@]}" --output_name "$name")
    fi
    [ "$mode" = eval ] || stage "${linear[@]}"
    [ "$mode" = train ] || stage "${linear[@]}" --evaluate
}

refuse() { echo "recipe.sh: error: $1" >&2; exit 2; }

stage() {           # program, its options; then those words of the command line that it knows
    local program=$1 mine; shift
    mapfile -d '' -t mine < <(python util/options.py "$program" ${words[@]+"${words[@]}"} && printf 'whole\0')
    [ "${mine[${#mine[@]}-1]:-}" = whole ] || refuse 'the options could not be sorted'
    unset 'mine[${#mine[@]}-1]'
    echo "${LAUNCH:-python} $program.py $* --trial $trial ${mine[*]:-}"
    ${LAUNCH:-python} "$program.py" "$@" --trial "$trial" ${mine[@]+"${mine[@]}"}
}
