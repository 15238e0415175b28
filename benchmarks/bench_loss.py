"""Time and peak memory of the losses against their dense reference implementation, forward and backward.

    python benchmarks/bench_loss.py [--views 16384] [--dim 128] [--classes 10] [--repeat 3]             SupConLoss
    python benchmarks/bench_loss.py --soft --classes 100                                                GenSupConLoss

Every measurement is a process of its own, so that peak memory is what the loss alone adds to an idle process that
holds the features; the forms take turns and medians are shown. `products` is what no loss can do without that makes the
whole matrix: three bare matrix products of its size, one forward and two backward. On a GPU where there is one. The
last line is the ratio of the times.
"""
import argparse
import math
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FORMS = ('linear', 'dense', 'products')


def dense(features, labels):
    """reference_loss of features [bsz, n_views, dim] with classes [bsz] or distributions [bsz, n_views, classes]."""
    import torch

    from losses import reference_loss
    z = torch.cat(features.unbind(1))
    not_self = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    if labels.dim() == 1:
        labels = labels.repeat(features.shape[1])
        weights = (labels[:, None] == labels) & not_self
    else:
        u = torch.nn.functional.normalize(torch.cat(labels.unbind(1)), dim=1)
        weights = u @ u.T * not_self
    return reference_loss(z, z, weights, not_self).mean()


def products(features):
    """Seconds of the three products, into memory that is there."""
    import torch
    z = torch.cat(features.detach().unbind(1))
    matrix = torch.ones(len(z), len(z), device=z.device)
    result = torch.ones_like(z)
    synchronize()
    start = time.perf_counter()
    torch.mm(z, z.T, out=matrix)
    torch.mm(matrix, z, out=result)
    torch.mm(matrix.T, z, out=result)
    synchronize()
    return time.perf_counter() - start


def synchronize():
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(form, views, dim, classes, soft):
    """Print seconds, added peak memory in MB and the loss of one forward and backward pass."""
    import torch

    from losses import GenSupConLoss, SupConLoss
    device = 'cuda' if torch.cuda.is_available() else 'cpu'

    def linear(features, labels):
        return GenSupConLoss()(features.unbind(1), labels.unbind(1)) if soft else SupConLoss()(features, labels)
    criterion = {'linear': linear, 'dense': dense, 'products': None}[form]

    def step(views):
        generator = torch.Generator().manual_seed(0)
        features = torch.nn.functional.normalize(torch.randn(views // 2, 2, dim, generator=generator), dim=2)
        features.requires_grad_()
        labels = torch.randint(classes, (views // 2,), generator=generator)
        if soft:                            # each view mixed with another image
            labels = torch.nn.functional.one_hot(torch.randint(classes, (2, views // 2, 2), generator=generator),
                                                 classes).float()
            labels = 0.7 * labels[0] + 0.3 * labels[1]
        features = features.detach().to(device).requires_grad_()
        labels = labels.to(device)
        if form == 'products':
            return products(features), math.nan, math.nan
        synchronize()
        reset_peak_memory()
        start_memory = peak_memory()
        start = time.perf_counter()
        loss = criterion(features, labels)
        loss.backward()
        synchronize()
        return time.perf_counter() - start, peak_memory() - start_memory, loss.item()

    step(64)                                # threads and libraries start here, not in the measurement
    if device == 'cuda':
        step(views)
    print(*step(views))


def reset_peak_memory():
    """Forget the largest memory so far: what the imports took for a moment."""
    import torch
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path('/proc/self/clear_refs').exists():
        Path('/proc/self/clear_refs').write_text('5')


def peak_memory():
    """Largest memory since then in MB, of the GPU or of this process (elsewhere than on Linux, since it started)."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if Path('/proc/self/status').exists():
        return int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20           # bytes on macOS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--views', type=int, default=16384)
    parser.add_argument('--dim', type=int, default=128)
    parser.add_argument('--classes', type=int, default=10)
    parser.add_argument('--soft', action='store_true', help='label distributions')
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--form', choices=FORMS, help='measure this form once, in this process')
    args = parser.parse_args()
    if args.form:
        return measure(args.form, args.views, args.dim, args.classes, args.soft)

    results = {form: [] for form in FORMS}
    for _ in range(args.repeat):
        for form, rows in results.items():
            command = [sys.executable, __file__, '--form', form, '--views', str(args.views), '--dim', str(args.dim),
                       '--classes', str(args.classes)] + ['--soft'] * args.soft
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append([float(value) for value in output.split()])
    kind = 'soft classes' if args.soft else 'classes'
    print(f'{args.views} views, {args.dim} dimensions, {args.classes} {kind}, forward and backward, '
          f'median of {args.repeat}')
    print(f'{"form":10}{"seconds":>10}{"peak MB":>10}{"loss":>14}')
    medians = {form: [statistics.median(column) for column in zip(*rows)] for form, rows in results.items()}
    for form, (seconds, memory, loss) in medians.items():
        print(f'{form:10}{seconds:10.4g}{memory:10.0f}{loss:14.7f}')
    print(f'memory: dense / linear {medians["dense"][1] / medians["linear"][1]:.1f}; '
          f'time: linear / products {medians["linear"][0] / medians["products"][0]:.2f}, dense / linear below')
    print(f'ratio {medians["dense"][0] / medians["linear"][0]:.1f}')


if __name__ == '__main__':
    main()
