"""Batches of views: from memory on the training device, or per sample in worker processes."""
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
    free memory and the view can be drawn in batches.
    """
    batched = not view.per_sample_only and (opt.loader == 'batched' or
        opt.loader == 'auto' and pictures.decoded_bytes(view.short_side) < available_memory() / 2)
    return (BatchedLoader if batched else PerSampleLoader)(pictures, view, opt, n_views, train)


def available_memory():
    """Bytes that this process may still take: what the machine has free, within the limit of a container."""
    def read(file):
        try:
            return Path(file).read_text().split()
        except OSError:
            return []

    free, meminfo = [], read('/proc/meminfo')
    if 'MemAvailable:' in meminfo:
        free.append(1024 * int(meminfo[meminfo.index('MemAvailable:') + 1]))
    limit, used = read('/sys/fs/cgroup/memory.max'), read('/sys/fs/cgroup/memory.current')
    if limit and used and limit[0] != 'max':
        free.append(int(limit[0]) - int(used[0]))
    return min(free, default=4 * 2**30)                                 # where no one tells: 4 GB


class Batches:
    """The order of n pictures: yields the indices [bsz] of each batch and the generator that draws its views.

    In training a last batch of one picture, which batch norm cannot take, is added to the batch before it.
    """

    def __init__(self, n, opt, train):
        if train and n < 2:
            raise UserError(f'found {n} training picture, expected at least 2')
        self.n, self.seed, self.train, self.epoch = n, opt.seed, train, 0
        self.sizes = [opt.batch_size] * (n // opt.batch_size) + [n % opt.batch_size] * (n % opt.batch_size > 0)
        if train and self.sizes[-1] == 1:
            self.sizes[-2:] = [self.sizes[-2] + 1]

    def __len__(self):
        return len(self.sizes)

    def __iter__(self):
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.n, generator=generator) if self.train else torch.arange(self.n)
        for indices in order.split(self.sizes):
            yield indices, generator


class BatchedLoader:
    """Keeps the decoded pictures in memory, on the GPU where they take at most a quarter of what is free there."""

    def __init__(self, pictures, view, opt, n_views, train):
        self.labels, self.view, self.n_views = pictures.labels, view, n_views
        self.batches, self.device = Batches(len(pictures), opt, train), torch.device(opt.device)
        self.data, self.heights, self.widths = pictures.decode(view.short_side)
        if self.device.type == 'cuda' and self.data.nbytes < torch.cuda.mem_get_info()[0] / 4:
            self.data = self.data.to(self.device)

    def __len__(self):
        return len(self.batches)

    def set_epoch(self, epoch):
        self.batches.epoch = epoch

    def __iter__(self):
        for indices, generator in self.batches:
            repeated = indices.repeat(self.n_views)
            drawn = views.draw(self.view, self.heights[repeated], self.widths[repeated], generator)
            data = self.data[indices.to(self.data.device)].to(self.device)
            images = views.apply(self.view, data.repeat(self.n_views, 1, 1, 1), drawn)
            yield images, self.labels[indices].to(self.device)


class PerSampleLoader:
    """torchvision transforms in DataLoader workers."""

    def __init__(self, pictures, view, opt, n_views, train):
        if isinstance(pictures.source, list):
            pictures.sizes()                            # finds what is no picture now, not in the first epoch
        self.batches, self.device = Batches(len(pictures), opt, train), torch.device(opt.device)
        self.loader = DataLoader(_Samples(pictures, views.per_sample(view), n_views),
                                 batch_sampler=_Keys(self.batches), num_workers=opt.num_workers,
                                 persistent_workers=train and opt.num_workers > 0, collate_fn=_collate,
                                 pin_memory=self.device.type == 'cuda')

    def __len__(self):
        return len(self.batches)

    def set_epoch(self, epoch):
        self.batches.epoch = epoch

    def __iter__(self):
        for batch in self.loader:
            if isinstance(batch, UserError):
                raise batch
            images, labels = batch
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class _Keys:
    """Batch sampler: each sample is an index and the seed of its views, so that workers share no random state."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for indices, generator in self.batches:
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
