"""t-SNE of what encoders make of the validation images, one panel per checkpoint, with the classes as colors.

    python scripts/plot_features.py --ckpt output/<run>/trial=0/last.ckpt [more checkpoints] --output features.png

Reads the same validation images as the checkpoint's run; its dataset and folder can be given otherwise. The near-ood
images of the run's augmentation folders are crosses in the colors of the classes that they were made from.
"""
import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
from sklearn.manifold import TSNE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import DATASETS, evaluation_view, load_images, make_loader  # noqa: E402
from scripts.figures import figure_file, plain_text, save  # noqa: E402

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

from util import arguments, checkpoints, errors, training  # noqa: E402
from util.errors import UserError  # noqa: E402
from util.options import Parser, number, one_of  # noqa: E402


def parse_option():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ckpt', nargs='+', required=True, metavar='FILE', help='checkpoints of main_*.py')
    parser.add_argument('--output', type=figure_file, default='features.png', metavar='FILE',
                        help='the image (default: %(default)s)')
    parser.add_argument('--dataset', type=one_of(*DATASETS), metavar='NAME', help="default: the checkpoint's")
    parser.add_argument('--data_folder', metavar='FOLDER', help="default: the checkpoint's")
    parser.add_argument('--max_points', type=number(int, 10), default=2000, metavar='N',
                        help='images, and as many ood images (default: %(default)s)')
    return parser.parse_args()


def features_of(ckpt, args):
    """Title, features [n, dim], labels [n], class names and the run's name of one checkpoint."""
    checkpoint = checkpoints.load_checkpoint(ckpt)
    given = {name: value for name, value in vars(args).items() if name in ('dataset', 'data_folder') and value}
    opt = arguments.evaluation_options(checkpoint, ckpt, **given)
    training.set_device(opt)
    encoder = checkpoints.load_encoder(checkpoint, opt, ckpt).to(opt.device)
    data = load_images(opt)
    if opt.multi_label:
        raise UserError(f'--ckpt {ckpt}: its images have several labels, expected one color each')
    parts = [part.sample(args.max_points, opt.seed) for part in (data.val, data.ood) if part]
    outputs = [training.forward_all(encoder, make_loader(part, evaluation_view(opt), opt, train=False), opt)
               for part in parts]
    features, labels = (np.concatenate([output[i].cpu().numpy() for output in outputs]) for i in (0, 1))
    recorded = checkpoint['opt']
    # main_ce.py takes a --method too, and does not use it.
    method = recorded.get('method', '') if 'temp' in recorded else 'cross-entropy'
    name = recorded.get('output_name')
    name = name if isinstance(name, str) else Path(ckpt).stem
    return f'{method}, {opt.dataset}', features, labels, data.val.classes, name


def draw(ax, title, features, labels, classes):
    """One panel: -> the marks for its legend and what they stand for."""
    points = TSNE(perplexity=min(30, (len(features) - 1) / 3), init='pca', random_state=0).fit_transform(features)
    colors, marks = plt.get_cmap('tab10' if len(classes) <= 10 else 'gist_ncar'), []
    for c in range(len(classes)):
        color = colors(c if len(classes) <= 10 else c / len(classes))
        marks.append(ax.scatter(*points[labels == c].T, s=6, color=color))
        ax.scatter(*points[labels == -c - 1].T, s=10, color=color, marker='x', linewidth=0.7)
    if (labels < 0).any():
        marks.append(ax.scatter([], [], s=10, color='gray', marker='x'))
    ax.set(title=plain_text(title), xticks=[], yticks=[])
    return marks, [*map(plain_text, classes), 'ood, made from\nthe class of its color'][:len(marks)]


def main():
    args = parse_option()
    panels = [features_of(ckpt, args) for ckpt in args.ckpt]
    for ckpt, (_, features, _, classes, _) in zip(args.ckpt, panels):
        if classes != panels[0][3]:
            raise UserError(f'--ckpt {ckpt}: its classes are not those of {args.ckpt[0]}')
        if not np.isfinite(features).all() or len(np.unique(features, axis=0)) < 10:
            raise UserError(f'--ckpt {ckpt}: t-SNE needs at least 10 images with different, finite features')
    fig, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels) + 1.2, 4), squeeze=False, layout='constrained')
    titles = [panel[0] for panel in panels]
    for ax, (title, features, labels, classes, name) in zip(axes[0], panels):
        legend = draw(ax, title if titles.count(title) == 1 else name, features, labels, classes)
    fig.legend(*legend, loc='outside right center', markerscale=2, frameon=False,
               ncols=-(-len(panels[-1][3]) // 20), fontsize='small')
    save(fig, args.output, dpi=150)


if __name__ == '__main__':
    errors.run(main)
