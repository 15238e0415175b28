"""Time and peak memory of SupConLoss against the textbook dense form, forward and backward.

    python benchmarks/bench_loss.py [--views 16384] [--dim 128] [--classes 10] [--repeat 3]

Every measurement is a process of its own, so that peak memory is what the loss alone adds to an idle process that
holds the features; the two forms take turns and medians are shown. The last line is the ratio of the memories.
"""
import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def dense_supcon(features, labels, temperature=0.07):
    """The formula as the textbook writes it: features [bsz, n_views, dim], N x N matrices throughout."""
    import torch
    z = torch.cat(features.unbind(1))
    labels = labels.repeat(features.shape[1])
    not_self = 1 - torch.eye(len(z))
    mask = (labels[:, None] == labels).float() * not_self
    logits = z @ z.T / temperature
    logits = logits - logits.max(1, keepdim=True).values.detach()
    log_prob = logits - (logits.exp() * not_self).sum(1, keepdim=True).log()
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


def measure(form, views, dim, classes):
    """Print seconds, added peak memory in MB and the loss of one forward and backward pass."""
    import torch

    from losses import SupConLoss
    criterion = {'linear': SupConLoss(), 'dense': dense_supcon}[form]

    def step(views):
        generator = torch.Generator().manual_seed(0)
        features = torch.nn.functional.normalize(torch.randn(views // 2, 2, dim, generator=generator), dim=2)
        features.requires_grad_()
        labels = torch.randint(classes, (views // 2,), generator=generator)
        start_memory, start = peak_memory(), time.perf_counter()
        loss = criterion(features, labels)
        loss.backward()
        return time.perf_counter() - start, peak_memory() - start_memory, loss.item()

    step(64)                                # threads and libraries start here, not in the measurement
    print(*step(views))


def peak_memory():
    """Largest resident memory of this process so far, in MB (ru_maxrss is in KB on Linux, in bytes on macOS)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == 'linux' else 2**20)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--views', type=int, default=16384)
    parser.add_argument('--dim', type=int, default=128)
    parser.add_argument('--classes', type=int, default=10)
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--form', choices=('linear', 'dense'), help='measure this form once, in this process')
    args = parser.parse_args()
    if args.form:
        return measure(args.form, args.views, args.dim, args.classes)

    results = {'linear': [], 'dense': []}
    for _ in range(args.repeat):
        for form, rows in results.items():
            command = [sys.executable, __file__, '--form', form, '--views', str(args.views), '--dim', str(args.dim),
                       '--classes', str(args.classes)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append([float(value) for value in output.split()])
    print(f'{args.views} views, {args.dim} dimensions, {args.classes} classes, forward and backward, '
          f'median of {args.repeat}')
    print(f'{"form":8}{"seconds":>10}{"peak MB":>10}{"loss":>14}')
    medians = {form: [statistics.median(column) for column in zip(*rows)] for form, rows in results.items()}
    for form, (seconds, memory, loss) in medians.items():
        print(f'{form:8}{seconds:10.2f}{memory:10.0f}{loss:14.7f}')
    time_ratio, memory_ratio = (medians['dense'][i] / medians['linear'][i] for i in (0, 1))
    print(f'time: dense / linear {time_ratio:.2f}; memory: dense / linear below')
    print(f'ratio {memory_ratio:.1f}')


if __name__ == '__main__':
    main()
