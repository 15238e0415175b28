"""Command lines of programs that know the datasets, networks and checkpoints: see options.py for the options."""
import os
import re
from pathlib import Path

from datasets import DATASETS
from networks.resnet_big import network_name
from util import options
from util.errors import UserError
from util.options import DATA, EVALUATION, METHOD_DEFAULTS, NETWORK, as_text
from util.runs import run_folder
from util.weights import hold_out_same_images, read_weights

# Options that distinguish runs although the published names of runs do not hold them.
NAMED = ('model', 'width', 'stem', 'size', 'timm_pretrained', 'encoder_lr', 'head', 'positives', 'moco', 'ce_weight',
         'n_views', 'local_crops', 'local_size', 'mix', 'augment_policy', 'samples_per_class', 'label_fraction',
         'imbalance', 'label_noise', 'sampler', 'images_per_class', 'logit_adjustment', 'aug_mode', 'cache_features',
         'finetune', 'freeze_bn')
DOWNLOADED = {'cifar10': 'cifar-10-batches-py', 'cifar100': 'cifar-100-python'}     # their folders in --data_folder


def parse(program, description, argv=None, method=None, recorded=()):
    """`options.parse` with the rows of DATASETS; the names of networks are checked."""
    opt = options.parse(program, description, argv, DATASETS, method, recorded)
    if opt.model is not None:
        opt.model = network_name(opt.model)
    if getattr(opt, 'teacher_kind', None):
        opt.teacher_kind = network_name(f'timm/{opt.teacher_kind}', '--teacher_kind').removeprefix('timm/')
    pretrained = getattr(opt, 'timm_pretrained', False)
    for name in (opt.model if not (pretrained or recorded) else None, getattr(opt, 'teacher_kind', None)):
        if name and '.' in name:
            expected = f"{name.split('.')[0]}, with random weights"
            if name == opt.model:
                expected += ', or --timm_pretrained'
            raise UserError(f'found {name}: what follows the dot names pretrained weights, expected {expected}')
    if pretrained:
        from networks.timm_encoder import pretrained_settings  # here, since timm takes seconds to import
        for name, value in pretrained_settings(opt.model.removeprefix('timm/')).items():
            setattr(opt, name, getattr(opt, name) or value)
    return opt


def parse_recorded(program, description, argv, file, recorded, names=DATA, method=None):
    """As `parse`, but the options `names` of the checkpoint `file`, a dict `recorded`, come before other defaults; on
    another dataset than the recorded one only those of the network."""
    downloaded = os.path.join(str(recorded.get('data_folder')), DOWNLOADED.get(recorded.get('dataset'), ''))
    if recorded.get('dataset') in DOWNLOADED and not os.path.isdir(downloaded):
        recorded = {**recorded, 'data_folder': None}            # a file must not choose where a download goes
    try:
        opt = parse(program, description, argv, method, as_words(recorded, names))
        if opt.dataset != recorded.get('dataset'):
            opt = parse(program, description, argv, method, as_words(recorded, set(names) & set(NETWORK)))
    except (UserError, ValueError) as error:
        parse(program, description, argv, method)               # whether the command line alone is wrong
        raise UserError(f'{file}: its recorded options cannot be used here ({error})') from error
    return opt


def parse_with_encoder(program, description, argv=None):
    """The options of a program that uses a pretrained encoder, and its checkpoint, of --ckpt or --pretrained: the
    checkpoint's network and dataset are the defaults, on the same dataset its size and statistics too.

    Raises UserError where there is no such checkpoint, or it holds another network than is asked for.
    """
    opt = parse(program, description, argv)
    names = DATA
    if opt.evaluate and opt.output_name:
        ckpt = run_folder(opt.output_name, opt.trial) / 'last.ckpt'
        names = EVALUATION
    elif (opt.ckpt is None) == (opt.pretrained is None):
        raise UserError('expected the pretrained encoder, either --ckpt FILE or --pretrained NAME')
    else:
        ckpt = opt.ckpt or run_folder(opt.pretrained, opt.trial) / opt.pretrained_ckpt
    checkpoint = read_weights(ckpt)
    recorded = checkpoint['opt']
    opt = parse_recorded(program, description, argv, ckpt, recorded, names, method=recorded.get('method'))
    opt.ckpt = str(ckpt)
    of_timm = 'model' not in recorded and (opt.model or '').startswith('timm/')         # timm's own weights
    for name, default in (('model', 'resnet50'), ('stem', 'imagenet' if of_timm else 'cifar'), ('width', 1.)):
        value = recorded.get(name, default)
        if getattr(opt, name) is None:
            setattr(opt, name, value)
        elif name in recorded and getattr(opt, name) != value:
            raise UserError(f'--{name} {getattr(opt, name)}: {opt.ckpt} holds an encoder with --{name} {value}')
    if recorded.get('dataset', opt.dataset) == opt.dataset:             # old files of --export record none
        for name in ('size', 'mean', 'std'):
            setattr(opt, name, getattr(opt, name) or recorded.get(name))
    hold_out_same_images(recorded, opt, opt.ckpt)
    return opt, checkpoint


