"""Batches of views: from memory on the training device, half in worker processes, or per sample in those."""
import atexit
import contextlib
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from datasets import views
from datasets.image_set import mostly_padding
from util.distributed import all_max, local_processes, local_slice, to_device, world_size
from util.errors import UserError
from util.log import log
from util.memory import available_memory, keep_freed_memory


def make_loader(image_set, view, opt, n_views=1, train=True, stream=()):
    """An iterable of (images [n_views * bsz, 3, size, size], labels [bsz] or [bsz, C]), view after view, on opt.device.

    Call `set_epoch(epoch)` before each epoch: permutation and views depend on opt.seed and the epoch alone, and those
    of a batch on nothing that was sampled before. With train=False the images come in their own order. Of several
    processes each gets its slice of every batch, with the views that a single process would sample.

    opt.loader: 'batched' decodes everything into memory first and computes views on opt.device; 'workers' decodes and
    crops in opt.num_workers worker processes and does the colors on a GPU, without one in the workers too;
    'per_sample' does all in the workers by torchvision's transforms; 'auto' takes 'batched' where the images fit into
    half of the free memory and padding is not most of it, else 'workers'.

    stream: (LOCAL_CROPS,) for other random views of the same batches.
    """
    kind = opt.loader
    if kind == 'auto':
        kind = train and opt.loader_chosen or _loader_that_fits(image_set, view)
        if train:
            opt.loader_chosen = kind                    # recorded, since a run that resumes must sample the same views
    if kind == 'batched':
        return BatchedLoader(image_set, view, opt, n_views, train, stream)
    return WorkerLoader(image_set, view, opt, n_views, train, stream, per_sample=opt.loader == 'per_sample')


def _loader_that_fits(image_set, view):
    """What --loader auto chooses, alike in all processes."""
    needed, filled = image_set.decoded_bytes(view.short_side, bool(view.crop))
    too_large = needed >= available_memory() / 2 / local_processes() or mostly_padding(needed, filled)
    return 'workers' if all_max(too_large) else 'batched'


# Pixels of all views of a run from which on compiled operations pay: they cost 7 to 25 seconds at the first use on a
# machine, and save 4 seconds for a million views of 32 pixels on two CPU cores (benchmarks/bench_views.py).
COMPILE_PAYS = 2**33

# Streams of random numbers of a batch beside that of its crops: _Finish, the classes of --sampler pk, small crops.
FINISH, CLASSES, LOCAL_CROPS = 1, 2, 3


