"""Views per second of a SupCon training step: this project's, against the original's way of training the same network.

    python benchmarks/bench_step.py [--model resnet18] [--width 1] [--batch_size 64] [--size 32] [--steps 5]

One step is two views of each image through network, loss, backward pass and optimizer. Each form is a process of its
own, since memory, threads and compilers are a process's; they take turns, and medians are shown. `original` is float32,
channels first, in a process as PyTorch starts it; `float32`, `amp` and `compile` are main_supcon.py without options,
with --amp, and with --amp --compile; `original, memory` shows how much is due to keeping freed memory alone, and `amp,
conv2d` what --amp does with PyTorch's convolutions of small maps. The last line is the ratio of amp to original.
"""
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FORMS = ('original', 'original, memory', 'float32', 'amp, conv2d', 'amp', 'compile')


def step_of(form, args):
    """A function that trains one step, from random images on the device."""
    import torch

    from losses import SupConLoss
    from networks.cpu_conv import Conv2d
    from networks.resnet_big import SupConResNet
    from util import arguments, memory, training

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    opt = arguments.defaults(device=device, amp=form.startswith(('amp', 'compile')), compile=form == 'compile',
                             learning_rate=0.1)
    if form.startswith('original') or form.endswith('conv2d'):
        Conv2d.forward = torch.nn.Conv2d.forward
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    images = torch.randn(2 * args.batch_size, 3, args.size, args.size, device=device)
    labels = torch.randint(10, (args.batch_size,), device=device)
    model, criterion = SupConResNet(args.model, width=args.width).to(device).train(), SupConLoss(temperature=0.1)
    if form != 'original' and device == 'cpu':
        memory.keep_freed_memory()
    if form.startswith('original'):
        optimizer = torch.optim.SGD(model.parameters(), opt.learning_rate, momentum=0.9, weight_decay=1e-4)
    else:
        network = training.Network(model, opt)
        optimizer, scaler = training.set_optimizer(opt, model), training.set_scaler(opt)

    def step():
        if form.startswith('original'):
            features = torch.stack(model(images).chunk(2), 1)
            loss = criterion(features, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            features = network(images, 2)
            training.update(criterion(torch.stack(features.chunk(2), 1), labels), optimizer, scaler)
    return step


def measure(form, args):
    """Print the views per second of the median step, after two that warm up."""
    import torch
    step, seconds = step_of(form, args), []
    for _ in range(args.steps + 2):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    print(2 * args.batch_size / statistics.median(seconds[2:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet18')
    parser.add_argument('--width', type=float, default=1., help='of the network: multiplies its channels')
    parser.add_argument('--batch_size', type=int, default=64)
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--steps', type=int, default=5)
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--forms', nargs='+', choices=FORMS, default=FORMS, help='original and amp among them')
    parser.add_argument('--form', choices=FORMS, help='measure this form once, in this process')
    args = parser.parse_args()
    if args.form:
        return measure(args.form, args)
    speeds = {form: [] for form in args.forms}
    for _ in range(args.repeat):
        for form, values in speeds.items():
            output = subprocess.run([sys.executable, __file__, *sys.argv[1:], '--form', form], check=True,
                                    stdout=subprocess.PIPE, text=True).stdout
            values.append(float(output.split()[-1]))
    medians = {form: statistics.median(values) for form, values in speeds.items()}
    print(f'{args.model} of width {args.width:g}, batches of {args.batch_size} images with two views of {args.size} '
          f'pixels; medians of {args.repeat}')
    print(f'{"form":18}{"views/s":>10}{"ratio":>8}')
    for form, speed in medians.items():
        print(f'{form:18}{speed:10.1f}{speed / medians["original"]:8.2f}')
    print(f'ratio {medians["amp"] / medians["original"]:.2f}')


if __name__ == '__main__':
    main()
