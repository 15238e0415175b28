"""Batches of views: from memory on the training device, or per sample in worker processes."""
import math
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from datasets import views
from util import UserError


def make_loader(pictures, view, opt, n_views=1, train=True):
    """An iterable of (images [n_views * bsz, 3, size, size], labels [bsz]), view after view, on opt.device.

    Call `set_epoch(epoch)` before each epoch: permutation and views depend on opt.seed and the epoch alone. With
    train=False the pictures come in their own order. opt.loader: 'batched' decodes everything into memory first,
    'per_sample' decodes in opt.num_workers processes, 'auto' takes 'batched' where the pictures fit into half of the
    free memory.
    """
    batched = opt.loader == 'batched' or (
        opt.loader == 'auto' and pictures.decoded_bytes(view.short_side) < available_memory() / 2)
    return (BatchedLoader if batched else PerSampleLoader)(pictures, view, opt, n_views, train)


def available_memory():
    """Bytes that this process may still take: what the machine has free, within the limit of a container."""
    free = []
    for file, unit in (('/proc/meminfo', 1024), ('/sys/fs/cgroup/memory.max', 1)):
        try:
            words = Path(file).read_text().split()
        except OSError:
            continue
        if 'MemAvailable:' in words:
            words = words[words.index('MemAvailable:') + 1:]
        if words[0].isdigit():                                          # 'max' is no limit
            free.append(int(words[0]) * unit)
    return min(free, default=4 * 2**30)                                 # where no one tells: 4 GB


class Loader:
    """The order of the pictures: what both loaders share."""

    def __init__(self, pictures, view, opt, n_views, train):
        self.pictures, self.view, self.n_views, self.train = pictures, view, n_views, train
        self.batch_size, self.seed, self.device = opt.batch_size, opt.seed, torch.device(opt.device)
        self.epoch = 0

    def __len__(self):
        return math.ceil(len(self.pictures) / self.batch_size)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def batches(self):
        """Yield the indices [bsz] of each batch, and the generator that draws its views."""
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        n = len(self.pictures)
        order = torch.randperm(n, generator=generator) if self.train else torch.arange(n)
        for indices in order.split(self.batch_size):
            yield indices, generator


class BatchedLoader(Loader):
    """Keeps the decoded pictures in memory, on the GPU where they take at most a quarter of what is free there."""

    def __init__(self, *args):
        super().__init__(*args)
        self.data, self.heights, self.widths = self.pictures.decode(self.view.short_side)
        if self.device.type == 'cuda' and self.data.nbytes < torch.cuda.mem_get_info()[0] / 4:
            self.data = self.data.to(self.device)

    def __iter__(self):
        for indices, generator in self.batches():
            repeated = indices.repeat(self.n_views)
            drawn = views.draw(self.view, self.heights[repeated], self.widths[repeated], generator)
            data = self.data[indices.to(self.data.device)].to(self.device)
            images = views.apply(self.view, data.repeat(self.n_views, 1, 1, 1), drawn)
            yield images, self.pictures.labels[indices].to(self.device)


class PerSampleLoader(Loader):
    """torchvision transforms in DataLoader workers."""

    def __init__(self, pictures, view, opt, n_views, train):
        super().__init__(pictures, view, opt, n_views, train)
        self.loader = DataLoader(_Samples(pictures, views.per_sample(view), n_views), batch_sampler=_Keys(self),
                                 num_workers=opt.num_workers, persistent_workers=train and opt.num_workers > 0,
                                 collate_fn=_collate, pin_memory=self.device.type == 'cuda')

    def __iter__(self):
        for batch in self.loader:
            if isinstance(batch, UserError):
                raise batch
            yield (tensor.to(self.device, non_blocking=True) for tensor in batch)


class _Keys:
    """Batch sampler: each sample is an index and the seed of its views, so that workers share no random state."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for indices, generator in self.loader.batches():
            seeds = torch.randint(2**62, indices.shape, generator=generator)
            yield list(zip(indices.tolist(), seeds.tolist()))


class _Samples(Dataset):
    def __init__(self, pictures, transform, n_views):
        self.pictures, self.transform, self.n_views = pictures, transform, n_views

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, key):
        index, seed = key
        try:
            picture = self.pictures.load(index)
        except UserError as error:              # raised in a worker it would arrive wrapped in a traceback
            return error
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return torch.stack([self.transform(picture) for _ in range(self.n_views)]), self.pictures.labels[index]


def _collate(samples):
    """[(views [n_views, 3, size, size], label)] -> images [n_views * bsz, 3, size, size], labels [bsz]."""
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    if errors:
        return errors[0]
    images, labels = zip(*samples)
    return torch.stack(images, 1).flatten(0, 1), torch.stack(labels)
