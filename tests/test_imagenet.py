"""What ImageNet scale needs: gradient caching, momentum contrast, heads, views, folders, launch scripts, export."""
import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.transforms.v2 import functional as tv

import main_ce
import main_linear
import main_supcon
import methods
from datasets import classification_view, evaluation_view, load_images, make_loader, pretraining_view, views
from datasets.image_set import ImageSet
from datasets.loader import WorkerLoader, _Crops
from datasets.sources import folder
from datasets.views import View
from losses import SupConLoss
from networks.moco import NOBODY, MomentumContrast
from networks.resnet_big import SupConResNet
from util import checkpoints, export, training
from util.export import named_as_elsewhere, plain_parts

DATA = ['--dataset', 'digits', '--size', '8', '--max_samples', '96', '--num_workers', '0']


def ok(call, program, *arguments):
    status, out, err = call(program.main, *arguments)
    assert status == 0, err
    return out


def options(*arguments):
    opt = main_supcon.parse_option([str(argument) for argument in arguments])
    opt.device = 'cpu'
    return opt


# Gradient caching

class Small(nn.Module):
    """A network without batch norm, whose micro-batches are then those of the whole batch; gives one output or two."""

    def __init__(self, two=False, dropout=0.):
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(6, 16), nn.Linear(16, 5), nn.Linear(16, 3)
        self.two, self.dropout, self.rows = two, nn.Dropout(dropout), []

    def forward(self, x):
        self.rows.append(len(x))
        hidden = self.dropout(torch.tanh(self.first(x)))
        features = F.normalize(self.second(hidden), dim=1)
        return (features, self.fc(hidden)) if self.two else features


def in_parts(model, images, accum_steps):
    """Outputs for two views of each image as the training loop gets them with --accum_steps."""
    network = object.__new__(training.Network)
    network.model, network.replica, network.opt = model, model, options('--accum_steps', accum_steps)
    return network(images, 2)


@pytest.mark.parametrize('two', [False, True])
@pytest.mark.parametrize('bsz, number', [(4096, 64), (37, 5)])
def test_micro_batches_give_the_loss_and_gradient_of_the_whole_batch(two, bsz, number):
    model = Small(two).double()
    images, labels = torch.randn(2 * bsz, 6, dtype=torch.float64), torch.randint(3, (bsz,))

    def step(accum_steps):
        network = copy.deepcopy(model)
        optimizer, scaler = torch.optim.SGD(network.parameters(), lr=0.), torch.amp.GradScaler('cpu', enabled=False)
        output = in_parts(network, images, accum_steps)
        features, logits = output if two else (output, None)
        loss = SupConLoss(0.1)(features.view(2, bsz, -1).transpose(0, 1), labels)
        if two:
            loss = loss + F.cross_entropy(logits, labels.repeat(2))
        training.update(loss, optimizer, scaler)
        return loss, [p.grad for p in network.parameters()], network.rows
    whole, gradients, _ = step(1)
    loss, cached, rows = step(number)
    assert max(rows) == 2 * -(-bsz // number) and sum(rows) == 2 * 2 * bsz          # twice through
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    for ours, theirs in zip(cached, gradients):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_dropout_is_the_same_in_both_passes():
    """The gradient is that of the loss which was computed: by finite differences along one direction."""
    model = Small(dropout=0.5).double()
    images = torch.randn(8, 6, dtype=torch.float64)
    direction = torch.randn_like(model.second.weight)

    def loss_at(step):
        network = copy.deepcopy(model)
        with torch.no_grad():
            network.second.weight.add_(direction, alpha=step)
        torch.manual_seed(0)
        return network, (in_parts(network, images, 2) ** 3).sum()
    network, loss = loss_at(0.)
    loss.backward()
    expected = (loss_at(1e-5)[1] - loss_at(-1e-5)[1]) / 2e-5
    torch.testing.assert_close((network.second.weight.grad * direction).sum(), expected, rtol=1e-6, atol=1e-9)


def test_micro_batches_move_the_statistics_of_batch_norms_once():
    model, images = SupConResNet('resnet18', width=0.0625), torch.randn(16, 3, 8, 8)
    model.train()
    output = in_parts(model, images, 4)
    assert (model.encoder.bn1.running_mean == 0).all() and model.encoder.bn1.num_batches_tracked == 0
    output.sum().backward()
    assert model.encoder.bn1.num_batches_tracked == 4 and (model.encoder.bn1.running_mean != 0).all()


@pytest.mark.parametrize('program, more', [(main_supcon, ['--ce_weight', '0.5']), (main_ce, ['--mix', 'mixup'])])
def test_programs_in_micro_batches(call, program, more):
    """Pieces of two or more images, whatever the size of the last batch."""
    out = ok(call, program, *TINY, '--max_samples', 37, '--epochs', 1, '--accum_steps', 7, *more, '--print_freq', 1)
    assert out.count('Train: ') >= 2


# Momentum contrast

def small_network():
    return SupConResNet('resnet18', width=0.0625, feat_dim=6)


def test_momentum_copy_moves_towards_the_network():
    network = small_network()
    moco = MomentumContrast(network, 8, 0.9)
    before = {name: value.clone() for name, value in moco.network.named_parameters()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.)
    moco.update(network)
    for name, value in moco.network.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.1)
        assert not value.requires_grad


