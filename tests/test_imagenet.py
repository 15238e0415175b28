"""What ImageNet scale needs: gradient caching, momentum contrast, heads, views, folders, launch files, export."""
import copy

import pytest
import torch
from conftest import TINY
from torch import nn
from torch.nn import functional as F

import main_ce
import main_supcon
import util
from losses import SupConLoss
from networks.resnet_big import SupConResNet

LARGE = ['--dataset', 'digits', '--model', 'resnet18', '--width', '0.0625', '--size', '8', '--num_workers', '0']


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
    """A network without batch norm, whose pieces are then those of the whole batch; gives one output or two."""

    def __init__(self, two=False, dropout=0.):
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(6, 16), nn.Linear(16, 5), nn.Linear(16, 3)
        self.two, self.dropout, self.rows = two, nn.Dropout(dropout), []

    def forward(self, x):
        self.rows.append(len(x))
        hidden = self.dropout(torch.tanh(self.first(x)))
        features = F.normalize(self.second(hidden), dim=1)
        return (features, self.fc(hidden)) if self.two else features


@pytest.mark.parametrize('two', [False, True])
@pytest.mark.parametrize('bsz, pieces', [(4096, 64), (37, 5)])
def test_pieces_give_the_loss_and_gradient_of_the_whole_batch(two, bsz, pieces):
    model = Small(two).double()
    images, labels = torch.randn(2 * bsz, 6, dtype=torch.float64), torch.randint(3, (bsz,))

    def step(accum_steps):
        network = copy.deepcopy(model)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.)
        optimizer.scaler = torch.amp.GradScaler('cpu', enabled=False)
        output, backward = util.forward(network, images, options('--accum_steps', accum_steps), 2)
        features, logits = output if two else (output, None)
        loss = SupConLoss(0.1)(features.view(2, bsz, -1).transpose(0, 1), labels)
        if two:
            loss = loss + F.cross_entropy(logits, labels.repeat(2))
        util.update(loss, optimizer, backward)
        return loss, [p.grad for p in network.parameters()], network.rows
    whole, gradients, _ = step(1)
    loss, cached, rows = step(pieces)
    assert max(rows) == 2 * -(-bsz // pieces) and sum(rows) == 2 * 2 * bsz          # twice through, in pieces
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    for ours, theirs in zip(cached, gradients):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_dropout_is_the_same_in_both_passes():
    """The gradient is that of the loss which was computed: by finite differences along one direction."""
    model = Small(dropout=0.5).double()
    images = torch.randn(8, 6, dtype=torch.float64)
    opt, direction = options('--accum_steps', 2), torch.randn_like(model.second.weight)

    def loss_at(step):
        network = copy.deepcopy(model)
        with torch.no_grad():
            network.second.weight.add_(direction, alpha=step)
        torch.manual_seed(0)
        output, backward = util.forward(network, images, opt, 2)
        return network, (output ** 3).sum(), backward
    network, loss, backward = loss_at(0.)
    loss.backward()
    backward()
    expected = (loss_at(1e-5)[1] - loss_at(-1e-5)[1]) / 2e-5
    torch.testing.assert_close((network.second.weight.grad * direction).sum(), expected, rtol=1e-6, atol=1e-9)


def test_pieces_move_the_statistics_of_batch_norms_once():
    opt = options('--accum_steps', 4)
    model, images = SupConResNet('resnet18', width=0.0625), torch.randn(16, 3, 8, 8)
    model.train()
    output, backward = util.forward(model, images, opt, 2)
    assert (model.encoder.bn1.running_mean == 0).all() and model.encoder.bn1.num_batches_tracked == 0
    output.sum().backward()
    backward()
    assert model.encoder.bn1.num_batches_tracked == 4 and (model.encoder.bn1.running_mean != 0).all()


@pytest.mark.parametrize('program, more', [(main_supcon, ['--ce_weight', '0.5']), (main_ce, ['--mix', 'mixup'])])
def test_programs_in_pieces(call, program, more):
    """Pieces of two or more pictures, whatever the size of the last batch."""
    out = ok(call, program, *TINY, '--max_samples', 37, '--epochs', 1, '--accum_steps', 7, *more, '--print_freq', 1)
    assert out.count('Train: ') >= 2
