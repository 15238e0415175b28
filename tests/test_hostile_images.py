"""Images, masks and caches that mean harm, or are only odd: what is opened, what is named, what ends the program."""
import io
import json
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torch.utils.data import dataloader

from datasets import cache, image_set, load_images, make_loader, sources
from datasets import loader as loaders
from datasets.augmentations import augmentation_folder
from datasets.mvip import mvip, super_classes
from datasets.views import View
from util import arguments
from util.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
LOADERS = ['batched', 'workers', 'per_sample']


def content(kind, image=None, **settings):
    buffer = io.BytesIO()
    (image or Image.new('RGB', (20, 12), (200, 100, 50))).save(buffer, kind, **settings)
    return buffer.getvalue()


def options(root, **changes):
    return arguments.defaults(**{'dataset': 'path', 'data_folder': str(root), 'device': 'cpu', 'num_workers': 0,
                                 'size': 16,
                            'batch_size': 4, 'mean': (0.,) * 3, 'std': (1.,) * 3, **changes})


def read(root, loader='batched', **changes):
    """All training batches of a folder."""
    opt = options(root, loader=loader, **changes)
    return list(make_loader(load_images(opt).train, View(16, opt.mean, opt.std, crop=(0.2, 1.)), opt))


@pytest.fixture
def pipe():
    """pipe(file): make a named pipe; whoever waits for it is let go after some seconds."""
    timers = []

    def make(file):
        os.mkfifo(file)
        timers.append(threading.Timer(10, lambda: os.close(os.open(file, os.O_RDWR))))
        timers[-1].start()
    yield make
    for timer in timers:
        timer.cancel()


# Formats

@pytest.mark.parametrize('kind', ['EPS', 'PDF', 'ICO', 'TGA', 'PCX', 'SGI', 'DDS', 'ICNS', 'JPEG2000', 'DIB'])
@pytest.mark.parametrize('name', ['x.jpg', 'x.png', 'x.tif'])
def test_files_of_other_formats_are_rejected_whatever_they_are_called(tmp_path, kind, name):
    (tmp_path / name).write_bytes(content(kind, Image.new('RGB', (32, 32))))
    for function in (image_set.read_image, image_set.image_size):
        with pytest.raises(UserError, match=f'{name}: not a readable image .none of JPEG, PNG, GIF'):
            function(str(tmp_path / name))


@pytest.mark.parametrize('loader', LOADERS)
def test_no_image_starts_a_program(image_folder, tmp_path, monkeypatch, loader):
    """Pillow hands EPS to Ghostscript."""
    program = tmp_path / 'gs'
    program.write_text(f'#!/bin/sh\ntouch {tmp_path}/started\n')
    program.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, 'gs_binary', str(program))
    root = image_folder()
    (root / 'red' / 'x.jpg').write_bytes(content('EPS'))
    with pytest.raises(UserError, match='x.jpg: not a readable image'):
        read(root, loader)
    assert not (tmp_path / 'started').exists()


@pytest.mark.parametrize('kind, name, settings', [
    ('JPEG', 'x.jpg', {}), ('JPEG', 'x.JPEG', {}), ('PNG', 'x.jpg', {}), ('GIF', 'x.gif', {}), ('BMP', 'x.bmp', {}),
    ('PPM', 'x.ppm', {}), ('PPM', 'x.pgm', {}), ('WEBP', 'x.webp', {'lossless': True}), ('TIFF', 'x.tif', {}),
    ('TIFF', 'x.tiff', {'compression': 'tiff_lzw'}), ('TIFF', 'x.png', {'big_tiff': True}),
    ('MPO', 'x.jpg', {'save_all': True, 'append_images': [Image.new('RGB', (20, 12), 'blue')]}),
    ('GIF', 'x.gif', {'save_all': True, 'append_images': [Image.new('RGB', (20, 12), 'blue')]}),
    ('WEBP', 'x.webp', {'save_all': True, 'append_images': [Image.new('RGB', (20, 12), 'blue')], 'lossless': True})])
