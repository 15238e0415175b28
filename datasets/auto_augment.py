"""AutoAugment and RandAugment of a batch on any device, by tensor operations.

AutoAugment: Cubuk et al., 2019, https://arxiv.org/abs/1805.09501; RandAugment: Cubuk et al., 2020,
https://arxiv.org/abs/1909.13719. Policies, operations and magnitudes are those of transforms.AutoAugment and
transforms.RandAugment, and every operation gives the bytes that these give for a PIL image
(tests/test_auto_augment.py). Magnitudes are few, so what an operation does to positions or to single values is a table
that torchvision's own operation fills.
"""
import functools
import math

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as tv

from util.distributed import to_device

AUTO_BINS, RAND_BINS = 10, 31               # magnitudes of which a policy names one, as torchvision
# Operations whose sign is random: their largest magnitude, for translations in sides of the view.
SIGNED = {'ShearX': 0.3, 'ShearY': 0.3, 'TranslateX': 150 / 331, 'TranslateY': 150 / 331, 'Rotate': 30.,
          'Brightness': 0.9, 'Color': 0.9, 'Contrast': 0.9, 'Sharpness': 0.9}
RAND_OPERATIONS = ('Identity', *SIGNED, 'Posterize', 'Solarize', 'AutoContrast', 'Equalize')

# Operations that move pixels or map values: (PIL image, magnitude) -> PIL image.
MOVES = {
    'ShearX': lambda image, x: tv.affine(image, 0., [0, 0], 1., [math.degrees(math.atan(x)), 0.], center=[0, 0]),
    'ShearY': lambda image, x: tv.affine(image, 0., [0, 0], 1., [0., math.degrees(math.atan(x))], center=[0, 0]),
    'TranslateX': lambda image, x: tv.affine(image, 0., [int(x), 0], 1., [0., 0.]),
    'TranslateY': lambda image, x: tv.affine(image, 0., [0, int(x)], 1., [0., 0.]),
    'Rotate': tv.rotate,
}
MAPS = {
    'Brightness': lambda image, x: tv.adjust_brightness(image, 1 + x),
    'Posterize': tv.posterize,
    'Solarize': tv.solarize,
    'Invert': lambda image, x: tv.invert(image),
}


def magnitudes(name, level, bins, size):
    """The magnitudes of an operation, each as likely as the others, at a level below `bins`."""
    if name in SIGNED:
        largest = SIGNED[name] * size if name.startswith('Translate') else SIGNED[name]
        magnitude = torch.linspace(0., largest, bins)[level].item()
        return magnitude, -magnitude
    if name == 'Posterize':
        return 8 - round(level / ((bins - 1) / 4)),                     # bits
    if name == 'Solarize':
        return torch.linspace(255., 0., bins)[level].item(),
    return 0.,


@functools.cache
class Policy:
    """What AutoAugment with the policy `auto`, and then RandAugment with `rand` = (number, magnitude), do to images of
    size x size; None: nothing.

    operations: all pairs of name and magnitude, by which `sample` and `apply` number them; the first changes nothing.
    """

    def __init__(self, auto, rand, size):
        self.size, self.operations = size, [('Identity', 0.)]
        self.auto, self.rand, self.tables = None, None, {}
        if auto:
            steps = transforms.AutoAugment(transforms.AutoAugmentPolicy(auto)).policies     # 25 pairs of operations
            self.auto = torch.tensor([[self._numbers(name, level, AUTO_BINS) for name, _, level in pair]
                                      for pair in steps])                                   # [25, 2, signs]
            self.probabilities = torch.tensor([[probability for _, probability, _ in pair] for pair in steps])
        if rand:
            self.rand_steps, level = rand
            self.rand = torch.tensor([self._numbers(name, level, RAND_BINS) for name in RAND_OPERATIONS])
        names = [name for name, _ in self.operations]
        self.kinds = [kind for kind in KINDS if kind in map(_kind, names)]
        self.kind_of = torch.tensor([self.kinds.index(_kind(name)) for name in names])      # [operations]
        # Place of each operation among those of its kind.
        self.row_of = torch.tensor([(self.kind_of[:i] == kind).sum() for i, kind in enumerate(self.kind_of)])

    def _numbers(self, name, level, bins):
        """The numbers of an operation with either sign."""
        pairs = [(name, magnitude) for magnitude in magnitudes(name, level, bins, self.size)]
        self.operations += [pair for pair in dict.fromkeys(pairs) if pair not in self.operations]
        return [self.operations.index(pair) for pair in (pairs[0], pairs[-1])]

    def sample(self, n, generator):
        """Operations [n, steps] of n images, on the CPU from `generator`."""
        steps = []
        if self.auto is not None:
            pair = torch.randint(len(self.auto), (n,), generator=generator)
            sign = torch.randint(2, (n, 2), generator=generator)
            done = torch.rand(n, 2, generator=generator) <= self.probabilities[pair]
            steps.append(torch.where(done, self.auto[pair].gather(2, sign[..., None])[..., 0], 0))
        if self.rand is not None:
            shape = n, self.rand_steps
            steps.append(self.rand[torch.randint(len(self.rand), shape, generator=generator),
                                   torch.randint(2, shape, generator=generator)])
        return torch.cat(steps, 1)

    def apply(self, x, numbers):
        """Round images x [n, 3, size, size] of 0..1 to bytes and do the operations `numbers` [n, steps], which are on
        the CPU, to them, all images of one kind of operation at once."""
        x = x.mul(255).round_().byte()
        for step in numbers.T:
            kinds, order = self.kind_of[step].sort()
            counts = kinds.bincount(minlength=len(self.kinds)).tolist()
            rows, back = to_device(self.row_of[step[order]], x.device), to_device(order.argsort(), x.device)
            parts = x.index_select(0, to_device(order, x.device)).split(counts)
            x = torch.cat([KINDS[kind](part, table[row]) if len(part) else part for kind, part, table, row in
                           zip(self.kinds, parts, self._tables(x.device), rows.split(counts))]).index_select(0, back)
        return x.float().div_(255)

    def _tables(self, device):
        """For each kind what its operations need to know, [operations of the kind, ...] on a device."""
        if device not in self.tables:
            self.tables[device] = [
                torch.stack([self._table(*operation) for operation in self.operations if _kind(operation[0]) == kind])
                .to(device) for kind in self.kinds]
        return self.tables[device]

    def _table(self, name, magnitude):
        if name in MOVES:                               # of each pixel where it is from, counted from 1; 0: black
            pixels = np.arange(1, self.size**2 + 1, dtype=np.int32).reshape(self.size, self.size)
            return torch.from_numpy(np.array(MOVES[name](Image.fromarray(pixels), magnitude))).flatten().long()
        if name in MAPS:
            values = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
            return torch.from_numpy(np.array(MAPS[name](values, magnitude)))
        return torch.tensor(1 + magnitude)


