"""Write augmentation folders for any dataset, without a diffusion model, to try the protocol of hard negatives.

    python scripts/make_augs.py --dataset cifar10 --aug_output_name cifar10-augs

Of each class the first training pictures are taken. In-distribution ("id") pictures are blended mildly with another
picture of the class and change their colours a little; near-out-of-distribution ("ood") pictures are the same pictures
with their patches shuffled: the textures of the class without its shape. Files are named as DA-Fusion names them:
<aug_root>/<aug_output_name>/<aug_name>/<class>-<index>-<number>.png.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import util  # noqa: E402
from datasets import DATASETS, load_pictures  # noqa: E402
from util import UserError  # noqa: E402
from util.options import Parser, number  # noqa: E402

BLEND, GAIN = 0.2, 0.2              # share of the other picture, and the largest relative change of a colour channel


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
    parser.add_argument('--per_class', type=number(int, 1), default=16,
                        metavar='N', help='pictures (default: %(default)s)')
    parser.add_argument('--variants', type=number(int, 1), default=4,
                        metavar='N', help='of each picture (default: %(default)s)')
    parser.add_argument('--patches', type=number(int, 2), default=4,
                        metavar='N', help='along each side (default: %(default)s)')
    parser.add_argument('--seed', type=number(int, 0, 2**31), default=0,
                        help='as in the training runs (default: %(default)s)')
    return parser.parse_args()


def blend(picture, other, rng):
    """A picture [h, w, 3] with a share of another and its channels a little brighter or darker."""
    other = np.asarray(Image.fromarray(other).resize(picture.shape[1::-1]))
    mixed = (1 - BLEND) * picture + BLEND * other
    return (mixed * rng.uniform(1 - GAIN, 1 + GAIN, 3)).clip(0, 255).astype(np.uint8)


def shuffle_patches(picture, patches, rng):
    """A picture [h, w, 3], cut to patches x patches, in another order."""
    h, w = (side // patches for side in picture.shape[:2])
    parts = picture[:h * patches, :w * patches].reshape(patches, h, patches, w, 3).swapaxes(1, 2).reshape(-1, h, w, 3)
    order = rng.permutation(len(parts))
    while (order == np.arange(len(parts))).mean() > 0.25:               # most patches have moved
        order = rng.permutation(len(parts))
    parts = parts[order].reshape(patches, patches, h, w, 3)
    return parts.swapaxes(1, 2).reshape(h * patches, w * patches, 3)


def main():
    args = parse_option()
    opt = util.defaults(dataset=args.dataset, seed=args.seed, max_samples=args.max_samples,
                        samples_per_class=args.samples_per_class)
    opt.data_folder = args.data_folder or util.options.data_folder(args.dataset)
    folders = [Path(args.aug_root) / args.aug_output_name / name for name in (args.aug_name_id, args.aug_name_ood)]
    for folder in folders:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f'{folder}: holds files already, expected a new or empty folder')
    train, rng = load_pictures(opt).train, np.random.default_rng(args.seed)
    members = [np.flatnonzero(train.labels.numpy() == number) for number in range(len(train.classes))]
    smallest = min(min(train.load(i).size) for part in members for i in part[:args.per_class])
    if smallest < args.patches:
        raise UserError(f'--patches {args.patches}: expected at most {smallest}, the side of the smallest picture')
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(train.classes, members):
        for index, i in enumerate(part[:args.per_class]):
            picture = np.asarray(train.load(i))
            for variant in range(args.variants):
                file = f"{name.replace(' ', '_')}-{index}-{variant}.png"
                other = np.asarray(train.load(rng.choice(part)))
                Image.fromarray(blend(picture, other, rng)).save(folders[0] / file)
                Image.fromarray(shuffle_patches(picture, args.patches, rng)).save(folders[1] / file)
    for folder in folders:
        print(f'{folder}: {len(list(folder.iterdir()))} pictures')


if __name__ == '__main__':
    util.run(main)
