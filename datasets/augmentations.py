"""Augmentation folders: synthetic images of the classes, as DA-Fusion (https://arxiv.org/abs/2302.07944) writes them.

    <aug_root>/<aug_output_name>/<aug_name>/<class>-<index>-<number>.png

<class> may have underscores for spaces, <index> numbers the source images of the class, <number> their variants.
In-distribution ("id") images carry the label of their class c, near-out-of-distribution ("ood") ones -(c + 1).
"""
import os
from pathlib import Path

import torch

from datasets.image_set import EXTENSIONS, ImageSet
from util.errors import UserError
from util.files import as_text


def load_augmentations(opt, classes):
    """The id and the ood ImageSet that the options name; None where --aug_name_id or --aug_name_ood is not given."""
    if not opt.aug_output_name:
        return None, None
    root = Path(opt.aug_root) / opt.aug_output_name
    if opt.aug_name_id and opt.aug_name_ood and (
            os.path.realpath(root / opt.aug_name_id) == os.path.realpath(root / opt.aug_name_ood)):
        raise UserError(f'--aug_name_ood {opt.aug_name_ood}: the same folder as --aug_name_id, expected another')
    parts = []
    for kind, name, limit in (('id', opt.aug_name_id, opt.aug_ex_id), ('ood', opt.aug_name_ood, opt.aug_ex_ood)):
        part = augmentation_folder(root / name, classes, limit, f'--aug_name_{kind}') if name else None
        if part is not None and kind == 'ood':
            part.labels = -part.labels - 1
        parts.append(part)
    return parts


def augmentation_folder(folder, classes, limit, option):
    """The images of one folder, at most `limit` source images (with all their variants) of each class; -1: all."""
    if not os.path.isdir(folder):
        raise UserError(f'{option}: {folder}: no such folder')
    try:
        files = list(folder.iterdir())
    except OSError as error:
        raise UserError(f'{option}: {folder}: cannot be read ({error})') from error
    numbers = {}
    for number, name in enumerate(classes):
        if numbers.setdefault(name.replace(' ', '_'), number) != number:
            raise UserError(f'{option}: {folder}: classes {classes[numbers[name.replace(" ", "_")]]!r} and {name!r} '
                            'have the same files, expected names that differ in more than spaces')
    found = []                                              # (class number, index, number, file)
    for file in files:
        if file.suffix.lower() not in EXTENSIONS or file.name.startswith('.'):
            continue
        name, *fields = as_text(file.stem).rsplit('-', 2)
        if len(fields) != 2 or not all(field.isdecimal() for field in fields):
            raise UserError(f'{file}: expected a name such as <class>-<index>-<number>.png')
        number = numbers.get(name.replace(' ', '_'))
        if number is None:
            raise UserError(f'{file}: no class is called {name!r}')
        found.append((number, int(fields[0]), int(fields[1]), str(file)))
    if not found:
        raise UserError(f'{option}: {folder}: no images in it, expected <class>-<index>-<number>.png')
    if limit >= 0:
        kept = {c: sorted({index for number, index, *_ in found if number == c})[:limit] for c in numbers.values()}
        found = [entry for entry in found if entry[1] in kept[entry[0]]]
    found.sort()
    labels = torch.tensor([number for number, *_ in found], dtype=torch.long)
    return ImageSet([file for *_, file in found], labels, classes)
