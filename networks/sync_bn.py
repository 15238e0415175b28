"""Batch norm over the batches of all processes (--syncBN)."""
import torch
from torch import nn

from util.distributed import all_reduce_sum, world_size
from util.errors import UserError


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of [bsz, channels, ...] with the statistics of all processes; a part may be empty.

    What torch.nn.SyncBatchNorm is on GPUs, for the CPU, where that does not work.
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        values = x if x.dtype == torch.float64 else x.float()
        count = values.new_tensor([values.numel() // values.shape[1]])
        sums, count = all_reduce_sum(torch.cat([values.sum(dims), count])).split([values.shape[1], 1])
        mean = sums / count
        centered = values - mean.view(shape)
        var = all_reduce_sum(centered.square().sum(dims)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_((var * count / (count - 1).clamp(min=1)).to(self.running_var), self.momentum)
        scale = self.weight / (var + self.eps).sqrt()
        return torch.addcmul(self.bias.view(shape), centered, scale.view(shape)).to(x.dtype)


def synchronized(network, cuda):
    """The network with its batch norms over all processes, parameters and their names as before."""
    if cuda:
        from timm.layers import convert_sync_batchnorm  # knows timm's own kinds of batch norm too
        network = convert_sync_batchnorm(network)
        for module in network.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.register_forward_pre_hook(_float_if_empty)
        return network
    for name, child in network.named_children():
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            norm = SyncBatchNorm(child.num_features, child.eps, child.momentum)
            for values in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'):
                setattr(norm, values, getattr(child, values))           # frozen or not, as they are
            setattr(network, name, norm)
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise UserError(f'--syncBN: {type(child).__name__} works over processes on GPUs only, expected a ResNet, '
                            'or no --syncBN')
        else:
            synchronized(child, cuda)
    return network


def _float_if_empty(module, inputs):
    """Under autocast PyTorch's sends the zeros of an empty part as half precision, the others send float32."""
    return tuple(x if len(x) else x.float() for x in inputs)


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
