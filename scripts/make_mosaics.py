"""Write a set of images with several labels: mosaics of two by two images of a dataset, labeled with the classes in it.

    python scripts/make_mosaics.py --dataset cifar10 --output mosaics
    python main_supcon.py --dataset csv --data_folder mosaics ...

Mosaics of training images are for training, those of validation images for validation. The folder, with train.csv,
val.csv and images/, appears when it is complete.
"""
import argparse
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


def parse_option():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dataset', default='cifar10', choices=DATASETS)
    parser.add_argument('--data_folder', metavar='FOLDER', help='default: ./data')
    parser.add_argument('--output', required=True, metavar='FOLDER', help='folder that is made')
    parser.add_argument('--train', type=number(int, 2, 10**6), default=4000, metavar='N',
                        help='mosaics for training (default: %(default)s)')
    parser.add_argument('--val', type=number(int, 1, 10**6), default=1000, metavar='N',
                        help='mosaics for validation (default: %(default)s)')
    parser.add_argument('--side', type=number(int, 8, 1024), default=32, metavar='PIXELS',
                        help='side of a mosaic (default: %(default)s)')
    parser.add_argument('--seed', type=number(int, 0, 2**31), default=0, help='default: %(default)s')
    return parser.parse_args()


def mosaic(images, side, rng):
    """Four random images of an ImageSet, two by two: -> an image of side x side, the numbers of its classes."""
    indices, half = rng.integers(len(images), size=4), side // 2
    canvas = Image.new('RGB', (2 * half, 2 * half))
    for place, i in enumerate(indices):
        part = images.load(i).resize((half, half), Image.Resampling.BILINEAR)
        canvas.paste(part, (place % 2 * half, place // 2 * half))
    return canvas, sorted(set(images.labels[indices].tolist()))


def main():
    args = parse_option()
    output = Path(args.output)
    if output.exists():
        raise UserError(f'--output {output}: is there already, expected a folder that is not')
    data = load_images(arguments.defaults(dataset=args.dataset, data_folder=args.data_folder))
    bad = [name for name in data.train.classes if ';' in name or name != name.strip()]
    if data.train.multi_label or bad:
        raise UserError(f'--dataset {args.dataset}: expected one class for each image, without ; in its name')
    rng, partial = np.random.default_rng(args.seed), output.with_name(f'.{output.name}.{uuid.uuid4().hex}.partial')
    try:
        with writing(output):
            (partial / 'images').mkdir(parents=True)
            for name, images, count in (('train', data.train, args.train), ('val', data.val, args.val)):
                lines = ['file,labels']
                for i in range(count):
                    image, classes = mosaic(images, args.side, rng)
                    file = f'images/{name}-{i:06}.png'
                    image.save(partial / file)
                    labels = ';'.join(images.classes[c] for c in classes).replace('"', '""')
                    lines.append(f'{file},"{labels}"')
                (partial / f'{name}.csv').write_text('\n'.join([*lines, '']), encoding='utf-8')
            os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f'{output}: {args.train} mosaics for training, {args.val} for validation')


if __name__ == '__main__':
    errors.run(main)
