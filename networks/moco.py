"""Momentum contrast: a slowly moving copy of the network makes the keys, and a queue keeps those of earlier batches.

He et al., 2020, https://arxiv.org/abs/1911.05722; with labels it is the "MoCo trick" of SupCon.
"""
import copy

import torch
from torch import nn

EMPTY = -2**40                             # label of an empty place in the queue, which no anchor sees


class MomentumContrast(nn.Module):
    """The momentum copy of a network and its queue of keys, which are saved with them.

    The copy's batch norms normalize with the statistics of its batches, as the network's do.

    Args:
        network: a SupConResNet.
        length: keys in the queue.
        momentum: fraction of its own that the copy keeps in each step.
    """

    def __init__(self, network, length, momentum):
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.network.fc = None
        self.momentum = momentum
        self.register_buffer('queue', torch.zeros(length, network.feat_dim))
        self.register_buffer('queue_labels', torch.full((length,), EMPTY))
        self.register_buffer('position', torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, network):
        """Move the copy towards the network."""
        mine, theirs = dict(self.network.named_parameters()), dict(network.named_parameters())
        torch._foreach_lerp_(list(mine.values()), [theirs[name] for name in mine], 1 - self.momentum)

    @torch.no_grad()
    def forward(self, images):
        """Keys [n, feat_dim] of images [n, 3, h, w]."""
        return self.network(images)

    def contrasts(self, keys, labels):
        """Keys of this batch and of the queue, [n + length, feat_dim], and their labels."""
        return torch.cat([keys, self.queue]), torch.cat([labels, self.queue_labels])

    @torch.no_grad()
    def enqueue(self, keys, labels):
        """Replace the oldest keys."""
        keys, labels = keys[-len(self.queue):], labels[-len(self.queue):]   # a last batch may be larger
        places = (self.position + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, places, keys.to(self.queue))
        self.queue_labels.index_copy_(0, places, labels)
        self.position.add_(len(keys)).remainder_(len(self.queue))