def test_the_formats_of_the_readme_are_opened(tmp_path, kind, name, settings):
    """Of cameras' JPEG with several images (MPO) and of animations the first image."""
    (tmp_path / name).write_bytes(content(kind, **settings))
    image = image_set.read_image(str(tmp_path / name))
    assert image.size == (20, 12) == image_set.image_size(str(tmp_path / name))
    assert np.abs(np.asarray(image).astype(int) - [200, 100, 50]).max() <= 2


@pytest.mark.parametrize('header', [b'P5 2 2 65535\n' + struct.pack('>4H', 0, 256, 32768, 65535),
                                    b'P2 2 2 65535 0 256 32768 65535 '])
def test_gray_images_of_16_bits_in_ppm_files(tmp_path, header):
    (tmp_path / 'x.pgm').write_bytes(header)
    assert np.asarray(image_set.read_image(str(tmp_path / 'x.pgm')))[..., 0].tolist() == [[0, 1], [128, 255]]


def test_nothing_is_mapped_into_memory(tmp_path, monkeypatch):
    """A program that has mapped a file ends where that is cut off meanwhile."""
    import mmap

    def mapped(*args, **settings):
        raise AssertionError
    monkeypatch.setattr(mmap, 'mmap', mapped)
    (tmp_path / 'x.bmp').write_bytes(content('BMP', Image.new('L', (20, 12), 7)))
    assert image_set.read_image(str(tmp_path / 'x.bmp')).getpixel((3, 3)) == (7, 7, 7)


# What is no regular file

def open_socket(file):
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(file))
    server.close()


@pytest.mark.parametrize('make', ['pipe', open_socket, lambda file: file.symlink_to('/dev/zero'),
                                  lambda file: file.symlink_to('/dev/ptmx'), lambda file: file.symlink_to('/dev/null')])
@pytest.mark.parametrize('place', [*LOADERS, 'aug', 'mask', 'meta'])
def test_what_is_no_regular_file_is_named(image_folder, tmp_path, monkeypatch, pipe, make, place):
    monkeypatch.chdir(tmp_path)
    make = pipe if make == 'pipe' else make
    root = image_folder()
    if place in LOADERS:
        make(root / 'red' / 'x.png')
        with pytest.raises(UserError, match='x.png: not a readable image .not a regular file'):
            read(root, place)
    elif place == 'aug':
        make(tmp_path / 'red-0-0.png')
        part = augmentation_folder(tmp_path, ['red'], -1, '--aug_name_id')
        with pytest.raises(UserError, match='red-0-0.png: not a readable image .not a regular file'):
            part.load(0)
    elif place == 'mask':
        make(tmp_path / 'x_mask_gen.png')
        with pytest.raises(UserError, match='x_mask_gen.png: not a readable image .not a regular file'):
            image_set.read_image(tmp_path / 'x_mask_gen.png', 'L')
    else:
        make(tmp_path / 'meta.json')
        with pytest.raises(UserError, match='meta.json: not readable .*not a regular file'):
            super_classes(tmp_path)


def test_a_pipe_among_caches_is_made_a_cache(image_folder, tmp_path, pipe, capsys):
    root, folder = image_folder(), tmp_path / 'cache'
    read(root, mean=None, std=None, cache_dir=str(folder))
    names = sorted(file.name for file in folder.iterdir())
    for name in names:
        (folder / name).unlink()
        pipe(folder / name)
    pipe(folder / f'{names[0]}.x.partial')
    read(root, mean=None, std=None, cache_dir=str(folder))
    assert capsys.readouterr().out.count('not a valid cache, written again') == 2
    assert all((folder / name).is_file() for name in names)


def test_files_too_large_for_an_image_are_rejected(tmp_path):
    """Pillow reads a whole WebP file, here three gigabytes of it, into memory."""
    (tmp_path / 'x.webp').write_bytes(content('WEBP'))
    os.truncate(tmp_path / 'x.webp', 3 * 2**30)
    with pytest.raises(UserError, match='x.webp: not a readable image .3221225472 bytes, expected 1 to 2147483648'):
        image_set.read_image(str(tmp_path / 'x.webp'))


