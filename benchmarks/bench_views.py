"""Views per second: two views of each image, sampled in batches, against torchvision's transforms in workers.

    python benchmarks/bench_views.py [--policy sim|auto|rand] [--images 20000] [--size 32] [--batch_size 1024]
                                     [--num_workers N] [--repeat 5]

`sim` are SimCLR's views; `auto` AutoAugment with the policy of CIFAR-10, from 128 pixels on that of ImageNet, and
`rand` two operations of RandAugment of magnitude 9, after cropping and flipping.
`per_sample` are the original's transforms in DataLoader workers, `batched` the batched loader without a compiler,
`compiled` as a long run has it; all three sample the same view of the same images, parts of scikit-learn's two
photographs. They take turns, an epoch each; medians. A batch counts when it lies in memory on the device. The
last line is the ratio of compiled to per_sample.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from datasets import pretraining_view  # noqa: E402
from datasets.image_set import ImageSet  # noqa: E402
from datasets.loader import COMPILE_PAYS, make_loader  # noqa: E402
from util import arguments, memory  # noqa: E402


def photographs(count, size):
    """`count` square parts of two photographs, resized."""
    from sklearn.datasets import load_sample_images
    photos, rng = load_sample_images().images, np.random.default_rng(0)
    parts = []
    for i in range(count):
        side = rng.integers(size, 300)
        top, left = (rng.integers(0, length - side) for length in photos[i % 2].shape[:2])
        parts.append(np.asarray(Image.fromarray(photos[i % 2][top:top + side, left:left + side]).resize((size, size))))
    return ImageSet(np.stack(parts), torch.arange(count) % 2, ['china', 'flower'])


def loader_of(form, images, args):
    opt = arguments.defaults(dataset='imagenet' if args.size >= 128 else 'cifar10', augment_policy=args.policy,
                        rand_n=2, rand_m=9, crop_min=0.2, size=args.size, mean=(0.5,) * 3, std=(0.25,) * 3, seed=0,
                        batch_size=args.batch_size, num_workers=args.num_workers, device=args.device,
                        loader='per_sample' if form == 'per_sample' else 'batched',
                        epochs=COMPILE_PAYS if form == 'compiled' else 1)
    if form == 'per_sample':                            # fewer images, or its turns take minutes; all workers busy
        opt.batch_size = min(256, args.batch_size)
        images = images.select(np.arange(min(len(images), max(4096, 8 * opt.batch_size * args.num_workers))))
    return make_loader(images, pretraining_view(opt), opt, 2)


def epoch(loader, number):
    """Seconds and images per second of one pass."""
    loader.set_epoch(number)
    start, count = time.perf_counter(), 0
    for _, labels in loader:
        count += len(labels)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, count / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--policy', choices=('sim', 'auto', 'rand'), default='sim')
    parser.add_argument('--images', type=int, default=20000)
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--batch_size', type=int, default=1024)
    parser.add_argument('--num_workers', type=int, default=os.cpu_count(), help='of per_sample; default: the cores')
    parser.add_argument('--repeat', type=int, default=5)
    args = parser.parse_args()
    args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    memory.keep_freed_memory()
    cache = tempfile.TemporaryDirectory()
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = cache.name  # as on a machine that has compiled nothing yet
    images = photographs(args.images, args.size)
    loaders = {form: loader_of(form, images, args) for form in ('per_sample', 'batched', 'compiled')}
    first = {form: epoch(loader, 0)[0] for form, loader in loaders.items()}         # workers start, compilers compile
    speeds = {form: [] for form in loaders}
    for number in range(1, args.repeat + 1):
        for form, loader in loaders.items():
            speeds[form].append(epoch(loader, number)[1])
    medians = {form: statistics.median(values) for form, values in speeds.items()}
    print(f'two views of {args.size} pixels each, policy {args.policy}, batches of {args.batch_size}, '
          f'{args.num_workers} workers, on {args.device}; medians of {args.repeat}')
    print(f'{"form":12}{"images/s":>12}{"ratio":>8}{"first epoch, s":>16}')
    for form, speed in medians.items():
        print(f'{form:12}{speed:12.0f}{speed / medians["per_sample"]:8.1f}{first[form]:16.1f}')
    print(f'ratio {medians["compiled"] / medians["per_sample"]:.1f}')


if __name__ == '__main__':
    main()
