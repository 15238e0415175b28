"""Where images come from: scikit-learn's digits, CIFAR, ImageNet, folders of images, lists of files in csv.

Each source is a function from the options to training and validation images (ImageSet), and a row of DATASETS.
"""
import csv
import importlib.util
import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets as tv

from datasets.image_set import EXTENSIONS, ImageSet
from util.distributed import rank_zero_first
from util.errors import UserError, is_peer_failure
from util.files import as_text, files_below, open_regular
from util.log import log


def digits(opt):
    """scikit-learn's 1,797 scans of handwritten digits, 8x8, stratified into 80 % training and 20 % validation."""
    package = importlib.util.find_spec('sklearn')
    if package is None:
        raise UserError('--dataset digits: scikit-learn is missing, expected: pip install scikit-learn')
    file = Path(package.origin).parent / 'datasets/data/digits.csv.gz'  # importing its reader takes a second
    data = np.loadtxt(file, delimiter=',')                              # 64 pixels of 0 to 16, and the class
    source = (data[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).round().astype(np.uint8).repeat(3, -1)
    images = ImageSet(source, torch.from_numpy(data[:, -1]).long(), [str(digit) for digit in range(10)])
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
    log(f'{root}: a tenth of each class is held out for validation (seed {opt.split_seed})')
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


def csv_files(opt):
    """Images that train.csv and val.csv in the data folder list, with one label or several each.

    Both begin with the header `file,labels`; files are relative to the folder, and `;` separates labels. Where each
    image has one label it is its class. Raises UserError with the line of what is wrong.
    """
    root, lines = Path(opt.data_folder), {}
    parts = [rows_of_csv(root, name, lines) for name in ('train.csv', 'val.csv')]
    classes = sorted({label for _, labels, _ in parts[0] for label in labels})
    numbers = {label: number for number, label in enumerate(classes)}
    for _, labels, line in parts[1]:
        if unknown := sorted(labels - numbers.keys()):
            raise UserError(f'{line}: label {unknown[0]!r} has validation but no training images')
    several = any(len(labels) > 1 for part in parts for _, labels, _ in part)
    sets = []
    for part in parts:
        if several:
            labels = torch.zeros(len(part), len(classes))
            for i, (_, names, _) in enumerate(part):
                labels[i, [numbers[name] for name in names]] = 1.
        else:
            labels = torch.tensor([numbers[name] for _, (name,), _ in part])
        sets.append(ImageSet([file for file, _, _ in part], labels, classes))
    return sets


def rows_of_csv(root, name, lines):
    """[(file, its set of labels, its line in words)] of a csv file in the folder root; lines: {file: line} so far."""
    rows = []
    try:
        with open_regular(root / name, 2**31) as stream:
            reader = csv.reader(io.TextIOWrapper(stream, encoding='utf-8-sig', newline=''), strict=True)
            header = next(reader, [])
            if header != ['file', 'labels']:
                raise ValueError(f'found the header {",".join(header):.99}, expected file,labels')
            for row in filter(None, reader):
                line = f'{root / name}, line {reader.line_num}'
                if len(row) != 2:
                    raise UserError(f'{line}: found {len(row)} fields, expected file,labels; names with a comma in "')
                file, labels = os.path.normpath(row[0]), [label.strip() for label in row[1].split(';')]
                if os.path.isabs(file) or file.split(os.sep)[0] == os.pardir:
                    raise UserError(f'{line}: {row[0]:.200} is outside of the folder, expected a file in it')
                if not os.path.isfile(root / file):
                    raise UserError(f'{line}: {row[0]:.200}: no such file in {root}')
                if file in lines:
                    raise UserError(f'{line}: {row[0]:.200} is listed already ({lines[file]})')
                if not all(labels):
                    raise UserError(f'{line}: an empty label in {row[1]!r:.200}, expected names separated by ;')
                lines[file] = line
                rows.append((str(root / file), set(labels), line))
    except (OSError, ValueError, csv.Error) as error:   # ValueError: also bytes that are no text
        raise UserError(f'{root / name}: cannot be read ({error!s:.300})') from error
    if not rows:
        raise UserError(f'{root / name}: no images in it, expected lines of file,labels')
    return rows


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
