"""Ten training steps of SupCon under PyTorch's profiler: what a GPU is given, and how much of the time it is busy.

    python benchmarks/bench_profile.py [--model resnet50] [--batch_size 1024] [--options="--amp --compile"]

Prints the time of a step, the kernels (on a CPU operators) in it, and those that take most of it. The last line is the
fraction of the time that kernels run (on a CPU operators).
"""
import argparse
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet50')
    parser.add_argument('--batch_size', type=int, default=1024)
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--options', default='--amp', help='of main_supcon.py')
    args = parser.parse_args()
    import torch
    from bench_views import photographs
    from torch.profiler import ProfilerActivity, profile

    import main_supcon
    from datasets import make_loader, pretraining_view
    from methods import SupCon
    from util import training
    from util.runs import Run

    image_set = photographs(min(args.batch_size, 2000), 32)
    image_set = image_set.select([i % len(image_set) for i in range(args.batch_size * args.steps)])
    opt = main_supcon.parse_option(['--model', args.model, '--batch_size', str(args.batch_size), '--loader', 'batched',
                                    *shlex.split(args.options)])
    opt.size, opt.mean, opt.std, opt.num_classes = 32, (0.5,) * 3, (0.25,) * 3, len(image_set.classes)
    training.set_device(opt)
    training.set_warmup(opt)
    gpu = opt.device == 'cuda'
    loader = make_loader(image_set, pretraining_view(opt), opt, 2)
    model, method = main_supcon.set_model(opt), SupCon(opt)
    network, optimizer = training.Network(model, opt), training.set_optimizer(opt, model)
    scaler = training.set_scaler(opt)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)                                # no run of this name is in the way
        run = Run(opt)
        run.restore(model, optimizer, scaler)
        main_supcon.train(loader, network, method, optimizer, scaler, 1, run)               # warms up, and compiles
        with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiled:
            start = time.perf_counter()
            main_supcon.train(loader, network, method, optimizer, scaler, 2, run)
            if gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        os.chdir(ROOT)
    time_of = 'self_device_time_total' if gpu else 'self_cpu_time_total'                    # microseconds
    rows = sorted(profiled.key_averages(), key=lambda row: -getattr(row, time_of))
    busy = sum(getattr(row, time_of) for row in rows) / 1e6
    print(f'{args.model}, batches of {args.batch_size}, {args.options}: {1000 * seconds / args.steps:.1f} ms a step, '
          f'{sum(row.count for row in rows) / args.steps:.0f} {"kernels" if gpu else "operators"}')
    for row in rows[:10]:
        print(f'{getattr(row, time_of) / 1e4 / seconds:5.1f} % {row.count / args.steps:7.1f} a step  {row.key:.90}')
    print(f'ratio {busy / seconds:.2f}')


if __name__ == '__main__':
    main()
