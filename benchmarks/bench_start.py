"""Seconds until a run can start: --help, and a folder of small images with and without --cache_dir.

    python benchmarks/bench_start.py [--images 60000] [--size 32] [--repeat 3]

The folder holds JPEG files, made in a temporary folder. Reading it is finding the files, measuring mean and standard
deviation, and decoding all. The last line is the ratio of a start without cache to the second with one.
"""
import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench_views import photographs  # noqa: E402
from PIL import Image  # noqa: E402

from datasets import load_images, make_loader, pretraining_view  # noqa: E402
from util import arguments  # noqa: E402


def write_folder(root, count, size):
    parts = photographs(min(count, 1000), size).source
    for i in range(count):
        folder = root / str(i % 10)
        folder.mkdir(exist_ok=True)
        Image.fromarray(parts[i % len(parts)]).save(folder / f'{i:06}.jpg')


def start(root, cache_dir):
    """Seconds of reading all images of a folder."""
    cache_dir = cache_dir and str(cache_dir)
    opt = arguments.defaults(dataset='path', data_folder=str(root), cache_dir=cache_dir, device='cpu',
                        epochs=1, seed=0)
    before = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        data = load_images(opt)
        make_loader(data.train, pretraining_view(opt), opt, 2)
        make_loader(data.val, pretraining_view(opt), opt, 2, train=False)
    return time.perf_counter() - before


def seconds_of_help():
    before = time.perf_counter()
    subprocess.run([sys.executable, ROOT / 'main_supcon.py', '--help'], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=60000)
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--repeat', type=int, default=3)
    args = parser.parse_args()
    print(f'main_supcon.py --help: {statistics.median(seconds_of_help() for _ in range(args.repeat)):.2f} s')
    with tempfile.TemporaryDirectory() as folder:
        root, results = Path(folder) / 'images', {'without': [], 'first': [], 'second': []}
        root.mkdir()
        write_folder(root, args.images, args.size)
        start(root, None)                                               # libraries and the disk's own cache
        for i in range(args.repeat):
            results['without'].append(start(root, None))
            results['first'].append(start(root, Path(folder) / f'cache{i}'))
            results['second'].append(start(root, Path(folder) / f'cache{i}'))
    medians = {name: statistics.median(values) for name, values in results.items()}
    print(f'{args.images} JPEG files of {args.size} pixels; medians of {args.repeat}, seconds')
    print(f'without --cache_dir {medians["without"]:.2f}; with it, first start {medians["first"]:.2f}, second '
          f'{medians["second"]:.2f}')
    print(f'ratio {medians["without"] / medians["second"]:.1f}')


if __name__ == '__main__':
    main()