@pytest.mark.parametrize('text', [
    b'{"super_class": "Car"}' + b' ' * 2**21, b'{"super_class": "Car", "x": "' + b'x' * 2**20 + b'"}',
    b'{"super_class": ' + b'[' * 300_000, b'{"super_class": ' + b'{"a":' * 100_000 + b'1' + b'}' * 100_000 + b'}',
    b'{"super_class": [["Car"]]}', b'{"super_class": ["Car", 3]}', b'{"super_class": null}',
    b'{"super_class": [' + b'1,' * 300_000 + b'1]}', b'{"super_class": "Car", "n": ' + b'9' * 500_000 + b'}',
    b'{"super_class": "Car", "n": "\xff"}'])
def test_odd_descriptions_of_mvip_are_one_short_line(tmp_path, text):
    (tmp_path / 'meta.json').write_bytes(text)
    with pytest.raises(UserError, match='meta.json: not readable as .{20,300}$'):
        super_classes(tmp_path)


# Memory

@pytest.mark.parametrize('loader', LOADERS)
def test_too_little_memory_is_not_blamed_on_an_image(image_folder, monkeypatch, loader):
    """The error still tells which file it was."""
    root = image_folder()

    def convert(*args):
        raise MemoryError('Unable to allocate 24 GiB')
    monkeypatch.setattr(Image.Image, 'convert', convert)
    with pytest.raises(MemoryError, match=r'\d.png: Unable to allocate 24 GiB'):
        read(root, loader)


def test_too_little_memory_is_not_blamed_on_a_cache(tmp_path, monkeypatch):
    def read_again(make=lambda: {'x': np.zeros(5)}):
        return cache.cached(tmp_path / 'x.npz', make, lambda arrays: arrays['x'].shape == (5,))
    read_again()
    whole = (tmp_path / 'x.npz').stat().st_size
    with zipfile.ZipFile(tmp_path / 'x.npz', 'w') as archive:           # no cache: asks for more than it holds
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
        archive.writestr('x.npy', b'\x93NUMPY\x01\x00' + struct.pack('<H', 118) + header.ljust(117) + b'\n' + bytes(40))
    read_again()
    assert (tmp_path / 'x.npz').stat().st_size == whole

    def load(*args, **settings):
        raise MemoryError
    monkeypatch.setattr(np, 'load', load)
    with pytest.raises(MemoryError):
        read_again(make=lambda: pytest.fail('decoded again'))


# Worker processes that end

def worker_loader(n=40, workers=1):
    opt = arguments.defaults(loader='per_sample', device='cpu', num_workers=workers, size=8, batch_size=4)
    array = np.zeros((n, 8, 8, 3), dtype=np.uint8)
    images = image_set.ImageSet(array, torch.arange(n) % 2, ['a', 'b'])
    return make_loader(images, View(8, (0.,) * 3, (1.,) * 3), opt)


@pytest.fixture
def fast_check(monkeypatch):
    """PyTorch looks every five seconds whether a worker still lives."""
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, '__defaults__', (0.3,))


def test_a_worker_that_is_killed_ends_no_step_and_is_reported(fast_check, capfd):
    """Of a worker without memory: the step is not interrupted, the next batches are one line."""
    loader = worker_loader()
    batches = iter(loader)
    next(batches)
    for child in multiprocessing.active_children():
        child.kill()
    time.sleep(0.3)                                     # PyTorch's error came here
    with pytest.raises(UserError, match=r'^--num_workers 1: .*exited unexpectedly.*/dev/shm.*ulimit -n\S*\Z'):
        list(batches)
    assert not capfd.readouterr().err


def test_a_worker_that_cannot_send_is_not_waited_for(fast_check, monkeypatch, capfd):
    """Without open files PyTorch prints that a batch is lost, and waits for it without end."""
    def full(*args):
        raise OSError(24, 'Too many open files')
    monkeypatch.setattr(multiprocessing.reduction, 'DupFd', full)       # only the worker sends something
    with pytest.raises(UserError, match='--num_workers 1: .*exited unexpectedly'):
        list(worker_loader())
    assert not capfd.readouterr().err


WHERE = 'DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "x.py"'


