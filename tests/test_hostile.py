"""Files and options that mean harm, or are only corrupted: one clear line, nothing executed or written elsewhere."""
import ast
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from torchvision import datasets as tv

import main_ce
import main_linear
import main_supcon
from datasets import load_images, make_loader
from datasets.cache import cached
from datasets.mvip import super_classes
from datasets.views import View
from util import arguments, runs, teachers, training
from util.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


class Evil:
    """What writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ('hacked', 'w')


def png(width, height, data=b''):
    """A PNG that says it has this size."""
    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b'')


def stored(save, *args, **settings):
    buffer = io.BytesIO()
    save(*args, buffer, **settings)
    return buffer.getvalue()


def npy(header):
    """A NumPy file with this header and no data."""
    return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header


def foreign():
    """Files of other kinds, and of other programs, by name."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr('archive/data.pkl', bytes(10_000_000))
    evil_array = np.array([Evil()], dtype=object)
    image = stored(lambda buffer: Image.new('RGB', (9, 9)).save(buffer, 'png'))
    return {
        'empty': b'', 'zeros': bytes(3000), 'text': b'hello\n' * 50, 'bytes': bytes(range(256)) * 9,
        'pickle': pickle.dumps(Evil()), 'old pickle': pickle.dumps({'model': Evil(), 'super_class': Evil()}, 0),
        'torch': stored(torch.save, {'model': Evil()}),
        'old torch': stored(torch.save, {'model': Evil()}, _use_new_zipfile_serialization=False),
        'torch options': stored(torch.save, {'model': {}, 'opt': Evil()}),
        'numpy objects': stored(lambda buffer: np.savez(buffer, data=evil_array, sizes=evil_array)),
        'huge pickle': b'\x80\x04\x8e' + struct.pack('<Q', 2**62) + b'x' * 99, 'inflating zip': archive.getvalue(),
        'huge array': npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}"),
        'evaluated header': npy(b"{'descr': __import__('os').system('touch hacked'), 'shape': (3,)}"),
        'huge image': png(60_000, 60_000), 'image without data': png(30, 30), 'image': image,
        'huge gif': b'GIF89a' + struct.pack('<HH', 65535, 65535) + bytes(20), 'tiff': b'II*\x00' + b'\xff' * 400,
        'deep json': b'[' * 200_000, 'json': json.dumps({'super_class': {'a': 1}}).encode(), 'script': b'import os\n',
        'tar': bytes(257) + b'ustar' + bytes(300),
    }


