"""Classes of unequal sizes: samplers, long-tailed training sets, the methods for them."""
import re

import numpy as np
import pytest
import torch
from conftest import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import main_ce
import main_linear
import main_supcon
import methods
from datasets import load_images
from datasets.image_set import ImageSet
from datasets.loader import Batches
from networks.resnet_big import SupConResNet
from util import arguments, checkpoints, metrics, training

LABELS = torch.tensor([0] * 50 + [1] * 30 + [2] * 17 + [3] * 3)[torch.randperm(100)]


def batches(labels=LABELS, epoch=1, first_step=0, **changes):
    made = Batches(labels, arguments.defaults(**{'batch_size': 12, **changes}), train=True)
    made.epoch, made.first_step = epoch, first_step
    assert made.batch_sizes[first_step:] == [len(indices) for _, indices in made]
    return [indices for _, indices in made]


def test_class_balanced_gives_each_class_and_in_it_each_image_equally_often():
    epoch = batches(sampler='class_balanced', batch_size=33)
    assert [len(indices) for indices in epoch] == [33, 33, 17, 17]      # none of one image
    order = torch.cat(epoch)
    assert LABELS[order].bincount().tolist() == [25] * 4
    counts = order.bincount(minlength=100)
    for c in range(4):
        of_class = counts[c == LABELS]
        assert of_class.max() - of_class.min() <= 1
    assert all(len(LABELS[indices].unique()) == 4 for indices in epoch)             # mixed
    odd = torch.cat(batches(LABELS[:99], sampler='class_balanced'))
    assert sorted(LABELS[:99][odd].bincount().tolist()) == [24, 25, 25, 25]
    assert not torch.equal(odd.sort()[0], torch.cat(batches(LABELS[:99], sampler='class_balanced', epoch=2)).sort()[0])


def test_pk_gives_k_images_of_each_of_p_classes():
    epoch = batches(sampler='pk', images_per_class=4)
    assert len(epoch) == 8                                              # 100 // 12, all of them full
    for indices in epoch:
        counts = LABELS[indices].bincount(minlength=4)
        assert sorted(counts.tolist()) == [0, 4, 4, 4]
        large = indices[LABELS[indices] != 3]
        assert len(large.unique()) == len(large)                        # only a class of 3 repeats an image
        assert LABELS[indices].unique_consecutive().numel() > 3         # not class by class
    second = batches(sampler='pk', images_per_class=4, epoch=2)
    assert len({tuple(indices.tolist()) for indices in epoch + second}) == 16
    assert [len(indices) for indices in batches(LABELS[:10], sampler='pk', images_per_class=6)] == [12]


@pytest.mark.parametrize('changes', [{}, {'sampler': 'class_balanced'}, {'sampler': 'pk', 'images_per_class': 3}])
def test_the_rest_of_an_epoch_is_that_of_the_whole(changes):
    whole = batches(**changes, epoch=3)
    torch.manual_seed(99)
    for first_step in (0, 1, 5, len(whole)):
        rest = batches(**changes, epoch=3, first_step=first_step)
        assert len(rest) == len(whole) - first_step
        assert all(map(torch.equal, rest, whole[first_step:]))


def test_hard_negatives_count_as_images_of_their_class():
    labels = torch.tensor([0, 1, -1, -2, -1, 1] * 10)
    classes = torch.where(labels < 0, -labels - 1, labels)
    for indices in batches(labels, sampler='pk', images_per_class=6):
        assert classes[indices].bincount().tolist() == [6, 6]
    order = torch.cat(batches(labels, sampler='class_balanced'))
    assert classes[order].bincount().tolist() == [30, 30] and (labels[order] < 0).sum() == 30


SAMPLERS = [['--sampler', 'class_balanced'], ['--sampler', 'pk', '--images_per_class', '4']]


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_a_run_resumes_within_an_epoch(call, sampler, monkeypatch):
    """Stopped after the second step of the second epoch, it ends with the same bits."""
    arguments = [*TINY, *sampler, '--epochs', 2, '--output_name']
    assert call(main_supcon.main, *arguments, 'whole')[0] == 0
    update, steps = main_supcon.training.update, []

    def interrupted(*args):
        steps.append(args)
        if len(steps) == 6:
            raise KeyboardInterrupt
        update(*args)
    with monkeypatch.context() as patch:
        patch.setattr(main_supcon.training, 'update', interrupted)
        assert call(main_supcon.main, *arguments, 'halves', '--save_steps', 1)[0] == 130
    assert call(main_supcon.main, *arguments, 'halves', '--save_steps', 1, '--resume')[0] == 0
    whole, halves = (checkpoints.load_checkpoint(f'output/{name}/trial=0/last.ckpt')['model']
                     for name in ('whole', 'halves'))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_samplers_in_all_programs(call):
    small = [*TINY, '--epochs', 1, '--sampler', 'pk', '--images_per_class', 8]
    assert call(main_ce.main, *small, '--output_name', 'a', '--loader', 'per_sample')[0] == 0
    for more in ([], ['--cache_features']):
        status, _, err = call(main_linear.main, *TINY[:2], *TINY[6:], '--size', 8, '--epochs', 1, *SAMPLERS[0],
                              '--ckpt', 'output/a/trial=0/last.ckpt', *more)
        assert status == 0, err


