"""What the tests share: calling programs, real images, small folders of images."""
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

# Before torch is imported, for subprocesses too: the tests are of the CPU, but for tests/test_gpu.py.
os.environ['CUDA_VISIBLE_DEVICES'] = os.environ.get('SUPCON_TEST_GPUS', '')

import numpy as np
import pytest
import torch
from PIL import Image

import main_ce
import main_supcon
from methods import make_method
from util import errors, training
from util.log import log
from util.runs import Run

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = ROOT.parent / 'shared' / 'data' / 'cifar10_jpeg.tar.xz'
TINY = ['--dataset', 'digits', '--model', 'resnet18', '--width', '0.0625', '--size', '8', '--max_samples', '96',
        '--batch_size', '32', '--num_workers', '0']


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob('*')}


def close_log():
    log.file = None
    log.waiting.clear()


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a program's main in an empty folder: call(main, *arguments) -> (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(main, *arguments):
        capsys.readouterr()
        close_log()                             # in a shell every run is a process of its own
        status = 0
        try:
            errors.run(lambda: main([str(argument) for argument in arguments]))
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err
    return call


@pytest.fixture
def rejected(call, tmp_path):
    """Assert that a program rejects with status 2 and one line on stderr that holds `words`, and writes nothing."""
    def rejected(main, *arguments, words):
        before = contents(tmp_path)
        status, _, err = call(main, *arguments)
        assert status == 2, err
        assert err.count('\n') == 1 and err.endswith('\n'), err
        for word in words:
            assert str(word) in err, err
        assert contents(tmp_path) == before
    return rejected


@pytest.fixture
def spy(monkeypatch):
    """spy(object, name): replace a function by one that records its arguments and calls it."""
    def spy(owner, name):
        calls, original = [], getattr(owner, name)

        def record(*args, **kwargs):
            calls.append((args, kwargs))
            return original(*args, **kwargs)
        monkeypatch.setattr(owner, name, record)
        return calls
    return spy


def train_one_epoch(program, opt, loader, num_classes, teacher=None, model=None):
    """The first epoch of main_supcon or main_ce on batches of a loader: -> averages, the model."""
    opt.num_classes = num_classes
    if program is main_supcon:
        model = main_supcon.set_model(opt)
        method, more = make_method(opt, teacher), ()
    else:
        new, method = main_ce.set_model(opt)
        model, more = model or new, (opt,)
    network, run = training.Network(model, opt), Run(opt)
    optimizer, scaler = training.set_optimizer(opt, model), training.set_scaler(opt)
    run.restore(model, optimizer, scaler)
    return program.train(loader, network, method, optimizer, scaler, 1, run, *more), model


@pytest.fixture
def interrupt(call):
    """interrupt(program, epoch, *arguments): run a program until Ctrl-C comes at the start of an epoch."""
    def interrupt(program, epoch, *arguments):
        train = program.train

        def interrupted(train_loader, network, method, optimizer, scaler, now, *rest):
            if now == epoch:
                raise KeyboardInterrupt
            return train(train_loader, network, method, optimizer, scaler, now, *rest)
        program.train = interrupted
        try:
            assert call(program.main, *arguments)[0] == 130
        finally:
            program.train = train
    return interrupt


@pytest.fixture(scope='session')
def cifar_jpeg(tmp_path_factory):
    """Real CIFAR-10 images as train/<class>/*.jpg (500 each) and test/<class>/*.jpg (100 each)."""
    if not ARCHIVE.exists():
        pytest.skip('needs cifar10_jpeg.tar.xz')
    folder = tmp_path_factory.mktemp('images')
    counts = {}
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            part = '/'.join(Path(member.name).parts[1:3])
            counts[part] = counts.get(part, 0) + member.isfile()
            if member.isfile() and counts[part] <= (500 if part.startswith('train') else 100):
                (folder / part).mkdir(parents=True, exist_ok=True)      # extract(filter=...) is of Python 3.11.4
                (folder / part / Path(member.name).name).write_bytes(archive.extractfile(member).read())
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope='session')
def real_images(request):
    """5,000 real images as an ImageSet: CIFAR-10's, or where these are not, parts of scikit-learn's two photographs."""
    from datasets.image_set import ImageSet
    from datasets.sources import folder
    if ARCHIVE.exists():
        return folder(request.getfixturevalue('cifar_jpeg') / 'train')
    from sklearn.datasets import load_sample_images
    photos, rng = load_sample_images().images, np.random.default_rng(0)
    parts = []
    for i in range(5000):
        side = rng.integers(32, 200)
        top, left = (rng.integers(0, length - side) for length in photos[i % 2].shape[:2])
        part = Image.fromarray(photos[i % 2][top:top + side, left:left + side])
        parts.append(np.asarray(part.resize((32, 32))))
    return ImageSet(np.stack(parts), torch.arange(5000) % 2, ['china', 'flower'])


@pytest.fixture
def image_folder(tmp_path):
    """image_folder(name, {class: count}, size): a folder of PNG files, each class of its own color."""
    def make(name='images', classes=None, size=(12, 10)):
        root = tmp_path / name
        for c, (label, count) in enumerate((classes or {'blue': 10, 'red': 10}).items()):
            (root / label).mkdir(parents=True)
            for i in range(count):
                array = np.full((size[1], size[0], 3), 20 * i % 100, dtype=np.uint8)
                array[..., c % 3] = 255
                Image.fromarray(array).save(root / label / f'{i:03}.png')
        return root
    return make


@pytest.fixture
def two_threads():
    """Threads whose order could change what is computed; scripts/test.sh gives each test one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Each test has its own random numbers and no run's log; --amp is bfloat16 on any CPU."""
    monkeypatch.setattr(training, 'cpu_has_bfloat16', lambda: True)
    torch.manual_seed(0)
    hook = sys.unraisablehook
    yield
    sys.unraisablehook = hook                           # errors.run replaces it
    close_log()


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository whose runs stay in a temporary folder; its environment is this one."""
    ignore = shutil.ignore_patterns('.git', '.venv', 'output', 'data', '__pycache__', '.*_cache')
    shutil.copytree(ROOT, tmp_path / 'copy', ignore=ignore)
    return tmp_path / 'copy'


def shell(command, cwd, **environment):
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=700,
                          env={**os.environ, 'PATH': path, **environment})


def ok(call, program, *arguments):
    """What a program prints that ends without an error."""
    status, out, err = call(program.main, *arguments)
    assert status == 0, err
    return out


def options(*arguments):
    """Options of main_supcon.py for the CPU."""
    import main_supcon
    opt = main_supcon.parse_option([str(argument) for argument in arguments])
    opt.device = 'cpu'
    return opt


@pytest.fixture
def interruptible():
    """Ctrl-C is ignored in what a script starts in the background, as the tests may be."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