@pytest.mark.parametrize('error', [
    RuntimeError('DataLoader worker (pid(s) 12) exited unexpectedly'), OSError(24, 'Too many open files'),
    RuntimeError('DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that ... shared memory.'),
    RuntimeError('received 0 items of ancdata'), EOFError(),
    RuntimeError(f'Caught RuntimeError in {WHERE}\nRuntimeError: unable to open shared memory object </torch_1>'),
    RuntimeError('Too many open files. Communication with the workers is no longer possible.'), OSError(12, 'x'),
    MemoryError(f'Caught MemoryError in {WHERE}\nMemoryError'), RuntimeError("can't start new thread")])
def test_what_workers_lack_is_one_line(monkeypatch, error):
    loader = worker_loader()

    class Failing:
        num_workers = 1

        def __iter__(self):
            raise error
    loader.loader = Failing()
    with pytest.raises(UserError, match=r'^--num_workers 1: worker processes failed \([^\n]+ulimit -n\S*\Z') as raised:
        list(loader)
    assert 'Traceback' not in str(raised.value)
    loader.loader.num_workers = 0                       # none are to blame there
    with pytest.raises(type(error)):
        list(loader)


def test_errors_of_the_program_in_workers_keep_their_traceback(monkeypatch):
    def broken(*args):
        raise RuntimeError('a mistake in the program')
    monkeypatch.setattr(loaders._PerSample, '__call__', broken)
    with pytest.raises(RuntimeError, match='Traceback'):
        list(worker_loader())


# Folders

@pytest.mark.parametrize('place', ['class', 'folder in a class', 'augmentations'])
def test_folders_that_cannot_be_listed_are_named(image_folder, monkeypatch, place):
    """os.walk leaves out what it cannot list."""
    root = image_folder(classes={'a': 3, 'b': 3})
    (root / 'a' / 'more').mkdir()
    secret = str({'class': root / 'a', 'folder in a class': root / 'a' / 'more', 'augmentations': root}[place])
    listing = {'scandir': os.scandir, 'listdir': os.listdir}
    for name in listing:
        def denied(folder, name=name):
            if str(folder) == secret:
                raise PermissionError(13, 'Permission denied', secret)
            return listing[name](folder)
        monkeypatch.setattr(os, name, denied)
    with pytest.raises(UserError, match='cannot be read .*Permission denied'):
        if place == 'augmentations':
            augmentation_folder(root, ['a'], -1, '--aug_name_id')
        else:
            load_images(options(root))


def names_and_numbers(folder, super_class):
    """What is made of the names in a folder: of classes, images, MVIP's super-classes, augmentations."""
    def as_bytes(files):
        return [os.fsencode(file).hex() for file in files]
    images = sources.folder(Path(folder) / 'images')
    train, _ = mvip(arguments.defaults(data_folder=f'{folder}/sets', mvip_super_class=super_class, mvip_num_classes=9))
    augs = augmentation_folder(Path(folder) / 'augs', images.classes, -1, '')
    for part in (images, train, augs):
        part.load(len(part) - 1)
    return [images.classes, train.classes, as_bytes(images.source), augs.labels.tolist(),
            as_bytes(file for item in train.source for file in item.files())]


