"""Draw mixed views and the label distributions that GenSCL learns from them.

    python scripts/plot_mixing.py --dataset cifar10 --output mixing.png

A column for each image: a view of pretraining, the same mixed with mixup and with cutmix, and the labels of both.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib  # noqa: E402

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

from datasets import DATASETS, load_images, make_loader, pretraining_view  # noqa: E402
from datasets.mixing import mix  # noqa: E402
from scripts.figures import figure_file, plain_text, save  # noqa: E402
from util import arguments, errors  # noqa: E402
from util.options import Parser, number  # noqa: E402


def parse_option():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dataset', default='cifar10', choices=DATASETS)
    parser.add_argument('--data_folder', metavar='FOLDER', help='default: ./data, mvip ./data/MVIP/sets')
    parser.add_argument('--count', type=number(int, 2, 100), default=8, metavar='N',
                        help='images (default: %(default)s)')
    parser.add_argument('--seed', type=number(int, 0, 2**31), default=0, help='(default: %(default)s)')
    parser.add_argument('--output', type=figure_file, default='mixing.png', metavar='FILE',
                        help='default: %(default)s')
    return parser.parse_args()


def mixed_views(opt, count):
    """-> classes, and for each row its title, images [count, size, size, 3] and label distributions [count, C]."""
    data = load_images(opt)
    images, labels = next(iter(make_loader(data.train, pretraining_view(opt), opt)))
    labels = F.one_hot(labels, len(data.train.classes)).float()
    rng = np.random.default_rng(opt.seed)
    rows = [('view', images, labels)]
    rows += [(kind, *mix(images, labels, kind, 4., rng)) for kind in ('mixup', 'cutmix')]   # 4: visibly mixed
    mean, std = (torch.tensor(values)[:, None, None] for values in (opt.mean, opt.std))
    return data.train.classes, [
        (kind, (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)[:count], labels[:count])
        for kind, images, labels in rows]


def main():
    args = parse_option()
    opt = arguments.defaults(dataset=args.dataset, data_folder=args.data_folder, max_samples=max(100, args.count),
                        batch_size=args.count, seed=args.seed, device='cpu')
    classes, rows = mixed_views(opt, args.count)
    fig, axes = plt.subplots(len(rows), args.count, figsize=(1.25 * args.count, 1.65 * len(rows)), squeeze=False,
                             layout='constrained')
    for row, (title, images, labels) in zip(axes, rows):
        row[0].set_ylabel(title)
        for ax, image, distribution in zip(row, images, labels):
            ax.imshow(image)
            parts = [f'{plain_text(classes[c])} {distribution[c]:.2f}' for c in distribution.nonzero()[:, 0].tolist()]
            ax.set_xlabel('\n'.join(sorted(parts, key=lambda part: -float(part.split()[-1]))), fontsize=8)
            ax.set(xticks=[], yticks=[])
    save(fig, args.output, dpi=110)


if __name__ == '__main__':
    errors.run(main)
