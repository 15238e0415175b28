"""The command line: one table of options, shared by the three programs, with the defaults of each."""
import argparse
import difflib
import gc
import importlib.util
import math
import os
import re
import signal
import sys

from util.errors import UserError

PROGRAMS = ('main_supcon', 'main_ce', 'main_linear')


# Types of values. Text is parsed as data; nothing from an option is ever evaluated.

def number(kind, low, high=math.inf, open_low=False):
    """A type for argparse: an int or float between low (excluded if open_low) and high."""
    name = 'whole number' if kind is int else 'number'
    bounds = f"{'above' if open_low else 'of at least'} {low}" + (f' and at most {high}' if high < math.inf else '')

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)) or (open_low and value == low):
            raise argparse.ArgumentTypeError(f'found {text!r}, expected a {name} {bounds}')
        return value
    return parse


COUNT, COUNT_OR_ZERO = number(int, 1, 2**31), number(int, 0, 2**31)
POSITIVE, POSITIVE_OR_ZERO = number(float, 0, open_low=True), number(float, 0)


def channels(parse):
    """A type: three numbers such as "(0.49, 0.48, 0.45)"."""
    def parse_all(text):
        parts = text.strip().strip('()[]').replace(',', ' ').split()
        if len(parts) != 3:
            raise argparse.ArgumentTypeError(f'found {text!r}, expected three numbers such as "(0.49, 0.48, 0.45)"')
        return tuple(parse(part) for part in parts)
    return parse_all


MEAN, STD = channels(number(float, -1e6, 1e6)), channels(number(float, 1e-6, 1e6))     # views stay finite


def epochs_list(text):
    """A type: epochs in rising order such as "60,75,90"."""
    parts = text.replace(',', ' ').split()
    if not all(part.isdigit() for part in parts) or sorted(map(int, parts)) != list(map(int, parts)):
        raise argparse.ArgumentTypeError(f'found {text!r}, expected epochs in rising order such as "60,75,90"')
    return [int(part) for part in parts]


def folder_name(text):
    """A type: one folder's name, so that no run is written outside output/."""
    if not re.fullmatch(r'[\w+=,@%-][\w.+=,@% -]*', text) or len(text.encode()) > 200:
        raise argparse.ArgumentTypeError(f'found {text!r}, expected a name of at most 200 letters, digits and "_-.+=", '
                                         'without "/" and not starting with "."')
    return text


def one_of(*names):
    """A type: one of these names."""
    def parse(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {' or '.join(names)}")
        return text
    return parse


def weight_or_inf(text):
    """A type: a number of at least 0, or inf."""
    if text.strip().lower() in ('inf', 'infinity'):
        return math.inf
    try:
        return POSITIVE_OR_ZERO(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f'{error}, or inf') from None


def head(text):
    """A type: mlp, linear, or sizes of layers such as "2048,2048,128"."""
    if text in ('mlp', 'linear'):
        return text
    parts = text.replace(',', ' ').split()
    if not parts or not all(part.isdigit() and 1 <= int(part) <= 2**16 for part in parts):
        raise argparse.ArgumentTypeError(f'found {text!r}, expected mlp, linear or sizes of layers such as 2048,128')
    return [int(part) for part in parts]


class Switch(argparse.Action):
    """A flag that --no_<name> turns off again, where a method turns it on."""

    def __init__(self, option_strings, dest, **settings):
        option_strings = [*option_strings, *(f'--no_{flag[2:]}' for flag in option_strings)]
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=settings.get('help'))

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith('--no_'))


