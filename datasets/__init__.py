"""Which images there are, how they are augmented, how they are batched.

A new dataset is one function in sources.py and one row in DATASETS.
"""
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import mvip, sources
from datasets.augmentations import load_augmentations
from datasets.image_set import ImageSet
from datasets.loader import make_loader
from datasets.views import View
from util.errors import UserError
from util.log import log


@dataclass(frozen=True)
class DatasetInfo:
    """How a dataset is read and shown: `load(opt)` returns training and validation ImageSets.

    mean, std: of its channels; None: measured on the training images. size: side of the views in pixels.
    pretraining, classification: how the training views are cropped and flipped, as settings of View.
    policy: default --augment_policy of classification; that of pretraining is 'sim'. auto: its AutoAugment policy.
    padding: classification with 'auto' and 'rand' crops views from the padded image instead.
    resize: evaluation resizes the shorter side to this many times the size and takes the central square.
    folder: where it lies unless --data_folder is given.
    defaults: other defaults of options for this dataset, {program: {option: value}}.
    """
    load: Callable
    mean: tuple | None = None
    std: tuple | None = None
    size: int = 32
    pretraining: dict = field(default_factory=lambda: CROP)
    classification: dict = field(default_factory=lambda: CROP)
    policy: str = 'no'
    auto: str = 'imagenet'
    padding: int = 0
    resize: float = 1.
    folder: str = './data'
    defaults: dict = field(default_factory=dict)


CROP = {'crop': (0.2, 1.), 'flip': 0.5}
DIGIT = {'crop': (0.4, 1.)}                             # mirrored or cropped smaller, a digit is another one
PART = {'flip': 0.5, 'rotation': 15.}
CIFAR = {'auto': 'cifar10', 'padding': 4}
LARGE = {'size': 224, 'resize': 256 / 224, **dict.fromkeys(('pretraining', 'classification'),
                                                           {'crop': (0.08, 1.), 'flip': 0.5})}

MVIP = {'learning_rate': 0.001, 'batch_size': 16, 'save_freq': 10}      # default options

DATASETS = {
    'digits': DatasetInfo(sources.digits, size=16, pretraining=DIGIT, classification=DIGIT, auto='svhn'),
    'cifar10': DatasetInfo(sources.cifar, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), **CIFAR),
    'cifar100': DatasetInfo(sources.cifar, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), **CIFAR),
    'imagenet': DatasetInfo(sources.imagenet, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), **LARGE,
                            folder='./data/imagenet',
                            defaults=dict.fromkeys(('main_supcon', 'main_ce'), {'stem': 'imagenet'})),
    'path': DatasetInfo(sources.path),
    'csv': DatasetInfo(sources.csv_files),
    'mvip': DatasetInfo(mvip.mvip, (0.4213, 0.4252, 0.4242), (0.1955, 0.1923, 0.1912), size=224, policy='sim',
                        pretraining={'crop': (0.6, 1.), **PART}, classification={'crop': (0.8, 1.), **PART},
                        folder='./data/MVIP/sets', defaults={
                            'main_supcon': {**MVIP, 'epochs': 110}, 'main_linear': {**MVIP, 'epochs': 50},
                            'main_ce': {**MVIP, 'epochs': 100, 'weight_decay': 0.}}),
}


def sim(opt, info):
    """The colors of SimCLR and SupCon."""
    strength = opt.jitter_strength
    return {'jitter': (0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength), 'grayscale': 0.2,
            'blur': opt.blur_p}


def rand(opt, info):
    return {'rand': (opt.rand_n, opt.rand_m)}


POLICIES = {                                            # --augment_policy: what is done after cropping
    'no': lambda opt, info: {},
    'sim': sim,
    'auto': lambda opt, info: {'auto': info.auto},
    'rand': rand,
    'stacked_rand': lambda opt, info: {**rand(opt, info), **sim(opt, info)},
}


@dataclass
class Data:
    """What a run reads: training and validation ImageSets, and those of augmentation folders, or None.

    train already holds the id images with --aug_mode with_id and with_both; ood images it never holds.
    """
    train: ImageSet
    val: ImageSet
    id: ImageSet | None
    ood: ImageSet | None