def corrupted(whole, count, seed):
    """Copies of a file with bytes cut off, changed or inserted."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        content = bytearray(whole)
        if i % 3 == 0:
            del content[rng.integers(len(whole)):]
        elif i % 3 == 1:
            for place in rng.integers(0, min(len(whole), 2000), 12):
                content[place] = rng.integers(256)
        else:
            content[rng.integers(len(whole)):0] = rng.bytes(50)
        yield bytes(content)


@pytest.fixture
def nothing_happens(monkeypatch, tmp_path):
    """Assert that what is called here ends in a UserError, or well, and that no file of an attack is there."""
    monkeypatch.chdir(tmp_path)

    def check(function, *args, may_work=False):
        try:
            function(*args)
            assert may_work, args
        except UserError as error:
            assert str(error)
        assert not (tmp_path / 'hacked').exists()
    return check


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    """A folder with a whole run of main_ce.py: output/a."""
    folder, before = tmp_path_factory.mktemp('run'), os.getcwd()
    os.chdir(folder)
    try:
        main_ce.main([*TINY, '--epochs', '1', '--output_name', 'a'])
    finally:
        os.chdir(before)
    return folder


def contents(whole):
    """300 files: all foreign ones, and corrupted copies of a whole one."""
    others = list(foreign().values())
    return [*others, *corrupted(whole, 300 - len(others), seed=len(whole))]


def test_checkpoints(nothing_happens, run_folder):
    """Of an encoder, of a run to go on with, to evaluate, of a teacher: 300 files each."""
    whole = (run_folder / 'output/a/trial=0/last.ckpt').read_bytes()
    last = Path('output/a/trial=0/last.ckpt')
    last.parent.mkdir(parents=True)

    def resume(how):
        opt = main_ce.parse_option([*TINY, '--epochs', '2', '--output_name', 'a', how])
        run = runs.Run(opt)
        training.set_device(opt)
        opt.num_classes = 10
        model, _ = main_ce.set_model(opt)
        if how == '--resume':
            run.restore(model, training.set_optimizer(opt, model), training.set_scaler(opt))
        else:
            run.load(model, [str(i) for i in range(10)])

    def encoder():
        opt, checkpoint = main_linear.parse_option(['--dataset', 'digits', '--ckpt', str(last)])
        opt.num_classes = 1
        main_linear.set_model(opt, checkpoint)

    def teacher():
        opt = main_supcon.parse_option([*TINY, '--method', 'GenSCL', '--KD', '--teacher_path', str(last.parent)])
        opt.device = 'cpu'
        teachers.load_teacher(teachers.read_teacher(opt), opt, [str(i) for i in range(10)], [])
    others = list(foreign().values())
    for content in contents(whole):
        last.write_bytes(content)
        for function, *args in ((resume, '--resume'), (resume, '--evaluate'), (encoder,), (teacher,)):
            # Changed bytes of a parameter are a parameter; an image of the run's options may be gone.
            nothing_happens(function, *args, may_work=content not in others)


def test_options_without_end_in_a_checkpoint(nothing_happens, run_folder, rejected):
    """Lists in lists that would be of any length as a text, numbers of any length."""
    whole = torch.load(run_folder / 'output/a/trial=0/last.ckpt', weights_only=True)
    endless = []
    for _ in range(60):
        endless = [endless] * 10
    Path('output/a/trial=0').mkdir(parents=True)
    for name, value in (('model', endless), ('mean', endless), ('seed', endless), ('size', 10**9999)):
        torch.save({**whole, 'opt': {**whole['opt'], name: value}}, 'output/a/trial=0/last.ckpt')
        rejected(main_ce.main, *TINY, '--epochs', 2, '--output_name', 'a', '--resume', words=['last.ckpt'])


@pytest.mark.parametrize('kind', ['batched', 'workers', 'per_sample'])
def test_images(nothing_happens, kind, tmp_path):
    """300 files among whole images of a folder, in every loader."""
    whole = stored(lambda buffer: Image.effect_noise((20, 20), 90).convert('RGB').save(buffer, 'jpeg'))
    for label in 'ab':
        (tmp_path / 'data' / label).mkdir(parents=True)
        for i in range(3):
            (tmp_path / 'data' / label / f'{i}.jpg').write_bytes(whole)

    def read():
        opt = arguments.defaults(dataset='path', data_folder='data', loader=kind, device='cpu', num_workers=0, size=16)
        train = load_images(opt).train
        loader = make_loader(train, View(16, opt.mean, opt.std, crop=(0.2, 1.)), opt)
        for images, _ in loader:
            assert images.isfinite().all()
    read()
    others, image = list(foreign().values()), foreign()['image']
    for content in contents(whole):
        for suffix in ('jpg', 'png', 'gif') if content in others else ('jpg',):
            file = tmp_path / 'data' / 'a' / f'x.{suffix}'
            file.write_bytes(content)
            nothing_happens(read, may_work=content == image or content not in others)
            file.unlink()


def test_masks_and_descriptions_of_mvip(nothing_happens, tmp_path):
    folder = tmp_path / 'data' / 'part'
    others = list(foreign().values())
    for content in contents(json.dumps({'super_class': 'CarComponent', 'name': 'x' * 99}).encode()):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'meta.json').write_bytes(content)
        nothing_happens(super_classes, folder, may_work=content not in others)


def test_caches(nothing_happens, tmp_path):
    """What is no whole cache is made again."""
    arrays = {'data': np.arange(5, dtype=np.uint8), 'sizes': np.ones((5, 2), dtype=np.int64)}

    def check(found):
        return all(found[name].dtype == array.dtype and found[name].shape == array.shape
                   for name, array in arrays.items())

    def same():
        found = cached(file, lambda: arrays, check)
        assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    file = tmp_path / 'cache.npz'
    cached(file, lambda: arrays, check)
    for content in contents(file.read_bytes()):
        file.write_bytes(content)
        nothing_happens(same, may_work=True)


def test_cifar_is_verified_before_it_is_unpickled(nothing_happens, monkeypatch, tmp_path):
    """torchvision's own check of the known sums stands before every pickle of the dataset."""
    def no_network(*args, **settings):
        raise OSError('no network')
    monkeypatch.setattr(tv.cifar, 'download_and_extract_archive', no_network)
    for name in ('cifar10', 'cifar100'):
        folder = tmp_path / {'cifar10': 'cifar-10-batches-py', 'cifar100': 'cifar-100-python'}[name]
        folder.mkdir()
        for file in ('data_batch_1', 'data_batch_2', 'test_batch', 'batches.meta', 'train', 'test', 'meta'):
            (folder / file).write_bytes(pickle.dumps(Evil()))
        nothing_happens(load_images, arguments.defaults(dataset=name, data_folder=str(tmp_path)))


