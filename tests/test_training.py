import argparse
import math

import pytest
import torch

from util import metrics, training
from util.metrics import AverageMeter, knn_accuracy
from util.training import learning_rate


def options(**changes):
    return argparse.Namespace(**{'learning_rate': 0.5, 'lr_decay_rate': 0.1, 'lr_decay_epochs': [3, 5], 'epochs': 100,
                                 'cosine': False, 'warm': False, 'warm_epochs': 0, 'warmup_from': 0.01,
                                 'exp_decay': None, **changes})


def test_step_schedule_decays_after_each_epoch_of_the_list():
    rates = [learning_rate(options(), epoch) for epoch in range(1, 8)]
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005])


def test_cosine_schedule_ends_at_eta_min():
    opt = options(cosine=True)
    eta_min = 0.5 * 0.1**3
    for epoch in (1, 50, 100):
        expected = eta_min + (0.5 - eta_min) * (1 + math.cos(math.pi * epoch / 100)) / 2
        assert learning_rate(opt, epoch) == pytest.approx(expected)
    assert learning_rate(opt, 100) == pytest.approx(eta_min)


@pytest.mark.parametrize('cosine', [False, True])
def test_warm_up_rises_linearly_per_step_to_the_schedule(cosine):
    opt = options(warm=True, warm_epochs=10, warmup_from=0.02, cosine=cosine, lr_decay_epochs=[70])
    training.set_warmup(opt)
    assert opt.warm_epochs == 10
    steps = [learning_rate(opt, epoch, step, 20) for epoch in range(1, 11) for step in range(20)]
    target = learning_rate(options(cosine=cosine, lr_decay_epochs=[70]), 10)
    assert steps[0] == 0.02
    assert steps == pytest.approx([0.02 + (target - 0.02) * i / 200 for i in range(200)])
    assert learning_rate(opt, 11, 3, 20) == learning_rate(options(cosine=cosine, lr_decay_epochs=[70]), 11)


def test_warm_up_of_short_runs_and_low_rates():
    opt = options(warm=True, warm_epochs=10, epochs=6, learning_rate=0.001, lr_decay_epochs=[])
    training.set_warmup(opt)
    assert opt.warm_epochs == 3
    assert learning_rate(opt, 1) == pytest.approx(1e-4) and learning_rate(opt, 4) == 0.001
    opt = options(warm=True, warm_epochs=10, epochs=1)
    training.set_warmup(opt)
    assert learning_rate(opt, 1, 0, 5) == 0.5


def test_exponential_schedule_decays_within_epochs():
    opt = options(exp_decay=0.9, exp_decay_epochs=0.5)
    rates = [learning_rate(opt, epoch, step, 4) for epoch in (1, 2) for step in range(4)]
    assert rates == pytest.approx([0.5 * 0.9**k for k in (0, 0, 1, 1, 2, 2, 3, 3)])
    opt = options(exp_decay=0.9, exp_decay_epochs=0.1)
    rates = [learning_rate(opt, epoch, step, 10) for epoch in (1, 2, 3) for step in range(10)]
    assert rates == pytest.approx([0.5 * 0.9**k for k in range(30)])
    opt = options(exp_decay=0.9, exp_decay_epochs=2, warm=True, warm_epochs=1)
    assert learning_rate(opt, 1, 0, 4) == 0.01 and learning_rate(opt, 1, 2, 4) == pytest.approx((0.01 + 0.5) / 2)
    assert learning_rate(opt, 3, 0, 4) == pytest.approx(0.45)
    opt = options(exp_decay=0.9, exp_decay_epochs=0.5, warm=True, warm_epochs=1)       # it rises to where decay goes on
    assert learning_rate(opt, 1, 2, 4) == pytest.approx((0.01 + learning_rate(opt, 2, 0, 4)) / 2)


def test_meter_keeps_tensors_and_weighs_by_count():
    meter = AverageMeter()
    meter.update(torch.tensor(1., requires_grad=True), 1)
    meter.update(torch.tensor(4.), 3)
    assert meter.val == 4 and meter.avg == 13 / 4
    assert AverageMeter().avg == 0


def knn_loop(memory, memory_labels, features, labels, k, temperature):
    correct = 0
    for feature, label in zip(features, labels):
        votes = {}
        similarities = [(torch.nn.functional.cosine_similarity(feature, other, dim=0).item(), int(c))
                        for other, c in zip(memory, memory_labels)]
        for similarity, c in sorted(similarities, reverse=True)[:k]:
            votes[c] = votes.get(c, 0) + math.exp(similarity / temperature)
        correct += max(votes, key=votes.get) == int(label)
    return 100 * correct / len(labels)


@pytest.mark.parametrize('k', [1, 7, 200])
def test_knn_accuracy_matches_a_plain_loop(k):
    memory, labels = torch.randn(60, 8), torch.randint(4, (60,))
    features, targets = torch.randn(40, 8), torch.randint(4, (40,))
    assert knn_accuracy(memory, labels, features, targets, k) == knn_loop(memory, labels, features, targets, k, 0.1)


def test_accuracy():
    output = torch.tensor([[1., 2.], [3., 0.], [0., 1.]])
    assert metrics.accuracy(output, torch.tensor([1, 0, 0])).item() == pytest.approx(200 / 3)
