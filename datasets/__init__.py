"""What to read, which views to draw, how to batch them.

A new dataset is one function in pictures.py and one row in DATASETS.
"""
from collections.abc import Callable
from dataclasses import dataclass

from datasets import pictures
from datasets.loader import make_loader
from datasets.views import View
from util import log


@dataclass(frozen=True)
class DatasetInfo:
    """How a dataset is read and shown: `load(opt)` returns training and validation Pictures.

    mean, std: of its channels; None: measured on the training pictures. size: side of the views in pixels.
    crop, flip: share of the area of random crops, and whether its pictures may be mirrored.
    """
    load: Callable
    mean: tuple | None = None
    std: tuple | None = None
    size: int = 32
    crop: tuple = (0.2, 1.)
    flip: bool = True


DATASETS = {
    'digits': DatasetInfo(pictures.digits, size=16, crop=(0.4, 1.), flip=False),
    'cifar10': DatasetInfo(pictures.cifar, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    'cifar100': DatasetInfo(pictures.cifar, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    'path': DatasetInfo(pictures.path),
}


def load_pictures(opt):
    """Training and validation Pictures of opt.dataset; fills in opt.size, opt.mean and opt.std where they are None."""
    info = DATASETS[opt.dataset]
    train, val = (part.sample(opt.max_samples, opt.seed) for part in info.load(opt))
    opt.size = opt.size or info.size
    if opt.mean is None or opt.std is None:
        mean, std = (info.mean, info.std) if info.mean else train.statistics()
        opt.mean, opt.std = opt.mean or mean, opt.std or std
        if not info.mean:
            log(f'Measured on the training pictures: --mean "{opt.mean}" --std "{opt.std}"')
    return train, val


def pretraining_view(opt):
    """The view of SimCLR and SupCon: crop, flip, colour jitter, grayscale."""
    return View(opt.size, opt.mean, opt.std, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2, **_geometry(opt))


def classification_view(opt):
    """The training view of cross-entropy and linear evaluation: crop and flip."""
    return View(opt.size, opt.mean, opt.std, **_geometry(opt))


def evaluation_view(opt):
    """The central square, resized."""
    return View(opt.size, opt.mean, opt.std)


def _geometry(opt):
    info = DATASETS[opt.dataset]
    return {'crop': info.crop, 'flip': 0.5 if info.flip else 0.}