def load_images(opt):
    """The ImageSets of a run, Data; sets opt.multi_label, and opt.size, mean, std, split_seed where they are None."""
    info = dataset_info(opt)
    cache_dir = _cache_dir(opt)
    try:
        train, val = info.load(opt)
        opt.multi_label = train.multi_label
        if opt.multi_label:
            check_multi_label(opt)
        augmentations = load_augmentations(opt, train.classes)
    except OSError as error:                            # a folder that may not be listed, a disk that fails
        raise UserError(f'--data_folder {opt.data_folder}: cannot be read ({error})') from error
    if opt.imbalance or opt.label_noise:
        opt.split_seed = opt.seed if opt.split_seed is None else opt.split_seed
    if opt.label_noise:                                 # of all images, so that each part of them has the same labels
        if len(train.classes) == 1:
            raise UserError(f'--label_noise {opt.label_noise:g}: {opt.data_folder} has one class, expected several')
        train = train.mislabeled(opt.label_noise, opt.split_seed)
        log(f'--label_noise {opt.label_noise:g}: this fraction of the training images has another class')
    train, val, extra_id, extra_ood = (
        part and replace(part.sample(opt.max_samples, opt.seed, per_class), cache_dir=cache_dir)
        for part, per_class in ((train, opt.samples_per_class), (val, None), *((part, None) for part in augmentations)))
    if opt.imbalance:
        train = train.long_tailed(opt.imbalance, opt.split_seed)
        sizes = train.class_sizes()
        log(f'--imbalance {opt.imbalance:g}: {len(train)} training images, {max(sizes)} to {min(sizes)} of a class')
    if getattr(opt, 'label_fraction', None):            # of those that pretraining has seen, which lacks this option
        train = train.sample(None, opt.seed, train.counts_of_fraction(opt.label_fraction))
    opt.size = opt.size or info.size
    if opt.mean is None or opt.std is None:
        mean, std = (info.mean, info.std) if info.mean else train.statistics()
        opt.mean, opt.std = opt.mean or mean, opt.std or std
        if not info.mean:
            log(f'Measured on the training images: --mean "{opt.mean}" --std "{opt.std}"')
    if opt.aug_mode in ('with_id', 'with_both'):
        train = train.join(extra_id)
    return Data(train, val, extra_id if opt.aug_mode != 'ood_only' else None,
                extra_ood if opt.aug_mode != 'id_only' else None)


# Options that need one class for each image, with the values at which they do nothing.
ONE_CLASS = {'label_smoothing': 0., 'moco': False, 'KD': False, 'summation_location': 'out', 'denominator_mode': 'all',
             'positives_cap': -1, 'aug_output_name': None, 'sampler': 'shuffle', 'imbalance': None, 'label_noise': 0.,
             'logit_adjustment': 0., 'local_crops': 0}


def check_multi_label(opt):
    """UserError for an option that images with several labels cannot have."""
    if (method := getattr(opt, 'method', None)) not in (None, 'SupCon', 'SimCLR', 'GenSCL'):
        raise UserError(f'--method {method}: images of {opt.data_folder} have several labels, expected SupCon, SimCLR '
                        'or GenSCL')
    for name, default in ONE_CLASS.items():
        if (value := getattr(opt, name, default)) != default:
            raise UserError(f'--{name} {value}: images of {opt.data_folder} have several labels, expected one each')


def _cache_dir(opt):
    """The folder of --cache_dir, which need not be there yet, or None."""
    if opt.cache_dir and os.path.lexists(opt.cache_dir) and not os.path.isdir(opt.cache_dir):
        raise UserError(f'--cache_dir {opt.cache_dir}: expected a folder')
    return opt.cache_dir and Path(opt.cache_dir)


def dataset_info(opt):
    """The row of --dataset; the user's own images with --stem imagenet are shown as ImageNet's."""
    info = DATASETS[opt.dataset]
    return replace(info, **LARGE) if opt.dataset in ('path', 'csv') and opt.stem == 'imagenet' else info


def pretraining_view(opt):
    """The view of contrastive pretraining."""
    return _training_view(opt, dataset_info(opt).pretraining, opt.augment_policy or 'sim')


def local_view(view, opt):
    """The small crops of multi-crop, of --local_size pixels: from 5 % of the image's area up to that of the smallest
    other `view` (Caron et al., 2020, https://arxiv.org/abs/2006.09882); --cutout hides the same fraction of both."""
    smallest, _ = view.crop
    size = opt.local_size or round(opt.size * 3 / 7)
    cutout = view.cutout and (view.cutout[0], max(1, round(view.cutout[1] * size / opt.size)))
    return replace(view, size=size, crop=(min(0.05, smallest / 2), smallest), cutout=cutout)


def classification_view(opt):
    """The training view of cross-entropy and linear evaluation."""
    info = dataset_info(opt)
    policy = opt.augment_policy or info.policy
    cut = info.classification
    if info.padding and policy in ('auto', 'rand'):
        cut = {'padding': info.padding, 'flip': 0.5}                                    # as GenSCL
    return _training_view(opt, cut, policy, erasing=opt.erasing_p if opt.erasing else 0.)


def _training_view(opt, cut, policy, **more):
    if opt.cutout and opt.cutout_length >= 2 * opt.size:
        raise UserError(f'--cutout_length {opt.cutout_length} hides all of a view of {opt.size} pixels, expected less')
    cutout = (opt.n_holes, opt.cutout_length) if opt.cutout else None
    if opt.crop_min:
        if 'crop' not in cut:
            raise UserError(f'--crop_min has no effect: with --augment_policy {policy} views of {opt.dataset} are '
                            'cut from the padded image')
        cut = {**cut, 'crop': (opt.crop_min, 1.)}
    color = POLICIES[policy](opt, dataset_info(opt))
    view = View(opt.size, opt.mean, opt.std, **cut, **color, cutout=cutout, **more)
    if view.blur and not view.blur_radius:
        log(f'--blur_p has no effect on views of {opt.size} pixels, only from 20 on')
    return view


def evaluation_view(opt):
    """The central square of the resized image."""
    return View(opt.size, opt.mean, opt.std, resize=round(opt.size * dataset_info(opt).resize))
