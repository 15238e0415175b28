"""Write augmentation folders for any dataset, without a diffusion model, to try the protocol of hard negatives.

    python scripts/make_augs.py --dataset cifar10 --aug_output_name cifar10-augs

The seed selects the images of each class that they are made of. In-distribution ("id") images are blended mildly
with another image of the class and change their colors a little; near-out-of-distribution ("ood") images are the
same images with their patches shuffled: the textures of the class without its shape.
Files are named as DA-Fusion names them: <aug_root>/<aug_output_name>/<aug_name>/<class>-<index>-<number>.png. The
folders appear when they are complete.
"""
import argparse
import glob
import os
import shutil
import sys
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import DATASETS, load_images  # noqa: E402
from util import arguments, errors  # noqa: E402
from util.errors import UserError  # noqa: E402
from util.files import writing  # noqa: E402
from util.options import Parser, number  # noqa: E402

BLEND, GAIN = 0.2, 0.2              # fraction of the other image, and the largest relative change of a color channel


def parse_option():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dataset', default='cifar10', choices=DATASETS)
    parser.add_argument('--data_folder', metavar='FOLDER', help='default: ./data, mvip ./data/MVIP/sets')
    parser.add_argument('--max_samples', type=number(int, 1),
                        metavar='N', help='as in the training runs; default: all')
    parser.add_argument('--samples_per_class', type=number(int, 1), metavar='N', help='the same')
    parser.add_argument('--aug_root', default='./da_fusion/output', metavar='FOLDER', help='default: %(default)s')
    parser.add_argument('--aug_output_name', required=True, metavar='NAME')
    parser.add_argument('--aug_name_id', default='augs-id', metavar='NAME', help='default: %(default)s')
    parser.add_argument('--aug_name_ood', default='augs-ood', metavar='NAME', help='default: %(default)s')
    parser.add_argument('--split', default='train', choices=('train', 'val'),
                        help='the images they are made of (default: %(default)s)')
    parser.add_argument('--per_class', type=number(int, 1), default=16,
                        metavar='N', help='images (default: %(default)s)')
    parser.add_argument('--variants', type=number(int, 1), default=4,
                        metavar='N', help='of each image (default: %(default)s)')
    parser.add_argument('--patches', type=number(int, 2), default=4,
                        metavar='N', help='along each side (default: %(default)s)')
    parser.add_argument('--seed', type=number(int, 0, 2**31), default=0,
                        help='as in the training runs (default: %(default)s)')
    return parser.parse_args()


def blend(image, other, rng):
    """An image [h, w, 3] with a fraction of another and its channels a little brighter or darker."""
    other = np.asarray(Image.fromarray(other).resize(image.shape[1::-1]))
    mixed = (1 - BLEND) * image + BLEND * other
    return (mixed * rng.uniform(1 - GAIN, 1 + GAIN, 3)).clip(0, 255).astype(np.uint8)


def shuffle_patches(image, patches, rng):
    """An image [h, w, 3], cut to patches x patches, in another order."""
    h, w = (side // patches for side in image.shape[:2])
    parts = image[:h * patches, :w * patches].reshape(patches, h, patches, w, 3).swapaxes(1, 2).reshape(-1, h, w, 3)
    order = rng.permutation(len(parts))
    while (order == np.arange(len(parts))).mean() > 0.25:               # most patches have moved
        order = rng.permutation(len(parts))
    parts = parts[order].reshape(patches, patches, h, w, 3)
    return parts.swapaxes(1, 2).reshape(h * patches, w * patches, 3)


def real_path(folder):
    return Path(os.path.realpath(folder))               # Path.resolve raises RuntimeError for a link to itself


def check_folders(folders):
    """UserError unless both can be made, and the files of one are not the other's."""
    one, other = map(real_path, folders)
    if one == other or one in other.parents or other in one.parents:
        raise UserError(f'--aug_name_id and --aug_name_ood: {folders[0]} and {folders[1]} lie in each other, expected '
                        'two folders')
    for folder in folders:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f'{folder}: holds files already, expected a new or empty folder')


def file_names(classes, args):
    """What the names of each class's files begin with; UserError where two classes share them or they are too long."""
    begins = {}
    for name in classes:
        begin = name.replace(' ', '_')
        if begin in begins:
            raise UserError(f'classes {begins[begin]!r} and {name!r} would have the same files, expected names that '
                            'differ in more than spaces')
        begins[begin] = name
        longest = len(os.fsencode(f'{begin}-{args.per_class - 1}-{args.variants - 1}.png'))
        if longest > 255:
            raise UserError(f'class {name!r}: its files would have names of {longest} bytes, expected at most 255')
    return list(begins)


def main():
    args = parse_option()
    opt = arguments.defaults(dataset=args.dataset, data_folder=args.data_folder, seed=args.seed,
                        max_samples=args.max_samples, samples_per_class=args.samples_per_class)
    folders = [Path(args.aug_root) / args.aug_output_name / name for name in (args.aug_name_id, args.aug_name_ood)]
    with writing(folders[0].parent):
        check_folders(folders)
    images, rng = getattr(load_images(opt), args.split), np.random.default_rng(args.seed)
    if images.multi_label:
        raise UserError(f'--data_folder {args.data_folder}: its images have several labels, expected one class each')
    names = file_names(images.classes, args)
    labels = images.labels.numpy()
    members = [rng.permutation(np.flatnonzero(labels == number)) for number in range(len(images.classes))]
    smallest = min(min(images.load(i).size) for part in members for i in part[:args.per_class])
    if smallest < args.patches:
        raise UserError(f'--patches {args.patches}: expected at most {smallest}, the side of the smallest image')
    final = [real_path(folder) for folder in folders]                   # a link stays one
    partial = [folder.with_name(f'.{folder.name}.{uuid.uuid4().hex}.partial') for folder in final]
    try:
        with writing(folders[0].parent):
            for folder, new in zip(final, partial):
                for old in folder.parent.glob(f'.{glob.escape(folder.name)}.*.partial'):    # what a killed run left
                    shutil.rmtree(old)
                new.mkdir(parents=True)
            for name, part in zip(names, members):
                for index, i in enumerate(part[:args.per_class]):
                    image = np.asarray(images.load(i))
                    for variant in range(args.variants):
                        file = f'{name}-{index}-{variant}.png'
                        other = np.asarray(images.load(rng.choice(part[part != i] if len(part) > 1 else part)))
                        Image.fromarray(blend(image, other, rng)).save(partial[0] / file)
                        Image.fromarray(shuffle_patches(image, args.patches, rng)).save(partial[1] / file)
            for new, folder in zip(partial, final):
                os.replace(new, folder)
    finally:
        for folder in partial:
            shutil.rmtree(folder, ignore_errors=True)
    for folder, real in zip(folders, final):
        print(f'{folder}: {len(list(real.iterdir()))} images')


if __name__ == '__main__':
    errors.run(main)
