"""MVIP, multi-view industrial parts (Fraunhofer IPK), cropped around the object.

    sets/<class>/meta.json                                              "super_class": one name or a list of names
    sets/<class>/train_data/<set>/<orientation>/<camera>/*rgb.png       and *rgb_mask_gen.png, the object's mask
    sets/<class>/{valid_data,test_data}/<set>/<camera>/*rgb.png         and masks
"""
import json
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path

import torch

from datasets.image_set import ImageSet, open_image, read_image
from util.errors import UserError
from util.files import as_text, open_regular
from util.log import log

MARGIN = 16                                 # pixels between the mask's bounding box and the crop, as published
LARGEST_META = 2**20                        # bytes


@dataclass(frozen=True)
class ObjectImage:
    """An image that is read cropped to the square around its object."""
    file: Path
    mask: Path

    def box(self):
        """The square crop: left, top, right, bottom in pixels; it may leave the image.

        The bounding box of the mask, grown by MARGIN but kept in the image, made square around its own center.
        """
        size, mask = open_image(self.file, lambda image: image.size), read_image(self.mask, 'L')
        if mask.size != size:
            raise UserError(f'{self.mask}: the mask has {mask.size[0]}x{mask.size[1]} pixels, expected '
                            f'{size[0]}x{size[1]} as {self.file.name}')
        if mask.getbbox() is None:
            raise UserError(f'{self.mask}: the mask is empty')
        left, top, right, bottom = mask.getbbox()
        left, top = max(0, left - MARGIN), max(0, top - MARGIN)
        right, bottom = min(size[0], right + MARGIN), min(size[1], bottom + MARGIN)
        side = max(right - left, bottom - top)
        left, top = left - (side - (right - left)) // 2, top - (side - (bottom - top)) // 2
        return left, top, left + side, top + side

    def files(self):
        return [str(self.file), str(self.mask)]

    def size(self):
        left, top, right, bottom = self.box()
        return right - left, bottom - top

    def read(self):
        return read_image(self.file).crop(self.box())         # black outside the image


def mvip(opt):
    """The classes of --mvip_super_class, by name, at most --mvip_num_classes: training and validation images."""
    root = Path(opt.data_folder)
    if not root.is_dir():
        raise UserError(f'--data_folder {root}: no such folder, expected the sets/ folder of MVIP')
    folders = [folder for folder in sorted(root.iterdir(), key=names) if folder.is_dir() and folder.name[0] != '.']
    super_class = as_text(opt.mvip_super_class)
    folders = [folder for folder in folders if super_class in super_classes(folder)][:opt.mvip_num_classes]
    if not folders:
        raise UserError(f'--mvip_super_class {opt.mvip_super_class}: no class in {root} belongs to it')
    train, val = [], []
    for number, folder in enumerate(folders):
        held_out = folder / 'valid_data' if (folder / 'valid_data').is_dir() else folder / 'test_data'
        for part, pattern, found in ((folder / 'train_data', '*/*/*/*rgb.png', train), (held_out, '*/*/*rgb.png', val)):
            files = sorted(part.glob(pattern), key=names)
            if not files:
                raise UserError(f'{part}: no images, expected {pattern}')
            found += [(file, number) for file in files]
    log(f'MVIP: {len(folders)} classes of {opt.mvip_super_class}, {len(train)} training and {len(val)} validation '
        'images')
    classes = [as_text(folder.name) for folder in folders]
    if not any(os.path.lexists(mask_of(file)) for file, _ in val):
        log('MVIP: no validation image has a mask; they are used uncropped')
        return with_masks(train, classes), ImageSet([str(file) for file, _ in val], labels_of(val), classes)
    return with_masks(train, classes), with_masks(val, classes)


def super_classes(folder):
    """The super-classes of one class folder, from its meta.json."""
    file = folder / 'meta.json'
    try:
        with open_regular(file, LARGEST_META) as stream:
            found = json.loads(stream.read().decode('utf-8'))['super_class']
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise TypeError(f'super_class is {reprlib.repr(found)}, expected a name or a list of names')
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = 'no such file' if isinstance(error, FileNotFoundError) else f'{type(error).__name__}: {error}'
        raise UserError(f'{file}: not readable as {{"super_class": ...}} ({reason})') from error
    return found


def with_masks(found, classes):
    """Images of (file, class number) pairs, each cropped by the mask that belongs to its file name."""
    source = [ObjectImage(file, mask_of(file)) for file, _ in found]
    for image in source:
        if not os.path.isfile(image.mask):
            raise UserError(f'{image.mask}: no such file, expected the mask of {image.file.name}')
    return ImageSet(source, labels_of(found), classes)


def names(file):
    """What files are sorted by."""
    return [as_text(name) for name in file.parts]


def mask_of(file):
    return file.with_name(file.stem + '_mask_gen.png')


def labels_of(found):
    return torch.tensor([number for _, number in found])
