"""Gradient caching (--accum_steps): the loss and gradient of the whole batch, in micro-batches."""
import copy

import pytest
import torch
from conftest import TINY, ok, options
from torch import nn
from torch.nn import functional as F

import main_ce
import main_supcon
from losses import SupConLoss
from networks.resnet_big import SupConResNet
from util import training

DATA = ['--dataset', 'digits', '--size', '8', '--max_samples', '96', '--num_workers', '0']


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
    network.model, network.wrapped, network.opt = model, model, options('--accum_steps', accum_steps)
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
