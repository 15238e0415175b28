"""Time of an epoch's reading on an MVIP-like tree: DataLoader workers against the batched loader, both with this
project's views, no training.

    python benchmarks/bench_mvip.py [--images 200] [--size 224] [--workers 2]

The tree has 1280x720 PNG files with masks, made in a temporary folder. The first epoch of the batched loader includes
decoding everything; later epochs open no file. Three views separate reading from augmenting: evaluation only reads, the
others compute one and two augmented views of each image. The last line is the ratio of the second epochs of evaluation.
"""
import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import classification_view, evaluation_view, load_images, make_loader, pretraining_view  # noqa: E402
from util import arguments  # noqa: E402


def make_tree(root, images):
    """Four classes; each image is a textured scene (its PNG takes about 1 MB) with an object of its own size."""
    rng = np.random.default_rng(0)
    for i in range(images + 4):
        part = 'train_data/0/up' if i < images else 'valid_data/0'
        folder = root / f'part {i % 4}' / part / 'camera'
        folder.mkdir(parents=True, exist_ok=True)
        (root / f'part {i % 4}' / 'meta.json').write_text(json.dumps({'super_class': ['CarComponent']}))
        coarse = Image.fromarray(rng.integers(0, 256, (45, 80, 3), dtype=np.uint8)).resize((1280, 720))
        scene = np.asarray(coarse, dtype=np.int16) + rng.integers(-6, 7, (720, 1280, 3))
        Image.fromarray(scene.clip(0, 255).astype(np.uint8)).save(folder / f'{i}_rgb.png')
        mask = Image.new('L', (1280, 720))
        radius = int(rng.integers(100, 300))
        center_x, center_y = rng.integers(320, 960), rng.integers(300, 420)
        ImageDraw.Draw(mask).ellipse((center_x - radius, center_y - radius, center_x + radius, center_y + radius), 255)
        mask.save(folder / f'{i}_rgb_mask_gen.png')


def epochs(data, view, n_views, opt, count=3):
    """Seconds of each epoch; the first includes making the loader."""
    seconds, start = [], time.perf_counter()
    loader = make_loader(data.train, view, opt, n_views)
    for epoch in range(1, count + 1):
        loader.set_epoch(epoch)
        for images, _ in loader:
            images.sum().item()
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=200)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--workers', type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_tree(Path(folder), args.images)
        print(f'{args.images} images of 1280x720, views of {args.size} pixels, {args.workers} workers; seconds')
        print(f'{"view":16}{"loader":12}{"epoch 1":>9}{"epoch 2":>9}{"epoch 3":>9}{"ratio of epochs 2":>20}')
        ratios = {}
        for name, make_view, n_views in (('evaluation', evaluation_view, 1), ('classification', classification_view, 1),
                                         ('pretraining', pretraining_view, 2)):
            second = {}
            for kind in ('per_sample', 'batched'):
                opt = arguments.defaults(dataset='mvip', data_folder=folder, batch_size=16, loader=kind, size=args.size,
                                    num_workers=args.workers, device='cpu')
                with contextlib.redirect_stdout(io.StringIO()):
                    data = load_images(opt)
                seconds = epochs(data, make_view(opt), n_views, opt)
                second[kind] = seconds[1]
                ratios[name] = second['per_sample'] / second[kind]
                print(f'{name:16}{kind:12}' + ''.join(f'{value:9.2f}' for value in seconds)
                      + (f'{ratios[name]:20.1f}' if kind == 'batched' else ''))
        print(f'ratio {ratios["evaluation"]:.1f}')


if __name__ == '__main__':
    main()
