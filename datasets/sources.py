"""Where images come from: scikit-learn's digits, CIFAR, ImageNet, folders of images.

Each source is a function from the options to training and validation images (ImageSet), and a row of DATASETS.
"""
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets as tv

from datasets.image_set import EXTENSIONS, ImageSet
from util.distributed import rank_zero_first
from util.errors import UserError, is_peer_failure
from util.files import as_text, files_below
from util.log import log


def digits(opt):
    """scikit-learn's 1,797 scans of handwritten digits, 8x8, stratified into 80 % training and 20 % validation."""
    from sklearn.datasets import load_digits  # a slow import that no other dataset needs
    data = load_digits()
    source = (data.images * (255 / 16)).round().astype(np.uint8)[..., None].repeat(3, -1)
    images = ImageSet(source, torch.from_numpy(data.target).long(), [str(name) for name in data.target_names])
    return split(images, 0.2, seed=0)


def cifar(opt):
    """CIFAR-10 or CIFAR-100, downloaded into the data folder when it is not there."""
    name = {'cifar10': 'CIFAR10', 'cifar100': 'CIFAR100'}[opt.dataset]
    parts = []
    for train in (True, False):
        new = not os.path.exists(opt.data_folder)
        try:
            data = rank_zero_first(lambda train=train: getattr(tv, name)(opt.data_folder, train=train, download=True))
        except (OSError, RuntimeError) as error:
            if is_peer_failure(error):
                raise
            if new and os.path.isdir(opt.data_folder) and not os.listdir(opt.data_folder):
                os.rmdir(opt.data_folder)
            raise UserError(f'--dataset {opt.dataset}: cannot be read from or downloaded into '
                            f'--data_folder {opt.data_folder} ({error})') from error
        parts.append(ImageSet(data.data, torch.tensor(data.targets), data.classes))
    return parts


def imagenet(opt):
    """The folders train/<class>/ and val/<class>/ of ILSVRC 2012, as torchvision's ImageFolder reads them."""
    for part in ('train', 'val'):
        if not (Path(opt.data_folder) / part).is_dir():
            raise UserError(f'--dataset imagenet: --data_folder {opt.data_folder} has no {part}/, expected '
                            'train/<class>/<image> and val/<class>/<image>')
    return path(opt)


def path(opt):
    """A folder of images, <class>/<image>: in train/ and val/ (or test/), or split 90/10 with --seed."""
    root = Path(opt.data_folder)
    if not root.is_dir():
        raise UserError(f'--data_folder {root}: no such folder')
    train, val = root / 'train', next((root / name for name in ('val', 'test') if (root / name).is_dir()), None)
    if train.is_dir() and val:
        train, val = folder(train), folder(val)
        unknown = sorted(set(val.classes) - set(train.classes))
        if unknown:
            raise UserError(f'--data_folder {root}: class {unknown[0]!r} has validation but no training images')
        numbers = torch.tensor([train.classes.index(name) for name in val.classes])
        return train, replace(val, labels=numbers[val.labels], classes=train.classes)
    if train.is_dir() or val:
        raise UserError(f'--data_folder {root}: found {(val or train).name}/ alone, expected train/ and val/ (or '
                        'test/), or one folder per class')
    opt.split_seed = opt.seed if opt.split_seed is None else opt.split_seed
    return split(folder(root), 0.1, opt.split_seed)


def folder(root):
    """The images below <root>/<class>/, classes and files in the order of their names."""
    folders = [name for name in os.listdir(root) if os.path.isdir(root / name) and not name.startswith('.')]
    if not folders:
        raise UserError(f'{root}: no folder of images in it, expected {root}/<class>/<image>')
    files, labels, skipped = [], [], 0
    for number, name in enumerate(sorted(folders, key=as_text)):
        found = sorted(files_below(root / name), key=as_text)
        images = [file for file in found if file.lower().endswith(EXTENSIONS)]
        if not images:
            raise UserError(f"{root / name}: no images in it, expected files that end in {', '.join(EXTENSIONS)}")
        files += images
        labels += [number] * len(images)
        skipped += len(found) - len(images)
    if skipped:
        log(f'{root}: {skipped} files that are no images by their names are left out')
    return ImageSet(files, torch.tensor(labels), sorted(map(as_text, folders)))


def split(images, fraction, seed):
    """Training and validation images: `fraction` of every class, at least one image, is held out."""
    counts = torch.bincount(images.labels, minlength=len(images.classes))
    if counts.min() < 2:
        raise UserError(f'class {images.classes[counts.argmin()]!r} has {counts.min()} image, expected at least 2 '
                        'to split into training and validation')
    order = np.random.default_rng(seed).permutation(len(images))
    held_out = np.zeros(len(images), dtype=bool)
    for c, count in enumerate(counts.tolist()):
        members = order[images.labels.numpy()[order] == c]
        held_out[members[:max(1, round(fraction * count))]] = True
    return images.select(np.flatnonzero(~held_out)), images.select(np.flatnonzero(held_out))