def test_queue_replaces_the_oldest_keys():
    moco = MomentumContrast(small_network(), 5, 0.9)
    assert (moco.queue_labels == NOBODY).all()
    for i in range(4):                                                      # eight keys in five places
        moco.enqueue(torch.full((2, 6), float(i)), torch.tensor([2 * i, 2 * i + 1]))
    assert moco.queue_labels.tolist() == [5, 6, 7, 3, 4] and moco.queue[:, 0].tolist() == [2, 3, 3, 1, 2]
    keys, labels = moco.contrasts(torch.ones(2, 6), torch.tensor([8, 9]))
    assert labels.tolist() == [8, 9, 5, 6, 7, 3, 4] and keys.shape == (7, 6)


def test_empty_places_are_seen_by_nobody():
    moco, criterion = MomentumContrast(small_network(), 16, 0.9), SupConLoss(0.1)
    features, keys = (F.normalize(torch.randn(4, 6), dim=1) for _ in range(2))
    labels = torch.tensor([0, 1, 0, 2])
    contrasts, contrast_labels = moco.contrasts(keys, labels)
    for positives in ('class', 'image'):
        torch.testing.assert_close(
            criterion(features[:, None], labels, positives=positives, keys=contrasts, key_labels=contrast_labels),
            criterion(features[:, None], labels, positives=positives, keys=keys, key_labels=labels))


@pytest.mark.parametrize('method', ['SupCon', 'SimCLR'])
def test_pretraining_with_momentum_contrast(call, interrupt, monkeypatch, method):
    """Queries are the first views, keys the second, the queue holds the batches before; resumed, it resumes exactly."""
    arguments = [*TINY, '--method', method, '--moco', '--moco_k', 64, '--moco_m', 0.5, '--epochs', 3, '--moco_t', 0.2]
    seen = []
    original = SupConLoss.forward

    def forward(self, features, *labels, **targets):
        seen.append((self.temperature, features.shape, targets['keys'].shape, targets['key_labels'].clone()))
        return original(self, features, *labels, **targets)
    monkeypatch.setattr(SupConLoss, 'forward', forward)
    ok(call, main_supcon, *arguments, '--output_name', 'whole')
    temperature, features, keys, labels = seen[3]                           # the fourth batch: the queue is full
    assert (temperature, features, keys) == (0.2, (32, 1, 128), (96, 128))
    assert torch.equal(labels[32:], torch.cat([seen[2][3][:32], seen[1][3][:32]]))  # the third took the first's place
    interrupt(main_supcon, 2, *arguments, '--output_name', 'halves')
    ok(call, main_supcon, *arguments, '--output_name', 'halves', '--resume')
    whole, halves = (checkpoints.load_checkpoint(f'output/{name}/trial=0/last.ckpt')['model']
                     for name in ('whole', 'halves'))
    assert all(torch.equal(whole[name], halves[name]) for name in whole) and 'moco.queue' in whole
    ok(call, main_linear, *DATA, '--epochs', 1, '--pretrained', 'whole')


