#!/usr/bin/env bash
# SimCLR pretraining on your own images: ./path/<class>/<image>.png. Without --mean and --std they are measured.
exec python "$(dirname "$0")/launch.py" "$0" '
    main_supcon.py --batch_size 1024 --learning_rate 0.5 --temp 0.1 --cosine --dataset path --data_folder ./path
        --mean "(0.4914, 0.4822, 0.4465)" --std "(0.2675, 0.2565, 0.2761)" --method SimCLR' -- "$@"