@pytest.mark.parametrize('arguments, words', [
    (['--sampler', 'pk'], ['--sampler pk', '--images_per_class is missing', '--batch_size 32']),
    (['--sampler', 'pk', '--images_per_class', '5'], ['--images_per_class 5', '--batch_size 32']),
    (['--sampler', 'pk', '--images_per_class', '2'], ['--sampler pk', 'found 10 classes', 'at least 16']),
    (['--images_per_class', '4'], ['--images_per_class', '--sampler pk']),
    (['--sampler', 'even'], ['--sampler', "'even'"])])
def test_wrong_samplers(rejected, arguments, words):
    rejected(main_supcon.main, *TINY, *arguments, words=words)


# Long-tailed training sets

def test_long_tailed_keeps_the_published_number_of_each_class():
    """CIFAR-10-LT, CIFAR-100-LT: 12,406, 20,431 and 10,847 images (Cui et al., 2019)."""
    for classes, n, ratio, total in ((10, 5000, 100, 12406), (10, 5000, 10, 20431), (100, 500, 100, 10847)):
        labels = torch.arange(classes).repeat(n)
        images = ImageSet(np.zeros((len(labels), 1, 1, 3), np.uint8), labels, list(map(str, range(classes))))
        sizes = images.long_tailed(ratio, 0).class_sizes()
        assert sum(sizes) == total and sizes[0] == n and sizes[-1] == n // ratio
        assert images.long_tailed(1, 0).class_sizes() == images.class_sizes()


def test_long_tail_of_unequal_classes():
    """A class that has fewer images than its part of the tail keeps all, every class at least one."""
    labels = torch.tensor([0] * 5 + [1] * 40 + [2] * 3 + [3] * 9)
    source = np.arange(len(labels), dtype=np.uint8)[:, None, None, None].repeat(3, -1)
    images = ImageSet(source, labels, ['a', 'b', 'c', 'd'])
    tail, other = images.long_tailed(1000, 3), images.long_tailed(1000, 4)
    assert tail.class_sizes() == [5, 4, 1, 1]                           # 40, 4, 0.4, 0.04
    assert np.array_equal(tail.source, images.long_tailed(1000, 3).source) != np.array_equal(tail.source, other.source)
    assert torch.equal(labels[tail.source[:, 0, 0, 0].astype(int)], tail.labels)
    one = ImageSet(source[:5], labels[:5], ['a'])
    assert one.long_tailed(10, 0).class_sizes() == [5]


def test_accuracy_by_class_size_is_the_plain_loop_s():
    sizes, labels = [101, 100, 20, 19, 500], torch.randint(5, (300,))
    correct = (torch.rand(300) < 0.5).float()
    groups = {'many': (0, 4), 'medium': (1, 2), 'few': (3,)}
    expected = {name: 100 * np.mean([c for c, y in zip(correct.tolist(), labels.tolist()) if y in group])
                for name, group in groups.items()}
    assert metrics.accuracy_by_class_size(correct, labels, sizes) == pytest.approx(expected, abs=1e-4)
    assert metrics.accuracy_by_class_size(correct, labels, [101] * 5).keys() == {'many'}


DIGITS = ['--dataset', 'digits', '--size', '8', '--num_workers', '0', '--batch_size', '64', '--epochs', '1']
NETWORK = ['--model', 'resnet18', '--width', '0.0625']