class Batches:
    """Which images each batch of an epoch holds: yields (step, indices [bsz] of images), from first_step on.

    labels: [n] of all images, where -(c + 1) counts as class c; with 'shuffle' also [n, C]. Without `train` all images
    come in their order. In training by opt.sampler:
    - 'shuffle': all images, in random order. A tiny last batch shares the images of the one before it equally: one of
      4 images beside those of 64 costs a small network 6 points of accuracy, since evaluation takes the running
      statistics of batch norms as the last batch left them; one of 1 image they cannot take at all.
    - 'class_balanced': as many images, each class equally often or once more, and in a class each image.
    - 'pk': opt.images_per_class images of each of as many random classes as a batch holds; small classes repeat theirs.
    """

    def __init__(self, labels, opt, train):
        n, bsz = len(labels), opt.batch_size
        self.n, self.seed, self.train = n, opt.seed, train
        self.epoch, self.first_step = 0, 0
        self.sampler = opt.sampler if train else None
        self.images_per_class = opt.images_per_class
        if train and n < 2:
            raise UserError(f'found {n} training image, expected at least 2')
        self.batch_sizes = [bsz] * (n // bsz) + [n % bsz] * (n % bsz > 0)
        if self.sampler == 'pk':
            self.batch_sizes = [bsz] * max(1, n // bsz)
        elif train and n < bsz:
            log(f'--batch_size {bsz}: found {n} training images, each batch holds all of them')
        elif train and n % bsz and n % bsz < max(2, bsz / 8):
            both = bsz + n % bsz
            self.batch_sizes[-2:] = [both - both // 2, both // 2] if both > 3 else [both]
        if self.sampler in ('class_balanced', 'pk'):
            ordered, order = torch.where(labels < 0, -labels - 1, labels).sort(stable=True)
            self.classes = order.split(ordered.unique_consecutive(return_counts=True)[1].tolist())  # indices of each
        if self.sampler == 'pk' and len(self.classes) * self.images_per_class < bsz:
            raise UserError(f'--sampler pk: found {len(self.classes)} classes, expected at least '
                            f'{bsz // self.images_per_class}, --batch_size {bsz} / --images_per_class '
                            f'{self.images_per_class}')

    def __iter__(self):
        if self.sampler == 'pk':
            batches = (self._pk_batch(step) for step in range(self.first_step, len(self.batch_sizes)))
        else:
            batches = self._order().split(self.batch_sizes)[self.first_step:]
        yield from enumerate(batches, self.first_step)

    def _order(self):
        """The images of an epoch, one after the other: [n]."""
        if not self.train:
            return torch.arange(self.n)
        generator = self.generator()
        order = torch.randperm(self.n, generator=generator)
        if self.sampler == 'shuffle':
            return order
        counts = torch.full((len(self.classes),), self.n // len(self.classes))
        counts[torch.randperm(len(counts), generator=generator)[:self.n % len(counts)]] += 1
        parts = [_sampled(*part, generator) for part in zip(self.classes, counts.tolist())]
        return torch.cat(parts)[order]

    def _pk_batch(self, step):
        generator, k = self.generator(step, CLASSES), self.images_per_class
        chosen = torch.randperm(len(self.classes), generator=generator)[:self.batch_sizes[step] // k]
        batch = torch.cat([_sampled(self.classes[number], k, generator) for number in chosen.tolist()])
        return batch[torch.randperm(len(batch), generator=generator)]   # each device gets images of all classes

    def generator(self, *key):
        """Random numbers of the epoch, or of a batch: (step,) for its views, or (step, stream, ...)."""
        return torch.Generator().manual_seed(self.seed_of(*key))

    def seed_of(self, *key):
        key = [number + 1 for number in key]            # to NumPy [a, b] and [a, b, 0] are the same
        seed, = np.random.SeedSequence([self.seed, self.epoch, *key]).generate_state(1, np.uint64)
        return int(seed)


def _sampled(members, count, generator):
    """`count` of the members [n] in random order, each equally often or once more."""
    rounds = [torch.randperm(len(members), generator=generator) for _ in range(math.ceil(count / len(members)))]
    return members[torch.cat([members[:0], *rounds])[:count]]


class Loader:
    """What all loaders have: `len`, the steps of an epoch; `batch_sizes`, the images of each batch in all processes;
    `labels` [n] of all images."""
    operations = views.OPERATIONS                       # of views.apply

    def __init__(self, labels, opt, train, stream=()):
        self.batches, self.labels, self.stream = Batches(labels, opt, train), labels, stream
        self.batch_sizes = self.batches.batch_sizes

    def __len__(self):
        return len(self.batch_sizes)

    def _set_operations(self, view, opt, n_views, train):
        """Set the operations of views.apply on opt.device: compiled where the run is long enough."""
        compiled = train and opt.epochs * len(self.labels) * n_views * view.size**2 >= COMPILE_PAYS
        self.operations = views.compiled_operations(torch.device(opt.device)) if compiled else views.OPERATIONS

    def _operations(self, step):
        """Those of a batch: for one of another size than the first they would be compiled again."""
        return self.operations if self.batch_sizes[step] == self.batch_sizes[0] else views.OPERATIONS

    def set_epoch(self, epoch, first_step=0):
        """What is iterated over next: the batches of an epoch from a step on, counted from 0. Not during an iteration.

        Raises UserError for a step after its end.
        """
        if first_step > len(self):
            raise UserError(f'--resume: the checkpoint has made {first_step} steps of epoch {epoch}, found {len(self)} '
                            'steps in it, expected the same images')
        self.batches.epoch, self.batches.first_step = epoch, first_step


class BatchedLoader(Loader):
    """Keeps the decoded images in memory, on the GPU where they fit, else prefetched from the host's."""

    def __init__(self, image_set, view, opt, n_views, train, stream):
        super().__init__(image_set.labels, opt, train, stream)
        self.view, self.n_views, self.device = view, n_views, torch.device(opt.device)
        self.data, self.heights, self.widths = image_set.decode(view.short_side, self.device, bool(view.crop))
        if self.device.type == 'cpu':
            self._set_operations(view, opt, n_views, train)
        on_host = self.data.device.type == 'cpu'                        # too many for the GPU, if there is one
        self.copying = torch.cuda.Stream() if on_host and self.device.type == 'cuda' else None

    def __iter__(self):
        batches = (self._batch(step, indices) for step, indices in self.batches)
        # To launch the kernels of a step often takes the host longer than the GPU takes for the step: a thread launches
        # those of the views. They are not compiled: compiling resets the random numbers of all threads when it ends.
        return batches if self.device.type == 'cpu' else prefetch(batches)

    def _batch(self, step, indices):
        repeated, mine = indices.repeat(self.n_views), local_slice(len(indices))
        params = views.sample_params(self.view, self.heights[repeated], self.widths[repeated],
                                     self.batches.generator(step, *self.stream), self.device)
        params, indices = params.local(mine, len(indices)), indices[mine]
        with torch.cuda.stream(self.copying):
            data = to_device(self.data.index_select(0, to_device(indices, self.data.device)), self.device)
        if self.copying:
            self.copying.synchronize()                   # only this thread waits
            data.record_stream(torch.cuda.current_stream())
        return (views.apply(self.view, data, params, self._operations(step)),
                to_device(self.labels[indices], self.device))


def prefetch(iterator):
    """The items of an iterator; each is made in a thread while the one before is used."""
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None       # of this thread and its GPU
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_stream, initargs=(stream,)) as thread:
        following = thread.submit(next, iterator, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, iterator, None)
            yield item
            del item


class MultiCrop:
    """Two loaders of the same batches as one, of ((images of the first, of the second), labels)."""

    def __init__(self, loader, local):
        self.loader, self.local, self.batch_sizes = loader, local, loader.batch_sizes

    def __len__(self):
        return len(self.loader)

    def set_epoch(self, epoch, first_step=0):
        self.loader.set_epoch(epoch, first_step)
        self.local.set_epoch(epoch, first_step)

    def __iter__(self):
        for (images, labels), (local, _) in zip(self.loader, self.local):
            yield (images, local), labels


class FeatureLoader(Loader):
    """Batches of features [bsz, dim] instead of a loader's images, and labels: `compute(loader)` gives those of all
    images, [n, dim] and [n], once, when the first batch is asked for."""

    def __init__(self, loader, compute, opt, train):
        super().__init__(loader.labels, opt, train)
        self.loader, self.compute, self.features = loader, compute, None

    def __iter__(self):
        if self.features is None:
            self.features, self.labels = self.compute(self.loader)
            self.loader = None                          # its images are not needed any more
        for _, indices in self.batches:
            indices = to_device(indices[local_slice(len(indices))], self.labels.device)
            yield self.features[indices], self.labels[indices]


class WorkerLoader(Loader):
    """Worker processes decode and crop, and with per_sample do all else by torchvision's transforms too."""

    def __init__(self, image_set, view, opt, n_views, train, stream, per_sample):
        if isinstance(image_set.source, list):
            image_set.sizes()                           # a file that is no image is found now, not in the first epoch
        super().__init__(image_set.labels, opt, train, stream)
        self.n_views, self.device = n_views, torch.device(opt.device)
        self.finish = None                              # what the main process does to the workers' batches
        if per_sample:
            augment, finish = _PerSample(view, n_views), None
        else:
            on_cpu = self.device.type == 'cpu'
            # Without a GPU AutoAugment and RandAugment are done by PIL, which is faster for large images.
            augment = _Crops(view if on_cpu else views.without_policy(view), n_views)
            finish = views.without_crop(view)
            finish = _Finish(views.without_policy(finish) if on_cpu else finish, n_views)
            if not (on_cpu and finish.changes_colors()):        # there the workers do it
                self.finish, finish = finish, None
            if not on_cpu:
                self._set_operations(view, opt, n_views, train)
        # Batches that wait may take a quarter of the memory: those of thousands of large images are gigabytes.
        images_here = math.ceil(min(opt.batch_size, len(image_set)) / world_size())
        batch_bytes = images_here * n_views * 3 * view.size**2 * (1 if self.finish else 4)
        waiting = max(1, int(available_memory() / local_processes() / 4 / batch_bytes))
        workers = min(opt.num_workers, waiting)
        self.busy = self.device.type == 'cpu' and workers > 0           # the cores, with the workers
        self.loader = DataLoader(_Samples(image_set, augment, finish), batch_size=None, sampler=_Keys(self),
                                 num_workers=workers, persistent_workers=train and workers > 0,
                                 prefetch_factor=max(1, min(4, waiting // workers)) if workers else None,
                                 pin_memory=self.device.type == 'cuda', worker_init_fn=_start_worker)
        self.empty = torch.empty(0, 3, view.size, view.size), image_set.labels[:0]

    def __iter__(self):
        for step, batch in enumerate(self._loaded(), self.batches.first_step):
            if isinstance(batch, UserError):
                raise UserError(str(batch))     # not itself: its traceback would hold this frame, and that the workers
            images, labels = (part.to(self.device, non_blocking=True) for part in batch or self.empty)
            if self.finish and len(images):
                with _one_thread() if self.busy else contextlib.nullcontext():
                    images = self.finish(images, self.batch_sizes[step], local_slice(self.batch_sizes[step]),
                                         self.batches.generator(step, FINISH, *self.stream), self._operations(step))
            yield images, labels

    def _loaded(self):
        """What self.loader gives; UserError where its processes end, or cannot be started or reached."""
        workers = self.loader.num_workers
        try:
            batches = iter(self.loader)
            if workers and hasattr(signal, 'SIGCHLD') and threading.current_thread() is threading.main_thread():
                # PyTorch's handler would raise an error wherever the program is when a worker ends: in a step, or while
                # it writes a checkpoint. Without it the next batch is the error, after at most five seconds.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield from batches
        except (EOFError, MemoryError, OSError, RuntimeError) as error:
            if not workers or isinstance(error, RuntimeError) and not re.search(WORKERS_FAIL, str(error)):
                raise
            # The error of a worker comes with a traceback, of which the last line is the reason.
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise UserError(f'--num_workers {workers}: worker processes failed ({reason}), expected fewer of them, or '
                            'more memory, a larger /dev/shm (--shm-size of docker) or a higher limit of open files '
                            '(ulimit -n)') from error


# Messages of RuntimeErrors, of PyTorch or Python, that are not the program's.
WORKERS_FAIL = (r'DataLoader worker \(pid|MemoryError|allocate memory|shared memory|open files|ancdata|'
                'start new thread|Pin memory thread exited')


def _start_worker(_):
    """What a worker process does first."""
    keep_freed_memory()                                 # of one image for the next
    # These often go to all processes of a job: workers continue while the program writes its checkpoint.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # A batch that cannot be sent would be lost, with a traceback, and waited for without end: the worker ends instead,
    # which the program notices.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)
    sys.excepthook = _end_worker


def _end_worker(*error):
    os._exit(1)


@atexit.register
def _end_workers():
    """Without this Python would end with SIGTERM those that an error left, and wait for them."""
    for child in multiprocessing.active_children():
        if child.daemon:                                                # as DataLoader makes them
            child.kill()


@contextlib.contextmanager
def _one_thread():
    """Among workers that use all cores the threads of an operation wait for each other, many times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Keys:
    """Sampler of batches: the index of each image and the seed of its views, so that workers share no random state;
    the images of the batch in all processes, the slice of this one, and the seed of _Finish."""

    def __init__(self, loader):
        self.batches, self.stream = loader.batches, loader.stream

    def __iter__(self):
        for step, indices in self.batches:
            seeds = torch.randint(2**62, indices.shape, generator=self.batches.generator(step, *self.stream))
            mine = local_slice(len(indices))
            yield (list(zip(indices[mine].tolist(), seeds[mine].tolist())), len(indices), mine,
                   self.batches.seed_of(step, FINISH, *self.stream))


class _Samples(Dataset):
    """Batches of images [n_views * bsz, 3, size, size], view after view, and labels by the keys of _Keys; None for one
    without samples; a UserError for a file that is no image."""

    def __init__(self, image_set, augment, finish):
        self.image_set, self.augment, self.finish = image_set, augment, finish

    def __getitem__(self, batch):
        keys, *whole, seed = batch
        if not keys:
            return None
        try:
            images = torch.stack([self.augment(self.image_set, *key) for key in keys], 1).flatten(0, 1)
        except UserError as error:              # raised in a worker it would arrive wrapped in a traceback
            return error
        if self.finish:
            images = self.finish(images, *whole, torch.Generator().manual_seed(seed))
        return images, self.image_set.labels[[index for index, _ in keys]]


@contextlib.contextmanager
def _seeded(seed):
    """torchvision's transforms sample from this seed alone."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)           # torch.manual_seed would prepare for CUDA each time
    try:
        yield
    finally:
        torch.set_rng_state(before)


class _PerSample:
    """Views [n_views, 3, size, size] of an image by torchvision's transforms."""

    def __init__(self, view, n_views):
        self.transform, self.n_views = views.per_sample(view), n_views

    def __call__(self, image_set, index, seed):
        image = image_set.load(index)
        with _seeded(seed):
            return torch.stack([self.transform(image) for _ in range(self.n_views)])


class _Finish:
    """The operations of a view that _Crops does not do, for batches [n_views * bsz, 3, size, size] uint8."""

    def __init__(self, view, n_views):
        self.view, self.n_views = view, n_views

    def changes_colors(self):
        return bool(self.view.jitter or self.view.grayscale or self.view.blur)

    def __call__(self, images, bsz, mine, generator, operations=None):
        """images: of the slice `mine` of a batch of bsz images in all processes."""
        sizes = torch.full((self.n_views * bsz,), self.view.size)
        params = views.sample_params(self.view, sizes, sizes, generator, images.device).local(mine, bsz)
        return views.apply(self.view, images.transpose(2, 3), params, operations)


class _Crops:
    """Cropped and flipped views [n_views, 3, size, size] uint8 of an image, after AutoAugment and RandAugment if the
    view has them; _Finish does the others.

    A JPEG is decoded at the smallest of its scales (1, 1/2, 1/4, 1/8) that gives each crop three times its final size.
    """

    def __init__(self, view, n_views):
        self.view, self.n_views = view, n_views
        # Steps that need PIL images; flips alone do not.
        self.after = transforms.Compose(views.after_crop(view)) if views.after_crop(replace(view, flip=0.)) else None

    def __call__(self, image_set, index, seed):
        size, boxes = self.view.size, None
        generator = torch.Generator().manual_seed(seed)

        def needed(width, height):
            nonlocal boxes
            boxes = views.boxes_of_image(self.view, height, width, self.n_views, generator)
            boxes = [(top / height, left / width, box_h / height, box_w / width) for top, left, box_h, box_w in boxes]
            return [math.ceil(size / min(box[side] for box in boxes)) for side in (3, 2)]
        pixels = image_set.pixels(index, needed)
        height, width = pixels.shape[1:]
        if boxes is None:                                                   # no file whose header has the size
            needed(width, height)
        boxes = [(top * height, left * width, box_h * height, box_w * width) for top, left, box_h, box_w in boxes]
        crops = (tensor_crops if self.view.crop else pil_crops)(pixels, boxes, size)
        if self.after:
            with _seeded(seed):
                crops = [to_tensor(self.after(to_image(crop))) for crop in crops]
        else:
            flips = torch.rand(self.n_views, generator=generator).tolist()
            crops = [crop.flip(2) if flip < self.view.flip else crop for crop, flip in zip(crops, flips)]
        return torch.stack(crops)


def to_tensor(image):
    """A PIL image as [3, h, w] uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(pixels):
    """[3, h, w] uint8 as a PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def tensor_crops(pixels, boxes, size):
    """Boxes (top, left, height, width), rounded to pixels, of an image [3, h, w] uint8: tensors [3, size, size].

    PyTorch's antialiased resize of uint8 is Pillow's, and twice as fast.
    """
    boxes = [[round(value) for value in box] for box in boxes]
    return [F.interpolate(pixels[None, :, top:top + max(1, box_h), left:left + max(1, box_w)], size=(size, size),
                          mode='bilinear', antialias=True)[0] for top, left, box_h, box_w in boxes]


def pil_crops(pixels, boxes, size):
    """The same of boxes that may be parts of pixels."""
    image = to_image(pixels)
    return [to_tensor(image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + box_w, top + box_h)))
            for top, left, box_h, box_w in boxes]
