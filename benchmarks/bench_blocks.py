"""What a compiled log-sum-exp would gain on a GPU: blocks of rows as in losses.py, eager and under torch.compile.

    python benchmarks/bench_blocks.py [--views 2048 16384 65536]

`rows`: the gradient of anchors and of contrasts, two products. `symmetric`: of both in one product, since the matrix is
symmetric: sum_j (g_i exp(s_ij - L_i) + g_j exp(s_ij - L_j)) z_j / temperature. Beside them SupConLoss, its log-sum-exp
alone, the dense reference under torch.compile, and the three plain products that a dense loss needs. Forward and
backward, means of ten; error: of the gradient, against losses.py. The ratio is dense / symmetric, both compiled, of the
last number of views that is at most 16,384. An experiment: losses.py does not use it.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from losses import BLOCK_CUDA, SupConLoss, _LogSumExp, reference_loss  # noqa: E402

TEMPERATURE = 0.1
DENSE = 16384           # as many views at most, with n x n matrices


def logits(anchors, contrasts, self_index):
    similarity = anchors @ contrasts.T
    columns = torch.arange(len(contrasts), device=anchors.device)
    return similarity.masked_fill(columns == self_index[:, None], -torch.inf)


def log_sum_exp(anchors, contrasts, self_index):
    return logits(anchors, contrasts, self_index).logsumexp(1)


def row_gradient(anchors, contrasts, self_index, result, grad):
    return (logits(anchors, contrasts, self_index) - result[:, None]).exp() * grad[:, None]


def symmetric_gradient(anchors, contrasts, self_index, result, grad, all_results, all_grads):
    s = logits(anchors, contrasts, self_index)
    return (s - result[:, None]).exp() * grad[:, None] + (s - all_results).exp() * all_grads


class Blocked(torch.autograd.Function):
    """The log-sum-exp of each row of z [n, dim]: [n]; `functions` are the three above, compiled or not."""

    @staticmethod
    def forward(ctx, z, functions, symmetric):
        ctx.functions, ctx.symmetric = functions, symmetric
        index = torch.arange(len(z), device=z.device)
        scaled = z / TEMPERATURE
        result = torch.cat([functions[0](scaled[rows], z, index[rows]) for rows in Blocked.slices(z)])
        ctx.save_for_backward(z, index, result)
        return result

    @staticmethod
    def backward(ctx, grad):
        z, index, result = ctx.saved_tensors
        scaled, grad = z / TEMPERATURE, grad / TEMPERATURE
        grad_z = torch.zeros_like(z)
        for rows in Blocked.slices(z):
            if ctx.symmetric:
                block = ctx.functions[2](scaled[rows], z, index[rows], result[rows], grad[rows], result, grad)
            else:
                block = ctx.functions[1](scaled[rows], z, index[rows], result[rows], grad[rows])
                grad_z.addmm_(block.T, z[rows])
            grad_z[rows].add_(block @ z)
        return grad_z, None, None

    @staticmethod
    def slices(z):
        step = max(1, BLOCK_CUDA // len(z))
        return [slice(i, i + step) for i in range(0, len(z), step)]


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


def measure(n, device, backend):
    """-> dense / symmetric, both compiled; None where the dense form would be too large."""
    name = torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'
    print(f'{n} views, 128 dimensions, 10 classes, on {name}')
    torch.manual_seed(0)
    z = F.normalize(torch.randn(n, 128, device=device), dim=1).requires_grad_()
    labels = torch.randint(10, (n // 2,), device=device)
    index = torch.arange(n, device=device)
    criterion = SupConLoss(temperature=TEMPERATURE)

    def gradient(loss):
        z.grad = None
        loss().backward()
        return z.grad

    report('SupConLoss', lambda: gradient(lambda: criterion(z.view(2, n // 2, 128).transpose(0, 1), labels)), device)

    def ours():
        return gradient(lambda: _LogSumExp.apply(z, z, TEMPERATURE, index, None, None).mean())
    report('its log-sum-exp', ours, device)
    expected = ours().clone()
    functions = log_sum_exp, row_gradient, symmetric_gradient
    compiled = [torch.compile(function, dynamic=False, backend=backend) for function in functions]
    for kind, used in (('eager', functions), ('compiled', compiled)):
        for symmetric in (False, True):
            def blocked(used=used, symmetric=symmetric):
                return gradient(lambda: Blocked.apply(z, used, symmetric).mean())
            began = time.time()
            error = ((blocked() - expected).norm() / expected.norm()).item()
            of_blocks = report(f"{'symmetric' if symmetric else 'rows'}, {kind}", blocked, device,
                               f'error {error:.0e}, first {time.time() - began:.1f} s')
    if n <= DENSE:
        of_views, not_self = torch.cat([labels, labels]), ~torch.eye(n, dtype=torch.bool, device=device)
        positives = (of_views[:, None] == of_views) & not_self
        dense = torch.compile(lambda z: reference_loss(z, z, positives, not_self, TEMPERATURE).mean(),
                              backend=backend)
        of_dense = report('dense, compiled', lambda: gradient(lambda: dense(z)), device)

        def products():
            x = z.detach()
            similarity = x @ x.T
            return similarity @ x, similarity.T @ x
        report('three products', products, device)
        return of_dense / of_blocks                     # the last blocks are symmetric and compiled


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--views', type=int, nargs='+', default=[2048, 16384, 65536])
    parser.add_argument('--backend', default='inductor', help='of torch.compile')
    args = parser.parse_args()
    if min(args.views) > DENSE:
        parser.error(f'--views {args.views}: expected one of at most {DENSE}, for the ratio')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    ratios = [measure(n, device, args.backend) for n in args.views]
    print(f'ratio {[ratio for ratio in ratios if ratio][-1]:.2f}')


if __name__ == '__main__':
    main()
