"""Momentum contrast (--moco): the copy, its queue of keys, and training with them."""

import numpy as np
import pytest
import torch
from conftest import TINY, ok, options
from torch import nn
from torch.nn import functional as F

import main_linear
import main_supcon
import methods
from losses import SupConLoss
from networks.moco import EMPTY, MomentumContrast
from networks.resnet_big import SupConResNet
from util import checkpoints

DATA = ['--dataset', 'digits', '--size', '8', '--max_samples', '96', '--num_workers', '0']


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
    assert (moco.queue_labels == EMPTY).all()
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
    assert contrast_labels[:6].tolist() == labels.tolist() and (contrast_labels[6:] == EMPTY).all()
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
