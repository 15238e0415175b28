import functools
import hashlib
import http.server
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import main_ce
from datasets import image_set, load_images, make_loader, pretraining_view, sources
from datasets import loader as loaders
from datasets.image_set import ImageSet
from datasets.views import View
from util import arguments
from util.errors import UserError


def options(**changes):
    return arguments.defaults(**{'dataset': 'digits', 'batch_size': 32, 'loader': 'batched', 'num_workers': 0,
                            'device': 'cpu', **changes})


def load(opt):
    data = load_images(opt)
    return data.train, data.val


def test_digits_are_split_once_and_for_all():
    train, val = load(options(seed=0))
    other_train, _ = load(options(seed=5))
    assert len(train) + len(val) == 1797 and train.source.shape[1:] == (8, 8, 3)
    counts, val_counts = train.labels.bincount(), val.labels.bincount()
    assert ((val_counts / (counts + val_counts) - 0.2).abs() < 0.003).all()
    assert np.array_equal(train.source, other_train.source)
    assert not {p.tobytes() for p in train.source} & {p.tobytes() for p in val.source}
    assert train.source.max() == 255 and train.source.min() == 0


def test_digits_are_read_without_importing_scikit_learn():
    """Whose import takes a second, of four until the first step."""
    from sklearn.datasets import load_digits
    code = """import sys
from datasets.sources import digits
parts = digits(None)
assert 'sklearn' not in sys.modules
print(*sorted((int(label), *image[..., 0].ravel().tolist()) for part in parts
              for image, label in zip(part.source, part.labels)), sep='\\n')"""
    environment = {**os.environ, 'PYTHONPATH': '.'}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    data = load_digits()
    pixels = (data.data * (255 / 16)).round().astype(int)
    expected = sorted((int(label), *image.tolist()) for label, image in zip(data.target, pixels))
    assert done.stdout.splitlines() == [str(row) for row in expected], done.stderr


def fake_cifar(monkeypatch, tmp_path, name, folder, keys):
    """An archive in CIFAR's format with 4 images a file, on a server of this machine: -> the server."""
    cls = getattr(sources.tv, name)
    rng = np.random.default_rng(0)
    files, md5 = {}, {}
    for file in [entry[0] for entry in cls.train_list + cls.test_list]:
        content = {b'data': rng.integers(0, 256, (4, 3072), dtype=np.uint8), keys[0].encode(): [0, 1, 1, 0]}
        files[file] = pickle.dumps({key.decode(): value for key, value in content.items()})
    files[cls.meta['filename']] = pickle.dumps({keys[1]: ['apple', 'bear']})
    archive = tmp_path / 'server' / cls.filename
    archive.parent.mkdir()
    with tarfile.open(archive, 'w:gz') as tar:
        for file, content in files.items():
            info = tarfile.TarInfo(f'{folder}/{file}')
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            md5[file] = hashlib.md5(content).hexdigest()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(cls, 'url', f'http://127.0.0.1:{server.server_port}/{cls.filename}')
    monkeypatch.setattr(cls, 'tgz_md5', hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cls, 'train_list', [[file, md5[file]] for file, _ in cls.train_list])
    monkeypatch.setattr(cls, 'test_list', [[file, md5[file]] for file, _ in cls.test_list])
    monkeypatch.setattr(cls, 'meta', {**cls.meta, 'md5': md5[cls.meta['filename']]})
    return server


@pytest.mark.parametrize('dataset, name, folder, keys, n', [
    ('cifar10', 'CIFAR10', 'cifar-10-batches-py', ('labels', 'label_names'), 20),
    ('cifar100', 'CIFAR100', 'cifar-100-python', ('fine_labels', 'fine_label_names'), 4)])