def test_keys_are_those_of_the_second_views_of_their_images():
    """The copy moves first; images are shuffled for its batch norms, in micro-batches, keys put back in order."""
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.feat_dim, self.seen = nn.Parameter(torch.ones(1)), 2, []

        def forward(self, x):
            self.seen.append(x[:, 0, 0, 0])
            return torch.stack([x[:, 0, 0, 0] * self.weight, self.weight.expand(len(x))], 1)
    model = Network()
    model.moco = MomentumContrast(model, 6, 0.75)
    with torch.no_grad():
        model.weight.add_(4.)
    images, labels = torch.arange(6.)[:, None, None, None].expand(6, 3, 1, 1), torch.arange(6) + 10
    rng = np.random.default_rng(0)
    opt = options('--accum_steps', 3)
    model.moco.update(model)
    keys, all_labels = methods.momentum_keys(model.moco, images, labels, opt, rng)
    contrasts, contrast_labels = model.moco.contrasts(keys, all_labels)
    model.moco.enqueue(keys, all_labels)
    weight = 0.75 * 1 + 0.25 * 5
    expected = torch.stack([torch.arange(6.) * weight, torch.full((6,), weight)], 1)
    torch.testing.assert_close(keys, expected)
    assert torch.equal(keys, contrasts[:6])
    assert contrast_labels[:6].tolist() == labels.tolist() and (contrast_labels[6:] == NOBODY).all()
    assert [len(piece) for piece in model.moco.network.seen] == [2, 2, 2]
    assert torch.cat(model.moco.network.seen).tolist() != list(range(6))            # shuffled (with this test's seed)
    assert sorted(torch.cat(model.moco.network.seen).tolist()) == list(range(6))
    assert torch.equal(model.moco.queue, keys) and torch.equal(model.moco.queue_labels, labels)
    model.moco.enqueue(torch.arange(14.).view(7, 2), torch.arange(7))               # more than the queue takes
    assert sorted(model.moco.queue_labels.tolist()) == [1, 2, 3, 4, 5, 6]


def test_the_second_views_are_given_to_the_copy(call, spy):
    networks, copies = spy(SupConResNet, 'forward'), spy(methods, 'momentum_keys')
    arguments = [*TINY, '--max_samples', '32', '--epochs', '1', '--moco', '--moco_k', '64', '--head', 'linear']
    ok(call, main_supcon, *arguments)
    loader = main_supcon.set_loader(options(*arguments))[0]
    loader.set_epoch(1)
    images, labels = next(iter(loader))
    assert torch.equal(copies[0][0][1], images[32:]) and torch.equal(copies[0][0][2], labels)
    queries = [args[1] for args, _ in networks if args[0].moco is not None]         # not those of the copy itself
    assert torch.equal(queries[0], images[:32])


def test_momentum_contrast_with_micro_batches_and_classifier(call):
    ok(call, main_supcon, *TINY, '--epochs', 1, '--moco', '--moco_k', 64, '--accum_steps', 4, '--ce_weight', 1,
       '--output_name', 'a')


