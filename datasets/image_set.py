"""Labeled images, in memory or in files, and how image files are read."""
import contextlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision import datasets as tv

from datasets.cache import cached, key_of, size_in_cache
from util.errors import UserError
from util.files import open_regular
from util.log import log
from util.memory import available_memory, release_freed_memory

try:
    from simplejpeg import decode_jpeg
except ImportError:
    decode_jpeg = None                  # optional: without it Pillow decodes

EXTENSIONS = (*tv.folder.IMG_EXTENSIONS, '.gif')
# The formats that are opened, whatever a file is called: Pillow knows more, and hands EPS to the program Ghostscript.
FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'PPM', 'TIFF', 'WEBP')
LARGEST_FILE = 2**31                    # bytes: more than any image of the number of pixels that Pillow allows
PADDING_MATTERS = 2**30                 # bytes of padded images above which the fraction of padding is looked at


@dataclass
class ImageSet:
    """n labeled images, in memory or in files.

    source: uint8 array [n, h, w, 3], or a list of n file names or objects with `read()` and `size()`.
    labels: [n] int64, numbers of `classes`; or [n, C] float32 of 0 and 1, where images have several.
    cache_dir: folder where what is decoded of files is kept for the next time, or None.
    """
    source: np.ndarray | list
    labels: torch.Tensor
    classes: list
    cache_dir: Path | None = None
    _decoded: dict = field(default_factory=dict, repr=False, compare=False)

    def __len__(self):
        return len(self.labels)

    @property
    def multi_label(self):
        return self.labels.dim() == 2

    def strata(self):
        """The class by which an image counts where as many of each are sampled, [n]: of several the rarest."""
        if not self.multi_label:
            return self.labels.numpy()
        labels = self.labels.numpy() > 0
        return np.where(labels, labels.sum(0), len(self) + 1).argmin(1)

    def load(self, i, needed=None):
        """Image i as RGB; raises UserError with the name of a file that is no readable image.

        needed(width, height) may give a smaller width and height to which the image will be resized: a JPEG file is
        then decoded at a reduced scale (1/2, 1/4, 1/8) that has three times as many pixels along each side.
        """
        if isinstance(self.source, np.ndarray):
            return Image.fromarray(self.source[i])
        if isinstance(self.source[i], str):
            return read_image(self.source[i], needed=needed)
        return self.source[i].read()

    def pixels(self, i, needed=None):
        """What `load` gives as a tensor [3, h, w] uint8, faster for JPEG files."""
        if isinstance(self.source, list) and isinstance(self.source[i], str):
            return read_pixels(self.source[i], needed)
        return torch.from_numpy(np.array(self.load(i))).permute(2, 0, 1)

    def select(self, indices):
        source = self.source[indices] if isinstance(self.source, np.ndarray) else [self.source[i] for i in indices]
        return replace(self, source=source, labels=self.labels[indices], _decoded={})

    def join(self, other):
        """These images and others of the same classes; beside images in memory the others are resized to theirs."""
        if isinstance(self.source, np.ndarray):
            size = self.source.shape[2], self.source.shape[1]
            extra = [np.asarray(other.load(i).resize(size, Image.Resampling.BILINEAR)) for i in range(len(other))]
            source = np.concatenate([self.source, np.stack(extra)])
        else:
            source = self.source + other.source
        return replace(self, source=source, labels=torch.cat([self.labels, other.labels]), _decoded={})

    def sample(self, count, seed, per_class=None):
        """At most `count` images, as many of each class as of any other while they last, sampled with `seed`.

        An image with several labels counts as of the rarest. per_class: at most so many of each class, a number or one
        for each; None as either: all.
        """
        if per_class is None and (count is None or count >= len(self)):
            return self
        order = np.random.default_rng(seed).permutation(len(self))
        labels = self.strata()[order]
        rank = np.zeros(len(self), dtype=int)                           # the position within its class
        for c in np.unique(labels):
            rank[labels == c] = np.arange((labels == c).sum())
        if per_class is not None:
            kept = rank < np.broadcast_to(per_class, len(self.classes))[labels]
            order, rank = order[kept], rank[kept]
        return self.select(np.sort(order[np.argsort(rank, kind='stable')[:count]]))

    def class_sizes(self):
        """How many images there are of each class, without hard negatives: a list."""
        return self.labels[self.labels >= 0].bincount(minlength=len(self.classes)).tolist()

    def long_tailed(self, ratio, seed):
        """At most largest * ratio**(-c / (C - 1)) images of class c of C, rounded down, at least one, sampled with
        `seed`; largest: how many the largest class has (Cui et al., 2019, https://arxiv.org/abs/1901.05555)."""
        largest, last = max(self.class_sizes()), max(1, len(self.classes) - 1)
        exact = [largest * ratio**(-c / last) for c in range(len(self.classes))]
        counts = [max(1, int(count + 1e-6)) for count in exact]         # what should be 50 may be 49.999...
        return self.sample(None, seed, counts)

    def mislabeled(self, fraction, seed):
        """The same images, of which `fraction`, sampled with `seed`, have another class, each as likely as any other:
        symmetric label noise."""
        rng, labels = np.random.default_rng([seed, 1]), self.labels.clone()     # not the order of `sample`
        wrong = torch.from_numpy(rng.permutation(len(self))[:round(fraction * len(self))])
        shift = torch.from_numpy(rng.integers(1, len(self.classes), len(wrong)))
        labels[wrong] = (labels[wrong] + shift) % len(self.classes)
        return replace(self, labels=labels)

    def counts_of_fraction(self, fraction):
        """How many images of each class a fraction of it is, at least one: [C]."""
        counts = np.bincount(self.strata(), minlength=len(self.classes))
        return np.maximum(1, (fraction * counts).round().astype(int))

    def decode(self, short_side, device='cpu', cropped=False):
        """All images as tensors, decoded once: [n, 3, w, h] uint8, on a GPU where they fit into a quarter of its free
        memory, and their heights and widths [n].

        Images larger than `short_side` are scaled down until the shorter side has that length; none is enlarged. Where
        crops of them will be resized once more (`cropped`), by a sharper filter: two bilinear ones would blur them.
        Images of unlike sizes lie in the top left corner of the largest height and width.
        """
        if isinstance(self.source, np.ndarray):
            short_side = min(short_side, *self.source.shape[1:3])       # one copy serves all who want no scaling
            cropped = cropped and short_side < min(self.source.shape[1:3])
        key = short_side, cropped
        if key not in self._decoded:
            if isinstance(self.source, np.ndarray) and short_side == min(self.source.shape[1:3]):
                data = torch.from_numpy(self.source).permute(0, 3, 2, 1).contiguous()
                sizes = torch.tensor(self.source.shape[1:3]).expand(len(self), 2)
            else:
                data, sizes = self._decode(short_side, cropped)
            data = data.to(device) if fits(data, device) else data
            self._decoded[key] = data, sizes[:, 0], sizes[:, 1]
        return self._decoded[key]

    def _decode(self, short_side, cropped):
        """What `decode` gives for files: [n, 3, w, h] uint8 and [n, 2] heights and widths."""
        if self.decoded_bytes(short_side, cropped)[0] > available_memory():
            raise UserError(f'{len(self)} images of {short_side} pixels do not fit into memory, expected --loader '
                            'workers')
        file = self._cache_file(_purpose(short_side, cropped))
        if not file:
            return self._decode_files(short_side, cropped)

        def make():
            data, sizes = self._decode_files(short_side, cropped)
            return {'data': data.numpy(), 'sizes': sizes.numpy()}

        def check(arrays):
            data, sizes = arrays['data'], arrays['sizes']
            return (data.dtype == np.uint8 and data.ndim == 4 and data.shape[:2] == (len(self), 3)
                    and sizes.dtype == np.int64 and sizes.shape == (len(self), 2) and sizes.min() > 0
                    and (sizes.max(0) <= data.shape[:1:-1]).all())
        arrays = cached(file, make, check)
        return torch.from_numpy(arrays['data']), torch.from_numpy(arrays['sizes'])

    def _cache_file(self, purpose):
        """Where the result for `purpose` is kept, or None where nothing is."""
        if self.cache_dir is None or isinstance(self.source, np.ndarray):
            return None
        if 'key' not in self._decoded:
            self._decoded['key'] = key_of(
                file for item in self.source for file in ([item] if isinstance(item, str) else item.files()))
        return self.cache_dir / f"{self._decoded['key']}-{purpose}.npz"

    def _decode_files(self, short_side, cropped):
        resampling = Image.Resampling.LANCZOS if cropped else Image.Resampling.BILINEAR

        def load(i):
            size = None

            def needed(*full_size):
                nonlocal size
                size = scaled(full_size, short_side)
                return size
            image = self.load(i, needed)
            return np.array(image.resize(size or scaled(image.size, short_side), resampling))

        with ThreadPoolExecutor(os.cpu_count()) as pool:                # Pillow decodes without the interpreter lock
            arrays = list(pool.map(load, range(len(self))))
        sizes = torch.tensor([array.shape[:2] for array in arrays])
        height, width = sizes.amax(0).tolist()
        if 3 * width * height * len(self) > available_memory():
            raise UserError(f'{len(self)} images of up to {width}x{height} do not fit into memory, expected '
                            '--loader workers')
        filled = sum(array.nbytes for array in arrays)
        if mostly_padding(3 * width * height * len(self), filled):
            log(f'{len(self)} images of up to {width}x{height} take {3 * width * height * len(self) / 1e9:.1f} GB of '
                f'memory, all padded to one size, and {filled / 1e9:.1f} GB without: --loader workers needs less')
        data = torch.zeros(len(self), 3, width, height, dtype=torch.uint8)
        for i, array in enumerate(arrays):
            data[i, :, :array.shape[1], :array.shape[0]] = torch.from_numpy(array).permute(2, 1, 0)
            arrays[i] = None
        release_freed_memory()                                          # what was decoded is not needed twice
        return data, sizes

    def sizes(self, limit=100_000):
        """Widths and heights of all files, or of `limit` spread over them; UserError for one that is no image."""
        key = 'sizes', limit
        if key not in self._decoded:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                self._decoded[key] = list(pool.map(image_size, self.source[::math.ceil(len(self) / limit)]))
        return self._decoded[key]

    def decoded_bytes(self, short_side, cropped=False):
        """Bytes of memory that `decode` takes, and of those that it fills with pixels, estimated from a part of the
        files; or the bytes of a cache."""
        if isinstance(self.source, np.ndarray):
            return self.source.nbytes, self.source.nbytes
        file = self._cache_file(_purpose(short_side, cropped))
        if file and (size := size_in_cache(file)):
            return size, size
        sizes = np.array([scaled(size, short_side) for size in self.sizes(limit=5000)])
        return 3 * int(sizes.max(0).prod()) * len(self), int(3 * sizes.prod(1).mean() * len(self))

    def statistics(self, probes=5000):
        """Mean and standard deviation per channel of 0..1 over (at most `probes` of) the images."""
        file = self._cache_file(f'statistics-{probes}')
        if not file:
            return self._statistics(probes)

        def make():
            return {'statistics': np.array(self._statistics(probes))}

        def check(arrays):
            values = arrays['statistics']
            return (values.shape == (2, 3) and values.dtype == np.float64
                    and ((values >= 0) & (values <= 1)).all() and (values[1] > 0).all())
        return tuple(map(tuple, cached(file, make, check)['statistics'].tolist()))

    def _statistics(self, probes):
        counts, levels = np.zeros((3, 256), dtype=int), np.arange(256) / 255       # how often a channel has each level
        for i in np.linspace(0, len(self) - 1, min(probes, len(self))).astype(int):
            counts += np.reshape(self.load(i).histogram(), counts.shape)
        pixels = counts[0].sum()
        mean = counts @ levels / pixels
        std = np.sqrt(np.maximum(counts @ levels**2 / pixels - mean**2, 0))
        return tuple(mean.round(4).tolist()), tuple(np.maximum(std, 1e-3).round(4).tolist())