def test_imbalance_in_the_programs(call, spy, tmp_path):
    """Linear evaluation trains on the images of pretraining, also with another seed; test images stay balanced."""
    status, out, err = call(main_supcon.main, *DIGITS, *NETWORK, '--imbalance', 50, '--seed', 3, '--output_name', 'a')
    assert status == 0 and '--imbalance 50: ' in out, err
    found = spy(training, 'forward_all')
    status, out, err = call(main_linear.main, *DIGITS[4:], '--size', 8, '--ckpt', 'output/a/trial=0/last.ckpt',
                            '--cache_features', '--output_name', 'b')
    assert status == 0, err
    opt = arguments.defaults(dataset='digits', size=8, imbalance=50, seed=3)
    data = load_images(opt)
    train = next(args[1] for args, _ in found if torch.equal(args[1].labels, data.train.labels))
    assert len(train.labels) < 500 and torch.equal(train.data, data.train.decode(train.view.short_side)[0])
    whole = arguments.defaults(dataset='digits', size=8)
    assert torch.equal(data.val.labels, load_images(whole).val.labels)
    sizes = data.train.class_sizes()
    line = re.search(r' \* Acc@1 over classes: many (\S+) medium (\S+) few (\S+)', out)
    events = EventAccumulator('output/b/trial=0').Reload()
    recorded = [events.Scalars(f'val_acc_{name}')[0].value for name in ('many', 'medium', 'few')]
    assert [float(value) for value in line.groups()] == pytest.approx(recorded, abs=1e-3)
    groups = [[c for c in range(10) if low <= sizes[c] <= high] for low, high in ((101, 999), (20, 100), (0, 19))]
    counts = data.val.labels.bincount().double()
    total = sum(counts[group].sum().item() * value for group, value in zip(groups, recorded)) / counts.sum().item()
    assert total == pytest.approx(events.Scalars('val_acc')[0].value, abs=1e-3)
    status, out, _ = call(main_linear.main, *DIGITS[4:], '--size', 8, '--ckpt', 'output/a/trial=0/last.ckpt',
                          '--imbalance', 1, '--output_name', 'c')
    assert status == 0 and '--imbalance 1: 1438 training images' in out and 'over classes: many' in out
    assert call(main_linear.main, *DIGITS[4:], '--ckpt', 'output/a/trial=0/last.ckpt', '--output_name', 'b',
                '--evaluate')[0] == 0


def test_label_noise_gives_a_fraction_another_class():
    source = np.broadcast_to(np.arange(1000)[:, None, None, None] % 250, (1000, 8, 8, 3)).astype(np.uint8)
    data = ImageSet(source, torch.arange(1000) % 10, [str(c) for c in range(10)])
    noisy = data.mislabeled(0.4, 0)
    wrong = noisy.labels != data.labels
    assert wrong.sum() == 400 and torch.equal(data.labels, torch.arange(1000) % 10)
    shift = ((noisy.labels - data.labels) % 10)[wrong].bincount(minlength=10)
    assert shift[0] == 0 and shift[1:].min() > 25                           # each other class about 44 times
    assert torch.equal(noisy.labels, data.mislabeled(0.4, 0).labels)
    assert not torch.equal(noisy.labels, data.mislabeled(0.4, 1).labels)
    assert torch.equal(data.mislabeled(0, 0).labels, data.labels)
    part = noisy.sample(None, 0, 10)                                        # the same seed selects other images
    assert 25 < (part.labels != torch.from_numpy(part.source[:, 0, 0, 0] % 10)).sum() < 55


def test_label_noise_in_the_programs(call, rejected, image_folder):
    """Linear evaluation trains on the labels of pretraining, also with another seed; validation labels are right."""
    status, _, err = call(main_supcon.main, *DIGITS, *NETWORK, '--label_noise', 0.5, '--seed', 3, '--output_name', 'a')
    assert status == 0, err
    status, out, err = call(main_linear.main, *DIGITS[4:], '--ckpt', 'output/a/trial=0/last.ckpt', '--output_name', 'b')
    assert status == 0, err
    assert '--label_noise 0.5: this fraction' in out
    opt = checkpoints.load_checkpoint('output/b/trial=0/last.ckpt')['opt']
    assert (opt['label_noise'], opt['split_seed'], opt['seed']) == (0.5, 3, 0)
    right, noisy, again = (load_images(arguments.defaults(dataset='digits', size=8, **more)) for more in (
        {}, {'label_noise': 0.5, 'seed': 3}, {'label_noise': 0.5, 'seed': 7, 'split_seed': 3}))
    assert 0.45 < (right.train.labels != noisy.train.labels).double().mean() < 0.55
    few = load_images(arguments.defaults(dataset='digits', size=8, label_noise=0.5, split_seed=3, samples_per_class=5))
    known = {image.tobytes(): label for image, label in zip(noisy.train.source, noisy.train.labels.tolist())}
    assert few.train.labels.tolist() == [known[image.tobytes()] for image in few.train.source]
    assert torch.equal(noisy.train.labels, again.train.labels) and torch.equal(right.val.labels, noisy.val.labels)
    image_folder('one', {'a': 10})
    rejected(main_supcon.main, *NETWORK, '--dataset', 'path', '--data_folder', 'one', '--label_noise', 0.2,
             words=['--label_noise 0.2', 'one class'])


def test_names_of_runs_hold_what_makes_the_tail():
    opt = main_ce.parse_option(['--imbalance', '50', '--sampler', 'class_balanced', '--logit_adjustment', '1'])
    assert opt.output_name.endswith('_imbalance_50.0_sampler_class_balanced_logit_adjustment_1.0')


# Logit adjustment and balanced contrastive learning

