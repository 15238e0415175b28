"""The plumbing that the three programs share; names are imported when they are first used, since --help needs none."""
import importlib
import os

# tensorboard-logger's generated messages are older than protobuf 4, whose Python implementation still reads them. It
# is chosen when protobuf is imported, by whichever package.
os.environ.setdefault('PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION', 'python')

MODULES = {
    'checkpoints': ('load_checkpoint', 'load_encoder'),
    'distributed': ('exchanged', 'gather', 'mean', 'moved', 'rank', 'share', 'sizes_of'),
    'export': ('Exporter',),
    'metrics': ('AverageMeter', 'accuracy', 'check_finite', 'knn_accuracy', 'ood_metrics', 'ood_report'),
    'options': ('DATA', 'EVALUATION', 'UserError', 'defaults', 'evaluation_options', 'name_suffix', 'parse',
                'parse_recorded', 'run'),
    'runs': ('Run', 'log', 'progress', 'run_folder'),
    'teachers': ('load_classifier', 'load_teacher', 'read_teacher'),
    'training': ('autocast', 'forward', 'forward_all', 'keep_freed_memory', 'learning_rate', 'pieces_of', 'prepare',
                 'release_freed_memory', 'seed_step', 'set_device', 'set_learning_rate', 'set_optimizer',
                 'set_warmup', 'update'),
}


def __getattr__(name):
    for module, names in MODULES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f'util.{module}'), name)
            return value
    raise AttributeError(f'module util has no attribute {name!r}')