def test_names_are_the_same_in_every_locale(tmp_path):
    """Classes, their numbers, the order of files, MVIP's super-classes and augmentations, without UTF-8 as with it."""
    names = ['z', 'é', 'e\u0301', '\uff21', '😀', os.fsdecode(b'\x80'), os.fsdecode(b'\xff x'), 'a b']
    image = content('PNG')
    for name in names:
        camera = f'sets/{name}/train_data/{name}/u/c'
        for file in (*(f'images/{name}/{other}.png' for other in names), f'augs/{name}-0-0.png', f'{camera}/rgb.png',
                     f'{camera}/rgb_mask_gen.png', f'sets/{name}/valid_data/0/c/rgb.png'):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(image)
        (tmp_path / 'sets' / name / 'meta.json').write_text(json.dumps({'super_class': 'Auto é'}))
    code = ('import json, sys; sys.path[:0] = [".", "tests"]; from test_hostile_images import names_and_numbers; '
            'print(json.dumps([sys.getfilesystemencoding(), names_and_numbers(*sys.argv[1:])]))')
    environment = {**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    ran = subprocess.run([sys.executable, '-c', code, tmp_path, 'Auto é'], cwd=ROOT, env=environment,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    encoding, found = json.loads(ran.stdout.splitlines()[-1])
    assert encoding != 'utf-8' == sys.getfilesystemencoding()
    assert found == names_and_numbers(tmp_path, 'Auto é') and found[0] == found[1] == sorted(names)


# Caches

def test_what_killed_writers_left_is_removed(tmp_path, monkeypatch):
    """The files of processes that are gone, of whatever cache, but not that of one that is still writing."""
    def store(name):
        cache.cached(tmp_path / name, lambda: {'x': np.zeros(5)}, lambda arrays: True)

    reading, writing = os.pipe()
    child = os.fork()
    if not child:                                       # writes until it is killed
        def never_ending(stream, **arrays):
            stream.write(b'x')
            stream.flush()
            os.write(writing, b'x')
            time.sleep(60)
        monkeypatch.setattr(np, 'savez', never_ending)
        store('one.npz')
        os._exit(0)
    os.read(reading, 1)
    left, = tmp_path.glob('*.partial')
    (tmp_path / 'last.ckpt.partial').touch()            # of others
    store('two.npz')
    assert left.exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    store('three.npz')
    assert sorted(file.name for file in tmp_path.iterdir()) == ['last.ckpt.partial', 'three.npz', 'two.npz']


@pytest.mark.parametrize('name', ['x' * 300, 'file/cache', 'itself'])
def test_caches_that_cannot_be_written_are_gone_without(image_folder, tmp_path, capsys, name):
    root = image_folder()
    (tmp_path / 'file').touch()
    (tmp_path / 'itself').symlink_to('itself')
    opt = dict(mean=None, std=None, cache_dir=str(tmp_path / name))
    if name == 'itself':
        with pytest.raises(UserError, match='--cache_dir .*itself: expected a folder'):
            read(root, **opt)
    else:
        assert read(root, **opt) and 'cannot be written' in capsys.readouterr().out


# Sizes

def test_images_that_would_mostly_be_padding(tmp_path, monkeypatch, capsys):
    """One image of 1x700 beside one of 700x1: auto leaves them to workers, batched tells what it takes."""
    monkeypatch.setattr(image_set, 'PADDING_MATTERS', 2**20)
    for label in 'ab':
        (tmp_path / 'images' / label).mkdir(parents=True)
        for i in range(4):
            Image.new('RGB', (1, 700) if label == 'a' else (700, 1)).save(tmp_path / 'images' / label / f'{i}.png')
    opt = options(tmp_path / 'images', loader='auto')
    train = load_images(opt).train
    assert isinstance(make_loader(train, View(16, opt.mean, opt.std), opt), loaders.WorkerLoader)
    assert 'padded' not in capsys.readouterr().out
    opt.loader = 'batched'
    assert isinstance(make_loader(train, View(16, opt.mean, opt.std), opt), loaders.BatchedLoader)
    line, = (line for line in capsys.readouterr().out.splitlines() if 'padded' in line)
    assert '6 images of up to 700x700' in line and '--loader workers' in line
    for file in (tmp_path / 'images' / 'a').iterdir():
        Image.new('RGB', (690, 1)).save(file)
    opt.loader, opt.loader_chosen = 'auto', None
    train = load_images(opt).train
    assert isinstance(make_loader(train, View(16, opt.mean, opt.std), opt), loaders.BatchedLoader)
    assert 'padded' not in capsys.readouterr().out


def test_statistics_of_large_images_take_little_memory(tmp_path):
    """Those of the pixels, counted level by level: floats of all pixels took 48 times the memory of the image."""
    (tmp_path / 'a').mkdir()
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((3, 5), (700, 500), (1, 1))]
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / 'a' / f'{i}.png')
    tracemalloc.start()
    mean, std = sources.folder(tmp_path).statistics()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 700 * 500
    pixels = np.concatenate([array.reshape(-1, 3) for array in arrays]) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), atol=6e-5)
    np.testing.assert_allclose(std, pixels.std(0), atol=6e-5)
