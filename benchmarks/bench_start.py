"""Seconds until a run can start: --help, and a folder of small images with and without --cache_dir.

    python benchmarks/bench_start.py [--images 60000] [--size 32] [--repeat 3]
    python benchmarks/bench_start.py --program first_step

The folder holds JPEG files, made in a temporary folder. Reading it is finding the files, measuring mean and standard
deviation, and decoding all. The last line is the ratio of a start without cache to the second with one.

With --program, of main_supcon.py on the digits, one epoch of twelve steps: the seconds from its start until its first
step is done, and from its last step to its end, with evaluation and checkpoint. The last line is 5 s divided by the
first (first_step), or 1 s by the second (end).
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


def seconds_of_program():
    """Seconds of main_supcon.py on the digits from its start to its first step, and from its last step to its end."""
    options = ('--dataset digits --model resnet18 --width 0.25 --batch_size 128 --epochs 1 --print_freq 1 '
               '--output_name start')
    command = [sys.executable, ROOT / 'main_supcon.py', *options.split()]
    with tempfile.TemporaryDirectory() as folder:
        before, steps = time.perf_counter(), []
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            steps += [time.perf_counter() for line in process.stdout if line.startswith('Train: ')]
        if process.returncode or not steps:
            sys.exit('main_supcon.py has failed')
        return steps[0] - before, time.perf_counter() - steps[-1]


def measure_program(args):
    first, end = (statistics.median(values) for values in zip(*(seconds_of_program() for _ in range(args.repeat))))
    print(f'main_supcon.py on digits: {first:.2f} s to its first step, {end:.2f} s from its last step to its end; '
          f'medians of {args.repeat}')
    print(f'ratio {5 / first if args.program == "first_step" else 1 / end:.2f}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=60000)
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--program', choices=('first_step', 'end'))
    args = parser.parse_args()
    if args.program:
        return measure_program(args)
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