# Heads

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
    """Evaluation views: view after view, in order, as the batched loader has them; and on the half way of a GPU."""
    image_set = folder(jpegs / 'train')
    view = View(64, (0.5,) * 3, (0.2,) * 3, resize=72)
    images, labels = worker_views(image_set, view)
    assert labels.tolist() == image_set.labels.tolist() and torch.equal(images[:12], images[12:])
    opt = options('--loader', 'batched', '--batch_size', 12)
    expected, _ = next(iter(make_loader(image_set, view, opt, 1, train=False)))
    torch.testing.assert_close(images[:12], expected, rtol=0, atol=4 / 255 / 0.2)           # JPEG's own scales round
    assert (images[:12] - expected).abs().mean() < 0.02
    opt = options('--loader', 'workers', '--batch_size', 12, '--num_workers', 0)
    loader = make_loader(image_set, view, opt, 2, train=False)
    augment = loader.loader.dataset.augment
    augment.finish, loader.rest = False, augment.rest
    torch.testing.assert_close(next(iter(loader))[0], images)


def test_workers_leave_autoaugment_to_a_gpu(jpegs):
    """Where the training device does the colors, of whole batches, workers only crop and flip."""
    image_set = folder(jpegs / 'train')
    plain = View(64, (0.5,) * 3, (0.2,) * 3, crop=(0.2, 1.), flip=0.5)
    view = replace(plain, auto='imagenet', rand=(2, 9))
    crops = _Crops(view, 2, finish=False)
    assert all(torch.equal(crops(image_set, i, i), _Crops(plain, 2, finish=False)(image_set, i, i)) for i in range(12))
    results = []
    for each in (view, plain):
        loader = make_loader(image_set, each, options('--loader', 'workers', '--batch_size', 12, '--num_workers', 0), 2)
        loader.loader.dataset.augment = _Crops(each, 2, finish=False)
        loader.rest = loader.loader.dataset.augment.rest
        results.append(next(iter(loader))[0])
    assert (results[0] != results[1]).flatten(1).any(1).sum() > 12


def test_jpegs_are_decoded_at_the_scale_that_is_needed(jpegs):
    images = folder(jpegs / 'train')
    i = next(i for i, file in enumerate(images.source) if Image.open(file).size == (640, 480))
    assert images.load(i).size == (640, 480)
    for needed, expected in (((641, 481), (640, 480)), ((320, 240), (320, 240)), ((321, 240), (640, 480)),
                             ((81, 60), (160, 120)), ((80, 60), (80, 60))):
        assert images.load(i, lambda w, h, needed=needed: needed).size == expected
    view = View(16, (0.,) * 3, (1.,) * 3, crop=(0.9, 1.))
    assert isinstance(make_loader(images, view, options('--loader', 'workers'), 2), WorkerLoader)


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
        assert torch.equal(samples[0, 7][0], samples[0, 7][0]) and not torch.equal(samples[0, 7][0], samples[0, 8][0])
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


# Evaluation and export

def logits_of(program_name, images):
    """The logits that the network of a run's last.ckpt gives."""
    checkpoint = checkpoints.load_checkpoint(f'output/{program_name}/trial=0/last.ckpt')
    from networks.resnet_big import LinearProbe, SupCEResNet, make_encoder
    opt = checkpoint['opt']
    settings = {'size': opt['size'], 'stem': opt['stem'], 'width': opt['width']}
    if 'fc.weight' in checkpoint['model']:
        model = SupCEResNet(opt['model'], 10, **settings)
    else:
        model = LinearProbe(make_encoder(opt['model'], **settings), 10)
    model.load_state_dict(checkpoint['model'])
    return model.eval()(images).detach()


FRESH = """
import json, sys, torch
images = torch.load('images.pt')
extra = {'info.json': ''}
program = torch.export.load(sys.argv[1], extra_files=extra)
info = json.loads(extra['info.json'])
torch.save((program.module()(images), info), 'result.pt')
"""


@pytest.fixture
def linear_run(call):
    ok(call, main_supcon, *TINY, '--epochs', 1, '--output_name', 'a')
    ok(call, main_linear, *DATA, '--pretrained', 'a', '--epochs', 1, '--output_name', 'linear', '--export', 'first.pth')