# The table: group -> rows of (flags, settings of add_argument, programs that have the option).
SUPCON, CE, LINEAR = (PROGRAMS[:1], PROGRAMS[1:2], PROGRAMS[2:])
FLAG = {'action': 'store_true', 'default': False}
SWITCH = {'action': Switch, 'default': False}
OPTIONS = {
    'data': [
        ('--dataset', dict(default='cifar10', metavar='NAME',
                           help='digits, cifar10, cifar100, imagenet, mvip, path or csv')),
        ('--data_folder --data_dir', dict(metavar='FOLDER', help='folder of the data; needed by --dataset path and '
                                          'csv; default: ./data, ./data/imagenet, ./data/MVIP/sets')),
        ('--mean', dict(type=MEAN, metavar='"(R, G, B)"',
                        help="channel means; default: the dataset's, or measured on the training images")),
        ('--std', dict(type=STD, metavar='"(R, G, B)"',
                       help='channel standard deviations; default: as --mean')),
        ('--size --image_size', dict(type=number(int, 8, 4096), metavar='PIXELS',
                                     help='side of the views; default: 32, digits 16, imagenet, mvip, and '
                                     'folders with --stem imagenet 224')),
        ('--max_samples', dict(type=COUNT, metavar='N', help='use at most N training and N validation images, '
                               'spread over the classes; default: all')),
        ('--samples_per_class', dict(type=COUNT, metavar='N', help='train on at most N images of each class, sampled '
                                     'with --seed; not of validation and augmentation folders; default: all')),
        ('--label_fraction', dict(type=number(float, 0, 1, open_low=True), metavar='FRACTION', help='train on this '
                                  'fraction of each class, at least one image, sampled with --seed; default: 1'),
         CE + LINEAR),
        ('--sampler', dict(choices=('shuffle', 'class_balanced', 'pk'), default='shuffle',
                           help='training batches: shuffle: all images in random order; class_balanced: as many, each '
                           'class equally often; pk: --images_per_class images of each of batch_size / '
                           'images_per_class random classes')),
        ('--images_per_class', dict(type=COUNT, metavar='K', help='of each class in a batch; needed by --sampler pk')),
        ('--imbalance', dict(type=number(float, 1, 1e6), metavar='RATIO', help='train on a long-tailed part of the '
                             'images, sampled with --seed: class c of C keeps largest * RATIO**(-c / (C - 1)); report '
                             'the accuracy over many, medium and few classes; default: all images')),
        ('--label_noise', dict(type=number(float, 0, 1), default=0., metavar='FRACTION', help='give this fraction of '
                               'the training images another class at random, sampled with --seed')),
        ('--loader', dict(choices=('auto', 'batched', 'workers', 'per_sample'), default='auto',
                          help='batched: all images in memory, views sampled on the device; workers: worker processes '
                               'read and crop, colors on a GPU; per_sample: torchvision transforms in worker '
                               'processes; auto: batched where the images fit, else workers')),
        ('--cache_dir', dict(metavar='FOLDER', help='keep decoded images of folders there, for the next start; '
                             'default: nowhere')),
        ('--num_workers', dict(type=COUNT_OR_ZERO, metavar='N', help='worker processes that read and sample; default '
                               'and maximum: the cores there are')),
    ],
    'views': [
        ('--n_views', dict(type=number(int, 2, 64), default=2, metavar='N', help='views of each image in a batch'),
         SUPCON),
        ('--local_crops', dict(type=COUNT_OR_ZERO, default=0, metavar='N', help='multi-crop: N small crops of each '
                               'image as further views'), SUPCON),
        ('--local_size', dict(type=number(int, 8, 4096), metavar='PIXELS', help='side of the small crops; default: '
                              '3/7 of --size, as 96 of 224'), SUPCON),
        ('--augment_policy', dict(choices=('no', 'sim', 'auto', 'rand', 'stacked_rand'), help='training views beside '
                                  'cropping and flipping: no: nothing; sim: color jitter and grayscale; auto: '
                                  'AutoAugment; rand: RandAugment; stacked_rand: RandAugment and sim (default: sim in '
                                  'pretraining and for mvip, else no)')),
        ('--crop_min', dict(type=number(float, 1e-3, 1), metavar='FRACTION', help='smallest fraction of the area of a '
                            'random crop; default: 0.2, digits 0.4, imagenet, and folders with --stem imagenet, '
                            '0.08, mvip 0.6 and 0.8')),
        ('--jitter_strength', dict(type=number(float, 0, 2), default=0.5, metavar='S',
                                   help='of the color jitter in sim')),
        ('--blur_p', dict(type=number(float, 0, 1), default=0., metavar='P', help='probability of blur in sim')),
        ('--rand_n', dict(type=number(int, 1, 20), default=1, metavar='N', help='operations of RandAugment')),
        ('--rand_m', dict(type=number(int, 0, 30), default=2, metavar='M', help='magnitude of RandAugment, 0 to 30')),
        ('--cutout', dict(FLAG, help='set squares of training views to the mean color')),
        ('--n_holes', dict(type=number(int, 1, 100), default=1, metavar='N', help='squares of --cutout')),
        ('--cutout_length', dict(type=COUNT, default=16, metavar='PIXELS', help='their side')),
        ('--erasing', dict(FLAG, help='set a rectangle of training views to the mean color'), CE + LINEAR),
        ('--erasing_p', dict(type=number(float, 0, 1), default=0.5, metavar='P', help='probability of --erasing'),
         CE + LINEAR),
        ('--mix', dict(choices=('mixup', 'cutmix', 'mixup_cutmix'), help='mix the images of a batch and their '
                       'labels; mixup_cutmix tosses a coin for each batch and view; pretraining: for GenSCL (default: '
                       'none)')),
        ('--mix_alpha', dict(type=number(float, 0, 1e3, open_low=True), default=1., metavar='ALPHA',
                             help='the fraction of each image is sampled from Beta(ALPHA, ALPHA)')),
    ],
    'mvip and augmentation folders': [
        ('--mvip_super_class', dict(default='CarComponent', metavar='NAME', help='super-class whose classes are used')),
        ('--mvip_num_classes', dict(type=COUNT, default=20, metavar='N', help='use its first N classes, by name')),
        ('--aug_mode', dict(choices=('none', 'with_id', 'with_both', 'id_only', 'ood_only'), default='none',
                            help='with_id: in-distribution images join the training images; with_both: and, in '
                            'pretraining, near-out-of-distribution ones as hard negatives; id_only, ood_only: train on '
                            'neither, evaluate on one kind')),
        ('--aug_root', dict(default='./da_fusion/output', metavar='FOLDER', help='root of the augmentation folders')),
        ('--aug_output_name', dict(metavar='NAME', help='folder in it; default: no augmentation folders')),
        ('--aug_name_id', dict(metavar='NAME', help='folder of in-distribution images in that; default: none')),
        ('--aug_name_ood', dict(metavar='NAME', help='folder of near-out-of-distribution images; default: none')),
        ('--aug_ex_id', dict(type=number(int, -1), default=-1, metavar='N',
                             help='use at most N source images of each class; -1: all')),
        ('--aug_ex_ood', dict(type=number(int, -1), default=-1, metavar='N', help='the same for ood images')),
    ],
    'network': [
        ('--model', dict(default='resnet50', metavar='NAME',
                         help='resnet18, 34, 50, 101, 152 or 200, or timm/<name>')),
        ('--stem', dict(type=one_of('cifar', 'imagenet'), default='cifar', metavar='STEM',
                        help='cifar: 3x3 convolution; imagenet: 7x7 of stride 2 and max-pool, or as timm has it')),
        ('--width', dict(type=number(float, 1 / 64, 16), default=1., metavar='FACTOR',
                         help='multiplies the channels of every layer')),
        ('--ckpt', dict(metavar='FILE', help='start from the encoder, and the head where it fits, of a checkpoint of '
                        'these programs or SupContrast, or of weights of torchvision or timm; also .safetensors, and '
                        'hf://owner/name[/file]; default: random weights'), SUPCON + CE),
        ('--timm_pretrained', dict(FLAG, help="start --model timm/<name> from timm's weights, with their size, "
                                   'normalization and stem'), SUPCON + CE),
        ('--zero_init', dict(FLAG, help='start residual blocks as the identity'), SUPCON + CE),
        ('--head', dict(type=head, default='mlp', metavar='HEAD', help='projection head: mlp, linear, or the sizes '
                        'of its layers such as 2048,2048,128'), SUPCON),
        ('--head_bn', dict(FLAG, help='batch norm in the hidden layers of the head'), SUPCON),
        ('--feat_dim', dict(type=number(int, 1, 2**16), default=128, metavar='DIM', help='dimensions after the head '
                            'mlp or linear'), SUPCON),
        ('--normalize_embedding', dict(FLAG, help='the head sees features of unit length'), SUPCON),
        ('--syncBN', dict(FLAG, help='batch norm over all processes of torchrun'), SUPCON + CE),
    ],
    'method': [
        ('--method', dict(choices=('SupCon', 'SimCLR', 'SINCERE', 'DCL', 'BCL', 'GenSCL'), default='SupCon',
                          help='contrastive loss; BCL and GenSCL have their own defaults of other options, see '
                          'docs/long_tail.md and docs/genscl.md'), SUPCON),
        ('--positives', dict(choices=('class', 'image'), default='class', help='of a view: the other views of its '
                             'class or, as always with SimCLR, of its image'), SUPCON),
        ('--temp --temperature', dict(type=number(float, 1e-4, 1e4), default=0.07, metavar='T', help='temperature'),
         SUPCON),
        ('--base_temperature', dict(type=number(float, 1e-4, 1e4), default=0.07, metavar='T', help='the loss is '
                                    'multiplied by temp / T'), SUPCON),
        ('--contrast_mode', dict(choices=('all', 'one'), default='all', help='anchors: all views, or the first of each '
                                 'image'), SUPCON),
        ('--summation_location', dict(choices=('out', 'in'), default='out', help='mean over the positives outside or '
                                      'inside the log'), SUPCON),
        ('--denominator_mode', dict(choices=('all', 'one_positive', 'only_negatives'), default='all',
                                    help='what the denominator sums over'), SUPCON),
        ('--positives_cap', dict(type=number(int, -1, 2**31), default=-1, metavar='N', help='positives of other '
                                 'images that count, a multiple of the views of one; -1: all'), SUPCON),
        ('--moco', dict(FLAG, help='momentum contrast: contrasts are keys of a momentum copy, and a queue of earlier '
                        'ones'), SUPCON),
        ('--moco_k', dict(type=number(int, 1, 2**24), default=65536, metavar='N', help='keys in the queue'), SUPCON),
        ('--moco_m', dict(type=number(float, 0, 1), default=0.999, metavar='M', help='momentum of the copy'), SUPCON),
        ('--moco_t', dict(type=number(float, 1e-4, 1e4), metavar='T', help='temperature with --moco; default: --temp'),
         SUPCON),
        ('--ce_weight', dict(type=POSITIVE_OR_ZERO, default=0., metavar='W', help='adds W times the cross-entropy of a '
                             'linear classifier on the encoder, trained along'), SUPCON),
        ('--method', dict(default=None, metavar='NAME', help='accepted and not used'), CE),
        ('--KD', dict(FLAG, help='GenSCL: learn from the class probabilities of a teacher too'), SUPCON),
        ('--KD_alpha', dict(type=weight_or_inf, default=1., metavar='W', help='weight of the teacher; inf: learn from '
                            'it alone'), SUPCON),
        ('--KD_temp', dict(type=number(float, 1e-4, 1e4), default=1., metavar='T',
                           help="temperature of the teacher's softmax"), SUPCON),
        ('--teacher_path', dict(metavar='FOLDER', help="folder of the teacher's checkpoint; needed by --KD"), SUPCON),
        ('--teacher_ckpt', dict(metavar='FILE', help='the checkpoint in it; default: ckpt_best.pth, in a run of '
                                'main_ce.py last.ckpt'), SUPCON),
        ('--teacher_kind', dict(metavar='NAME', help='model of timm that it holds, default: '
                                'efficientnetv2_rw_m; one of main_ce.py or main_linear.py records its own'), SUPCON),
        ('--ckpt', dict(metavar='FILE', help='checkpoint of the pretrained encoder, or weights of torchvision or timm; '
                        'also .safetensors, and hf://owner/name[/file]; needed, unless --pretrained is given'), LINEAR),
        ('--pretrained', dict(type=folder_name, metavar='NAME', help='instead of --ckpt the run output/NAME, of the '
                              'same --trial; default: none'), LINEAR),
        ('--pretrained_ckpt', dict(type=folder_name, default='last.ckpt', metavar='FILE',
                                   help='checkpoint of that run'), LINEAR),
        ('--cache_features', dict(FLAG, help='compute the features of all images once, without augmentation, and '
                                  'train the classifier on these: another protocol, and many times faster'), LINEAR),
        ('--finetune', dict(FLAG, help='train the encoder too'), LINEAR),
        ('--freeze_bn', dict(FLAG, help='keep statistics, weights and biases of its batch norms'), LINEAR),
    ],
    'optimization': [
        ('--epochs', dict(type=COUNT, metavar='N', help='epochs')),
        ('--batch_size', dict(type=number(int, 2, 2**20), default=256, metavar='N',
                              help='images in a batch, over all devices')),
        ('--learning_rate --lr', dict(type=number(float, 0, 1e6, open_low=True), metavar='LR',
                                      help='learning rate')),
        ('--encoder_lr', dict(type=number(float, 0, 1e6, open_low=True), metavar='LR', help='learning rate of the '
                              'encoder, with the schedule of the other layers; default: --lr')),
        ('--base_lr', dict(type=number(float, 0, 1e6, open_low=True), metavar='LR', help='learning rate for 256 '
                           'images: replaces --lr by LR * batch size / 256; default: --lr')),
        ('--accum_steps', dict(type=COUNT, default=1, metavar='N', help='micro-batches that a batch goes through the '
                               'network in; the loss is that of the whole batch')),
        ('--lr_decay_epochs', dict(type=epochs_list, metavar='E,E,...',
                                   help='after these epochs the rate decays (without --cosine)')),
        ('--lr_decay_rate', dict(type=number(float, 0, 1), default=0.1, metavar='RATE',
                                 help='factor of each decay')),
        ('--cosine --lr_cosine', dict(SWITCH, help='cosine schedule, from LR to LR * lr_decay_rate**3')),
        ('--warm --lr_warmup', dict(action=Switch, help='let the rate rise in the first epochs; default in pretraining '
                                    'and cross-entropy: with batches above 256')),
        ('--warm_epochs', dict(type=COUNT, default=10, metavar='N', help='epochs of --warm, at most half of the run')),
        ('--warmup_from', dict(type=number(float, 0, 1e6), default=0.01, metavar='LR', help='its first learning rate')),
        ('--exp_decay', dict(type=number(float, 0, 1, open_low=True), metavar='RATE', help='multiply the learning rate '
                             'by RATE every --exp_decay_epochs; default: no')),
        ('--exp_decay_epochs', dict(type=number(float, 0, 1e6, open_low=True), default=0.5, metavar='E',
                                    help='epochs, may be a part of one')),
        ('--optim_kind', dict(choices=('SGD', 'RMSProp', 'RMSPropTF', 'Adam', 'AdamW'), default='SGD',
                              help='optimizer; RMSPropTF: with epsilon inside the root')),
        ('--LARS', dict(SWITCH, help='adapt the rate of each layer of SGD to its weights')),
        ('--nesterov', dict(SWITCH, help='Nesterov momentum of SGD')),
        ('--optim_eps', dict(type=POSITIVE, metavar='EPS', help='epsilon of RMSProp and Adam; default: theirs')),
        ('--no_bias_decay', dict(FLAG, help='no weight decay of biases and norms; always so with --LARS')),
        ('--weight_decay', dict(type=number(float, 0, 1e3), default=1e-4, metavar='WD',
                                help='weight decay')),
        ('--momentum', dict(type=number(float, 0, 1), default=0.9, metavar='M', help='momentum of SGD and RMSProp')),
        ('--label_smoothing', dict(type=number(float, 0, 1), default=0., metavar='S', help='fraction of each label '
                                   'that is spread over all classes'), CE + LINEAR),
        ('--logit_adjustment', dict(type=POSITIVE_OR_ZERO, default=0., metavar='TAU', help='in training, TAU * '
                                    'log(frequency of the class) is added to the logits'), CE + LINEAR),
        ('--amp', dict(SWITCH, help='mixed precision: bfloat16, or float16 on GPUs without it; float32 '
                                 'on CPUs without it')),
        ('--compile', dict(FLAG, help='torch.compile the encoder')),
    ],
    'run': [
        ('--output_name --desc', dict(type=folder_name, metavar='NAME', help='the run is output/NAME/trial=TRIAL; '
                                      'default: named after the settings')),
        ('--trial', dict(type=folder_name, default='0', metavar='TRIAL', help='distinguishes repeated runs')),
        ('--seed', dict(type=number(int, 0, 2**31), default=0, metavar='N', help='of weights, views and splits')),
        ('--resume', dict(nargs='?', const='auto', metavar='auto|FILE', help="continue from the run's last.ckpt, if "
                          'there is one, or from another checkpoint of it; default: no')),
        ('--force', dict(FLAG, help='resume with other options than the run was started with')),
        ('--overwrite', dict(FLAG, help='restart where the folder holds another run')),
        ('--print_freq', dict(type=COUNT, default=10, metavar='N', help='steps between lines')),
        ('--save_freq', dict(type=COUNT, default=50, metavar='N', help='epochs between kept checkpoints')),
        ('--keep_ckpts', dict(type=COUNT, metavar='N', help='keep only the newest N of these; default: all')),
        ('--save_steps', dict(type=COUNT, metavar='N', help='write last.ckpt after every N steps of an epoch too; '
                              'default: after epochs alone')),
        ('--deterministic', dict(FLAG, help='let a GPU compute the same bits every time, as a CPU does anyway; '
                                 'slower')),
        ('--eval_freq', dict(type=COUNT_OR_ZERO, default=1, metavar='N',
                             help='epochs between evaluations (pretraining: kNN accuracy); 0: only after the last')),
        ('--per_class', dict(FLAG, help='print the accuracy of each class'), CE + LINEAR),
        ('--evaluate', dict(FLAG, help="only evaluate the run's last.ckpt"), CE + LINEAR),
        ('--export', dict(metavar='FILE', help='write encoder and classifier for use elsewhere at the end, with '
                          '--evaluate those of last.ckpt: .safetensors or .pth a state dict with the names of '
                          'torchvision or timm, .pt2 a program of torch.export, or .onnx; default: no'), CE + LINEAR),
        ('--debug', dict(FLAG, help='one epoch only')),
        ('--wandb', dict(FLAG, help='send curves and images to Weights & Biases too (pip install wandb)')),
        ('--wandb_entity', dict(metavar='NAME', help='its user or team; default: yours')),
        ('--wandb_project', dict(default='supcon', metavar='NAME', help='its project')),
    ],
}


