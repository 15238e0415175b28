"""The plumbing that the three programs share; names are imported when they are first used, since --help needs none."""
import importlib
import os

# tensorboard-logger's generated messages are older than protobuf 4, whose Python implementation still reads them. It
# is chosen when protobuf is imported, by whichever package.
os.environ.setdefault('PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION', 'python')

MODULES = {
    'export': ('Exporter',),
    'options': ('UserError', 'defaults', 'parse', 'run'),
    'runs': ('Run', 'load_checkpoint', 'load_encoder', 'log', 'progress'),
    'teachers': ('load_teacher', 'read_teacher'),
    'training': ('AverageMeter', 'accuracy', 'autocast', 'check_finite', 'forward', 'forward_all', 'keep_freed_memory',
                 'knn_accuracy', 'learning_rate', 'moved', 'ood_metrics', 'ood_report', 'pieces_of', 'prepare',
                 'release_freed_memory', 'seed_step', 'set_device', 'set_learning_rate', 'set_optimizer', 'set_warmup',
                 'update'),
}


def __getattr__(name):
    for module, names in MODULES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(f'util.{module}'), name)
            return value
    raise AttributeError(f'module util has no attribute {name!r}')