@pytest.mark.parametrize('name', ['linear', 'ce'])
def test_export_gives_the_same_logits_in_a_fresh_process(call, linear_run, tmp_path, name):
    if name == 'ce':
        ok(call, main_ce, *TINY, '--epochs', 1, '--output_name', 'ce', '--export', 'x.pt2')
    else:
        ok(call, main_linear, *DATA, '--pretrained', 'a', '--output_name', 'linear', '--evaluate', '--export', 'x.pt2')
    images = torch.randn(5, 3, 8, 8)
    torch.save(images, 'images.pt')
    subprocess.run([sys.executable, '-c', FRESH, 'x.pt2'], check=True, cwd=tmp_path)
    logits, info = torch.load('result.pt')
    torch.testing.assert_close(logits, logits_of(name, images), rtol=1e-4, atol=1e-5)
    opt = checkpoints.load_checkpoint(f'output/{name}/trial=0/last.ckpt')['opt']
    assert info['classes'] == [str(i) for i in range(10)] and info['size'] == 8
    assert info['mean'] == list(opt['mean']) and info['std'] == list(opt['std']) != info['mean']
    assert not list(tmp_path.glob('*.partial'))


def test_exported_onnx_gives_the_same_logits(call):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    ok(call, main_ce, *TINY, '--epochs', 1, '--output_name', 'ce', '--export', 'x.onnx')
    session, images = onnxruntime.InferenceSession('x.onnx'), torch.randn(5, 3, 8, 8)
    logits = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(logits), logits_of('ce', images), rtol=1e-4, atol=1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map['classes']) == [str(i) for i in range(10)]


def test_exported_state_dict_matches_torchvision():
    """A ResNet-50 with the usual stem loads into torchvision's, and gives the same logits."""
    from networks.resnet_big import SupCEResNet
    ours = SupCEResNet('resnet50', 10, stem='imagenet').eval()
    theirs = models.resnet50(num_classes=10).eval()
    theirs.load_state_dict(named_as_elsewhere(*plain_parts(ours)))
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs(image), ours(image), rtol=1e-4, atol=1e-5)


def test_exported_state_dict_of_timm(call, tmp_path):
    import timm
    ok(call, main_ce, '--dataset', 'digits', '--size', 16, '--max_samples', 40, '--epochs', 1, '--model',
       'timm/resnet10t', '--stem', 'imagenet', '--output_name', 'a', '--export', 'x.pth')
    exported = torch.load('x.pth', weights_only=True)
    model = timm.create_model(exported['model'].removeprefix('timm/'), num_classes=10).eval()
    model.load_state_dict(exported['state_dict'])
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(image), logits_of('a', image), rtol=1e-4, atol=1e-5)


def test_export_at_the_end_of_a_run(linear_run):
    exported = torch.load('first.pth', weights_only=True)
    assert exported['classes'] == [str(i) for i in range(10)] and exported['state_dict']['fc.weight'].shape == (10, 32)
    assert 'layer2.0.downsample.0.weight' in exported['state_dict']


def test_export_refuses_before_it_trains(rejected, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, 'find_spec', lambda name: None)
    (tmp_path / 'folder.pth').mkdir()
    for file, words in (('x.pt', 'ends in .pth, .safetensors, .pt2, .onnx'), ('nowhere/x.pth', 'nowhere'),
                        ('x.onnx', 'onnxscript is missing'), ('x' * 300 + '.pth', 'cannot be written'),
                        ('/proc/x.pth', 'cannot be written'), ('folder.pth', 'found a folder')):
        rejected(main_ce.main, *TINY, '--epochs', 1, '--export', file, words=[f'--export {file}', words])