def test_cifar_is_downloaded(monkeypatch, tmp_path, dataset, name, folder, keys, n):
    server = fake_cifar(monkeypatch, tmp_path, name, folder, keys)
    opt = options(dataset=dataset, data_folder=str(tmp_path / 'data'))
    train, val = load(opt)
    assert (len(train), len(val), train.classes) == (n, 4, ['apple', 'bear'])
    assert train.labels.tolist() == [0, 1, 1, 0] * (n // 4)
    assert train.source.shape == (n, 32, 32, 3)
    assert opt.size == 32 and opt.mean[0] == {'cifar10': 0.4914, 'cifar100': 0.5071}[dataset]
    server.shutdown()
    server.server_close()
    assert len(load(opt)[0]) == n                      # the second time from the folder


def test_cifar_that_cannot_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(sources.tv.CIFAR10, 'url', 'http://127.0.0.1:9/missing.tar.gz')       # nobody listens there
    with pytest.raises(UserError, match='--data_folder'):
        load(options(dataset='cifar10', data_folder=str(tmp_path / 'data')))


def path_options(root, **changes):
    return options(dataset='path', data_folder=str(root), **changes)


@pytest.mark.parametrize('name', ['val', 'test'])
def test_folder_with_train_and_val(image_folder, tmp_path, name):
    image_folder('all/train', {'a': 3, 'b b': 4, 'c': 5})
    image_folder(f'all/{name}', {'b b': 2, 'c': 1})           # no images of class a
    (tmp_path / 'all' / 'train' / '.cache').mkdir()             # no class
    train, val = load(path_options(tmp_path / 'all'))
    assert train.classes == val.classes == ['a', 'b b', 'c']
    assert train.labels.bincount().tolist() == [3, 4, 5]
    assert val.labels.tolist() == [1, 1, 2]


def test_flat_folder_is_split_per_class_with_the_seed(image_folder, capsys):
    root = image_folder(classes={'a': 40, 'b': 20, 'c': 2})
    splits = [load(path_options(root, seed=seed)) for seed in (0, 0, 1)]
    assert capsys.readouterr().out.count('a tenth of each class is held out for validation (seed 0)') == 2
    for train, val in splits:
        assert val.labels.bincount().tolist() == [4, 2, 1] and len(train) + len(val) == 62
        assert not set(train.source) & set(val.source)
    assert splits[0][1].source == splits[1][1].source != splits[2][1].source


def test_statistics_are_measured_where_none_are_given(tmp_path, image_folder):
    root = image_folder()
    opt = path_options(root)
    train, _ = load(opt)
    x = np.stack([np.asarray(Image.open(file)) for file in train.source]) / 255
    np.testing.assert_allclose(opt.mean, x.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(opt.std, x.std((0, 1, 2)), atol=1e-4)
    opt = path_options(root, mean=(0.1, 0.2, 0.3))
    load(opt)
    assert opt.mean == (0.1, 0.2, 0.3)


def test_max_samples_takes_the_classes_alike():
    train, val = load(options(max_samples=95))
    assert sorted(train.labels.bincount().tolist()) == [9] * 5 + [10] * 5 and len(val) == 95
    again, _ = load(options(max_samples=95))
    assert np.array_equal(train.source, again.source)
    assert len(load(options(max_samples=10**6))[0]) > 1400


@pytest.mark.parametrize('broken', ['empty', 'text', 'truncated'])
@pytest.mark.parametrize('loader', ['batched', 'per_sample', 'auto'])
def test_unreadable_image_is_named(image_folder, broken, loader):
    root = image_folder(size=(60, 60))
    file = root / 'red' / '004.png'
    content = Image.effect_noise((60, 60), 50)
    buffer = io.BytesIO()
    content.save(buffer, format='png')
    file.write_bytes({'empty': b'', 'text': b'no image', 'truncated': buffer.getvalue()[:600]}[broken])
    opt = path_options(root, loader=loader, mean=(0., 0., 0.), std=(1., 1., 1.), size=16, num_workers=1)
    train, _ = load(opt)
    with pytest.raises(UserError, match=r'^.*004.png: not a readable image.*\Z'):     # one line, without a traceback
        list(make_loader(train, pretraining_view(opt), opt, n_views=2))


@pytest.mark.parametrize('mode, value, expected', [
    ('I;16', 0x8000, (128, 128, 128)), ('L', 77, (77, 77, 77)), ('1', 1, (255, 255, 255)),
    ('RGBA', (10, 20, 30, 255), (10, 20, 30)), ('CMYK', (0, 0, 0, 0), (255, 255, 255)),
    ('LA', (50, 255), (50, 50, 50))])
def test_images_of_other_modes(tmp_path, mode, value, expected):
    file = str(tmp_path / f'x.{"tif" if mode == "CMYK" else "png"}')
    Image.new(mode, (4, 4), value).save(file)
    assert image_set.read_image(file).getpixel((1, 1)) == expected


@pytest.mark.parametrize('mode', ['I', 'F'])
def test_images_without_a_known_range_are_rejected(tmp_path, mode):
    Image.new(mode, (4, 4), 1).save(tmp_path / 'x.tif')
    with pytest.raises(UserError, match='x.tif.*no known range'):
        image_set.read_image(str(tmp_path / 'x.tif'))


def test_files_of_a_folder(image_folder, tmp_path, capsys):
    """GIFs count, subfolders too, what is no image is said, links in a circle are walked once."""
    root = image_folder(classes={'a': 3})
    Image.new('RGB', (4, 4)).save(root / 'a' / 'x.GIF', format='gif')
    (root / 'a' / 'more').mkdir()
    Image.new('RGB', (4, 4)).save(root / 'a' / 'more' / 'y.png')
    (root / 'a' / 'notes.txt').write_text('x')
    (root / 'a' / '.hidden.png').write_text('x')
    (root / 'a' / '.ipynb_checkpoints').mkdir()
    Image.new('RGB', (4, 4)).save(root / 'a' / '.ipynb_checkpoints' / 'y-checkpoint.png')
    (root / 'a' / 'circle').symlink_to(root / 'a')
    assert len(sources.folder(root)) == 5
    assert '1 files that are no images' in capsys.readouterr().out


def test_memory_is_estimated_from_all_images(tmp_path):
    (tmp_path / 'a').mkdir()
    for i in range(700):
        Image.new('RGB', (8, 8)).save(tmp_path / 'a' / f'{i:04}.png')
    Image.new('RGB', (3000, 8)).save(tmp_path / 'a' / '0123.png')
    assert sources.folder(tmp_path).decoded_bytes(8)[0] == 3 * 8 * 3000 * 700


def test_images_of_unlike_sizes_do_not_touch_the_padding(tmp_path):
    """Every view of an image of one color has that color, whatever the sizes beside it."""
    sizes = [(30, 30), (10, 50), (50, 10), (7, 9), (100, 60), (1, 1)]
    for i, size in enumerate(sizes):
        (tmp_path / 'a').mkdir(exist_ok=True)
        Image.new('RGB', size, (40 * i + 10, 200, 100)).save(tmp_path / 'a' / f'{i}.png')
    train = sources.folder(tmp_path)
    for crop in ((0.2, 1.), None):
        view = View(8, (0., 0., 0.), (1., 1., 1.), crop=crop, flip=0.5)
        opt = options(batch_size=6)
        for images, _ in make_loader(train, view, opt, train=False):
            expected = torch.tensor([[40 * i + 10, 200, 100] for i in range(6)])[:, :, None, None] / 255
            torch.testing.assert_close(images, expected.expand_as(images), atol=1e-5, rtol=0)


def test_large_images_are_scaled_once(tmp_path):
    (tmp_path / 'a').mkdir()
    for i, size in enumerate([(500, 375), (375, 500), (40, 50)]):
        Image.new('RGB', size).save(tmp_path / 'a' / f'{i}.jpg')
    train = sources.folder(tmp_path)
    data, heights, widths = train.decode(72)
    assert heights.tolist() == [72, 96, 50] and widths.tolist() == [96, 72, 40]       # the last is not enlarged
    assert data.shape == (3, 3, 96, 96) and data.nbytes == train.decoded_bytes(72)[0]
    for file in train.source:
        (tmp_path / file).unlink()
    assert train.decode(72)[0] is data                          # files are not opened again


def test_auto_takes_batched_where_the_images_fit(monkeypatch, image_folder):
    opt = path_options(image_folder(), loader='auto')
    train, _ = load(opt)
    assert isinstance(make_loader(train, pretraining_view(opt), opt), loaders.BatchedLoader)
    monkeypatch.setattr(loaders, 'available_memory', lambda: 1000)
    opt.loader_chosen = None
    assert isinstance(make_loader(train, pretraining_view(opt), opt), loaders.WorkerLoader)
    assert opt.loader_chosen == 'workers'


def test_every_batch_has_its_own_random_numbers():
    """The permutation of an epoch and what each of its batches samples: all different, and the same again."""
    def numbers():
        for epoch in (1, 2):
            batches = loaders.Batches(torch.zeros(40), arguments.defaults(batch_size=10), train=True)
            batches.epoch = epoch
            for of in ((), (0,), (0, 0), (0, 1), (1,), (2,), (3,)):
                yield torch.rand((), generator=batches.generator(*of)).item()
    assert len(set(numbers())) == 14 and list(numbers()) == list(numbers())


def test_available_memory_is_that_of_this_machine():
    assert 2**26 < loaders.available_memory() < 2**45


def epochs(opt, train, count=2):
    loader = make_loader(train, pretraining_view(opt), opt, n_views=2)
    for epoch in range(1, count + 1):
        loader.set_epoch(epoch)
        yield [(images.clone(), labels.clone()) for images, labels in loader]


@pytest.mark.parametrize('kind, workers', [('batched', 0), ('per_sample', 0), ('per_sample', 2)])
def test_epochs_depend_on_seed_and_epoch_alone(kind, workers):
    opt = options(loader=kind, num_workers=workers, batch_size=40, max_samples=100)
    train, _ = load(opt)
    first, second = epochs(opt, train)
    torch.manual_seed(123)
    again, _ = epochs(opt, train)
    for (images, labels), (images_again, labels_again) in zip(first, again):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)
    assert [len(labels) for _, labels in first] == [40, 40, 20]
    assert first[0][0].shape == (80, 3, 16, 16)
    assert not torch.equal(first[0][0], second[0][0])                   # another epoch
    assert not torch.equal(first[0][0][:40], first[0][0][40:])          # another view
    for epoch in (first, second):
        assert sorted(torch.cat([labels for _, labels in epoch]).tolist()) == sorted(train.labels.tolist())


def test_worker_processes_change_nothing():
    train, _ = load(opt := options(loader='per_sample', max_samples=64))
    alone = list(epochs(opt, train))
    opt.num_workers = 2
    for a, b in zip(alone, epochs(opt, train)):
        assert all(torch.equal(x, y) for pair in zip(a, b) for x, y in zip(*pair))


@pytest.mark.parametrize('kind', ['batched', 'per_sample'])
def test_views_and_labels_belong_together(kind, image_folder):
    """Images of class c are bright in channel c; both views of a batch stand in the order of its labels."""
    opt = path_options(image_folder(classes={'a': 12, 'b': 12, 'c': 12}), loader=kind, mean=(0., 0., 0.),
                       std=(1., 1., 1.), batch_size=10)
    train, val = load(opt)
    view = View(16, opt.mean, opt.std, crop=(0.2, 1.), flip=0.5)
    for part, is_train in ((train, True), (val, False)):
        for images, labels in make_loader(part, view, opt, n_views=2, train=is_train):
            assert images.mean((2, 3)).argmax(1).tolist() == labels.repeat(2).tolist()


def test_images_without_training_keep_their_order():
    _, val = load(opt := options())
    loader = make_loader(val, pretraining_view(opt), opt, train=False)
    assert torch.equal(torch.cat([labels for _, labels in loader]), val.labels)


def test_select_forgets_decoded_images():
    source = np.arange(4, dtype=np.uint8).repeat(48).reshape(4, 4, 4, 3)
    images = ImageSet(source, torch.arange(4), list('abcd'))
    images.decode(4)
    assert images.select(np.array([2])).decode(4)[0].unique().tolist() == [2]


@pytest.fixture
def cache(tmp_path, image_folder):
    """cache() -> decoded training images, mean, and the names of files that were opened for them."""
    root = image_folder()

    def cache(**changes):
        opt = path_options(root, cache_dir=str(tmp_path / 'cache'), mean=None, std=None, **changes)
        opened, open_image = [], image_set.open_image
        image_set.open_image = lambda file, use: opened.append(file) or open_image(file, use)
        try:
            train, _ = load(opt)
            train.decoded_bytes(8)
            return train.decode(8)[0], opt.mean, opened
        finally:
            image_set.open_image = open_image
    return cache


def test_decoded_folders_are_kept_on_disk(cache, tmp_path):
    data, mean, opened = cache()
    assert opened and len(list((tmp_path / 'cache').iterdir())) == 2        # pixels and statistics
    again, mean_again, opened = cache()
    assert not opened and mean_again == mean and torch.equal(again, data)


def test_a_changed_file_is_decoded_again(cache, tmp_path):
    data, *_ = cache()
    for file in (tmp_path / 'images/red').iterdir():
        Image.new('RGB', (12, 10), 'white').save(file)
    again, _, opened = cache()
    assert opened and not torch.equal(again, data) and (again == 255).flatten(1).all(1).sum() == 9


def other_arrays(file, **changes):
    with np.load(file) as arrays:
        arrays = {**arrays, **changes}
    np.savez(file, **arrays)


@pytest.mark.parametrize('damage', [
    lambda file: file.write_bytes(file.read_bytes()[:-30]), lambda file: file.write_bytes(b''),
    lambda file: file.write_bytes(file.read_bytes()[:2000]), lambda file: file.write_bytes(b'PK\x03\x04' * 100),
    lambda file: file.write_bytes(bytes(byte ^ (i == 3000) for i, byte in enumerate(file.read_bytes()))),
    lambda file: other_arrays(file, data=np.zeros((3, 3, 8, 8), np.uint8)),
    lambda file: other_arrays(file, data=np.zeros((18, 3, 10, 8))), lambda file: other_arrays(file, sizes=np.zeros(1)),
    lambda file: np.savez(file, other=np.zeros(1)),
    lambda file: np.savez_compressed(file, data=np.zeros((18, 3, 4000, 4000), np.uint8), sizes=np.full((18, 2), 4000))])
def test_a_corrupted_cache_is_made_again(cache, tmp_path, capsys, damage):
    data, *_ = cache()
    file = next((tmp_path / 'cache').glob('*-resized-8.npz'))
    whole = file.read_bytes()
    damage(file)
    again, _, opened = cache()
    assert opened and torch.equal(again, data) and f'{file}: not a valid cache' in capsys.readouterr().out
    assert file.stat().st_size == len(whole) and not cache()[2]


def test_nothing_in_a_cache_is_executed(cache, tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / 'executed'), 'w')
    cache()
    for file in (tmp_path / 'cache').iterdir():
        np.savez(file, data=np.array([Hostile()], dtype=object), statistics=np.array([Hostile()]))
    assert cache()[2] and not (tmp_path / 'executed').exists()


