"""What a compiled log-sum-exp would gain on a GPU: blocks of rows as in losses.py, eager and under torch.compile.

    python benchmarks/bench_blocks.py

`rows`: the gradient of anchors and of contrasts, two products. `symmetric`: of both in one product, since the matrix is
symmetric: sum_j (g_i exp(s_ij - L_i) + g_j exp(s_ij - L_j)) z_j / temperature. Beside them SupConLoss, its log-sum-exp
alone, the dense reference under torch.compile, and the three plain products that a dense loss needs. Forward and
backward, means of ten; error: of the gradient, against losses.py. An experiment: losses.py does not use it.
"""
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from losses import BLOCK_CUDA, SupConLoss, _LogSumExp, reference_loss  # noqa: E402

TEMPERATURE = 0.1


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


def report(name, run, note=''):
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        run()
    end.record()
    torch.cuda.synchronize()
    added = (torch.cuda.max_memory_allocated() - before) / 2**20
    print(f'{name:26} {start.elapsed_time(end) / 10:8.2f} ms {added:6.0f} MB  {note}', flush=True)


def measure(n):
    print(f'{n} views, 128 dimensions, 10 classes, on {torch.cuda.get_device_name()}')
    torch.manual_seed(0)
    z = F.normalize(torch.randn(n, 128, device='cuda'), dim=1).requires_grad_()
    labels = torch.randint(10, (n // 2,), device='cuda')
    index = torch.arange(n, device='cuda')
    criterion = SupConLoss(temperature=TEMPERATURE)

    def gradient(loss):
        z.grad = None
        loss().backward()
        return z.grad

    report('SupConLoss', lambda: gradient(lambda: criterion(z.view(2, n // 2, 128).transpose(0, 1), labels)))

    def ours():
        return gradient(lambda: _LogSumExp.apply(z, z, TEMPERATURE, index, None, None).mean())
    report('its log-sum-exp', ours)
    expected = ours().clone()
    functions = log_sum_exp, row_gradient, symmetric_gradient
    for kind, used in (('eager', functions), ('compiled', [torch.compile(f, dynamic=False) for f in functions])):
        for symmetric in (False, True):
            def blocked(used=used, symmetric=symmetric):
                return gradient(lambda: Blocked.apply(z, used, symmetric).mean())
            began = time.time()
            error = ((blocked() - expected).norm() / expected.norm()).item()
            report(f"{'symmetric' if symmetric else 'rows'}, {kind}", blocked,
                   f'error {error:.0e}, first {time.time() - began:.1f} s')
    if n <= 16384:
        of_views, not_self = torch.cat([labels, labels]), ~torch.eye(n, dtype=torch.bool, device='cuda')
        positives = (of_views[:, None] == of_views) & not_self
        dense = torch.compile(lambda z: reference_loss(z, z, positives, not_self, TEMPERATURE).mean())
        report('dense, compiled', lambda: gradient(lambda: dense(z)))

        def products():
            x = z.detach()
            similarity = x @ x.T
            return similarity @ x, similarity.T @ x
        report('three products', products)


def main():
    if not torch.cuda.is_available():
        sys.exit('bench_blocks.py: no GPU is found')
    for n in (2048, 16384, 65536):
        measure(n)


if __name__ == '__main__':
    main()