def test_evaluation_alone(call, rejected, linear_run, tmp_path):
    rejected(main_ce.main, *TINY, '--evaluate', '--output_name', 'b', words=['output/b/trial=0/last.ckpt', 'no such'])
    run = tmp_path / 'output/linear/trial=0'
    before = {file: file.read_bytes() for file in run.iterdir()}
    accuracy = [line for line in (run / 'log.txt').read_text().splitlines() if 'Acc@1 ' in line]
    out = ok(call, main_linear, *DATA, '--pretrained', 'a', '--output_name', 'linear', '--evaluate', '--per_class')
    assert accuracy[-1] in out and 'Acc@5' in out and 'accuracy of 3: ' in out
    assert before == {file: file.read_bytes() for file in run.iterdir()}


def test_evaluation_is_of_the_same_run(call, rejected, image_folder, linear_run):
    out = ok(call, main_linear, *DATA, '--pretrained', 'a', '--output_name', 'linear', '--evaluate', '--seed', 3)
    assert '--evaluate: not as in output/linear/trial=0/last.ckpt: --seed 3, was 0' in out
    image_folder('one', {'a': 10, 'b': 10})
    image_folder('two', {'x': 10, 'y': 10})
    arguments = ['--dataset', 'path', *TINY[2:6], '--epochs', 1, '--mean', '(0.5, 0.5, 0.5)', '--std',
                 '(0.5, 0.5, 0.5)', '--output_name', 'c']
    ok(call, main_ce, *arguments, '--data_folder', 'one')
    rejected(main_ce.main, *arguments, '--data_folder', 'two', '--evaluate', words=['--evaluate', 'other classes'])
    out = ok(call, main_ce, *arguments, '--data_folder', 'one', '--evaluate', '--overwrite')
    assert '--overwrite has no effect with --evaluate' in out


def test_backbones_that_cannot_be_exported(call, rejected):
    model = ['--dataset', 'digits', '--size', 32, '--max_samples', 20, '--epochs', 1, '--model',
             'timm/deit_tiny_distilled_patch16_224', '--stem', 'imagenet', '--batch_size', 10]
    rejected(main_ce.main, *model, '--export', 'x.pth', words=['--export x.pth', 'several classifiers'])


def test_batches_that_wait_are_bounded(monkeypatch):
    import datasets.loader as loaders
    images = ImageSet(np.zeros((40, 8, 8, 3), np.uint8), torch.zeros(40).long(), ['a'])
    view = View(8, (0.,) * 3, (1.,) * 3, crop=(0.2, 1.))
    for free, workers, prefetch in ((10**9, 2, 4), (4 * 2 * 40 * 2 * 3 * 64 * 4, 2, 1), (10, 1, 1)):
        monkeypatch.setattr(loaders, 'available_memory', lambda free=free: free)
        opt = options('--loader', 'workers', '--batch_size', 40)
        opt.num_workers = 2
        loader = make_loader(images, view, opt, 2).loader
        assert (loader.num_workers, loader.prefetch_factor) == (workers, prefetch)


def test_evaluation_goes_through_the_network_in_micro_batches(call, monkeypatch):
    sizes = []
    forward = main_supcon.SupConResNet.forward
    from networks.resnet_big import ResNet
    encode = ResNet.forward
    monkeypatch.setattr(ResNet, 'forward', lambda self, x: (sizes.append(len(x)), encode(self, x))[1])
    monkeypatch.setattr(main_supcon.SupConResNet, 'forward', forward)
    ok(call, main_supcon, *TINY, '--epochs', 1, '--accum_steps', 8)
    assert max(sizes) == 8                                                  # two views of four images


# Mistakes

@pytest.mark.parametrize('arguments, words', [
    (['--positives_cap', '3'], ['--positives_cap 3', 'multiple of 2']),
    (['--positives_cap', '-2'], ['--positives_cap', '-2']),
    (['--moco', '--moco_k', '100'], ['--moco_k 100', 'multiple of --batch_size 32']),
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