def _purpose(short_side, cropped):
    """A part of the name of a cache of `decode`."""
    return f"resized-{short_side}{'-cropped' if cropped else ''}"


def fits(data, device):
    """Whether a tensor takes less than a quarter of a GPU's free memory."""
    return torch.device(device).type == 'cuda' and data.nbytes < torch.cuda.mem_get_info()[0] / 4


def mostly_padding(padded, filled):
    """Whether images of unlike sizes, padded to one, take far more memory than their pixels, and much of it."""
    return padded > max(PADDING_MATTERS, 8 * filled)


def scaled(size, short_side):
    """Width and height with the shorter side scaled down to short_side, rounded as transforms.Resize does; smaller
    images keep their size."""
    return tuple(int(side * short_side / min(size)) for side in size) if min(size) > short_side else tuple(size)


def open_image(file, use):
    """use(image) for an image that is just opened, its header read.

    Raises UserError where the file is no image of FORMATS, MemoryError with its name where memory does not suffice.
    """
    try:
        # Of a stream Pillow maps nothing into memory, where a file that is cut off meanwhile would end the program.
        with open_regular(file, LARGEST_FILE) as stream, Image.open(stream, formats=FORMATS) as image:
            return use(image)
    except UnidentifiedImageError as error:
        raise UserError(f"{file}: not a readable image (none of {', '.join(FORMATS)})") from error
    except MemoryError as error:
        raise MemoryError(f'{file}: {error}') from error
    except Exception as error:          # Pillow's plugins raise many kinds
        raise UserError(f'{file}: not a readable image ({str(error) or type(error).__name__})') from error


