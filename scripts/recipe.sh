# Sourced by the launch files of the SupCon paper's recipes. They set `pretraining` (none for cross-entropy) and `linear`,
# the options of the two stages, and call: recipe NAME "$@". Further options override those of both stages, as far as a
# stage knows them; --mode is train, eval or train_then_eval (default), --use_labels=False makes SupCon SimCLR.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

recipe() {
    local name=$1 mode=train_then_eval trial=0 words=(); shift
    while (($#)); do
        case $1 in
            --mode=* | --trial=*) local "${1#--}" ;;
            --mode | --trial) local "${1#--}=${2:-}"; shift ;;
            --output[_-]name=* | --desc=*) name=${1#*=} ;;
            --output[_-]name | --desc) name=${2:-}; shift ;;
            --use[_-]labels=[Ff]alse) words+=(--method SimCLR) ;;
            --use[_-]labels=[Tt]rue) ;;
            *) words+=("$1") ;;
        esac
        shift
    done
    case $mode in train | eval | train_then_eval) ;; *)
        echo "recipe.sh: error: --mode $mode, expected train, eval or train_then_eval" >&2; exit 2 ;;
    esac
    if ((${#pretraining[@]})); then
        [ "$mode" = eval ] || stage main_supcon "${pretraining[@]}" --output_name "$name"
        linear=(main_linear "${linear[@]}" --ckpt "output/$name/trial=$trial/last.ckpt" --output_name "$name-linear")
    else
        linear=(main_ce "${linear[@]}" --output_name "$name")
    fi
    [ "$mode" = eval ] || stage "${linear[@]}"
    [ "$mode" = train ] || stage "${linear[@]}" --evaluate
}

stage() {           # program, its options; then those words of the command line that it knows
    local program=$1 mine; shift
    mapfile -d '' -t mine < <(python util/options.py "$program" ${words[@]+"${words[@]}"})
    echo "python $program.py $* --trial $trial ${mine[*]:-}"
    python "$program.py" "$@" --trial "$trial" ${mine[@]+"${mine[@]}"}
}
