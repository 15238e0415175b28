"""What ImageNet scale needs: heads, views, folders of JPEG files, workers, combinations of options."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, ok, options
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as tv

import main_ce
import main_linear
import main_supcon
from datasets import classification_view, evaluation_view, load_images, make_loader, pretraining_view, views
from datasets.image_set import ImageSet
from datasets.loader import WorkerLoader
from datasets.sources import folder
from datasets.views import View
from networks.resnet_big import SupConResNet
from util import checkpoints

DATA = ['--dataset', 'digits', '--size', '8', '--max_samples', '96', '--num_workers', '0']


def test_heads():
    head = SupConResNet('resnet18', [40, 30, 20], width=0.0625, head_bn=True).head
    assert [type(layer).__name__ for layer in head] == ['Linear', 'BatchNorm1d', 'ReLU'] * 2 + ['Linear']
    assert [layer.out_features for layer in head if isinstance(layer, nn.Linear)] == [40, 30, 20]
    assert set(SupConResNet('resnet18', [7], width=0.0625).head.state_dict()) == {'weight', 'bias'}
    seen = []
    model = SupConResNet('resnet18', [7], width=0.0625, normalize_embedding=True).eval()
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(torch.randn(3, 3, 8, 8))
    torch.testing.assert_close(seen[0].norm(dim=1), torch.ones(3))


def test_head_options(call):
    ok(call, main_supcon, *TINY, '--epochs', 1, '--head', '12,6', '--head_bn', '--normalize_embedding', '--output_name',
       'a')
    state = checkpoints.load_checkpoint('output/a/trial=0/last.ckpt')['model']
    assert state['head.0.weight'].shape == (12, 32) and state['head.3.weight'].shape == (6, 12)


# Views and folders

def test_blur_matches_torchvision():
    images, sigmas = torch.rand(5, 3, 40, 40), torch.tensor([0.1, 0.5, 1., 1.7, 2.])
    x = views.blur(images, sigmas, 4)
    expected = torch.stack([tv.gaussian_blur(image, 9, sigma.item()) for image, sigma in zip(images, sigmas)])
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)
    assert View(224, (0,) * 3, (1,) * 3).blur_radius == 11                  # 23 pixels, as SimCLR
    params = views.sample_params(View(32, (0,) * 3, (1,) * 3, blur=0.3), *[torch.full((5000,), 32)] * 2,
                       torch.Generator().manual_seed(0))
    blurred = params.sigmas > 0
    assert blurred.float().mean() == pytest.approx(0.3, abs=0.03)
    low, high = params.sigmas[blurred].aminmax()
    assert low == pytest.approx(0.1, abs=0.01) and high == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize('h, w', [(40, 40), (60, 45), (33, 70)])
def test_evaluation_of_large_images_matches_torchvision(h, w):
    """Resize(36) and CenterCrop(32), in one product."""
    image = torch.rand(3, h, w).mul(255).byte()
    view = View(32, (0., 0., 0.), (1., 1., 1.), resize=36)
    params = views.sample_params(view, torch.tensor([h]), torch.tensor([w]), None)
    x = views.apply(view, image.transpose(1, 2)[None], params)[0]
    expected = tv.center_crop(tv.resize(image.float() / 255, 36, antialias=True), 32)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    assert [type(step).__name__ for step in views.per_sample(view).transforms[:2]] == ['Resize', 'CenterCrop']


@pytest.fixture
def jpegs(tmp_path):
    """An ImageNet-like folder of smooth images of many sizes: train/<class>/ and val/<class>/."""
    rng = np.random.default_rng(0)
    for part, count in (('train', 12), ('val', 4)):
        for i in range(count):
            size = [(500, 375), (375, 500), (640, 480), (120, 90)][i % 4]
            small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            (tmp_path / 'images' / part / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(
                tmp_path / 'images' / part / 'ab'[i % 2] / f'{i:02}.jpg', quality=95)
    return tmp_path / 'images'


def test_imagenet_is_shown_as_published(jpegs):
    opt = options('--dataset', 'imagenet', '--data_folder', jpegs, '--augment_policy', 'stacked_rand', '--blur_p', 0.5,
                  '--jitter_strength', 1)
    train = load_images(opt).train
    assert train.classes == ['a', 'b'] and (opt.size, opt.stem, opt.mean) == (224, 'imagenet', (0.485, 0.456, 0.406))
    view = pretraining_view(opt)
    assert (view.crop, view.flip, view.rand) == ((0.08, 1.), 0.5, (1, 2))
    assert (view.jitter, view.blur) == ((0.8, 0.8, 0.8, 0.2), 0.5)
    opt = main_ce.parse_option(['--dataset', 'imagenet', '--crop_min', '0.3'])
    opt.size, opt.mean, opt.std = 224, (0,) * 3, (1,) * 3
    assert classification_view(opt).crop == (0.3, 1.) and evaluation_view(opt).resize == 256
    opt = options('--dataset', 'path', '--data_folder', jpegs, '--stem', 'imagenet')
    load_images(opt)
    assert opt.size == 224 and opt.mean != (0.485, 0.456, 0.406) and pretraining_view(opt).crop == (0.08, 1.)


def test_imagenet_without_its_folders(rejected, tmp_path):
    (tmp_path / 'x' / 'train').mkdir(parents=True)
    rejected(main_ce.main, '--dataset', 'imagenet', '--data_folder', 'x', words=['--data_folder x', 'no val/'])
    rejected(main_ce.main, '--dataset', 'imagenet', words=['data/imagenet', 'no train/'])


def worker_views(images, view, n_views=2):
    opt = options('--loader', 'workers', '--batch_size', len(images), '--num_workers', 0)
    return next(iter(make_loader(images, view, opt, n_views, train=False)))


@pytest.mark.parametrize('view', [
    View(32, (0.5,) * 3, (0.2,) * 3, crop=(0.2, 1.), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2),
    View(32, (0.5,) * 3, (0.2,) * 3, crop=(0.2, 1.), rotation=15., blur=0.5),
    View(32, (0.5,) * 3, (0.2,) * 3, flip=0.5, padding=4, rand=(2, 9), cutout=(1, 8))])
def test_workers_draw_from_the_same_distribution(real_images, view):
    from test_views import compare
    transform = views.per_sample(view)
    expected = torch.stack([transform(real_images.load(i)) for i in range(len(real_images))])
    compare(worker_views(real_images, view, n_views=1)[0], expected)


def test_workers_give_both_views_of_the_same_images(jpegs):
    """Evaluation views: view after view, in order, as the batched loader has them."""
    image_set = folder(jpegs / 'train')
    view = View(64, (0.5,) * 3, (0.2,) * 3, resize=72)
    images, labels = worker_views(image_set, view)
    assert labels.tolist() == image_set.labels.tolist() and torch.equal(images[:12], images[12:])
    opt = options('--loader', 'batched', '--batch_size', 12)
    expected, _ = next(iter(make_loader(image_set, view, opt, 1, train=False)))
    torch.testing.assert_close(images[:12], expected, rtol=0, atol=4 / 255 / 0.2)           # JPEG's own scales round
    assert (images[:12] - expected).abs().mean() < 0.02


def test_colors_are_the_same_in_workers_and_after_them(jpegs):
    """Without a GPU workers change the colors, with one it does."""
    view = View(64, (0.5,) * 3, (0.2,) * 3, crop=(0.2, 1.), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)
    opt = options('--loader', 'workers', '--batch_size', 5, '--num_workers', 0)
    loader = make_loader(folder(jpegs / 'train'), view, opt, 2)
    expected = list(loader)
    samples = loader.loader.dataset
    assert loader.finish is None
    loader.finish, samples.finish = samples.finish, None
    for (images, labels), (expected_images, expected_labels) in zip(loader, expected):
        assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


@pytest.mark.parametrize('changes', [{}, {'auto': 'imagenet'}, {'cutout': (1, 16)}])
def test_workers_send_bytes_where_no_colors_change(jpegs, changes):
    """A quarter of the memory; only the normalization and what is cut out are left to do."""
    view = View(64, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), crop=(0.2, 1.), flip=0.5, **changes)
    opt = options('--loader', 'workers', '--batch_size', 12, '--num_workers', 0)
    loader = make_loader(folder(jpegs / 'train'), view, opt, 2)
    sent, _ = next(iter(loader.loader))
    images, _ = next(iter(loader))
    assert sent.dtype == torch.uint8 and sent.shape == images.shape == (24, 3, 64, 64)
    expected = (sent / 255 - torch.tensor(view.mean)[:, None, None]) / torch.tensor(view.std)[:, None, None]
    kept = images != 0
    torch.testing.assert_close(images[kept], expected[kept], rtol=0, atol=2e-6)
    assert (kept.float().mean() > 0.99) == ('cutout' not in changes)


@pytest.mark.parametrize('size, count', [((500, 375), 300), ((3, 600), 300), ((600, 3), 300), ((1, 1), 20)])
def test_boxes_of_an_image_are_those_of_a_batch(size, count):
    """With and without a box that fits, and of views that are not cropped: without and with tensors, the same seed."""
    for seed in range(count):
        view = View(32, (0.,) * 3, (1.,) * 3, crop=((0.08, 1.), (0.9, 1.), None)[seed % 3])
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        expected = views.sample_boxes(view, *(torch.full((3,), side) for side in size), generators[0])
        assert views.boxes_of_image(view, *size, 3, generators[1]) == expected.tolist()
        assert torch.equal(*(torch.rand(1, generator=generator) for generator in generators))


def test_workers_leave_autoaugment_to_a_gpu(jpegs):
    """Where the training device does the colors, of whole batches, workers only crop and flip."""
    image_set = folder(jpegs / 'train')
    plain = View(64, (0.5,) * 3, (0.2,) * 3, crop=(0.2, 1.), flip=0.5)
    view = replace(plain, auto='imagenet', rand=(2, 9))
    sent, results = [], []
    for each in (view, plain):
        opt = options('--loader', 'workers', '--batch_size', 12, '--num_workers', 0)
        opt.device = 'cuda'
        loader = make_loader(image_set, each, opt, 2)
        loader.device = torch.device('cpu')
        sent.append(next(iter(loader.loader))[0])
        results.append(next(iter(loader))[0])
    assert torch.equal(*sent)
    assert (results[0] != results[1]).flatten(1).any(1).sum() > 12


@pytest.mark.parametrize('side', [64, 128, 200])
@pytest.mark.parametrize('loader', ['batched', 'workers'])
def test_jpegs_are_resized_as_torchvision_does(tmp_path, side, loader):
    """In evaluation, also where the file could be decoded at half its size, or less, in which it is sharper."""
    (tmp_path / 'a').mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        small = Image.fromarray(rng.integers(0, 256, (side // 3, side // 3, 3), np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(tmp_path / 'a' / f'{i}.jpg', quality=95)
    images, view = folder(tmp_path), View(32, (0.,) * 3, (1 / 255,) * 3)
    each = options('--loader', loader, '--batch_size', 4, '--num_workers', 0)
    found = next(iter(make_loader(images, view, each, train=False)))[0]
    expected = torch.stack([views.per_sample(view)(images.load(i)) for i in range(4)])
    error = (found - expected).abs()
    assert error.mean() < 2 and error.max() < 16, (error.mean(), error.max())


def test_jpegs_are_decoded_at_the_scale_that_is_needed(jpegs):
    images = folder(jpegs / 'train')
    i = next(i for i, file in enumerate(images.source) if Image.open(file).size == (640, 480))
    assert images.load(i).size == (640, 480)
    for needed, expected in (((320, 240), (640, 480)), ((107, 80), (640, 480)), ((106, 80), (320, 240)),
                             ((53, 41), (320, 240)), ((53, 40), (160, 120)), ((26, 20), (80, 60))):
        assert images.load(i, lambda w, h, needed=needed: needed).size == expected
    view = View(16, (0.,) * 3, (1.,) * 3, crop=(0.9, 1.))
    assert isinstance(make_loader(images, view, options('--loader', 'workers'), 2), WorkerLoader)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize('settings', [{}, {'progressive': True}, {'subsampling': 0}])
@pytest.mark.parametrize('scale', [1, 2])
def test_jpegs_are_the_same_bytes_as_tensors(tmp_path, monkeypatch, mode, settings, scale):
    """With simplejpeg where it is installed, where it fails, and without it."""
    image = Image.effect_noise((75, 50), 80).convert('RGB').rotate(45).convert(mode)
    image.save(tmp_path / 'x.jpg', quality=80, **settings)
    images = ImageSet([str(tmp_path / 'x.jpg')], torch.zeros(1).long(), ['a'])

    def needed(width, height):
        return width // scale, height // scale
    expected = np.asarray(images.load(0, needed)).transpose(2, 0, 1)
    assert np.array_equal(images.pixels(0, needed), expected)

    def fail(*args):
        raise ValueError('Corrupt JPEG data')
    for decoder in (fail, None):
        monkeypatch.setattr('datasets.image_set.decode_jpeg', decoder)
        assert np.array_equal(images.pixels(0, needed), expected)


def test_what_follows_a_jpeg_is_not_read(tmp_path, monkeypatch):
    Image.new('RGB', (75, 50)).save(tmp_path / 'x.jpg')
    with open(tmp_path / 'x.jpg', 'r+b') as file:
        file.truncate(2**28)
    seen = []

    def decode(data, colors):
        seen.append(len(data))
        return np.zeros((50, 75, 3), np.uint8)
    monkeypatch.setattr('datasets.image_set.decode_jpeg', decode)
    ImageSet([str(tmp_path / 'x.jpg')], torch.zeros(1).long(), ['a']).pixels(0)
    assert seen and seen[0] < 2**21


@pytest.mark.parametrize('workers', [0, 2])
def test_worker_epochs_depend_on_seed_and_epoch_alone(jpegs, workers):
    def batches(epoch):
        opt = options('--loader', 'workers', '--batch_size', 5, '--num_workers', workers)
        view = View(24, (0.5,) * 3, (0.2,) * 3, crop=(0.2, 1.), flip=0.5, rotation=5., jitter=(0.4, 0.4, 0.4, 0.1))
        loader = make_loader(folder(jpegs / 'train'), view, opt, 2)
        loader.set_epoch(epoch)
        return list(loader)
    first, again, other = batches(1), batches(1), batches(2)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again))
    assert not torch.equal(first[0][0], other[0][0])


def test_seeds_of_workers_leave_the_programs_numbers_alone(jpegs):
    view = View(24, (0.5,) * 3, (0.2,) * 3, crop=(0.2, 1.), auto='imagenet')
    for kind in ('workers', 'per_sample'):
        opt = options('--loader', kind, '--num_workers', 0)
        samples = make_loader(folder(jpegs / 'train'), view, opt, 2).loader.dataset
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        first, again, other = (samples.augment(samples.image_set, 0, seed) for seed in (7, 7, 8))
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert torch.equal(torch.rand(3), expected)


def test_images_in_memory_go_through_workers():
    image_set = ImageSet(np.full((6, 20, 20, 3), 51, np.uint8), torch.zeros(6).long(), ['a'])
    images, _ = worker_views(image_set, View(8, (0.,) * 3, (1.,) * 3, crop=(0.2, 1.)))
    torch.testing.assert_close(images, torch.full((12, 3, 8, 8), 0.2))


def test_programs_read_an_imagenet_folder(call, jpegs):
    small = ['--dataset', 'imagenet', '--data_folder', jpegs, '--size', 32, '--epochs', 1, '--num_workers', 0]
    network = ['--model', 'resnet18', '--width', 0.0625]
    ok(call, main_supcon, *small, *network, '--loader', 'workers', '--augment_policy', 'auto', '--output_name', 'a')
    ok(call, main_linear, *small, '--pretrained', 'a', '--output_name', 'b')
    assert json.loads(Path('output/b/trial=0/options.json').read_text())['stem'] == 'imagenet'


# Mistakes

@pytest.mark.parametrize('arguments, words', [
    (['--positives_cap', '3'], ['--positives_cap 3', 'multiple of 2']),
    (['--positives_cap', '-2'], ['--positives_cap', '-2']),
    (['--moco_k', '64'], ['--moco_k', '--moco is missing']),
    (['--moco', '--moco_m', '1.5'], ['--moco_m', 'at most 1']),
    (['--method', 'GenSCL', '--moco'], ['--moco', 'GenSCL']),
    (['--method', 'GenSCL', '--summation_location', 'in'], ['--summation_location', 'GenSCL']),
    (['--exp_decay', '0.9', '--cosine'], ['--exp_decay', '--cosine']),
    (['--exp_decay_epochs', '2'], ['--exp_decay_epochs', '--exp_decay is missing']),
    (['--optim_eps', '1'], ['--optim_eps', 'SGD']),
    (['--nesterov', '--optim_kind', 'Adam'], ['--nesterov', 'Adam']),
    (['--head', '12,x'], ['--head', "'12,x'"]), (['--head', '0'], ['--head', "'0'"]),
    (['--head', '12', '--feat_dim', '6'], ['--feat_dim', '--head']),
    (['--head', '12', '--head_bn'], ['--head_bn', 'no hidden layer']),
    (['--head', 'linear', '--head_bn'], ['--head_bn', 'no hidden layer']),
    (['--moco', '--moco_k', '64', '--contrast_mode', 'one'], ['--contrast_mode one', '--moco']),
    (['--nesterov', '--momentum', '0'], ['--nesterov', '--momentum is 0']),
    (['--base_lr', '0.4', '--lr', '0.3'], ['--base_lr', '--learning_rate']),
    (['--augment_policy', 'no', '--blur_p', '0.5'], ['--blur_p', '--augment_policy sim or stacked_rand']),
    (['--accum_steps', '0'], ['--accum_steps', 'at least 1']),
    (['--crop_min', '0'], ['--crop_min', "'0'"])])
def test_bad_combinations(rejected, arguments, words):
    rejected(main_supcon.main, *TINY, *arguments, words=words)


def test_one_class_has_no_negatives(rejected, image_folder):
    image_folder('one', {'a': 12})
    data = ['--dataset', 'path', '--data_folder', 'one', '--model', 'resnet18', '--width', '0.0625']
    for location in ('in', 'out'):
        rejected(main_supcon.main, *data, '--summation_location', location, '--denominator_mode', 'only_negatives',
                words=['--denominator_mode only_negatives', 'one class'])


def test_methods_and_recipes_can_be_overridden():
    opt = options('--method', 'GenSCL', '--exp_decay', 0.97)                # its --cosine was not asked for
    assert opt.exp_decay == 0.97 and opt.cosine is False
    opt = options('--LARS', '--amp', '--no_LARS', '--no-amp', '--optim_kind', 'Adam')
    assert opt.LARS is opt.amp is False
    assert options('--dataset', 'mvip', '--jitter_strength', 0.3).jitter_strength == 0.3


def test_base_learning_rate_is_for_256_images():
    assert options('--base_lr', 0.4, '--batch_size', 6144).learning_rate == pytest.approx(9.6)