def test_a_cache_that_cannot_be_written_is_said(cache, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError('No space left on device')
    monkeypatch.setattr(np, 'savez', full)
    assert cache()[2] and 'No space left on device' in capsys.readouterr().out
    assert not list((tmp_path / 'cache').iterdir())


def test_digits_without_scikit_learn_are_one_line(rejected, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    rejected(main_ce.main, '--dataset', 'digits', words=['--dataset digits', 'scikit-learn is missing'])


def test_wrong_cache_folders_are_rejected(rejected, tmp_path, image_folder):
    (tmp_path / 'file').touch()
    data = ['--dataset', 'path', '--data_folder', image_folder()]
    rejected(main_ce.main, *data, '--cache_dir', 'file', words=['--cache_dir file'])
    rejected(main_ce.main, *data[:3], 'nowhere', '--cache_dir', 'cache', words=['nowhere'])      # and made no folder
    rejected(main_ce.main, '--dataset', 'digits', '--cache_dir', 'cache', words=['--cache_dir', 'digits'])


def test_wrong_statistics_in_a_cache_are_measured_again(cache, tmp_path):
    mean = cache()[1]
    file = next((tmp_path / 'cache').glob('*-statistics-*.npz'))
    for wrong in ([[0.5] * 3, [0., 1, 1]], [[float('nan')] * 3, [1.] * 3], [[0.5] * 3] * 3, [[2.] * 3, [1.] * 3],
                  [[0.5] * 3, [1e300] * 3]):
        np.savez(file, statistics=np.array(wrong))
        assert cache()[1] == mean


def test_what_does_not_fit_is_refused_before_it_is_decoded(cache, monkeypatch):
    cache()
    monkeypatch.setattr(image_set, 'available_memory', lambda: 1000)
    with pytest.raises(UserError, match='do not fit into memory, expected --loader workers'):
        cache()
