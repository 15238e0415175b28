"""Seconds of an epoch of SupCon: this project's way against the original's, and how much of it are the views.

    python benchmarks/bench_epoch.py [--model resnet18] [--images 50000] [--batch_size 1024] [--num_workers N]
                                     [--compile]

`ours` is main_supcon.py --amp, or --amp --compile, with its checkpoint after each epoch. `original` is the loop of
SupContrast written plainly: float32, channels first, torchvision's transforms in worker processes, the loss with
N x N matrices, cudnn.benchmark, and the loss read in each step. Each is a process of its own on one GPU; medians of
the epochs after the first. `views` is the time of all views without training. On a GPU also the largest memory, and the
fraction of the chip's bfloat16 peak that an epoch reaches. On a CPU the defaults are smaller. The last line is the
ratio of original to ours.
"""
import argparse
import collections
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FORMS = ('ours', 'original')
PEAK = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12}        # dense bfloat16 operations per second, NVIDIA's figures


def seconds_of(function, *arguments):
    """How long a call takes, with the work that it leaves on a GPU."""
    import torch
    start = time.perf_counter()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_original(image_set, opt, args):
    """Seconds of the epochs, and of sampling their views."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    from datasets import pretraining_view, views
    from losses import reference_loss
    from networks.resnet_big import SupConResNet

    class TwoViews(Dataset):
        transform = views.per_sample(pretraining_view(opt))             # torchvision's

        def __len__(self):
            return len(image_set)

        def __getitem__(self, index):
            image = image_set.load(index)
            return [self.transform(image), self.transform(image)], image_set.labels[index]

    def epoch():
        model.train()
        for images, labels in loader:
            images, labels = torch.cat(images).to(device, non_blocking=True), labels.to(device, non_blocking=True)
            z, labels = model(images), labels.repeat(2)
            not_self = ~torch.eye(len(z), dtype=torch.bool, device=device)
            positives = (labels[:, None] == labels) & not_self
            loss = 0.1 / 0.07 * reference_loss(z, z, positives, not_self, temperature=0.1).mean()
            loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.backends.cudnn.benchmark = True
    loader = DataLoader(TwoViews(), args.batch_size, shuffle=True, num_workers=args.num_workers,
                        pin_memory=device == 'cuda')
    model = SupConResNet(args.model).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    times = [(seconds_of(epoch), seconds_of(collections.deque, loader, 0)) for _ in range(args.epochs + 1)]
    return zip(*times)


def measure_ours(image_set, opt, args):
    """Seconds of the epochs, and of sampling their views."""
    import main_supcon
    from datasets import make_loader, pretraining_view
    from methods import SupCon
    from util import training
    from util.runs import Run

    training.set_device(opt)
    training.set_warmup(opt)
    opt.num_classes = len(image_set.classes)
    loader = make_loader(image_set, pretraining_view(opt), opt, 2)
    model, method, run = main_supcon.set_model(opt), SupCon(opt), Run(opt)
    network, optimizer = training.Network(model, opt), training.set_optimizer(opt, model)
    scaler = training.set_scaler(opt)
    run.restore(model, optimizer, scaler)

    def epoch(number):
        run.finish_epoch(number, main_supcon.train(loader, network, method, optimizer, scaler, number, run))

    times = []
    with run.start(image_set.classes):
        for number in range(1, args.epochs + 2):
            times.append((seconds_of(epoch, number), seconds_of(collections.deque, loader, 0)))
    return zip(*times)


def measure(form, args):
    """Seconds of an epoch and of sampling its views, operations, GPU memory in bytes and the GPU's name."""
    import torch
    from bench_views import photographs
    from torch.utils.flop_counter import FlopCounterMode

    import main_supcon
    from networks.resnet_big import SupConResNet

    opt = main_supcon.parse_option(['--model', args.model, '--batch_size', str(args.batch_size), '--temp', '0.1',
                                    '--loader', 'batched', '--epochs', str(args.epochs + 1), '--amp']
                                   + ['--compile'] * args.compile)
    opt.size, opt.mean, opt.std = 32, (0.5,) * 3, (0.25,) * 3
    image_set = photographs(min(args.images, 2000), 32)
    image_set = image_set.select([i % len(image_set) for i in range(args.images)])
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        SupConResNet(args.model)(torch.zeros(8, 3, 32, 32)).sum().backward()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)                                # for the checkpoints
        seconds, views = (measure_original if form == 'original' else measure_ours)(image_set, opt, args)
        os.chdir(ROOT)
    gpu = torch.cuda.is_available()
    return {'seconds': statistics.median(seconds[1:]), 'views': statistics.median(views[1:]),
            'flops': counter.get_total_flops() / 8 * 2 * args.images,
            'memory': torch.cuda.max_memory_allocated() if gpu else 0,
            'name': torch.cuda.get_device_name() if gpu else 'CPU'}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet18')
    parser.add_argument('--images', type=int, help='default: 50000, on a CPU 512')
    parser.add_argument('--batch_size', type=int, help='default: 1024, on a CPU 128')
    parser.add_argument('--num_workers', type=int, default=os.cpu_count())
    parser.add_argument('--epochs', type=int, default=2, help='measured epochs')
    parser.add_argument('--compile', action='store_true', help='ours with --compile')
    parser.add_argument('--form', choices=FORMS, help='measure this form once, in this process')
    args = parser.parse_args()
    import torch
    gpu = torch.cuda.is_available()
    args.images = args.images or (50000 if gpu else 512)
    args.batch_size = args.batch_size or (1024 if gpu else 128)
    if args.form:
        with contextlib.redirect_stdout(io.StringIO()):
            result = measure(args.form, args)
        return print(json.dumps(result))
    results = {}
    for form in FORMS:
        one_gpu = {'CUDA_VISIBLE_DEVICES': os.environ.get('CUDA_VISIBLE_DEVICES', '0').split(',')[0]}
        output = subprocess.run([sys.executable, os.path.abspath(__file__), *sys.argv[1:], '--form', form], check=True,
                                stdout=subprocess.PIPE, text=True, env={**os.environ, **one_gpu}).stdout
        results[form] = json.loads(output.splitlines()[-1])
    ours, original = (results[form] for form in FORMS)
    print(f'{args.model}, {args.images} images, batches of {args.batch_size}, on {ours["name"]}; seconds per epoch')
    for form, result in results.items():
        print(f'{form:10}{result["seconds"]:8.2f}, its views alone {result["views"]:.3f} '
              f'({100 * result["views"] / result["seconds"]:.1f} %)')
    rate = ours['flops'] / ours['seconds']
    peak = next((value for name, value in PEAK.items() if name in ours['name']), None)
    print(f'{rate / 1e12:.2f} TFLOP/s' + (f', {100 * rate / peak:.1f} % of the bfloat16 peak' if peak else '')
          + (f'; memory {ours["memory"] / 2**30:.1f} GB, original {original["memory"] / 2**30:.1f} GB' if gpu else ''))
    print(f'ratio {original["seconds"] / ours["seconds"]:.2f}')


if __name__ == '__main__':
    main()
