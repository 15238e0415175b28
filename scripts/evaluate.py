"""Evaluate a classifier of main_ce.py, main_linear.py or main_supcon.py --ce_weight, and its encoder, on the validation
images of its run.

    python scripts/evaluate.py --ckpt output/<run>/trial=0/last.ckpt [--figures FOLDER] [--per_class] [--corruptions]

Prints top-1, kNN accuracy (the training images are the neighbors), ECE (is the classifier as often right as it is
sure?) and, of the encoder's features, R@1 and mAP@R (are the most similar validation images of the same class?); where
images have several labels, mAP, F1 and the mAP of kNN. --figures writes confusion.png, reliability.png (accuracy by
confidence) and neighbors.png: validation images, each followed by the training images with the most similar features,
green where they have its class. --per_class prints the accuracy of each class.
--corruptions corrupts the validation images, before they are resized, by Gaussian noise and blur, less contrast and
JPEG, at the strengths of CIFAR-10-C (Hendrycks & Dietterich, 2019, https://arxiv.org/abs/1903.12261): a line of five
accuracies for each.
"""
import argparse
import io
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tvf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import DATASETS, evaluation_view, load_images, make_loader  # noqa: E402
from datasets.image_set import ImageSet  # noqa: E402
from scripts.figures import save, save_image  # noqa: E402
from util import arguments, checkpoints, curves, errors, metrics, teachers, training  # noqa: E402
from util.options import Parser, number, one_of  # noqa: E402

STRENGTHS = {
    'noise': (0.04, 0.06, 0.08, 0.09, 0.10),        # standard deviation, of channels in 0..1
    'blur': (0.4, 0.6, 0.7, 0.8, 1.),               # standard deviation in pixels
    'contrast': (0.75, 0.5, 0.4, 0.3, 0.15),        # factor of the distance from the image's mean color
    'jpeg': (80, 65, 58, 50, 40),                   # quality
}


def parse_option():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ckpt', required=True, metavar='FILE', help='checkpoint of main_ce.py, main_linear.py or '
                        'main_supcon.py --ce_weight')
    parser.add_argument('--figures', metavar='FOLDER', help='write figures there; default: none')
    parser.add_argument('--per_class', action='store_true', help='the accuracy of each class too')
    parser.add_argument('--corruptions', action='store_true', help='corrupted images too')
    parser.add_argument('--dataset', type=one_of(*DATASETS), metavar='NAME', help="default: the checkpoint's")
    parser.add_argument('--data_folder', metavar='FOLDER', help="default: the checkpoint's")
    parser.add_argument('--max_images', '--max_pictures', type=number(int, 1), metavar='N', help='validation images, '
                        'spread over the classes; default: all')
    return parser.parse_args()


def noise(image, strength, rng):
    return image + 255 * strength * rng.standard_normal(image.shape)


def blur(image, strength, rng):
    # Borders are mirrored, which takes images larger than half of the kernel.
    kernel = [min(2 * math.ceil(4 * strength) + 1, 2 * side - 1) for side in image.shape[1::-1]]
    channels_first = torch.from_numpy(image).permute(2, 0, 1)
    return tvf.gaussian_blur(channels_first, kernel, [strength, strength]).permute(1, 2, 0).numpy()


def contrast(image, strength, rng):
    mean = image.mean((0, 1))
    return mean + strength * (image - mean)


def jpeg(image, strength, rng):
    file = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(file, 'JPEG', quality=strength)
    return np.asarray(Image.open(file))


@dataclass
class Corrupted:
    """Image i of an ImageSet, corrupted when it is read: an entry of ImageSet.source. kind: a key of STRENGTHS."""
    images: ImageSet
    i: int
    kind: str
    strength: float

    def read(self):
        corrupt = {'noise': noise, 'blur': blur, 'contrast': contrast, 'jpeg': jpeg}[self.kind]
        image = np.asarray(self.images.load(self.i)).astype(np.float64)
        values = corrupt(image, self.strength, np.random.default_rng(self.i))
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))

    def size(self):
        return self.images.load(self.i).size


def reliability_diagram(bins, error):
    """The figure of what metrics.calibration gives."""
    confidence, accuracy, counts = bins[bins[:, 2] > 0].T.tolist()
    edges = np.linspace(0, 1, len(bins) + 1)[:-1][(bins[:, 2] > 0).numpy()]
    fig = Figure(figsize=(4, 5), layout='constrained')
    top, bottom = fig.subplots(2, sharex=True, height_ratios=[3, 1])
    top.bar(edges, accuracy, 1 / len(bins), align='edge', edgecolor='white')
    top.plot([0, 1], [0, 1], color='gray', linestyle=':')               # as sure as right
    top.plot(confidence, accuracy, 'o', color='black', markersize=3)
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel='accuracy', title=f'ECE {error:.2f} % of {int(sum(counts))} images')
    bottom.bar(edges, counts, 1 / len(bins), align='edge', edgecolor='white')
    bottom.set(xlabel='confidence', ylabel='images', yscale='log', ylim=(0.5, None))
    return fig