def _kind(name):
    """The key of KINDS for an operation."""
    return 'move' if name in MOVES else 'map' if name in MAPS else name


# The kinds of operations: images x [n, 3, size, size] uint8 and what _table says, of each [n, ...] -> the same shape.

def move(x, sources):
    pixels = torch.cat([x.new_zeros(len(x), 3, 1), x.flatten(2)], 2)
    return pixels.gather(2, sources[:, None].expand(-1, 3, -1)).view_as(x)


def map_values(x, tables):
    """tables [n, 1 or 3, 256] uint8."""
    return tables.expand(-1, 3, -1).gather(2, x.flatten(2).long()).view_as(x)


def blend(degenerate, x, factor):
    """degenerate + factor * (x - degenerate), as Pillow rounds it: factor [n]."""
    degenerate = degenerate.float()
    factor = factor.view(-1, *[1] * (x.dim() - 1))
    return x.float().sub_(degenerate).mul_(factor).add_(degenerate).clamp_(0, 255).byte()


def gray(x):
    """Brightness as Pillow rounds it: [n, 3, size, size] -> [n, 1, size, size] int32."""
    red, green, blue = x.int().split(1, 1)
    return (red * 19595 + green * 38470 + blue * 7471 + 2**15) >> 16


def color(x, factor):
    return blend(gray(x), x, factor)


def contrast(x, factor):
    mean = (gray(x).double().mean((1, 2, 3)) + 0.5).floor()
    values = torch.arange(256, device=x.device).expand(len(x), 1, -1)
    return map_values(x, blend(mean[:, None, None], values, factor))


def sharpness(x, factor):
    """The degenerate image is smoothed by 3 x 3 pixels of equal weight but the center, which has 5, except at edges."""
    smooth = x.short()
    center = smooth[:, :, 1:-1, 1:-1]
    rows = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * center
    result = x.clone()
    result[:, :, 1:-1, 1:-1] = blend(((total + 6.5) * (1 / 13)).floor(), center, factor)
    return result


def autocontrast(x, _):
    low, high = (value[..., None].double() for value in (x.amin((2, 3)), x.amax((2, 3))))           # [n, 3, 1]
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)       # 255 / x would be 255 * (1 / x)
    values = torch.arange(256, device=x.device)
    table = (values * scale).add_(-low * scale).clamp_(0, 255)          # in float64 and in this order, as Pillow
    return map_values(x, torch.where(high > low, table, values).byte())


def equalize(x, _):
    pixels = x.flatten(2).long()
    one = torch.ones((), dtype=torch.int32, device=x.device)
    counts = torch.zeros(len(x), 3, 256, dtype=torch.int32, device=x.device).scatter_add_(2, pixels,
                                                                                          one.expand_as(pixels))
    below = counts.cumsum(2, dtype=torch.int32)
    # The pixels of the largest value do not count.
    step = (pixels.shape[2] - counts.gather(2, pixels.amax(2, keepdim=True))) // 255                # [n, 3, 1]
    table = ((below - counts + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=x.device)).byte()
    return table.gather(2, pixels).view_as(x)


KINDS = {'Identity': lambda x, _: x, 'move': move, 'map': map_values, 'Color': color, 'Contrast': contrast,
         'Sharpness': sharpness, 'AutoContrast': autocontrast, 'Equalize': equalize}
