"""Seconds of an epoch of linear evaluation: images through the frozen encoder, against features computed once.

    python benchmarks/bench_linear.py [--images 2048] [--model resnet18] [--batch_size 256] [--repeat 3]

`images` is main_linear.py as usual, `amp` the same with --amp, `features` with --cache_features: another protocol,
without augmentation. An epoch is training and validation; the first of `features` computes these. Medians.
The last line is the ratio of images to features.
"""
import argparse
import contextlib
import io
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_views import photographs  # noqa: E402

import main_ce  # noqa: E402
import main_linear  # noqa: E402
from datasets import classification_view, evaluation_view, make_loader  # noqa: E402
from networks.resnet_big import LinearProbe, make_encoder  # noqa: E402
from util import arguments, runs, training  # noqa: E402


def measure(form, images, args):
    """Seconds of the first epoch, and of the others."""
    opt = arguments.parse('main_linear', '', ['--model', args.model, '--batch_size', str(args.batch_size), '--loader',
                                         'batched', '--size', '32'])
    opt.amp, opt.cache_features, opt.warm_epochs, opt.num_classes = form == 'amp', form == 'features', 0, 2
    opt.mean, opt.std, opt.output_name = (0.5,) * 3, (0.25,) * 3, 'benchmark'
    training.set_device(opt)
    cached = opt.cache_features
    val = images.select(np.arange(len(images) // 5))
    train_loader = make_loader(images, evaluation_view(opt) if cached else classification_view(opt), opt,
                               train=not cached)
    loaders = {'val': make_loader(val, evaluation_view(opt), opt, train=False)}
    model = LinearProbe(make_encoder(args.model), 2)
    network, run = training.Network(model, opt), runs.Run(opt)
    criterion = torch.nn.CrossEntropyLoss(reduction='none')
    optimizer, scaler = training.set_optimizer(opt, model), training.set_scaler(opt)
    run.restore(model, optimizer, scaler)
    seconds = []
    if cached:
        train_loader, loaders = main_linear.cached_features(train_loader, loaders, model, opt)
    for epoch in range(1, args.repeat + 2):
        start = time.perf_counter()
        main_ce.train(train_loader, network, criterion, optimizer, scaler, epoch, run, opt)
        main_ce.validate(loaders, model, opt)
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=2048)
    parser.add_argument('--model', default='resnet18')
    parser.add_argument('--batch_size', type=int, default=256)
    parser.add_argument('--repeat', type=int, default=3)
    args = parser.parse_args()
    images, results = photographs(args.images, 32), {}
    for form in ('images', 'amp', 'features'):
        with contextlib.redirect_stdout(io.StringIO()):
            results[form] = measure(form, images, args)
    print(f'{args.images} images of 32 pixels, {args.model}; medians of {args.repeat}')
    print(f'{"form":12}{"first, s":>10}{"others, s":>10}{"ratio":>8}')
    for form, (first, seconds) in results.items():
        print(f'{form:12}{first:10.2f}{seconds:10.3f}{results["images"][1] / seconds:8.1f}')
    print(f'ratio {results["images"][1] / results["features"][1]:.1f}')


if __name__ == '__main__':
    main()
