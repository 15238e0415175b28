"""The same two SimCLR views of small images, and the same losses, by other libraries, each in a process of its own.

    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py [--images 8192] [--size 32] [--batch_size 1024] [--num_workers N] [--repeat 3]
                               [--loss_views 8192]
    python benchmarks/peers.py --docs benchmarks/results/<date>_cpu.json        write that table into docs/speed.md

Libraries that are not installed are left out. `torchvision` are transforms in DataLoader workers, which is how
SupContrast and solo-learn make views, too; DALI runs on the CPU. No speed is printed of views whose statistics are not
those of torchvision's, and bench_loss.py ends with an error where losses differ. On a GPU where there is one, except
DALI. The last line is the ratio of our views, without a compiler, to the fastest other library's.
"""
import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from bench_views import photographs  # noqa: E402
from PIL import Image  # noqa: E402

from datasets import views  # noqa: E402
from datasets.loader import make_loader  # noqa: E402
from datasets.views import View  # noqa: E402
from util import arguments, memory  # noqa: E402

MEAN, STD, SCALE, JITTER = (0.5,) * 3, (0.25,) * 3, (0.2, 1.), (0.4, 0.4, 0.4, 0.1)
# Form: its library, as pip knows it
LIBRARIES = {'ours': None, 'torchvision': 'torchvision', 'lightly': 'lightly', 'kornia': 'kornia',
             'dali': 'nvidia-dali-cuda120'}
MARK = '<!-- written by benchmarks/peers.py --docs -->'


class Images(torch.utils.data.Dataset):
    """PIL images as two views by a transform of one."""

    def __init__(self, pixels, transform):
        self.pixels, self.transform = pixels, transform

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index]))


# Each form: images [n, size, size, 3] uint8 and the arguments -> a function that gives the batches of an epoch, each
# the two views of its images, [bsz, 3, size, size] each.

def ours(images, args):
    view = View(args.size, MEAN, STD, crop=SCALE, flip=0.5, jitter=JITTER, grayscale=0.2)
    opt = arguments.defaults(dataset='cifar10', seed=0, batch_size=args.batch_size, device=args.device,
                             loader='batched', epochs=1)
    memory.keep_freed_memory()
    loader = make_loader(images, view, opt, 2)
    return lambda: (x.chunk(2) for x, _ in loader)


def in_workers(images, args, transform):
    loader = torch.utils.data.DataLoader(Images(images.source, transform), min(256, args.batch_size), shuffle=True,
                                         num_workers=args.num_workers, persistent_workers=args.num_workers > 0)
    return lambda: ([part.to(args.device) for part in batch] for batch in loader)


def torchvision(images, args):
    transform = views.per_sample(View(args.size, MEAN, STD, crop=SCALE, flip=0.5, jitter=JITTER, grayscale=0.2))
    return in_workers(images, args, lambda image: [transform(image), transform(image)])


def lightly(images, args):
    from lightly.transforms import SimCLRTransform
    return in_workers(images, args, SimCLRTransform(
        input_size=args.size, cj_strength=0.5, min_scale=SCALE[0], gaussian_blur=0.,
        normalize={'mean': MEAN, 'std': STD}))


def kornia(images, args):
    from kornia import augmentation
    augment = torch.nn.Sequential(
        augmentation.RandomResizedCrop((args.size, args.size), scale=SCALE), augmentation.RandomHorizontalFlip(),
        augmentation.ColorJitter(*JITTER, p=0.8), augmentation.RandomGrayscale(p=0.2),
        augmentation.Normalize(torch.tensor(MEAN), torch.tensor(STD)))
    pixels = torch.from_numpy(images.source).permute(0, 3, 1, 2).contiguous().to(args.device)

    def batches():
        for indices in torch.randperm(len(pixels), device=args.device).split(args.batch_size):
            x = pixels[indices].float() / 255
            yield augment(x), augment(x)
    return batches


def dali(images, args):
    from nvidia.dali import fn, pipeline_def, types

    def one_view(x):
        jittered, gray = fn.random.coin_flip(probability=0.8), fn.random.coin_flip(probability=0.2)
        x = fn.random_resized_crop(x, size=args.size, random_area=SCALE, antialias=True)
        factors = [1 + jittered * fn.random.uniform(range=(-strength, strength)) for strength in JITTER[:3]]
        x = fn.color_twist(x, brightness=factors[0], contrast=factors[1], saturation=factors[2],
                           hue=jittered * fn.random.uniform(range=(-360 * JITTER[3], 360 * JITTER[3])))
        x = fn.hsv(x, saturation=fn.cast(1 - gray, dtype=types.FLOAT))
        return fn.crop_mirror_normalize(x, mirror=fn.random.coin_flip(), output_layout='CHW', dtype=types.FLOAT,
                                        mean=[255 * value for value in MEAN], std=[255 * value for value in STD])

    @pipeline_def(batch_size=args.batch_size, num_threads=args.num_workers or 1, device_id=None, seed=0,
                  prefetch_queue_depth=2)
    def two_views():
        x = fn.external_source(source=samples, batch=True, layout='HWC')
        return one_view(x), one_view(x)
    steps = len(images) // args.batch_size

    def samples():
        return [images.source[index] for index in torch.randint(len(images), (args.batch_size,)).tolist()]
    pipeline = two_views()
    pipeline.build()
    return lambda: ([torch.from_numpy(part.as_array()) for part in pipeline.run()] for _ in range(steps))