# Defaults of a program where they are not those of the table; None: the checkpoint's.
DEFAULTS = {
    'main_supcon': {'epochs': 1000, 'learning_rate': 0.05, 'lr_decay_epochs': [700, 800, 900], 'eval_freq': 10},
    'main_ce': {'epochs': 500, 'learning_rate': 0.2, 'lr_decay_epochs': [350, 400, 450]},
    'main_linear': {'epochs': 100, 'learning_rate': 0.1, 'lr_decay_epochs': [60, 75, 90], 'lr_decay_rate': 0.2,
                    'weight_decay': 0., 'model': None, 'stem': None, 'width': None},
}
# Those that a method brings; for main_linear the encoder's method. A dataset's are in its row of datasets.DATASETS.
METHOD_DEFAULTS = {
    'main_supcon': {'SimCLR': {'positives': 'image'}, 'SINCERE': {'denominator_mode': 'one_positive'},
                    'DCL': {'denominator_mode': 'only_negatives'},
                    'BCL': {'temp': 0.1, 'base_temperature': 0.1, 'ce_weight': 2.},         # as published
                    'GenSCL': {'epochs': 500, 'batch_size': 1024, 'learning_rate': 0.5, 'temp': 0.1, 'cosine': True,
                               'warm': True, 'seed': 3407}},
    'main_ce': {},
    'main_linear': {'GenSCL': {'batch_size': 512, 'learning_rate': 5., 'warm': True, 'warm_epochs': 5,
                               'warmup_from': 1e-5, 'seed': 3407}},
}

