"""Convolutions of the ResNets that take another way on a CPU, to the same values."""
import torch
from torch import nn
from torch.nn import functional as F


class Conv2d(nn.Conv2d):
    """A convolution without bias: [bsz, in_planes, h, w] -> [bsz, planes, h / stride, w / stride].

    When a CPU trains, one of at most 2x2 pixels is a single matrix product of all pixels and channels of an image. It
    multiplies hardly more numbers there, and oneDNN's convolution reaches a tenth of its speed, above all for the
    gradient of the weights. From 4x4 to 2x2 pixels it multiplies 2.6 times as many, and pays in bfloat16 alone, with
    64 views or more (benchmarks/README.md). The matrix, 2 to 7 times the weights, is kept for the backward pass.
    Values differ in rounding alone.
    """

    def __init__(self, in_planes, planes, size, stride=1):
        super().__init__(in_planes, planes, size, stride, padding=size // 2, bias=False)

    def forward(self, x):
        if not self.training or not x.is_cpu:           # first, since torch.export may not look at the batch size
            return super().forward(x)
        (h, w), stride = x.shape[2:], self.stride[0]
        strided_bfloat16 = stride > 1 and x.dtype == torch.bfloat16
        # With AMX, PyTorch 2.14's gradient of the weights of a convolution to one pixel is garbage in bfloat16.
        small = max(h, w) <= 2 and (len(x) >= 8 or strided_bfloat16)
        halved = max(h, w) <= 2 * stride and len(x) >= 64 and strided_bfloat16
        if not (small or halved):
            return super().forward(x)
        pixels = torch.eye(h * w, dtype=x.dtype).view(-1, 1, h, w)                      # an image of each single pixel
        taps = F.unfold(pixels, self.kernel_size, padding=self.padding, stride=stride)  # [pixel, tap, pixel of result]
        matrix = torch.einsum('pto,dct->odpc', taps, self.weight.flatten(2))
        out = F.linear(x.permute(0, 2, 3, 1).flatten(1), matrix.flatten(2).flatten(0, 1))
        return out.view(-1, -(-h // stride), -(-w // stride), self.out_channels).permute(0, 3, 1, 2)


class ThinShortcut(nn.Conv2d):
    """A 1x1 convolution that takes every stride-th pixel before it multiplies: the same values as Conv2d.

    On CPUs without AVX-512, PyTorch 2.15 writes beyond its memory when it computes the gradient of the weights of a
    strided 1x1 convolution with fewer than 8 channels in channels_last (oneDNN), as in a ResNet of width 1/16.
    """

    def forward(self, x):
        return F.conv2d(x[..., ::self.stride[0], ::self.stride[1]], self.weight)
