"""Mixup and cutmix of a batch, on its device, with the label distributions that follow.

Both mix every image with another of the batch, by one lam sampled for the batch, as published: mixup averages
pixels (Zhang et al., 2018, https://arxiv.org/abs/1710.09412), cutmix pastes a box (Yun et al., 2019,
https://arxiv.org/abs/1905.04899).
"""
import math

import torch
from torch.nn import functional as F

from util.distributed import all_to_all_rows, slice_sizes


def mix(images, labels, kind, alpha, rng):
    """Mix a batch: images [n, 3, h, w] and label distributions [n, C] -> the same, mixed.

    kind: 'mixup', 'cutmix' or 'mixup_cutmix', which tosses a coin for the batch. lam, the fraction of the image
    itself, is sampled from Beta(alpha, alpha); rng is a NumPy generator, in the same state in all processes: the batch
    is that of all of them.
    """
    if kind == 'mixup_cutmix':
        kind = rng.choice(['mixup', 'cutmix'])
    lam = rng.beta(alpha, alpha)
    sizes = slice_sizes(len(images))
    order = torch.from_numpy(rng.permutation(sum(sizes)))
    others, labels_of_others = all_to_all_rows(images, order, sizes), all_to_all_rows(labels, order, sizes)
    if kind == 'mixup':
        images = torch.lerp(others, images, lam)
    else:
        images, lam = cutmix(images, others, lam, rng)
    return images, torch.lerp(labels_of_others, labels, lam)


def as_distributions(labels, num_classes):
    """Labels [n] as one-hot rows [n, num_classes] float32; those of images with several labels stay as they are."""
    return labels if labels.dim() == 2 else F.one_hot(labels, num_classes).float()


def mix_views(images, labels, n_views, kind, alpha, rng):
    """Mix each view on its own: images [n_views * bsz, 3, h, w], view after view, and labels [bsz, C].

    -> mixed images, and their label distributions [n_views * bsz, C].
    """
    mixed = [mix(view, labels, kind, alpha, rng) for view in images.chunk(n_views)]
    return torch.cat([images for images, _ in mixed]), torch.cat([labels for _, labels in mixed])


def cutmix(images, others, lam, rng):
    """Paste the same box of `others` into `images`; -> mixed images, fraction of the area that stayed.

    The box has the shape of the image and 1 - lam of its area, around a uniform center; what lies outside is cut.
    """
    height, width = images.shape[2:]
    box_h, box_w = (int(side * math.sqrt(1 - lam)) for side in (height, width))
    y, x = rng.integers(height), rng.integers(width)
    top, bottom = max(0, y - box_h // 2), min(height, y + (box_h + 1) // 2)
    left, right = max(0, x - box_w // 2), min(width, x + (box_w + 1) // 2)
    images = images.clone()
    images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return images, 1 - (bottom - top) * (right - left) / (height * width)
