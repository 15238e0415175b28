"""The plumbing that the three programs share."""
from util.export import Exporter
from util.options import UserError, defaults, parse, run
from util.runs import Run, load_checkpoint, load_encoder, log, progress
from util.teachers import load_teacher, read_teacher
from util.training import (
    AverageMeter,
    accuracy,
    autocast,
    check_finite,
    forward,
    forward_all,
    keep_freed_memory,
    knn_accuracy,
    learning_rate,
    ood_metrics,
    ood_report,
    pieces_of,
    prepare,
    seed_step,
    set_device,
    set_learning_rate,
    set_optimizer,
    set_warmup,
    update,
)
