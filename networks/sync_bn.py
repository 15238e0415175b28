"""Batch norm over the batches of all processes (--syncBN)."""
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from util.distributed import all_reduce_sum, world_size


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of [bsz, channels, ...] with the statistics of all processes, whose part may be empty.

    torch.nn.SyncBatchNorm works on GPUs only, and waits for them three times in each layer to leave out empty parts.
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return self.after(super().forward(x))
        x, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_((var * count / (count - 1).clamp(min=1)).to(self.running_var), self.momentum)
        return self.after(x)


class _Normalize(torch.autograd.Function):
    """x normalized over all processes; mean, variance [channels] and number [] of what was normalized."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        channels = x.shape[1]
        mean = var = x.new_zeros(channels, dtype=torch.promote_types(x.dtype, torch.float32))
        if x.numel():
            mean, var = torch.batch_norm_update_stats(x, mean, var, 0.)     # their dtype is that of the result
        mine = torch.cat([mean, var, mean.new_full((1,), x.numel() // channels)])
        parts = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(parts, mine)
        means, variances, counts = torch.stack(parts).split([channels, channels, 1], 1)     # [processes, ...]
        count = counts.sum()
        weights = counts / count
        mean = (weights * means).sum(0)
        var = (weights * (variances + (means - mean).square())).sum(0)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        """With y = w n + b and n = (x - mean) / std: w / std * (grad - mean(grad) - n mean(n grad))."""
        x, weight, mean, var, count = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        if x.numel():                                   # w / std * grad, sum(n grad), sum(grad)
            grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, scale, mean, var, None, None, False, ctx.eps, [True] * 3)
        else:
            grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
        sums = torch.cat([grad_weight, grad_bias]).to(mean.dtype)
        dist.all_reduce(sums)
        of_n, constant = (-scale * (var + ctx.eps).rsqrt() * sums.view(2, -1) / count)
        grad_x = grad_x + F.batch_norm(x, mean, var, of_n, constant, eps=ctx.eps)
        return grad_x, *((None, None) if weight is None else (grad_weight, grad_bias)), None


def synchronized(network):
    """The network with its batch norms over all processes, parameters and their names as before."""
    for name, child in network.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            norm = SyncBatchNorm(child.num_features, child.eps, child.momentum)
            for values in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'):
                setattr(norm, values, getattr(child, values))           # frozen or not, as they are
            # timm's own kind of batch norm has these two, without parameters.
            norm.after = nn.Sequential(*(getattr(child, part) for part in ('drop', 'act') if hasattr(child, part)))
            setattr(network, name, norm)
        else:
            synchronized(child)
    return network


@torch.no_grad()
def average_statistics(network):
    """Give all processes the mean of their running statistics, of batch norms that are being trained."""
    if world_size() == 1:
        return
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
             and module.training and module.running_mean is not None]
    buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    if buffers:
        means = all_reduce_sum(torch.cat(buffers)) / world_size()
        for buffer, values in zip(buffers, means.split([len(buffer) for buffer in buffers])):
            buffer.copy_(values)