def draft(image, needed):
    """Have an opened JPEG file decoded at the smallest of its scales that leaves three times the pixels that are needed
    along each side: the resize that follows decides what is seen, not the sharper scaling of the file format."""
    image.draft(None, tuple(3 * side for side in needed(*image.size)))


def read_image(file, mode='RGB', needed=None):
    """An image file as 8-bit RGB, or another mode of Pillow; needed as for ImageSet.load."""
    def read(image):
        if needed is not None:
            draft(image, needed)
        return _converted(image, mode)
    return open_image(file, read)


def read_pixels(file, needed=None):
    """The same as a tensor [3, h, w]. A JPEG file at full scale is decoded by simplejpeg, where that is installed: from
    the file to the tensor in half of Pillow's time, with the same values."""
    def read(image):
        full_size = image.size
        if needed is not None:
            draft(image, needed)
        if decode_jpeg and image.format == 'JPEG' and image.mode == 'RGB' and image.size == full_size:
            image.fp.seek(0)
            data = image.fp.read(3 * math.prod(full_size) + 2**20)              # not whatever may follow the image
            with contextlib.suppress(ValueError):       # Pillow reads some more, or it finds what is wrong
                return torch.from_numpy(decode_jpeg(data, 'RGB')).permute(2, 0, 1)
        return torch.from_numpy(np.array(_converted(image, 'RGB'))).permute(2, 0, 1)
    return open_image(file, read)


def _converted(image, mode):
    """An opened image with 8 bits, in a mode of Pillow."""
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
    if image.mode in ('I', 'F'):
        raise ValueError(f'pixels of mode {image.mode} have no known range, expected 8 or 16 bits')
    if 'transparency' in image.info:
        image = image.convert('RGBA')
    return image.convert(mode)


def image_size(item):
    """Width and height of an entry of ImageSet.source."""
    return open_image(item, lambda image: image.size) if isinstance(item, str) else item.size()