def test_logit_adjustment_is_the_formula():
    """-log of f_y n_y^tau over the sum of f_c n_c^tau, f = exp(logit)."""
    opt = main_ce.parse_option(['--logit_adjustment', '0.5'])
    opt.device, opt.class_sizes = 'cpu', [60, 30, 10]
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 0])
    weights = logits.exp() * torch.tensor([60., 30., 10.])**0.5
    expected = -(weights[range(5), labels] / weights.sum(1)).log()
    torch.testing.assert_close(main_ce.classification_loss(opt)(logits, labels), expected)


@pytest.mark.parametrize('program', [main_ce, main_linear])
def test_logit_adjustment_changes_training_alone(call, program, spy):
    call(main_ce.main, *DIGITS, *NETWORK, '--output_name', 'a')
    network = NETWORK if program is main_ce else ['--ckpt', 'output/a/trial=0/last.ckpt']
    seen = spy(torch.nn.functional, 'cross_entropy')
    status, _, err = call(program.main, *DIGITS, *network, '--imbalance', 100, '--logit_adjustment', 1,
                          '--output_name', 'b')
    assert status == 0, err
    (trained, *_), _ = seen[0]
    validated = [args[0] for args, _ in seen if len(args[0]) > 300]
    assert trained.mean(0)[0] - trained.mean(0)[9] > 3                  # log(145 / 1) is 5
    assert len(validated) == 1
    options = checkpoints.load_checkpoint('output/b/trial=0/last.ckpt')['opt']
    assert options['logit_adjustment'] == 1 and len(options['class_sizes']) == 10


def test_bcl_is_the_plain_loop_s():
    """Views and prototypes as contrasts, each class one share of the denominator; cross-entropy of adjusted logits."""
    opt = main_supcon.parse_option(['--method', 'BCL', '--n_views', '3', '--temp', '0.2'])
    assert (opt.ce_weight, opt.base_temperature) == (2, 0.1)
    opt.device, opt.class_sizes = 'cpu', [8, 4, 2, 1]
    model = SupConResNet('resnet18', feat_dim=5, num_classes=4, width=1 / 16)
    features, logits = F.normalize(torch.randn(18, 5), dim=1), torch.randn(18, 4)
    labels = torch.tensor([0, 1, 0, 2, 0, 1])                           # the fourth class has its prototype alone

    def network(images, n_views):
        return features, logits
    network.model = model
    _, loss, _ = methods.BCL(opt)(network, None, labels, None)
    prototypes = F.normalize(model.head(model.fc.weight), dim=1)
    z, y = torch.cat([features, prototypes]), torch.cat([labels.repeat(3), torch.arange(4)])
    contrastive = classification = 0.
    for i in range(18):
        others = [j for j in range(22) if j != i]
        n = {c: sum(y[j].item() == c for j in others) for c in range(4)}
        denominator = sum(((z[i] @ z[j]) / 0.2).exp() / n[y[j].item()] for j in others)
        positives = [j for j in others if y[j] == y[i]]
        contrastive += sum(denominator.log() - z[i] @ z[j] / 0.2 for j in positives) / len(positives) / 18
        weights = logits[i].exp() * torch.tensor([8., 4., 2., 1.])
        classification -= (weights[y[i]] / weights.sum()).log() / 18
    torch.testing.assert_close(loss, 0.6 * 0.2 / 0.1 * contrastive + 2 * classification)
    loss.backward()
    assert model.fc.weight.grad.abs().sum() > 0 and model.head[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize('more', [[], ['--amp', '--accum_steps', '2', '--n_views', '3', '--sampler', 'class_balanced']])
def test_bcl_from_end_to_end(call, more):
    status, _, err = call(main_supcon.main, *DIGITS, *NETWORK, '--method', 'BCL', '--imbalance', 20, *more,
                          '--output_name', 'a')
    assert status == 0, err
    status, out, err = call(main_linear.main, *DIGITS, '--ckpt', 'output/a/trial=0/last.ckpt', '--output_name', 'b')
    assert status == 0 and 'over classes: ' in out, err


@pytest.mark.parametrize('arguments, words', [
    (['--moco'], ['--moco', 'BCL']), (['--positives', 'image'], ['--positives', 'BCL']),
    (['--ce_weight', '0'], ['--ce_weight 0', 'BCL']), (['--head_bn'], ['--head_bn', 'BCL']),
    (['--summation_location', 'in'], ['--summation_location', 'BCL']), (['--imbalance', '0.5'], ['--imbalance', '0.5']),
    (['--aug_mode', 'with_both', '--aug_output_name', 'a', '--aug_name_id', 'b', '--aug_name_ood', 'c'],
     ['--aug_mode with_both', 'BCL'])])
def test_wrong_options_of_bcl(rejected, arguments, words):
    rejected(main_supcon.main, *TINY, '--method', 'BCL', *arguments, words=words)
