"""t-SNE of what encoders make of the validation pictures, one panel per checkpoint, with the classes as colours.

    python scripts/plot_features.py --ckpt output/<run>/trial=0/last.ckpt [more checkpoints] --output features.png

Reads the same validation pictures as the checkpoint's run; its dataset and folder can be given otherwise.
"""
import argparse
import sys
from pathlib import Path

import matplotlib
from sklearn.manifold import TSNE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import util  # noqa: E402
from datasets import evaluation_view, load_pictures, make_loader  # noqa: E402
from util import UserError  # noqa: E402

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

DEFAULTS = {'dataset': 'cifar10', 'data_folder': './data', 'model': 'resnet50', 'stem': 'cifar', 'width': 1.,
            'size': None, 'mean': None, 'std': None, 'max_samples': None, 'seed': 0}


def parse_option():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ckpt', nargs='+', required=True, metavar='FILE', help='checkpoints of main_*.py')
    parser.add_argument('--output', default='features.png', metavar='FILE', help='the picture (default: %(default)s)')
    parser.add_argument('--dataset', metavar='NAME', help="default: the checkpoint's")
    parser.add_argument('--data_folder', metavar='FOLDER', help="default: the checkpoint's")
    parser.add_argument('--max_points', type=int, default=2000, metavar='N', help='pictures (default: %(default)s)')
    return parser.parse_args()


def features_of(ckpt, args):
    """Title, features [n, dim], labels [n] and class names of one checkpoint."""
    checkpoint = util.load_checkpoint(ckpt)
    given = {name: value for name, value in vars(args).items() if name in ('dataset', 'data_folder') and value}
    opt = argparse.Namespace(**{**DEFAULTS, **checkpoint['opt'], **given})
    opt.batch_size, opt.loader, opt.num_workers, opt.amp = 256, 'auto', 0, False
    util.set_device(opt)
    encoder = util.load_encoder(checkpoint, opt, ckpt).to(opt.device)
    val = load_pictures(opt)[1].sample(args.max_points, opt.seed)
    features, labels = util.encode(encoder, make_loader(val, evaluation_view(opt), opt, train=False), opt)
    title = f"{checkpoint['opt'].get('method') or 'cross-entropy'}, {opt.dataset}"
    return title, features.cpu().numpy(), labels.cpu().numpy(), val.classes


def main():
    args = parse_option()
    if args.max_points < 3:
        raise UserError(f'--max_points {args.max_points}: expected at least 3')
    panels = [features_of(ckpt, args) for ckpt in args.ckpt]
    fig, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels) + 1.2, 4), squeeze=False, layout='constrained')
    for ax, (title, features, labels, classes) in zip(axes[0], panels):
        points = TSNE(perplexity=min(30, (len(features) - 1) / 3), init='pca', random_state=0).fit_transform(features)
        colours = plt.get_cmap('tab10' if len(classes) <= 10 else 'gist_ncar')
        for c, name in enumerate(classes):
            colour = colours(c if len(classes) <= 10 else c / len(classes))
            ax.scatter(*points[labels == c].T, s=6, color=colour, label=name)
        ax.set(title=title, xticks=[], yticks=[])
    fig.legend(*axes[0, -1].get_legend_handles_labels(), loc='outside right center', markerscale=3, frameon=False,
               ncols=-(-len(panels[-1][3]) // 20), fontsize='small')
    try:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(args.output, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f'--output {args.output}: cannot be written ({error})') from error
    print(args.output)


if __name__ == '__main__':
    util.run(main)