# Options that do nothing alone: option -> the option that it needs, and with which values (None: any).
REQUIRES = {
    **dict.fromkeys(('KD_alpha', 'KD_temp', 'teacher_path', 'teacher_ckpt', 'teacher_kind'), ('KD', None)),
    **dict.fromkeys(('n_holes', 'cutout_length'), ('cutout', None)),
    **dict.fromkeys(('rand_n', 'rand_m'), ('augment_policy', ('rand', 'stacked_rand'))),
    **dict.fromkeys(('jitter_strength', 'blur_p'), ('augment_policy', ('sim', 'stacked_rand'))),
    **dict.fromkeys(('moco_k', 'moco_m', 'moco_t'), ('moco', None)),
    **dict.fromkeys(('warm_epochs', 'warmup_from'), ('warm', None)),
    **dict.fromkeys(('wandb_entity', 'wandb_project'), ('wandb', None)),
    'images_per_class': ('sampler', ('pk',)), 'local_size': ('local_crops', None),
    'erasing_p': ('erasing', None), 'mix_alpha': ('mix', None), 'pretrained_ckpt': ('pretrained', None),
    **dict.fromkeys(('mvip_super_class', 'mvip_num_classes'), ('dataset', ('mvip',))),
    'aug_root': ('aug_output_name', None), 'aug_ex_id': ('aug_name_id', None), 'aug_ex_ood': ('aug_name_ood', None),
    'force': ('resume', None), 'exp_decay_epochs': ('exp_decay', None), 'feat_dim': ('head', ('mlp', 'linear')),
    'freeze_bn': ('finetune', None),
    'momentum': ('optim_kind', ('SGD', 'RMSProp', 'RMSPropTF')),
    'optim_eps': ('optim_kind', ('RMSProp', 'RMSPropTF', 'Adam', 'AdamW')),
    **dict.fromkeys(('LARS', 'nesterov'), ('optim_kind', ('SGD',))),
}

