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
        self.kinds = list(dict.fromkeys(map(_kind, names)))
        self.kind_of = torch.tensor([self.kinds.index(_kind(name)) for name in names])      # [operations]
        # Place of each operation among those of its kind.
        self.row_of = torch.tensor([(self.kind_of[:i] == kind).sum() for i, kind in enumerate(self.kind_of)])

    def _numbers(self, name, level, bins):
        """The numbers of an operation with either sign."""
        pairs = [(name, magnitude) for magnitude in magnitudes(name, level, bins, self.size)]       # one or two
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
        """Round images x [n, 3, size, size] of 0..1 to bytes, and do the operations `numbers` [n, steps], which are on
        the CPU, to them, all images of one kind of operation at once: uint8."""
        # From 2**23 on a float32 is a whole number, in its last bits: faster than to round and to convert it.
        x = x.mul(255).add_(2.**23).view(torch.int32).byte()
        place = torch.arange(len(x))                                            # where each image is in x
        for step in numbers.T:
            kinds, order = self.kind_of[step].sort()
            x, place = x.index_select(0, to_device(place[order], x.device)), order.argsort()
            counts = kinds.bincount(minlength=len(self.kinds)).tolist()
            rows = to_device(self.row_of[step[order]], x.device).split(counts)
            for kind, part, row, table in zip(self.kinds, x.split(counts), rows, self._tables(x.device)):
                if len(part) and kind != 'Identity':
                    part.copy_(KINDS[kind](part, table.index_select(0, row)))
        return x.index_select(0, to_device(place, x.device))

    def _tables(self, device):
        """For each kind of operation a table with a row for each of its operations, on a device."""
        if device not in self.tables:
            self.tables[device] = [
                torch.stack([self._table(*operation) for operation in self.operations if _kind(operation[0]) == kind])
                .to(device) for kind in self.kinds]
        return self.tables[device]

    def _table(self, name, magnitude):
        """The row of an operation: where pixels come from, what values become, or the factor of `blend`."""
        if name in MOVES:                               # of each pixel where it is from, counted from 1; 0: black
            pixels = np.arange(1, self.size**2 + 1, dtype=np.int32).reshape(self.size, self.size)
            return torch.from_numpy(np.array(MOVES[name](Image.fromarray(pixels), magnitude))).flatten().long()
        if name in MAPS:
            values = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
            return torch.from_numpy(np.array(MAPS[name](values, magnitude)))
        return torch.tensor(1 + magnitude).view(1, 1, 1)


@functools.cache
def policy_of(auto, rand, size):
    """The Policy, whose tables are made once."""
    return Policy(auto, rand, size)


def _kind(name):
    """The key of KINDS for an operation."""
    return 'move' if name in MOVES else 'map' if name in MAPS else name


# The kinds of operations: images x [n, 3, size, size] uint8 and their rows of _tables [n, ...] -> the same shape.

def move(x, sources):
    pixels = torch.cat([x.new_zeros(len(x), 3, 1), x.flatten(2)], 2)
    return pixels.gather(2, sources[:, None].expand(-1, 3, -1)).view_as(x)


def map_values(x, tables):
    """tables [n, 1 or 3, 256] uint8."""
    return tables.expand(-1, 3, -1).gather(2, x.flatten(2).long()).view_as(x)


def to_bytes(x):
    """Truncated; through int32, which is twice as fast on a CPU."""
    return x.int().byte()


def blend(degenerate, x, factor):
    """degenerate + factor * (x - degenerate), as Pillow rounds it: floats in 0..255, factor [n, 1, 1, 1] -> uint8."""
    return to_bytes((x - degenerate).mul_(factor).add_(degenerate).clamp_(0, 255))


def gray(x):
    """Brightness as Pillow rounds it, in whole numbers that float32 holds: [n, 3, size, size] -> [n, 1, size, size]."""
    red, green, blue = x.split(1, 1)
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(2**15).mul_(2**-16).floor_()


def color(x, factor):
    x = x.float()
    return blend(gray(x), x, factor)


def contrast(x, factor):
    mean = gray(x.float()).double().mean((2, 3), keepdim=True).add_(0.5).floor_().float()
    values = torch.arange(256., device=x.device).expand(len(x), 1, 1, -1)
    return map_values(x, blend(mean, values, factor)[:, 0])


def sharpness(x, factor):
    """The degenerate image is smoothed except at its edges: 3 x 3 pixels, weight 5 at the center, 1 elsewhere."""
    result, x = x.clone(), x.float()
    center = x[:, :, 1:-1, 1:-1]
    rows = (x[:, :, :-2] + x[:, :, 1:-1]).add_(x[:, :, 2:])
    total = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(center, alpha=4)
    result[:, :, 1:-1, 1:-1] = blend(total.add_(6.5).mul_(1 / 13).floor_(), center, factor)
    return result


def autocontrast(x, _):
    low, high = (value[..., None].double() for value in (x.amin((2, 3)), x.amax((2, 3))))           # [n, 3, 1]
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)       # 255 / x would be 255 * (1 / x)
    values = torch.arange(256, device=x.device)
    table = (values * scale).add_(-low * scale).clamp_(0, 255)          # in float64 and in this order, as Pillow
    return map_values(x, torch.where(high > low, table, values).to(torch.uint8))


def equalize(x, _):
    pixels = x.flatten(2).long()
    one = torch.ones((), device=x.device).expand_as(pixels)
    counts = torch.zeros(len(x), 3, 256, device=x.device).scatter_add_(2, pixels, one)
    below = counts.cumsum(2) - counts
    # How many pixels make a step of the result; those of the largest value do not count.
    step = (below.gather(2, x.amax((2, 3))[..., None].long()) / 255).floor_()                       # [n, 3, 1]
    table = (below + (step / 2).floor_()).div_(step.clamp(min=1)).clamp_(max=255)
    table = to_bytes(torch.where(step > 0, table, torch.arange(256., device=x.device)))
    return table.gather(2, pixels).view_as(x)


KINDS = {'move': move, 'map': map_values, 'Color': color, 'Contrast': contrast,
         'Sharpness': sharpness, 'AutoContrast': autocontrast, 'Equalize': equalize}