def neighbors_image(train, val, memory, memory_labels, features, labels, count=10, k=8, side=64):
    """uint8 [h, w, 3]: a row for each of `count` validation images: it, and its k nearest training images."""
    chosen = torch.linspace(0, len(val) - 1, min(count, len(val))).long()
    nearest = (F.normalize(features[chosen], dim=1) @ F.normalize(memory, dim=1).T).topk(min(k, len(memory))).indices
    tiles = []
    for query, row in zip(chosen.tolist(), nearest.tolist()):
        same = (memory_labels[row] == labels[query]) if labels.dim() == 1 else (
            (memory_labels[row] * labels[query]).sum(1) > 0)
        pairs = [(val.load(query), 'white'), *((train.load(i), 'green' if hit else 'red') for i, hit in zip(row, same))]
        for image, color in pairs:
            tiles.append(ImageOps.expand(image.resize((side, side), Image.Resampling.BILINEAR), 4, color))
    columns = 1 + nearest.shape[1]
    canvas = Image.new('RGB', (columns * (side + 10), len(chosen) * (side + 10)), 'white')
    for i, tile in enumerate(tiles):
        canvas.paste(tile, (i % columns * (side + 10) + 1, i // columns * (side + 10) + 1))
    return np.array(canvas)


def main():
    args = parse_option()
    checkpoint = checkpoints.load_checkpoint(args.ckpt)
    given = {name: value for name, value in vars(args).items() if name in ('dataset', 'data_folder') and value}
    opt = arguments.evaluation_options(checkpoint, args.ckpt, **given)
    opt.teacher_kind = None                             # the checkpoint records its network
    training.set_device(opt)
    data = load_images(opt)
    known = {'file': args.ckpt, 'model': checkpoint['model'], 'classes': checkpoint.get('classes'), 'opt': vars(opt)}
    classifier = teachers.load_classifier(known, opt, data.train.classes)
    view, val = evaluation_view(opt), data.val.sample(args.max_images, 0)

    def logits_of(images):
        return training.forward_all(classifier, make_loader(images, view, opt, train=False), opt)

    def score(logits, labels):
        if opt.multi_label:
            return metrics.multi_label_scores(logits, labels)[0]['mAP']
        return metrics.accuracy(logits, labels)

    logits, labels = logits_of(val)
    encoder = classifier.classifier.encoder
    (memory, memory_labels), (features, _) = (
        training.forward_all(encoder, make_loader(part, view, opt, train=False), opt) for part in (data.train, val))
    known = memory, memory_labels, features, labels
    if opt.multi_label:
        values, per_class = metrics.multi_label_scores(logits, labels)
        print(*(f'{name} {value:.2f}' for name, value in values.items()), sep='\n')
        print(f'kNN mAP {metrics.knn_map(*known):.2f}', flush=True)
    else:
        matrix = metrics.confusion_matrix(logits.argmax(1), labels, len(val.classes)).cpu()
        error, bins = metrics.calibration(logits, labels)
        recall, precision = metrics.retrieval(features, labels)
        per_class = metrics.accuracy_by_class(matrix)
        print(f'top-1 {score(logits, labels):.2f}')
        print(f'kNN accuracy {metrics.knn_accuracy(*known):.2f}')
        print(f'ECE {error:.2f}\nR@1 {recall:.2f}\nmAP@R {precision:.2f}', flush=True)
    if args.per_class:
        for c, value in per_class.items():
            print(errors.printable(f"{'AP' if opt.multi_label else 'accuracy'} of {val.classes[c]}: {value:.2f}"))
    if args.figures:
        folder = Path(args.figures)
        if not opt.multi_label:
            save_image(curves.confusion_image(matrix, val.classes), folder / 'confusion.png')
            save(reliability_diagram(bins.cpu(), error), folder / 'reliability.png', dpi=100)
        save_image(neighbors_image(data.train, val, *known), folder / 'neighbors.png')
    if args.corruptions:
        for kind, strengths in STRENGTHS.items():
            print(kind, end='')
            for strength in strengths:
                source = [Corrupted(val, i, kind, strength) for i in range(len(val))]
                corrupted = replace(val, source=source, cache_dir=None, _decoded={})
                print(f' {score(*logits_of(corrupted)):.2f}', end='', flush=True)
            print()


if __name__ == '__main__':
    errors.run(main)