def test_links_that_lead_in_circles(nothing_happens, image_folder, tmp_path):
    root = image_folder('data')
    os.symlink('..', root / 'red' / 'up')
    os.symlink('red', root / 'red' / 'red')
    os.symlink('itself', root / 'itself')
    data = load_images(arguments.defaults(dataset='path', data_folder='data'))
    assert data.train.classes == ['blue', 'red'] and len(data.train) + len(data.val) == 20
    os.symlink('x.png', root / 'red' / 'x.png')
    opt = arguments.defaults(dataset='path', data_folder='data', mean=None)
    nothing_happens(lambda: load_images(opt).train.sizes())


@pytest.mark.parametrize('dataset', ['path', 'mvip'])
def test_a_folder_that_may_not_be_listed(nothing_happens, image_folder, monkeypatch, dataset):
    def denied(*args):
        raise PermissionError(13, 'Permission denied', str(args[0]))
    image_folder('data')
    monkeypatch.setattr(os, 'listdir', denied)
    monkeypatch.setattr(Path, 'iterdir', denied)
    nothing_happens(lambda: load_images(arguments.defaults(dataset=dataset, data_folder='data')))


@pytest.mark.parametrize('name', ['two words', "it's", 'a "b"', 'a\nb', 'a\tb', '\x1b[31mred', 'é', '$(touch hacked)',
                                  '; touch hacked', os.fsdecode(b'\xff\xfe'), '%s{x}', '-rf', '#'])
def test_strange_names_of_files_and_classes(call, rejected, image_folder, tmp_path, name):
    """From images to a classifier that resumes, is evaluated and exported; terminals get no control characters."""
    root = image_folder(name, {name: 6, 'other': 6})
    (root / name / '000.png').rename(root / name / f'{name}.png')
    data = ['--dataset', 'path', '--data_folder', tmp_path / name, '--size', 8, '--batch_size', 4, '--num_workers', 0]
    network = ['--model', 'resnet18', '--width', 0.0625, '--output_name', 'a']
    if name.startswith('-'):
        data[3] = f'./{name}'
    assert call(main_ce.main, *data, *network, '--epochs', 1, '--cache_dir', 'cache')[0] == 0
    status, out, err = call(main_ce.main, *data, *network, '--epochs', 2, '--resume', '--per_class', '--export',
                            'a.pth')
    assert status == 0, err
    assert all(line.isprintable() for line in out.replace('\t', ' ').splitlines()) and 'accuracy of other' in out
    assert set(torch.load('a.pth', weights_only=True)['classes']) == {name, 'other'}
    (root / name / f'{name}.png').write_bytes(b'no image')
    assert not (tmp_path / 'hacked').exists()
    rejected(main_ce.main, *data, *network[:-1], 'b', words=['not a readable image'])


@pytest.mark.parametrize('option', ['--output_name', '--trial', '--pretrained', '--pretrained_ckpt'])
@pytest.mark.parametrize('value', ['../x', '..', '.', '/tmp/x', 'a/../../x', 'a/b', '', ' ', 'a\0b', 'a\nb', 'x' * 300,
                                   '\udcff', '~', '$HOME', '`x`', 'a\\b', 'con:'])
def test_runs_stay_in_output(rejected, option, value):
    program = main_linear if 'pretrained' in option else main_ce
    words = [option] if 'pretrained' not in option or '_ckpt' in option else ['--pretrained']
    rejected(program.main, '--dataset', 'digits', *(['--pretrained', 'a'] if option == '--pretrained_ckpt' else []),
            f'{option}={value}', words=words)


FORBIDDEN = {'eval', 'exec', 'compile', '__import__', 'globals', 'os.system', 'os.popen', 'ast.literal_eval'}


def test_nothing_in_the_source_can_execute_a_file_or_an_option():
    """No eval or shell, no pickle but PyTorch's with weights_only and NumPy's arrays alone."""
    programs = [file for file in ROOT.rglob('*.py') if not {'.venv', 'tests', 'benchmarks'} & set(file.parts)]
    assert len(programs) > 25
    for file in programs:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, 'module', None)]
                alone = file.name in ('row.py', 'launch.py', 'check_gpu.py')            # these may start programs
                starts = {'subprocess'} if alone else set()
                assert not {'pickle', 'subprocess', 'shelve', 'marshal', 'dill', 'yaml'} & set(names) - starts, file
            if isinstance(node, ast.Call):
                name, source = ast.unparse(node.func), ast.unparse(node)
                settings = {word.arg: ast.unparse(word.value) for word in node.keywords}
                lazy = file.parts[-2:] == ('util', '__init__.py')               # globals() for names that are imported
                assert name not in FORBIDDEN or lazy, (file, source)
                assert name != 'torch.load' or settings['weights_only'] == 'True', (file, source)
                assert name != 'np.load' or settings['allow_pickle'] == 'False', (file, source)
                assert 'shell' not in settings, (file, source)