# Options that decide on which images a network is trained or evaluated, and which network it is.
NETWORK = ('model', 'stem', 'width')
DATA = ('dataset', 'data_folder', 'imbalance', 'label_noise', 'mvip_super_class', 'mvip_num_classes')
EVALUATION = (*DATA, 'size', 'mean', 'std', 'max_samples', 'samples_per_class', 'label_fraction', 'seed', 'aug_mode',
              'aug_root', 'aug_output_name', 'aug_name_id', 'aug_name_ood', 'aug_ex_id', 'aug_ex_ood', *NETWORK)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors in one line."""

    def error(self, message):
        unknown = re.match(r'unrecognized arguments: --([\w-]+)', message)
        known = [flag[2:] for action in self._actions for flag in action.option_strings if flag.startswith('--')]
        if unknown and (close := difflib.get_close_matches(unknown[1], known, 1, cutoff=0.7)):
            message += f', did you mean --{close[0]}?'
        raise UserError(message)


def answer_early(program, description):
    """Before the imports, which take seconds: print --help; let Ctrl-C end the program without a traceback, until
    `errors.run` handles it; report a cache folder that PyTorch cannot make, which importing torchvision needs; switch
    garbage collection off until `errors.run`, since imports make no garbage.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if {'-h', '--help'} & set(sys.argv[1:]):
        if hasattr(signal, 'SIGPIPE'):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # main_ce.py --help | head -5
        make_parser(program, description).print_help()
        sys.exit()
    if cache := os.environ.get('TORCHINDUCTOR_CACHE_DIR'):
        try:
            os.makedirs(cache, exist_ok=True)
        except OSError as error:
            print(f'{program}.py: error: TORCHINDUCTOR_CACHE_DIR cannot be made ({error})', file=sys.stderr)
            sys.exit(2)
    gc.disable()


