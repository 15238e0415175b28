"""Evaluate a classifier of main_ce.py or main_linear.py: top-1, kNN accuracy of its encoder, top-1 on corrupted images.

    python scripts/evaluate.py --ckpt output/<run>/trial=0/last.ckpt [--corruptions]

The validation images are those of the checkpoint's run; the kNN classifier remembers its training images.
--corruptions corrupts the validation images by Gaussian noise and blur, less contrast and JPEG, at the strengths of
CIFAR-10-C (Hendrycks & Dietterich, 2019, https://arxiv.org/abs/1903.12261): a line of five accuracies for each.
"""
import argparse
import io
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import DATASETS, evaluation_view, load_images, make_loader  # noqa: E402
from datasets.image_set import ImageSet  # noqa: E402
from util import arguments, checkpoints, errors, metrics, teachers, training  # noqa: E402
from util.options import Parser, number, one_of  # noqa: E402

STRENGTHS = {
    'noise': (0.04, 0.06, 0.08, 0.09, 0.10),        # standard deviation, of channels in 0..1
    'blur': (0.4, 0.6, 0.7, 0.8, 1.),               # standard deviation in pixels
    'contrast': (0.75, 0.5, 0.4, 0.3, 0.15),        # factor of the distance from the image's mean color
    'jpeg': (80, 65, 58, 50, 40),                   # quality
}


def parse_option():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ckpt', required=True, metavar='FILE', help='checkpoint of main_ce.py or main_linear.py')
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

    def top1(images):
        logits, labels = training.forward_all(classifier, make_loader(images, view, opt, train=False), opt)
        return metrics.accuracy(logits, labels)

    encoder = classifier.classifier.encoder
    memory, features = (training.forward_all(encoder, make_loader(part, view, opt, train=False), opt)
                        for part in (data.train, val))
    print(f'top-1 {top1(val):.2f}')
    print(f'kNN accuracy {metrics.knn_accuracy(*memory, *features):.2f}', flush=True)
    if args.corruptions:
        for kind, strengths in STRENGTHS.items():
            print(kind, end='')
            for strength in strengths:
                source = [Corrupted(val, i, kind, strength) for i in range(len(val))]
                print(f' {top1(replace(val, source=source, cache_dir=None, _decoded={})):.2f}', end='', flush=True)
            print()


if __name__ == '__main__':
    errors.run(main)
