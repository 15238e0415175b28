"""SupConLoss by the side of its blocks: rows of the similarities, or half of the symmetric matrix (unit_length=True).

    python benchmarks/bench_blocks.py [--views 2048 16384 65536] [--sides 1024 2048 4096 8192]

Beside them the reference implementation under torch.compile, and the three plain products that a loss with the whole
matrix needs. Milliseconds and added memory (on a GPU) of forward and backward pass, means of ten; the error of the
gradient, against rows. On a GPU rows are used where one block would hold all views. The ratio is compiled reference /
symmetric with the side of losses.py, of the last number of views that is at most 16,384.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import losses  # noqa: E402
from losses import SupConLoss, reference_loss  # noqa: E402

TEMPERATURE = 0.1
DENSE = 16384           # as many views at most, with n x n matrices


def report(name, run, device, note=''):
    """Print and return milliseconds of a run, and print the memory that it adds on a GPU."""
    on_gpu = device.type == 'cuda'
    for _ in range(3):
        run()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for _ in range(10):
        run()
    if on_gpu:
        torch.cuda.synchronize()
    milliseconds = 100 * (time.perf_counter() - start)
    added = (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else float('nan')
    print(f'{name:26} {milliseconds:8.2f} ms {added:6.0f} MB  {note}', flush=True)
    return milliseconds


def measure(n, sides, device, backend):
    """-> compiled reference / symmetric; None where the reference would be too large."""
    name = torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'
    print(f'{n} views, 128 dimensions, 10 classes, on {name}')
    torch.manual_seed(0)
    features = F.normalize(torch.randn(n // 2, 2, 128, device=device), dim=2).requires_grad_()
    labels = torch.randint(10, (n // 2,), device=device)

    def gradient(criterion):
        features.grad = None
        criterion(features, labels).backward()
        return features.grad
    symmetric = SupConLoss(TEMPERATURE, unit_length=True)
    rows = SupConLoss(TEMPERATURE)                      # on a CPU the same
    expected = gradient(rows).clone()
    report('rows', lambda: gradient(rows), device)
    attribute = 'TILE_CUDA' if device.type == 'cuda' else 'TILE'
    side = getattr(losses, attribute)
    for other in [*sides, side]:
        setattr(losses, attribute, other)
        error = ((gradient(symmetric) - expected).norm() / expected.norm()).item()
        of_blocks = report(f'symmetric, {other}', lambda: gradient(symmetric), device, f'error {error:.0e}')
    if n > DENSE:
        return None
    z = features.detach().transpose(0, 1).flatten(0, 1).requires_grad_()
    of_views, not_self = torch.cat([labels, labels]), ~torch.eye(n, dtype=torch.bool, device=device)
    positives = (of_views[:, None] == of_views) & not_self
    dense = torch.compile(lambda z: reference_loss(z, z, positives, not_self, TEMPERATURE).mean(), backend=backend)

    def of_reference():
        z.grad = None
        dense(z).backward()

    def products():
        x = z.detach()
        similarity = x @ x.T
        return similarity @ x, similarity.T @ x
    of_dense = report('reference, compiled', of_reference, device)
    report('three products', products, device)
    return of_dense / of_blocks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--views', type=int, nargs='+', default=[2048, 16384, 65536])
    parser.add_argument('--sides', type=int, nargs='*', default=[1024, 2048, 4096, 8192])
    parser.add_argument('--backend', default='inductor', help='of torch.compile')
    args = parser.parse_args()
    if min(args.views) > DENSE:
        parser.error(f'--views {args.views}: expected one of at most {DENSE}, for the ratio')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    ratios = [measure(n, args.sides, device, args.backend) for n in args.views]
    print(f'ratio {[ratio for ratio in ratios if ratio][-1]:.2f}')


if __name__ == '__main__':
    main()