def options_of(program):
    """The table's rows for a program: (group, names of the option, settings)."""
    for group, options in OPTIONS.items():
        for flags, settings, programs in ((*row, PROGRAMS)[:3] for row in options):
            if program in programs:
                yield group, flags.split(), settings


def program_defaults(program):
    """The defaults of a program: {option: value}."""
    table = {flags[0].lstrip('-'): settings.get('default') for _, flags, settings in options_of(program)}
    return {**table, **{name: value for name, value in DEFAULTS[program].items() if name in table}}


def make_parser(program, description):
    """The options of one of PROGRAMS: a Parser whose result holds only what is given."""
    parser = Parser(prog=f'{program}.py', description=description, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults, groups = program_defaults(program), {}
    for title, flags, settings in options_of(program):
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        name, settings = flags[0].lstrip('-'), {**settings}
        settings.pop('default', None)
        if 'action' not in settings and defaults[name] is not None:
            settings['help'] += f' (default: {as_text(defaults[name])})'
        elif name in DEFAULTS[program]:
            settings['help'] += " (default: the checkpoint's)"
        groups[title].add_argument(*flags, **settings)
    return parser


def as_text(value):
    """An option's value as on a command line: (0.1, 0.2) -> 0.1,0.2"""
    return ','.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def parse(program, description, argv, datasets, method=None, recorded=()):
    """Parse the command line of one of PROGRAMS: -> argparse.Namespace.

    `-` and `_` are the same in the name of an option. Later ones come before earlier ones: the defaults of the program,
    of `method` (of --method, if that is an option), of --dataset, a row of `datasets`; the options `recorded`, words of
    a command line; those given. Raises UserError for a mistake.
    """
    parser = make_parser(program, description)
    given = vars(parser.parse_args([underscores(word) for word in (sys.argv[1:] if argv is None else argv)]))
    recorded = vars(parser.parse_args(list(recorded)))
    for name, value in given.items():
        if value == '':                                 # of a variable of the shell that is not set, for example
            raise UserError(f'argument --{name}: found an empty text, expected a value')
    earlier = {**program_defaults(program), **recorded}
    chosen = {**earlier, **given}                       # before dataset and method have brought their defaults
    if chosen['dataset'] not in datasets:
        raise UserError(f"argument --dataset: found {chosen['dataset']!r}, expected one of {', '.join(datasets)}")
    info = datasets[chosen['dataset']]
    pretrained = {'stem': 'imagenet'} if chosen.get('timm_pretrained') else {}
    defaults = {**program_defaults(program), **METHOD_DEFAULTS[program].get(method or chosen.get('method'), {}),
                **info.defaults.get(program, {}), **pretrained, **recorded}
    opt = argparse.Namespace(**{**defaults, **given})
    if 'data_folder' in given and 'dataset' not in given and not recorded:
        _check_download(opt)
    _complete(opt, program, given, info)
    for name, value in given.items():
        if value is not False and (reason := without_effect(name, vars(opt), program, info)):
            raise UserError(f'--{name} has no effect: {reason}')
    return opt


def without_effect(name, values, program, info):
    """Why an option does nothing among the `values` of all, a dict; None where it does something. info: the dataset's
    row."""
    required, expected = REQUIRES.get(name, (None, None))
    found = values.get(required)
    if required == 'augment_policy' and found is None:
        found = 'sim' if program == 'main_supcon' else info.policy
    if required is None or (found in expected if expected else found):
        return None
    return f'expected --{required} {" or ".join(expected)}, found {found}' if expected else f'--{required} is missing'


def filter_args(program, argv, programs=PROGRAMS):
    """The words of a command line without the options, and their values, that only others of `programs` have.

    For launch scripts, whose options go to several programs. What none of them has stays, to be rejected.
    """
    mine = {flag for _, flags, _ in options_of(program) for flag in flags}
    others = {flag: settings for other in programs for _, flags, settings in options_of(other)
              for flag in flags if flag not in mine}
    words, rest = [], iter(argv)
    for word in rest:
        flag, equals, _ = underscores(word).partition('=')
        if flag not in others:
            words.append(word)
        elif 'action' not in others[flag] and not equals:       # its value is the next word
            next(rest, None)
    return words


def _check_download(opt):
    """UserError where nobody asked for CIFAR by name, and it would be downloaded into a folder of other things."""
    names = os.listdir(opt.data_folder) if os.path.isdir(opt.data_folder) else []
    if opt.dataset == 'cifar10' and names and not any(name.startswith('cifar-10-') for name in names):
        raise UserError(f'--data_folder {opt.data_folder}: found other files than CIFAR-10, expected --dataset path to '
                        'train on these, or --dataset cifar10 to download it there')


def underscores(word):
    """--data-folder=my-data -> --data_folder=my-data"""
    name, equals, value = word.partition('=')
    return '--' + name[2:].replace('-', '_') + equals + value if re.match(r'--\w', word) else word


def _complete(opt, program, given, info):
    """Check what depends on several options, and fill in what follows from them."""
    if opt.dataset in ('path', 'csv') and not opt.data_folder:
        expected = {'path': 'of images', 'csv': 'with train.csv and val.csv'}[opt.dataset]
        raise UserError(f'--dataset {opt.dataset}: --data_folder is missing, expected a folder {expected}')
    if opt.sampler == 'pk' and (not opt.images_per_class or opt.batch_size % opt.images_per_class):
        found = f'{opt.images_per_class} does not divide' if opt.images_per_class else 'is missing, expected to divide'
        raise UserError(f'--sampler pk: --images_per_class {found} --batch_size {opt.batch_size}')
    if opt.warm is None:                                # large batches need it
        opt.warm = opt.batch_size > 256 and program != 'main_linear'
    for one, other in (('resume', 'overwrite'), ('exp_decay', 'cosine'), ('base_lr', 'learning_rate'),
                       ('ckpt', 'timm_pretrained'), ('cache_features', 'finetune'),
                       ('label_fraction', 'samples_per_class')):
        if one in given and other in given and getattr(opt, one) and getattr(opt, other):
            raise UserError(f'--{one} and --{other} are both given, expected at most one')
    if 'cache_dir' in given and opt.dataset in ('digits', 'cifar10', 'cifar100'):
        raise UserError(f'--cache_dir has no effect: --dataset {opt.dataset} is no folder of images')
    for name in ('augment_policy', 'crop_min', 'jitter_strength', 'blur_p', 'cutout', 'erasing', 'mix'):
        if getattr(opt, 'cache_features', False) and name in given and getattr(opt, name) not in ('no', False):
            raise UserError(f'--{name} has no effect: --cache_features shows each image as evaluation does')
    if getattr(opt, 'timm_pretrained', False) and (not opt.model.startswith('timm/') or opt.stem != 'imagenet'):
        expected = '--stem imagenet, as the weights are' if opt.model.startswith('timm/') else '--model timm/<name>'
        raise UserError(f'--timm_pretrained: found --model {opt.model} --stem {opt.stem}, expected {expected}')
    if opt.encoder_lr and program == 'main_linear' and not opt.finetune:
        raise UserError('--encoder_lr has no effect: linear evaluation trains no encoder, unless with --finetune')
    if opt.exp_decay:                                   # a method may have --cosine as its default
        opt.cosine = False
    if opt.nesterov and not opt.momentum:
        raise UserError('--nesterov: --momentum is 0, expected above 0')
    if opt.base_lr:
        opt.learning_rate = opt.base_lr * opt.batch_size / 256
    if opt.wandb and not importlib.util.find_spec('wandb'):
        raise UserError('--wandb: the package wandb is missing, expected it installed: pip install wandb')
    if program == 'main_supcon':
        _check_generalized(opt)
        _check_loss(opt)
    _check_augmentations(opt)
    if opt.debug:
        opt.epochs = 1
    opt.data_folder = opt.data_folder or info.folder
    from util.distributed import expected_processes, local_processes  # here: --help does not wait for torch
    if opt.batch_size < 2 * expected_processes():
        raise UserError(f'--batch_size {opt.batch_size}: expected at least 2 images for each of '
                        f'{expected_processes()} processes')
    cores = max(1, (os.cpu_count() or 1) // local_processes())
    opt.num_workers = cores if opt.num_workers is None else min(opt.num_workers, cores)
    opt.split_seed = opt.loader_chosen = None           # these and the next are set when the images are read
    opt.multi_label = False
    return opt


def _check_generalized(opt):
    for name in ('mix', 'KD'):
        if getattr(opt, name) and opt.method != 'GenSCL':
            raise UserError(f'--{name} needs --method GenSCL, found {opt.method}')
    if opt.KD and not opt.teacher_path:
        raise UserError("--KD: --teacher_path is missing, expected the folder of the teacher's checkpoint")
    if opt.method in ('BCL', 'GenSCL') and opt.aug_mode == 'with_both':
        raise UserError(f'--aug_mode with_both: hard negatives are not defined for --method {opt.method}, expected '
                        'SupCon or SimCLR')


def _check_loss(opt):
    n_views = opt.n_views + opt.local_crops
    if not opt.moco and opt.positives_cap > 0 and opt.positives_cap % n_views:      # a key is one view
        raise UserError(f'--positives_cap {opt.positives_cap}: expected a multiple of {n_views}, the views of an image')
    for name, found in (('method GenSCL', opt.method == 'GenSCL'), ('moco', opt.moco),
                        ('accum_steps', opt.accum_steps > 1), ('model timm/...', opt.model.startswith('timm/'))):
        if opt.local_crops and found:
            raise UserError(f'--local_crops is not defined with --{name}')
    for name in ('positives', 'denominator_mode'):
        fixed = METHOD_DEFAULTS['main_supcon'].get(opt.method, {}).get(name)
        if fixed and getattr(opt, name) != fixed:
            raise UserError(f'--{name} {getattr(opt, name)}: --method {opt.method} is --{name} {fixed}, expected that, '
                            'or --method SupCon')
    if opt.method == 'GenSCL' and opt.n_views % 2:
        raise UserError(f'--n_views {opt.n_views}: the loss of --method GenSCL takes two groups of views, expected an '
                        'even number')
    changed = [name for name, default in (('positives', 'class'), ('summation_location', 'out'),
                                          ('denominator_mode', 'all'), ('positives_cap', -1))
               if getattr(opt, name) != default]
    if opt.method in ('BCL', 'GenSCL') and (changed or opt.moco):
        raise UserError(f"--{[*changed, 'moco'][0]} is not defined for --method {opt.method}, expected SupCon or "
                        'SimCLR')
    if opt.method == 'BCL' and not opt.ce_weight:
        raise UserError('--ce_weight 0: the prototypes of --method BCL are weights of the classifier, expected above 0')
    if opt.method == 'BCL' and opt.head_bn:
        raise UserError('--head_bn: the prototypes of --method BCL go through the head without a batch, expected no '
                        '--head_bn')
    if opt.head_bn and (opt.head == 'linear' or isinstance(opt.head, list) and len(opt.head) < 2):
        raise UserError('--head_bn has no effect: the head has no hidden layer')
    if opt.moco:
        if opt.contrast_mode == 'one':
            raise UserError('--contrast_mode one has no effect: with --moco all views but the last are anchors anyway')
        opt.temp = opt.moco_t or opt.temp


def _check_augmentations(opt):
    needed = {'none': (), 'with_id': ('aug_name_id',), 'with_both': ('aug_name_id', 'aug_name_ood'),
              'id_only': ('aug_name_id',), 'ood_only': ('aug_name_ood',)}[opt.aug_mode]
    given = [name for name in ('aug_name_id', 'aug_name_ood') if getattr(opt, name)]
    if (needed or given) and not opt.aug_output_name:
        reason = f'--aug_mode {opt.aug_mode}' if needed else f'--{given[0]} {getattr(opt, given[0])}'
        raise UserError(f'{reason}: --aug_output_name is missing, expected the folder in --aug_root')
    for name in needed:
        if name not in given:
            raise UserError(f'--aug_mode {opt.aug_mode}: --{name} is missing, expected a folder in --aug_output_name')