def as_words(recorded, names):
    """The options `names` of a checkpoint as words of a command line, where they are checked like any others.

    Raises ValueError for what no option can be.
    """
    values = {name: recorded.get(name) for name in names}
    for name, value in values.items():
        parts = value[:4] if isinstance(value, (list, tuple)) else [value]
        if len(parts) > 3 or not all(isinstance(part, (str, int, float, type(None))) for part in parts):
            raise ValueError(f'--{name}: found a {type(value).__name__} that is no value of an option')
    return [f'--{name}={as_text(value)}' for name, value in values.items() if value is not None]


def evaluation_options(checkpoint, file, **given):
    """The options that evaluate a checkpoint's network on the images of its run, but for `given` ones: for scripts.

    Raises UserError where a recorded one is wrong.
    """
    recorded = {'model': 'resnet50', 'stem': 'cifar', 'width': 1., **checkpoint['opt']}
    argv = as_words({**given, 'batch_size': 256, 'num_workers': 0}, (*given, 'batch_size', 'num_workers'))
    opt = parse_recorded('main_ce', '', argv, file, recorded, EVALUATION)
    if opt.dataset == recorded.get('dataset'):
        opt.split_seed = recorded.get('split_seed')
    for name in ('size', 'mean', 'std'):                    # the network's, on other images too
        setattr(opt, name, recorded.get(name))
    return opt


def defaults(**changes):
    """The options of main_ce.py as they are by default, but for `changes`: for scripts that read images.

    Raises UserError for the datasets `path` and `csv` without a data_folder.
    """
    opt = parse('main_ce', '', [])
    vars(opt).update(changes)
    if opt.dataset in ('path', 'csv') and not changes.get('data_folder'):
        raise UserError(f'--dataset {opt.dataset}: --data_folder is missing, expected a folder of images')
    opt.data_folder = changes.get('data_folder') or DATASETS[opt.dataset].folder
    return opt


def checkpoint_name(opt):
    """--ckpt in a run's name: output/NAME/trial=0/last.ckpt -> NAME."""
    file = Path(opt.ckpt)
    parts = [file.parent.name, file.stem]
    if file.parent.name.startswith('trial='):
        trial = file.parent.name.removeprefix('trial=')
        parts = [file.parent.parent.name, trial != opt.trial and f'trial_{trial}', file.stem.removeprefix('last')]
    return _in_file_names('_'.join(part for part in parts if part))


def run_name(program, opt):
    """A run's default name: the published one, and the options of NAMED that it lacks and that are not at their
    defaults."""
    published, included = _published_name(program, opt)
    standard = {**options.program_defaults(program), **METHOD_DEFAULTS[program].get(getattr(opt, 'method', None), {}),
                **DATASETS[opt.dataset].defaults.get(program, {})}
    differing = {name: getattr(opt, name) for name in NAMED
                 if name not in included and getattr(opt, name, None) != standard.get(name)}
    further = [name if value is True else f'{name}_{as_text(value)}' for name, value in differing.items()]
    if opt.ckpt:
        further.append(f"{'of' if program == 'main_linear' else 'from'}_{checkpoint_name(opt)}")
    return '_'.join([part for part in published if part] + [_in_file_names(part) for part in further])


def _published_name(program, opt):
    """The parts of the name in the published code, some None or False, and the options of NAMED that are in it."""
    schedule = [opt.cosine and 'cosine', opt.warm and 'warm']
    settings = f'{opt.dataset}_{opt.model}_lr_{opt.learning_rate}_decay_{opt.weight_decay}'
    if program == 'main_linear':                    # the network is in the name of the encoder's run, which comes last
        return [f'{settings}_bsz_{opt.batch_size}', *schedule], ('model', 'width', 'stem', 'size')
    if program == 'main_ce':
        return [f'SupCE_{settings}_bsz_{opt.batch_size}_trial_{opt.trial}', *schedule], ('model',)
    if opt.method == 'GenSCL':
        return [f'{opt.dataset}_bsz_{opt.batch_size}', opt.cutout and 'cutout',
                opt.mix and f'{opt.mix}_{opt.mix_alpha}', opt.KD and f'KD_{opt.KD_alpha}',
                f"{'LARS' if opt.LARS else opt.optim_kind}_lr_{opt.learning_rate}"], ('mix',)
    return [f'{opt.method}_{settings}_bsz_{opt.batch_size}_temp_{opt.temp}_trial_{opt.trial}', *schedule], ('model',)


def _in_file_names(text):
    """The text with `-` in place of what a file's name should not hold."""
    return re.sub(r'[^\w.+=,@%-]+', '-', text)
