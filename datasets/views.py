"""Views: declared once as data, executed two ways.

A View is how an image is cropped, flipped and colored. `per_sample(view)` makes it a torchvision transform of one
PIL image, as the original programs do in DataLoader workers. `sample_params` and `apply` execute it on a batch with
tensor operations on any device, every image with its own parameters from the distributions that torchvision samples
from. The batched executor takes images [bsz, 3, w, h] uint8, column after column; inside it they are
[n, 3, size, size] float32 in 0..1.
"""
import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

from datasets.auto_augment import policy_of
from util.distributed import all_to_device
from util.log import log

RATIO = (3 / 4, 4 / 3)                      # aspect ratio (width / height) of random crops, torchvision's default
BLUR = (0.1, 2.)                            # standard deviations, as SimCLR
ERASING_AREA, ERASING_RATIO = (0.02, 0.33), (0.3, 3.3)      # of RandomErasing (height / width), torchvision's defaults
GRAY = (0.2989, 0.587, 0.114)               # luma weights of ITU-R BT.601, as torchvision


@dataclass(frozen=True)
class View:
    """How to make an image of `size` x `size` from a larger or smaller one.

    crop: (smallest, largest) fraction of the area of a random crop; None: the central square.
    flip: probability of a left-right flip.
    resize: without `crop`, the shorter side is first resized to this many pixels (`size`, if it is None).
    padding: without `crop`, black pixels added on each side of the square, from which it is cut at a random place.
    rotation: largest angle in degrees; corners that come from outside are black.
    auto: AutoAugment with its policy for 'cifar10', 'imagenet' or 'svhn'; rand: (number, magnitude) of RandAugment's
        operations. Both round to bytes (auto_augment.py).
    jitter: strengths of brightness, contrast, saturation and hue, as transforms.ColorJitter; None: no color jitter.
    jitter_p, grayscale: probabilities of the color jitter and of losing the colors.
    blur: probability of a Gaussian blur, its standard deviation uniform in 0.1 .. 2 pixels, over a tenth of the side.
    mean, std: subtracted and divided by, per channel of 0..1.
    cutout: (number, length) of squares that are set to 0 last, around uniform centers
        (DeVries and Taylor, 2017, https://arxiv.org/abs/1708.04552).
    erasing: probability that a rectangle is set to 0 last, as transforms.RandomErasing.
    """
    size: int
    mean: tuple
    std: tuple
    crop: tuple | None = None
    flip: float = 0.
    resize: int | None = None
    padding: int = 0
    rotation: float = 0.
    auto: str | None = None
    rand: tuple | None = None
    jitter: tuple | None = None
    jitter_p: float = 0.8
    grayscale: float = 0.
    blur: float = 0.
    cutout: tuple | None = None
    erasing: float = 0.

    @property
    def short_side(self):
        """Shorter side from which even the smallest crop need not be enlarged."""
        return math.ceil(self.size / math.sqrt(self.crop[0])) if self.crop else self.resize or self.size

    @property
    def blur_radius(self):
        """Pixels on each side that a blur takes in: a tenth of the side in all, as SimCLR."""
        return self.size // 10 // 2

    @property
    def cpu_group(self):
        """Views that a CPU executes together, so few that they stay in its cache (measured at 32 pixels: 128 are 4
        times faster than 2,048); more with AutoAugment and RandAugment, which do each operation to a few of them."""
        return max(1, (2**19 if self.auto or self.rand else 2**17) // self.size**2)


def per_sample(view):
    """The view as a transform: PIL image -> [3, size, size]."""
    if view.crop:
        steps = [transforms.RandomResizedCrop(view.size, scale=view.crop, ratio=RATIO)]
    else:
        steps = [transforms.Resize(view.resize or view.size), transforms.CenterCrop(view.size)]
    steps += after_crop(view)
    if view.jitter:
        steps.append(transforms.RandomApply([transforms.ColorJitter(*view.jitter)], p=view.jitter_p))
    if view.grayscale:
        steps.append(transforms.RandomGrayscale(view.grayscale))
    if view.blur and view.blur_radius:
        steps.append(transforms.RandomApply([transforms.GaussianBlur(2 * view.blur_radius + 1, BLUR)], p=view.blur))
    steps += [transforms.ToTensor(), transforms.Normalize(view.mean, view.std)]
    if view.cutout:
        steps.append(Cutout(*view.cutout))
    if view.erasing:
        steps.append(transforms.RandomErasing(view.erasing, ERASING_AREA, ERASING_RATIO))
    return transforms.Compose(steps)


def after_crop(view):
    """The steps of `per_sample` between cropping and colors, of PIL images of size x size."""
    steps = []
    if view.flip:
        steps.append(transforms.RandomHorizontalFlip(view.flip))
    if view.padding:
        steps.append(transforms.RandomCrop(view.size, view.padding))
    if view.rotation:
        steps.append(transforms.RandomRotation(view.rotation, transforms.InterpolationMode.BILINEAR))
    if view.auto:
        steps.append(transforms.AutoAugment(transforms.AutoAugmentPolicy(view.auto)))
    if view.rand:
        steps.append(transforms.RandAugment(*view.rand))
    return steps


def without_policy(view):
    """The view without AutoAugment and RandAugment."""
    return replace(view, auto=None, rand=None)


def without_crop(view):
    """The view without cropping and `after_crop(without_policy(view))`."""
    return replace(view, crop=None, flip=0., resize=None, padding=0, rotation=0.)


class Cutout(nn.Module):
    """Squares set to 0 in a tensor [3, size, size], as View.cutout."""

    def __init__(self, number, length):
        super().__init__()
        self.number, self.length = number, length

    def forward(self, image):
        return erase(image[None], cutout_boxes(1, self.number, self.length, image.shape[1]))[0]


@dataclass
class ViewParams:
    """Parameters of n views, sampled by `sample_params`.

    boxes [n, 4] top, left, height, width in pixels; limits [n, 4] the boxes whose pixels may be used; flips [n] bool;
    shifts [n, 2] top, left in the padded view, or None; angles [n] in degrees, counter-clockwise, or None; factors
    [4, n] brightness, contrast, saturation, hue (1, 1, 1, 0 where an image is not jittered), or None; gray [n] bool or
    None; sigmas [n] of blurs, 0 where there is none, or None; holes [n, k, 4] boxes of the view that are set to 0, or
    None; orders: the order of the four color operations in each group; groups: the slices of the views that are
    executed together; policy [n, steps]: operations of AutoAugment and RandAugment by their numbers in Policy, or None.
    """
    boxes: torch.Tensor
    limits: torch.Tensor
    flips: torch.Tensor
    shifts: torch.Tensor | None
    angles: torch.Tensor | None
    factors: torch.Tensor | None
    gray: torch.Tensor | None
    sigmas: torch.Tensor | None
    holes: torch.Tensor | None
    orders: list
    groups: list
    policy: torch.Tensor | None = None

    def local(self, rows, bsz):
        """The parameters of the views of some images, the slice `rows` of the batch of bsz."""
        if rows == slice(0, bsz):
            return self
        groups, orders, start = [], [], 0
        for first in range(0, len(self.boxes), bsz):                    # view after view
            for group, order in zip(self.groups, self.orders):
                low = max(group.start, first + rows.start)
                length = min(group.stop, first + rows.stop) - low
                if length > 0:
                    groups.append(slice(start, start + length))
                    orders.append(order)
                    start += length
        indices = torch.arange(len(self.boxes)).view(-1, bsz)[:, rows].flatten()
        values = {name: value if value is None else value[:, indices] if name == 'factors' else value[indices]
                  for name, value in vars(self).items() if name not in ('orders', 'groups')}
        return ViewParams(**values, orders=orders, groups=groups)


def sample_params(view, heights, widths, generator, device='cpu'):
    """Sample parameters for images of the given sizes ([n] tensors), on the CPU from `generator`, in groups that suit
    the device that executes them."""
    n = len(heights)
    boxes = sample_boxes(view, heights, widths, generator)
    limits = boxes if view.crop else torch.stack([*torch.zeros(2, n), heights, widths], 1)
    flips = torch.rand(n, generator=generator) < view.flip
    shifts = torch.randint(2 * view.padding + 1, (n, 2), generator=generator) if view.padding else None
    angles = view.rotation * (2 * torch.rand(n, generator=generator) - 1) if view.rotation else None
    policy = policy_of(view.auto, view.rand, view.size).sample(n, generator) if view.auto or view.rand else None
    groups = groups_of(n, view, device)
    factors, orders = None, [None] * len(groups)
    if view.jitter:
        low = torch.tensor([max(0., 1 - s) for s in view.jitter[:3]] + [-view.jitter[3]])
        high = torch.tensor([1 + s for s in view.jitter[:3]] + [view.jitter[3]])
        factors = low[:, None] + (high - low)[:, None] * torch.rand(4, n, generator=generator)
        jittered = torch.rand(n, generator=generator) < view.jitter_p
        factors = torch.where(jittered, factors, torch.tensor([1., 1., 1., 0.])[:, None])
        orders = [torch.randperm(4, generator=generator).tolist() for _ in orders]
    gray = torch.rand(n, generator=generator) < view.grayscale if view.grayscale else None
    sigmas = None
    if view.blur and view.blur_radius:
        sigmas = BLUR[0] + (BLUR[1] - BLUR[0]) * torch.rand(n, generator=generator)
        sigmas = sigmas * (torch.rand(n, generator=generator) < view.blur)
    holes = []
    if view.cutout:
        holes.append(cutout_boxes(n, *view.cutout, view.size, generator))
    if view.erasing:
        holes.append(erasing_boxes(n, view.erasing, view.size, generator))
    holes = torch.cat(holes, 1) if holes else None
    return ViewParams(boxes, limits, flips, shifts, angles, factors, gray, sigmas, holes, orders, groups, policy)


def groups_of(n, view, device='cpu'):
    """Slices of n views that are executed together and share one order of the color operations: of at most
    View.cpu_group views on a CPU; four slices elsewhere, where the number of operations decides."""
    size = view.cpu_group if torch.device(device).type == 'cpu' else max(view.cpu_group, math.ceil(n / 4))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def sample_boxes(view, heights, widths, generator):
    """The boxes of ViewParams."""
    if view.crop:
        return random_boxes(heights, widths, view.crop, generator)
    return central_boxes(heights, widths, view.size, view.resize or view.size)


def random_boxes(heights, widths, scale, generator, tries=10):
    """Boxes [n, 4] of random crops, distributed as those of transforms.RandomResizedCrop.

    Where none fits, the largest central crop whose aspect ratio is allowed.
    """
    boxes, fits = _fitting_boxes(heights, widths, scale, RATIO, generator, tries=tries)
    h, w = heights.double()[:, None], widths.double()[:, None]
    central_h, central_w = torch.minimum(h, (w / RATIO[0]).round()), torch.minimum(w, (h * RATIO[1]).round())
    central = torch.cat([((h - central_h) / 2).floor(), ((w - central_w) / 2).floor(), central_h, central_w], 1)
    return torch.where(fits, boxes, central)


def boxes_of_image(view, height, width, n, generator, tries=10):
    """What `sample_boxes` gives for n views of one image, as lists: without tensors, which cost a worker process a
    fifth of its time."""
    if not view.crop:
        return sample_boxes(view, torch.full((n,), height), torch.full((n,), width), generator).tolist()
    (low, high), ratio = view.crop, [math.log(bound) for bound in RATIO]
    uniform = torch.rand(2, n, tries, generator=generator, dtype=torch.float64).tolist()
    corners = torch.rand(2, n, generator=generator, dtype=torch.float64).tolist()
    boxes = []
    for areas, ratios, *corner in zip(*uniform, *corners):
        for area, aspect in zip(areas, ratios):
            area = height * width * (low + (high - low) * area)
            aspect = math.exp(ratio[0] + (ratio[1] - ratio[0]) * aspect)
            box_h, box_w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < box_h <= height and 0 < box_w <= width:
                top, left = (math.floor(u * (side - box + 1))
                             for u, side, box in zip(corner, (height, width), (box_h, box_w)))
                break
        else:
            box_h, box_w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
            top, left = (height - box_h) // 2, (width - box_w) // 2
        boxes.append([top, left, box_h, box_w])
    return boxes


def cutout_boxes(n, number, length, size, generator=None):
    """Boxes [n, number, 4] around uniform pixels of a view; they may reach beyond it."""
    corners = torch.randint(size, (n, number, 2), generator=generator) - length // 2
    return torch.cat([corners, torch.full_like(corners, length)], 2)


def erasing_boxes(n, probability, size, generator):
    """Boxes [n, 1, 4] distributed as those of transforms.RandomErasing; 0 x 0 where nothing is erased."""
    sides = torch.full((n,), size)
    ratio = 1 / ERASING_RATIO[1], 1 / ERASING_RATIO[0]                  # there height / width, here width / height
    boxes, fits = _fitting_boxes(sides, sides, ERASING_AREA, ratio, generator, largest=sides - 1)
    erased = fits & (torch.rand(n, 1, generator=generator) < probability)
    return torch.where(erased, boxes, 0)[:, None]


def _fitting_boxes(heights, widths, scale, ratio, generator, largest=None, tries=10):
    """The first of `tries` random boxes that fits into the image, and whether there is one: [n, 4], [n, 1].

    Area uniform in `scale` times the image's, log of the aspect ratio uniform, sides at most `largest` [n].
    """
    n = len(heights)
    h, w = heights.double()[:, None], widths.double()[:, None]
    uniform = torch.rand(2, n, tries, generator=generator, dtype=torch.float64)
    area = h * w * (scale[0] + (scale[1] - scale[0]) * uniform[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratio = torch.exp(low + (high - low) * uniform[1])
    box_w, box_h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    max_h, max_w = (h, w) if largest is None else (largest[:, None],) * 2
    fits = (box_w > 0) & (box_w <= max_w) & (box_h > 0) & (box_h <= max_h)
    first = fits.int().argmax(1, keepdim=True)                          # 0 where none fits
    box_h, box_w = box_h.gather(1, first), box_w.gather(1, first)
    uniform = torch.rand(2, n, 1, generator=generator, dtype=torch.float64)
    top, left = ((u * (side - box + 1)).floor() for u, side, box in zip(uniform, (h, w), (box_h, box_w)))
    return torch.cat([top, left, box_h, box_w], 1), fits.any(1, keepdim=True)


def central_boxes(heights, widths, size, resize):
    """Boxes [n, 4] of transforms.Resize(resize) and CenterCrop(size), in pixels of the image, not rounded."""
    shorter = torch.minimum(heights, widths)
    starts, lengths = [], []
    for side in (heights, widths):
        resized = (resize * side) // shorter                            # as Resize rounds
        starts.append(((resized - size).double() / 2).round() * side / resized)
        lengths.append(size * side.double() / resized)
    return torch.stack([*starts, *lengths], 1)


def apply(view, images, params, operations=None):
    """Execute a view: images [bsz, 3, w, h] uint8 and the parameters of n views -> [n, 3, size, size] float32.

    View i is of image i % bsz. The order of the color operations is sampled for each group of views, not for each
    image; every single view still has the distribution that torchvision gives it. `operations` may be
    `compiled_operations(device)`.
    """
    n, device, operations = len(params.boxes), images.device, operations or OPERATIONS
    result = torch.empty(n, 3, view.size, view.size, device=device)
    if n == 0:
        return result
    images_of_views = torch.arange(n, device=device) % len(images)
    resized = view.flip or (params.boxes != torch.tensor([0, 0, view.size, view.size])).any()
    # Bytes that nothing but the normalization changes, or nothing after the policy, go into it as they are.
    colored = any(x is not None for x in (params.factors, params.gray, params.sigmas))
    changed = resized or colored or any(x is not None for x in (params.shifts, params.angles, params.policy))
    scale = 1 / torch.tensor(view.std)[:, None, None]
    shift_by = -torch.tensor(view.mean)[:, None, None] * scale
    # The views of each group that lose their colors or are blurred, found on the CPU: no GPU is waited for.
    grayed, blurred = ([_nonzero(x, group) for group in params.groups] for x in (params.gray, params.sigmas))
    places = torch.cat([torch.arange(group.stop - group.start) for group in params.groups])
    (scale, shift_by, boxes, limits, flips, places, shifts, angles, factors, sigmas, holes, *both) = all_to_device(
        [scale, shift_by, params.boxes, params.limits, params.flips, places, params.shifts, params.angles,
         params.factors, params.sigmas, params.holes, *grayed, *blurred], device)
    grayed, blurred = both[:len(grayed)], both[len(grayed):]
    if resized:
        n_taps = math.ceil(2 * max(1, params.boxes[:, 2:].max().item() / view.size))
        taps = operations['taps'](boxes, limits, flips, places.int(), *images.shape[2:], view.size, n_taps)
    for part, order, gray, blurry in zip(params.groups, params.orders, grayed, blurred):
        if not resized:
            x = images.transpose(2, 3).index_select(0, images_of_views[part])[..., :view.size, :view.size]
            x = x.mul(1 / 255) if changed else x
        else:
            x = images.index_select(0, images_of_views[part])
            columns, column_weights, rows, row_weights = (side[part] for side in taps)
            x = operations['transposed'](weighted_rows(x.float(), columns, column_weights))     # [n, 3, h, size]
            x = weighted_rows(x, rows, row_weights)
        if shifts is not None:
            x = shift(x, shifts[part].long(), view.padding)
        if angles is not None:
            x = rotate(x, angles[part])
        if params.policy is not None:
            x = policy_of(view.auto, view.rand, view.size).apply(x, params.policy[part])
            x = x.float().div_(255) if colored else x
        for color in order or ():
            x = operations[COLORS[color]](x, factors[color, part])
        if gray is not None and len(gray):
            gray = gray.long()
            x[gray] = luma(x[gray])[:, None]
        if blurry is not None and len(blurry):
            blurry = blurry.long()
            x[blurry] = blur(x[blurry], sigmas[part][blurry], view.blur_radius)
        scale_of_x = scale / 255 if x.dtype == torch.uint8 else scale
        torch.addcmul(shift_by, x, scale_of_x, out=result[part])        # (x - mean) / std
        if holes is not None:
            erase(result[part], holes[part])
    return result


def _nonzero(x, group):
    """Which of a group's values [n] are not 0, numbered from its start; None for None."""
    return None if x is None else x[group].nonzero()[:, 0]


def resize_taps(boxes, limits, flips, places, w, h, size, n_taps):
    """Which columns and rows of images [n, 3, w, h] make up those of n views, and how much of each.

    boxes [n, 4], limits [n, 4] and flips [n] as in ViewParams, in float32; places [n] in the group. The weights are
    those of torchvision's antialiased bilinear resize of the boxes: a triangle of which half the width is one pixel of
    the view, or one of the image where that is enlarged, cut off and normalized at the ends of the limits. `n_taps`
    taps must span its width.

    -> columns [n, 3, size, taps], numbered through all columns of a group of images, and their weights; the same for
    rows. Flips are in the columns, and the scale from 0..255 to 0..1 in the rows.
    """
    device = boxes.device
    planes = 3 * places[:, None] + torch.arange(3, dtype=torch.int32, device=device)     # [n, 3]
    taps = []
    for side, length_in in ((1, w), (0, h)):
        start, length, first, count = (x[:, i, None] for x in (boxes, limits) for i in (side, side + 2))    # [n, 1]
        scale = length / size
        reach = scale.clamp(min=1)
        center = (torch.arange(size, device=device) + 0.5) * scale                          # [n, size]
        if side == 1:
            center = torch.lerp(center, length - center, flips[:, None])
        center = center + start
        nearest = torch.ceil(center - reach - 0.5)                      # the first whose center may be within reach
        low, high = torch.ceil(first - 0.5), torch.ceil(first + count - 0.5)
        pixels, weights = [], []                                        # tap by tap, which is what compilers vectorize
        for pixel in (nearest + k for k in range(n_taps)):
            weight = (1 - (pixel + 0.5 - center).abs() / reach).clamp(min=0)
            # Whole numbers clamped to 0..1 instead of comparisons, which are many times slower on a CPU.
            weights.append(weight * (pixel - low + 1).clamp(0, 1) * (high - pixel).clamp(0, 1))
            pixels.append(pixel.clamp(0, length_in - 1).int())
        total = sum(weights) * (1 if side == 1 else 255)
        pixels, weights = torch.stack(pixels, 2), torch.stack([weight / total for weight in weights], 2)
        taps += [pixels[:, None] + length_in * planes[..., None, None], weights[:, None].repeat(1, 3, 1, 1)]
    return taps


def weighted_rows(x, rows, weights):
    """sum_k weights[n, c, i, k] x[n, c, rows[n, c, i, k]]: x [n, 3, h, w], the others [n, 3, size, taps], the rows
    numbered through all of x -> [n, 3, size, w].

    embedding_bag reads only the rows it needs; a matrix product takes 20 times as long at 224 pixels.
    """
    n, channels, size, taps = rows.shape
    sums = F.embedding_bag(rows.view(-1, taps), x.reshape(-1, x.shape[3]), mode='sum',
                           per_sample_weights=weights.view(-1, taps))
    return sums.view(n, channels, size, x.shape[3])


def shift(x, shifts, padding):
    """Cut views of the same size at shifts [n, 2] (top, left) from x [n, 3, size, size], padded with black."""
    n, channels, size = x.shape[:3]
    rows, columns = (shifts[:, i, None] + torch.arange(size, device=x.device) for i in (0, 1))      # [n, size]
    numbers, channels = (torch.arange(length, device=x.device) for length in (n, channels))
    return F.pad(x, (padding,) * 4)[numbers[:, None, None, None], channels[:, None, None], rows[:, None, :, None],
                                    columns[:, None, None]]


def erase(images, boxes):
    """Set boxes [n, k, 4] (top, left, height, width) to 0, in place on images [n, 3, size, size]."""
    pixel = torch.arange(images.shape[2], device=images.device)
    rows, columns = ((pixel >= boxes[..., i, None]) & (pixel < (boxes[..., i] + boxes[..., i + 2])[..., None])
                     for i in (0, 1))                                                               # [n, k, size]
    inside = (rows[..., None] & columns[..., None, :]).any(1)                                       # [n, size, size]
    return images.masked_fill_(inside[:, None], 0)


def rotate(x, angles):
    """Rotate square images x [n, 3, size, size] about their centers, bilinear, black outside; angles [n] degrees."""
    cos, sin = (f(torch.deg2rad(angles))[:, None, None] for f in (torch.cos, torch.sin))
    position = (torch.arange(x.shape[2], device=x.device) + 0.5) * (2 / x.shape[2]) - 1             # -1 .. 1
    across, down = position, position[:, None]
    # Positions in the input; no product of matrices, which a GPU may compute in TF32.
    grid = torch.stack([cos * across - sin * down, sin * across + cos * down], 3)
    return F.grid_sample(x, grid, align_corners=False)


def blur(x, sigmas, radius):
    """Gaussian blur of square images x [n, 3, size, size] over 2 radius + 1 pixels, mirrored edges; sigmas [n]."""
    n, channels, size = x.shape[:3]
    steps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (steps / sigmas[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)                                           # [n, taps]
    source = (torch.arange(size, device=x.device)[:, None] + steps).abs()                   # [size, taps]
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    planes = torch.arange(n * channels, device=x.device).view(n, channels, 1, 1)
    rows, weights = source + size * planes, kernel[:, None, None].repeat(1, channels, size, 1)
    for _ in range(2):                                                  # rows, then columns
        x = transposed(weighted_rows(x, rows, weights))
    return x


def luma(x):
    """Brightness of each pixel: [n, 3, h, w] -> [n, h, w]."""
    return (x[:, 0] * GRAY[0]).add_(x[:, 1], alpha=GRAY[1]).add_(x[:, 2], alpha=GRAY[2])


# The color operations of transforms.ColorJitter: x [n, 3, h, w] and a factor for each image [n] -> [n, 3, h, w].

def adjust_brightness(x, factor):
    return x.mul(factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(x, factor):
    mean = luma(x.mean((2, 3), keepdim=True))                                               # [n, 1, 1]
    return x.mul(factor[:, None, None, None]).add_((mean[:, 0, 0] * (1 - factor))[:, None, None, None]).clamp_(0, 1)


def adjust_saturation(x, factor):
    gray = luma(x).mul_(1 - factor[:, None, None])
    return x.mul(factor[:, None, None, None]).add_(gray[:, None]).clamp_(0, 1)


def adjust_hue(x, factor):
    """Turn the hue by `factor` (1 is a full circle), keeping the value and chroma of HSV."""
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    # Which channel is the largest, as 0 or 1: on a CPU comparisons and torch.where are many times slower.
    is_red, is_green = ((channel - value).sign_().add_(1) for channel in (red, green))
    of_red, of_green, of_blue = green - blue, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
    hue = of_green.sub_(of_blue).mul_(is_green).add_(of_blue)
    hue = of_red.sub_(hue).mul_(is_red).add_(hue).div_(chroma.clamp(min=1e-12))             # in sixths of the circle
    hue.add_(6 * factor[:, None, None])                                 # a gray pixel keeps chroma 0
    hue.sub_((hue * (1 / 6)).floor_().mul_(6))
    weights = (hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()         # HSV to RGB
    return torch.stack([torch.addcmul(low, chroma, weight.clamp_(0, 1)) for weight in weights], 1)


def transposed(x):
    """[..., h, w] -> [..., w, h], in memory too."""
    return x.transpose(-1, -2).contiguous()


COLORS = ('brightness', 'contrast', 'saturation', 'hue')               # in the order of ViewParams.factors
OPERATIONS = {'brightness': adjust_brightness, 'contrast': adjust_contrast, 'saturation': adjust_saturation,
              'hue': adjust_hue, 'taps': resize_taps, 'transposed': transposed}


@functools.cache
def compiled_operations(device):
    """OPERATIONS by torch.compile, each compiled at its first use; without a compiler for the device, OPERATIONS.

    One by one: the order in which the colors follow each other changes from group to group, and one function for each
    of the 24 orders was no faster.
    """
    try:
        compiled = {name: torch.compile(operation, dynamic=False) for name, operation in OPERATIONS.items()}
        compiled['brightness'](torch.zeros(2, 3, 8, 8, device=device), torch.ones(2, device=device))
    except MemoryError:
        raise
    except Exception as error:          # of the compiler, of its search for a C++ compiler, of its cache folder
        log(f'Views are computed without torch.compile, which does not work here ({type(error).__name__})')
        return OPERATIONS
    return compiled