def moments(x):
    """What views of the same distribution have in common: of values, of local differences, of colors."""
    return [x.mean().item(), x.std().item(), x.mean((2, 3)).std().item(), x.diff(dim=3).abs().mean().item(),
            (x - x.mean(1, keepdim=True)).abs().mean().item()]


def measure(args):
    """Print images per second, the median of the epochs but the first, and the moments of the views of that one."""
    torch.manual_seed(0)
    batches = globals()[args.form](photographs(args.images, args.size), args)
    found, speeds = [], []
    for epoch in range(args.repeat + 1):                                # the first starts threads and processes
        start, count = time.perf_counter(), 0
        for first, second in batches():
            count += len(first)
            if not epoch:
                found += [moments(torch.as_tensor(first).float()), moments(torch.as_tensor(second).float())]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if epoch:
            speeds.append(count / (time.perf_counter() - start))
    print(json.dumps([statistics.median(speeds), *map(statistics.mean, zip(*found))]))


def differs(found, expected):
    """Whether moments are not those of torchvision's views; contrast is about the mean here and 128 in DALI."""
    return abs(found[0] - expected[0]) > 0.05 or any(abs(a / b - 1) > 0.05 for a, b in zip(found[1:], expected[1:]))


def run(command):
    return subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.PIPE, text=True).stdout


def version(library):
    """Of an installed library; None where it is not."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def table_of_views(args):
    """Lines of Markdown, and our speed over the fastest other library's."""
    results, versions = {}, {form: version(library) if library else '' for form, library in LIBRARIES.items()}
    for form, number in versions.items():
        if number is not None:
            output = run([__file__, '--form', form, '--images', args.images, '--size', args.size, '--batch_size',
                          args.batch_size, '--num_workers', args.num_workers, '--repeat', args.repeat])
            results[form] = json.loads(output.splitlines()[-1])
    lines = [f'Two views of {args.size} pixels, images/s:', '', '| views | version | images/s | ours / this |',
             '|---|---|---|---|']
    speeds = {}
    for form, (speed, *found) in results.items():
        if differs(found, results['torchvision'][1:]):
            lines.append(f"| {form} | {versions[form]} | other views: {', '.join(f'{x:.3f}' for x in found)} | |")
            continue
        speeds[form] = speed
        lines.append(f"| {form} | {versions[form]} | {speed:,.0f} | {results['ours'][0] / speed:.1f} |")
    return lines, speeds['ours'] / max(speed for form, speed in speeds.items() if form != 'ours')


def write_docs(file):
    """Put the table of a results file into docs/speed.md, after MARK."""
    rows = json.loads(Path(file).read_text())
    table = rows['peers']['output'].rsplit('\nratio', 1)[0].strip()
    docs = HERE.parent / 'docs' / 'speed.md'
    before = docs.read_text().split(MARK)[0].rstrip()
    docs.write_text(f'{before}\n\n{MARK}\n\n{table}\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=8192)
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--batch_size', type=int, default=1024)
    parser.add_argument('--num_workers', type=int, default=os.cpu_count(), help='or threads; default: the cores')
    parser.add_argument('--loss_views', type=int, default=8192, help='0: no losses')
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--form', choices=LIBRARIES, help='measure these views, in this process')
    parser.add_argument('--docs', metavar='FILE', help='write the table of a results file into docs/speed.md')
    args = parser.parse_args()
    args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if args.form:
        return measure(args)
    if args.docs:
        return write_docs(args.docs)
    lines, ratio = table_of_views(args)
    print(*lines, '', sep='\n', flush=True)
    if args.loss_views:
        losses = run([HERE / 'bench_loss.py', '--variant', 'SupCon', 'SimCLR', '--views', args.loss_views, '--repeat',
                      args.repeat])
        print('Losses:', '', '```', losses.rsplit('\nratio', 1)[0], '```', sep='\n')
    print(f'ratio {ratio:.1f}')


if __name__ == '__main__':
    main()
