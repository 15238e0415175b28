"""Images per second from a folder of JPEG files: our worker loader against torchvision's ImageFolder and DALI.

    python benchmarks/bench_folder.py [--images 2000] [--size 224] [--num_workers N] [--policies blur sim auto no]

Makes ImageNet-like images of 500x375 and reads them with two random views each, as pretraining with --dataset
imagenet does. `torchvision` is ImageFolder with the same view as transforms in a DataLoader, `workers` our loader with
the same worker processes. DALI, where it is installed, runs on the CPU with as many threads: `dali crop` decodes a
random crop for each view (image_random_crop), `dali once` each file once; its colors, a matrix product, are not
torchvision's. All take turns epoch by epoch; medians of the epochs after the first. `blur` is the view of SimCLR on
ImageNet (colors of strength 1, blur), `sim` SupContrast's. The last line is the ratio to torchvision for the first
policy.

The first line is the time of a core that decoding alone takes: a limit for all.
"""
import argparse
import contextlib
import io
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

from datasets import image_set, pretraining_view, views  # noqa: E402
from datasets.loader import make_loader  # noqa: E402
from datasets.sources import folder  # noqa: E402
from util import arguments, memory  # noqa: E402

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


class Dali:
    """The same view by DALI: each batch is both views and the labels."""

    def __init__(self, root, view, opt, once):
        from nvidia.dali import fn, pipeline_def, types

        def cropped(files):
            if once:
                return fn.random_resized_crop(files, size=view.size, random_area=view.crop, antialias=True)
            crop = fn.decoders.image_random_crop(files, random_area=view.crop)
            return fn.resize(crop, size=(view.size, view.size), antialias=True)

        def one_view(files):
            x = cropped(files)
            if view.jitter:
                jittered, gray = (fn.random.coin_flip(probability=p) for p in (view.jitter_p, view.grayscale))
                factors = [1 + jittered * fn.random.uniform(range=(-s, s)) for s in view.jitter[:3]]
                hue = jittered * fn.random.uniform(range=(-360 * view.jitter[3], 360 * view.jitter[3]))
                x = fn.color_twist(x, brightness=factors[0], contrast=factors[1], saturation=factors[2] * (1 - gray),
                                   hue=hue)
            return fn.crop_mirror_normalize(x, mirror=fn.random.coin_flip(), output_layout='CHW', dtype=types.FLOAT,
                                            mean=[255 * x for x in view.mean], std=[255 * x for x in view.std])

        @pipeline_def(batch_size=opt.batch_size, num_threads=opt.num_workers or 1, device_id=None, seed=0)
        def two_views():
            files, labels = fn.readers.file(file_root=root, random_shuffle=True, name='files')
            files = fn.decoders.image(files) if once else files
            return one_view(files), one_view(files), labels
        self.pipeline = two_views()
        self.pipeline.build()
        self.steps = self.pipeline.epoch_size('files') // opt.batch_size

    def __iter__(self):
        for _ in range(self.steps):
            *images, labels = self.pipeline.run()
            yield images, labels


def dali_loaders(root, view, opt):
    """Of what DALI can do, where it is installed."""
    if view.auto or view.blur:
        return {}
    with contextlib.suppress(ImportError):
        return {f'dali {name}': Dali(root, view, opt, name == 'once') for name in ('crop', 'once')}
    return {}


def decoding(root, count=100):
    """Milliseconds of a core that decoding a file takes, by decoder."""
    files = [file.read_bytes() for file in sorted(Path(root).rglob('*.jpg'))[:count]]
    decoders = {'Pillow': lambda data: Image.open(io.BytesIO(data)).load()}
    if image_set.decode_jpeg:
        decoders['simplejpeg'] = lambda data: image_set.decode_jpeg(data, 'RGB')
    times = {name: [] for name in decoders}
    for _ in range(5):
        for name, decode in decoders.items():
            start = time.process_time()
            for data in files:
                decode(data)
            times[name].append((time.process_time() - start) / len(files) * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


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
               'workers': make_loader(folder(Path(root)), view, opt, 2), **dali_loaders(root, view, opt)}
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
    memory.keep_freed_memory()                                          # as the programs do
    with tempfile.TemporaryDirectory() as root:
        write_images(Path(root), args.images)
        print(f'{args.images} JPEG files of 500x375, two views of {args.size} pixels each, images per second')
        print('bare decoding, ms of a core a file:', ', '.join(f'{k} {v:.2f}' for k, v in decoding(root).items()))
        print(f'{"policy":8}{"form":14}{"images/s":>10}{"ours / this":>13}', flush=True)
        ratios = []
        for policy in args.policies:
            speeds = measure(root, policy, args)
            ratios.append(speeds['workers'] / speeds['torchvision'])
            for form, speed in speeds.items():
                print(f'{policy:8}{form:14}{speed:10.1f}{speeds["workers"] / speed:13.2f}', flush=True)
    print(f'ratio {ratios[0]:.2f}')


if __name__ == '__main__':
    main()
