"""Labelled pictures and where they come from: scikit-learn's digits, CIFAR, folders of pictures."""
import math
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision import datasets as tv

from datasets.cache import cached, key_of, size_in_cache
from util.distributed import in_turn
from util.errors import UserError, is_peer_failure
from util.log import log
from util.memory import release_freed_memory

EXTENSIONS = (*tv.folder.IMG_EXTENSIONS, '.gif')
# The formats that are opened, whatever a file is called: Pillow knows more, and hands EPS to the program Ghostscript.
FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'PPM', 'TIFF', 'WEBP')
LARGEST_FILE = 2**31                    # bytes: more than any image of the number of pixels that Pillow allows
PADDING_MATTERS = 2**30                 # bytes of padded images from which on it is asked how much of them is padding


@dataclass
class Pictures:
    """n labelled pictures, in memory or in files.

    source: uint8 array [n, h, w, 3], or a list of n file names or objects with `read()` and `size()`.
    labels: [n] int64, numbers of `classes`.
    cache_dir: folder where what is decoded of files is kept for the next time, or None.
    """
    source: np.ndarray | list
    labels: torch.Tensor
    classes: list
    cache_dir: Path | None = None
    _decoded: dict = field(default_factory=dict, repr=False, compare=False)

    def __len__(self):
        return len(self.labels)

    def load(self, i, needed=None):
        """Picture i as RGB; raises UserError with the name of a file that is no readable picture.

        needed(width, height) may give a smaller width and height that are enough: a JPEG file is then decoded at a
        reduced scale, if it has one that is not below.
        """
        if isinstance(self.source, np.ndarray):
            return Image.fromarray(self.source[i])
        if isinstance(self.source[i], str):
            return read_picture(self.source[i], needed=needed)
        return self.source[i].read()

    def select(self, indices):
        source = self.source[indices] if isinstance(self.source, np.ndarray) else [self.source[i] for i in indices]
        return replace(self, source=source, labels=self.labels[indices], _decoded={})

    def join(self, other):
        """These pictures and others of the same classes; beside pictures in memory the others are resized to theirs."""
        if isinstance(self.source, np.ndarray):
            size = self.source.shape[2], self.source.shape[1]
            extra = [np.asarray(other.load(i).resize(size, Image.Resampling.BILINEAR)) for i in range(len(other))]
            source = np.concatenate([self.source, np.stack(extra)])
        else:
            source = self.source + other.source
        return replace(self, source=source, labels=torch.cat([self.labels, other.labels]), _decoded={})

    def sample(self, count, seed, per_class=None):
        """At most `count` pictures, as many of each class as of any other while they last, drawn with `seed`.

        per_class: at most so many of each class; None as either: all.
        """
        if per_class is None and (count is None or count >= len(self)):
            return self
        order = np.random.default_rng(seed).permutation(len(self))
        labels = self.labels.numpy()[order]
        rank = np.zeros(len(self), dtype=int)                           # the how-manieth of its class
        for c in np.unique(labels):
            rank[labels == c] = np.arange((labels == c).sum())
        if per_class is not None:
            order, rank = order[rank < per_class], rank[rank < per_class]
        return self.select(np.sort(order[np.argsort(rank, kind='stable')[:count]]))

    def decode(self, short_side):
        """All pictures as tensors, decoded once: [n, 3, w, h] uint8 and their heights and widths [n].

        Pictures larger than `short_side` are scaled down until the shorter side has that length; none is enlarged.
        Pictures of unlike sizes lie in the top left corner of the largest height and width.
        """
        if isinstance(self.source, np.ndarray):
            short_side = min(short_side, *self.source.shape[1:3])       # one copy serves all who want no scaling
        if short_side not in self._decoded:
            if isinstance(self.source, np.ndarray) and short_side == min(self.source.shape[1:3]):
                data = torch.from_numpy(self.source).permute(0, 3, 2, 1).contiguous()
                sizes = torch.tensor(self.source.shape[1:3]).expand(len(self), 2)
            else:
                data, sizes = self._decode(short_side)
            self._decoded[short_side] = data, sizes[:, 0], sizes[:, 1]
        return self._decoded[short_side]

    def _decode(self, short_side):
        """What `decode` gives for files: [n, 3, w, h] uint8 and [n, 2] heights and widths."""
        if self.decoded_bytes(short_side)[0] > available_memory():
            raise UserError(f'{len(self)} pictures of {short_side} pixels do not fit into memory, expected --loader '
                            'workers')
        file = self._cache_file(f'decoded-{short_side}')
        if not file:
            return self._decode_files(short_side)

        def make():
            data, sizes = self._decode_files(short_side)
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

    def _decode_files(self, short_side):
        def load(i):
            size = None

            def needed(*whole):
                nonlocal size
                size = scaled(whole, short_side)
                return size
            picture = self.load(i, needed)
            return np.array(picture.resize(size or scaled(picture.size, short_side), Image.Resampling.BILINEAR))

        with ThreadPoolExecutor(os.cpu_count()) as pool:                # Pillow decodes without the interpreter lock
            arrays = list(pool.map(load, range(len(self))))
        sizes = torch.tensor([array.shape[:2] for array in arrays])
        height, width = sizes.amax(0).tolist()
        if 3 * width * height * len(self) > available_memory():
            raise UserError(f'{len(self)} pictures of up to {width}x{height} do not fit into memory, expected '
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
        """Widths and heights of all files, or of `limit` spread over them; UserError for one that is no picture."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(picture_size, self.source[::math.ceil(len(self) / limit)]))

    def decoded_bytes(self, short_side):
        """Bytes of memory that `decode` takes, and of those that it fills with pixels, as far as a part of the files
        tells; a cache is taken as it is."""
        if isinstance(self.source, np.ndarray):
            return self.source.nbytes, self.source.nbytes
        file = self._cache_file(f'decoded-{short_side}')
        if file and (size := size_in_cache(file)):
            return size, size
        sizes = np.array([scaled(size, short_side) for size in self.sizes(limit=5000)])
        return 3 * int(sizes.max(0).prod()) * len(self), int(3 * sizes.prod(1).mean() * len(self))

    def statistics(self, probes=5000):
        """Mean and standard deviation per channel of 0..1 over (at most `probes` of) the pictures."""
        file = self._cache_file(f'statistics-{probes}')
        if not file:
            return self._statistics(probes)

        def make():
            return {'statistics': np.array(self._statistics(probes))}

        def check(arrays):
            values = arrays['statistics']
            return (values.shape == (2, 3) and values.dtype == np.float64 and np.isfinite(values).all()
                    and (values[1] > 0).all())
        return tuple(map(tuple, cached(file, make, check)['statistics'].tolist()))

    def _statistics(self, probes):
        counts, levels = np.zeros((3, 256), dtype=int), np.arange(256) / 255       # how often a channel has each level
        for i in np.linspace(0, len(self) - 1, min(probes, len(self))).astype(int):
            counts += np.reshape(self.load(i).histogram(), counts.shape)
        pixels = counts[0].sum()
        mean = counts @ levels / pixels
        std = np.sqrt(np.maximum(counts @ levels**2 / pixels - mean**2, 0))
        return tuple(mean.round(4).tolist()), tuple(np.maximum(std, 1e-3).round(4).tolist())


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


def mostly_padding(padded, filled):
    """Whether images of unlike sizes, padded to one, take far more memory than their pixels, and much of it."""
    return padded > max(PADDING_MATTERS, 8 * filled)


def scaled(size, short_side):
    """Width and height with the shorter side scaled down to short_side, rounded as transforms.Resize does; smaller
    pictures keep their size."""
    return tuple(int(side * short_side / min(size)) for side in size) if min(size) > short_side else tuple(size)


def open_regular(file, largest):
    """A binary stream of a regular file, links followed; ValueError for a pipe or device, of which reading may never
    end, and for a file of no bytes (also those of the kernel in /proc) or more than `largest`."""
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError('not a regular file')
    if not 0 < status.st_size <= largest:
        raise ValueError(f'{status.st_size} bytes, expected 1 to {largest}')
    return open(file, 'rb')


def open_picture(file, use):
    """use(picture) for a picture that is just opened, its header read.

    Raises UserError where the file is no picture of FORMATS, MemoryError with its name where memory does not suffice.
    """
    try:
        # Of a stream Pillow maps nothing into memory, where a file that is cut off meanwhile would end the program.
        with open_regular(file, LARGEST_FILE) as stream, Image.open(stream, formats=FORMATS) as picture:
            return use(picture)
    except UnidentifiedImageError as error:
        raise UserError(f"{file}: not a readable picture (none of {', '.join(FORMATS)})") from error
    except MemoryError as error:
        raise MemoryError(f'{file}: {error}') from error
    except Exception as error:          # Pillow's plugins raise many kinds
        raise UserError(f'{file}: not a readable picture ({str(error) or type(error).__name__})') from error


def read_picture(file, mode='RGB', needed=None):
    """A picture file as 8-bit RGB, or another mode of Pillow; needed as for Pictures.load."""
    def read(picture):
        if needed is not None:
            picture.draft(None, needed(*picture.size))      # of the formats only JPEG has scales
        if picture.mode.startswith('I;16') or (picture.mode == 'I' and picture.format in ('PNG', 'PPM')):
            return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert(mode)
        if picture.mode in ('I', 'F'):
            raise ValueError(f'pixels of mode {picture.mode} have no known range, expected 8 or 16 bits')
        if 'transparency' in picture.info:
            picture = picture.convert('RGBA')
        return picture.convert(mode)
    return open_picture(file, read)


def picture_size(item):
    """Width and height of an entry of Pictures.source."""
    return open_picture(item, lambda picture: picture.size) if isinstance(item, str) else item.size()


# Each source takes the options and returns training and validation pictures.

def digits(opt):
    """scikit-learn's 1,797 scans of handwritten digits, 8x8, stratified into 80 % training and 20 % validation."""
    from sklearn.datasets import load_digits  # a slow import that no other dataset needs
    data = load_digits()
    source = (data.images * (255 / 16)).round().astype(np.uint8)[..., None].repeat(3, -1)
    pictures = Pictures(source, torch.from_numpy(data.target).long(), [str(name) for name in data.target_names])
    return split(pictures, 0.2, seed=0)


def cifar(opt):
    """CIFAR-10 or CIFAR-100, downloaded into the data folder when it is not there."""
    name = {'cifar10': 'CIFAR10', 'cifar100': 'CIFAR100'}[opt.dataset]
    parts = []
    for train in (True, False):
        new = not os.path.exists(opt.data_folder)
        try:
            data = in_turn(lambda train=train: getattr(tv, name)(opt.data_folder, train=train, download=True))
        except (OSError, RuntimeError) as error:
            if is_peer_failure(error):
                raise
            if new and os.path.isdir(opt.data_folder) and not os.listdir(opt.data_folder):
                os.rmdir(opt.data_folder)
            raise UserError(f'--dataset {opt.dataset}: cannot be read from or downloaded into '
                            f'--data_folder {opt.data_folder} ({error})') from error
        parts.append(Pictures(data.data, torch.tensor(data.targets), data.classes))
    return parts


def imagenet(opt):
    """The folders train/<class>/ and val/<class>/ of ILSVRC 2012, as torchvision's ImageFolder reads them."""
    for part in ('train', 'val'):
        if not (Path(opt.data_folder) / part).is_dir():
            raise UserError(f'--dataset imagenet: --data_folder {opt.data_folder} has no {part}/, expected '
                            'train/<class>/<picture> and val/<class>/<picture>')
    return path(opt)


def path(opt):
    """A folder of pictures, <class>/<picture>: in train/ and val/ (or test/), or split 90/10 with --seed."""
    root = Path(opt.data_folder)
    if not root.is_dir():
        raise UserError(f'--data_folder {root}: no such folder')
    train, val = root / 'train', next((root / name for name in ('val', 'test') if (root / name).is_dir()), None)
    if train.is_dir() and val:
        train, val = folder(train), folder(val)
        unknown = sorted(set(val.classes) - set(train.classes))
        if unknown:
            raise UserError(f'--data_folder {root}: class {unknown[0]!r} has validation but no training pictures')
        numbers = torch.tensor([train.classes.index(name) for name in val.classes])
        return train, replace(val, labels=numbers[val.labels], classes=train.classes)
    if train.is_dir() or val:
        raise UserError(f'--data_folder {root}: found {(val or train).name}/ alone, expected train/ and val/ (or '
                        'test/), or one folder per class')
    opt.split_seed = opt.seed if opt.split_seed is None else opt.split_seed
    return split(folder(root), 0.1, opt.split_seed)


def folder(root):
    """The pictures below <root>/<class>/, classes and files in the order of their names."""
    folders = [name for name in os.listdir(root) if os.path.isdir(root / name) and not name.startswith('.')]
    if not folders:
        raise UserError(f'{root}: no folder of pictures in it, expected {root}/<class>/<picture>')
    files, labels, skipped = [], [], 0
    for number, name in enumerate(sorted(folders, key=as_text)):
        found = sorted(files_below(root / name), key=as_text)
        pictures = [file for file in found if file.lower().endswith(EXTENSIONS)]
        if not pictures:
            raise UserError(f"{root / name}: no pictures in it, expected files that end in {', '.join(EXTENSIONS)}")
        files += pictures
        labels += [number] * len(pictures)
        skipped += len(found) - len(pictures)
    if skipped:
        log(f'{root}: {skipped} files that are no pictures by their names are left out')
    return Pictures(files, torch.tensor(labels), sorted(map(as_text, folders)))


def as_text(name):
    """The name of a file or folder as UTF-8 tells it, whatever the locale: the same names and order everywhere."""
    return os.fsencode(name).decode('utf-8', 'surrogateescape')


def files_below(folder):
    """All files below a folder but hidden ones; links are followed, each folder is visited once, none above it.

    Raises OSError where a folder cannot be listed.
    """
    def stop(error):
        raise error

    start, visited = os.path.realpath(folder), set()
    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders.sort(key=as_text)                       # of several links to a folder the same one every time
        real = os.path.realpath(parent)
        if real in visited or start.startswith(os.path.join(real, '')):
            folders.clear()
            continue
        visited.add(real)
        yield from (os.path.join(parent, name) for name in names if not name.startswith('.'))


def split(pictures, share, seed):
    """Training and validation pictures: `share` of every class, at least one picture, is held out."""
    counts = torch.bincount(pictures.labels, minlength=len(pictures.classes))
    if counts.min() < 2:
        raise UserError(f'class {pictures.classes[counts.argmin()]!r} has {counts.min()} picture, expected at least 2 '
                        'to split into training and validation')
    order = np.random.default_rng(seed).permutation(len(pictures))
    held_out = np.zeros(len(pictures), dtype=bool)
    for c, count in enumerate(counts.tolist()):
        members = order[pictures.labels.numpy()[order] == c]
        held_out[members[:max(1, round(share * count))]] = True
    return pictures.select(np.flatnonzero(~held_out)), pictures.select(np.flatnonzero(held_out))
