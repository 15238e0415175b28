"""Images per second from a folder of JPEG files: our worker loader against torchvision's ImageFolder.

    python benchmarks/bench_folder.py [--images 2000] [--size 224] [--num_workers N] [--policies blur sim auto no]

Makes ImageNet-like images of 500x375 and reads them with two random views each, as pretraining with --dataset
imagenet does: `torchvision` is ImageFolder with the same view as transforms in a DataLoader, `workers` our loader with
the same worker processes. They take turns epoch by epoch; medians of the epochs after the first. `blur` is the view of
SimCLR on ImageNet (colors of strength 1, blur), `sim` SupContrast's. The last line is the ratio for the first policy.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402

from datasets import pretraining_view, views  # noqa: E402
from datasets.loader import make_loader  # noqa: E402
from datasets.sources import folder  # noqa: E402
from util import arguments  # noqa: E402

POLICIES = {'blur': {'jitter_strength': 1., 'blur_p': 0.5}, 'sim': {}, 'auto': {'augment_policy': 'auto'},
            'no': {'augment_policy': 'no'}}


def write_images(root, count):
    """JPEG files with the sizes and about the bytes of ImageNet's: smooth colors, edges and noise."""
    rng = np.random.default_rng(0)
    for i in range(count):
        smooth = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(smooth).resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        top, left = rng.integers(0, 300), rng.integers(0, 400)
        image[top:top + 75, left:left + 100] = rng.integers(0, 256, 3)
        image = (image + rng.integers(-10, 11, image.shape)).clip(0, 255).astype(np.uint8)
        (root / str(i % 10)).mkdir(exist_ok=True)
        Image.fromarray(image).save(root / str(i % 10) / f'{i:05}.jpg', quality=90)


class TwoViews:
    def __init__(self, transform):
        self.transform = transform

    def __call__(self, image):
        return [self.transform(image), self.transform(image)]


def torchvision_loader(root, view, opt):
    return torch.utils.data.DataLoader(
        ImageFolder(root, TwoViews(views.per_sample(view))), opt.batch_size, shuffle=True, drop_last=True,
        num_workers=opt.num_workers, persistent_workers=opt.num_workers > 0)


def epoch(loader):
    """Images per second of one pass."""
    start, count = time.perf_counter(), 0
    for _, labels in loader:
        count += len(labels)
    return count / (time.perf_counter() - start)


def measure(root, policy, args):
    opt = arguments.defaults(dataset='imagenet', size=args.size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
                        batch_size=64, loader='workers', device='cuda' if torch.cuda.is_available() else 'cpu', seed=0,
                        num_workers=os.cpu_count() if args.num_workers is None else args.num_workers,
                        **POLICIES[policy])
    view = pretraining_view(opt)
    loaders = {'torchvision': torchvision_loader(root, view, opt),
               'workers': make_loader(folder(Path(root)), view, opt, 2)}
    speeds = {name: [] for name in loaders}
    for number in range(args.repeat + 1):
        for name, loader in loaders.items():
            if name == 'workers':
                loader.set_epoch(number)
            speeds[name].append(epoch(loader))
    return {name: statistics.median(values[1:]) for name, values in speeds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=2000)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--num_workers', type=int, help='default: the cores there are')
    parser.add_argument('--repeat', type=int, default=3, help='measured epochs')
    parser.add_argument('--policies', nargs='+', default=list(POLICIES), choices=POLICIES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        write_images(Path(root), args.images)
        print(f'{args.images} JPEG files of 500x375, two views of {args.size} pixels each, images per second')
        print(f'{"policy":10}{"torchvision":>14}{"workers":>10}{"ratio":>8}')
        ratios = []
        for policy in args.policies:
            speeds = measure(root, policy, args)
            ratios.append(speeds['workers'] / speeds['torchvision'])
            print(f'{policy:10}{speeds["torchvision"]:14.1f}{speeds["workers"]:10.1f}{ratios[-1]:8.2f}', flush=True)
    print(f'ratio {ratios[0]:.2f}')


if __name__ == '__main__':
    main()
