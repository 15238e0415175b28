import copy
import math
import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from losses import BalancedSupConLoss, GenSupConLoss, SupConLoss, contrastive_accuracy, reference_loss


def reference(features, labels=None, mask=None, positives='class', temperature=0.07, mode='all', base_temperature=0.07,
              location='out', denominator='all', cap=-1, keys=None, key_labels=None):
    """SupConLoss by reference_loss, its positives and its allowed contrasts found pair by pair."""
    bsz, n_views = features.shape[:2]
    y = list(range(bsz)) if labels is None else labels.tolist()
    views = [(i, v) for v in range(n_views) for i in range(bsz)]
    z = features.flatten(2).transpose(0, 1).flatten(0, 1)
    contrasts = [(j, u, y[j]) for j, u in views]
    if keys is not None:
        contrasts = [(j, 'key', j if key_labels is None else key_labels[j].item()) for j in range(len(keys))]
    # Near-ood images are no anchors.
    anchors = [row for row, (i, v) in enumerate(views) if y[i] >= 0 and (mode == 'all' or v == 0)]
    weights = torch.zeros(len(anchors), len(contrasts), dtype=torch.float64)
    allowed = torch.zeros(len(anchors), len(contrasts), dtype=torch.bool)
    for row, anchor in enumerate(anchors):
        i, v = views[anchor]
        others = []                                             # other images with positives so far
        for column, (j, u, label) in enumerate(contrasts):
            if (i, v) == (j, u):
                continue
            same = (i == j or (y[i] == label and positives == 'class')) and label >= 0
            weight = float(same if mask is None else mask[i, j])
            if weight > 0 and i != j and j not in others:
                others.append(j)
            if weight == 0:                                     # near-ood: seen by anchors of its own class only
                allowed[row, column] = label >= 0 or -label - 1 == y[i]
            elif cap < 0 or i == j or others.index(j) < cap // (n_views if keys is None else 1):
                weights[row, column] = weight
                allowed[row, column] = True
    values = reference_loss(z[anchors], z if keys is None else keys, weights, allowed, temperature, location,
                            denominator)
    return values.sum() / max(len(anchors), 1) * temperature / base_temperature


def reference_soft(features, labels, temperature=0.07, mode='all', base_temperature=0.07):
    """GenSupConLoss by reference_loss."""
    z, others = features
    y, y_others = (part.double() for part in labels)
    if mode == 'all':
        z = others = torch.cat([z, others])
        y = y_others = torch.cat([y, y_others])
    allowed = torch.ones(len(z), len(z), dtype=torch.bool)
    if mode == 'all':
        allowed.fill_diagonal_(False)
    weights = F.cosine_similarity(y[:, None], y_others, dim=2) * allowed
    return reference_loss(z, others, weights, allowed, temperature).mean() * temperature / base_temperature


@pytest.mark.parametrize('location', ['out', 'in'])
@pytest.mark.parametrize('denominator', ['all', 'one_positive', 'only_negatives'])
def test_reference_matches_the_formulas_in_exponentials(location, denominator):
    """Khosla et al., Eq. 2 and 3, with the sums of exponentials as they are written."""
    anchors = random_features(5, 1)[:, 0]
    contrasts = random_features(9, 1)[:, 0]
    allowed = torch.rand(5, 9) < 0.9
    weights = torch.rand(5, 9, dtype=torch.float64) * (torch.rand(5, 9) < 0.5) * allowed
    exp = (anchors @ contrasts.T / 0.5).exp()
    negatives = exp * (allowed & (weights == 0))
    b = torch.rand(5, 9).double()
    sums = {'all': (exp * allowed * b).sum(1, keepdim=True),
            'one_positive': exp + (negatives * b).sum(1, keepdim=True),
            'only_negatives': (negatives * b).sum(1, keepdim=True)}
    prob = exp / sums[denominator]
    weights /= weights.sum(1, keepdim=True)
    expected = -(weights * prob.log()).sum(1) if location == 'out' else -(weights * prob).sum(1).log()
    found = reference_loss(anchors, contrasts, weights, allowed, 0.5, location, denominator, b.log())
    torch.testing.assert_close(found, expected)


def random_features(bsz=7, n_views=2, shape=(5,), dtype=torch.float64):
    features = torch.randn(bsz, n_views, *shape, dtype=dtype)
    return F.normalize(features.flatten(2), dim=2).view_as(features).requires_grad_()


@pytest.fixture
def set_blocks(monkeypatch):
    """set_blocks(n): so many similarities are computed at a time."""
    def set_them(block):
        monkeypatch.setattr(losses, 'BLOCK', block)
        monkeypatch.setattr(losses, 'TILE', min(block // 10, losses.TILE))
    return set_them


def check(features, mode, location='out', denominator='all', cap=-1, **targets):
    copied = copy.deepcopy(features)
    loss = SupConLoss(0.1, mode, 0.07, location, denominator, cap, hard_negatives=True)(features, **targets)
    expected = reference(copied, temperature=0.1, mode=mode, location=location, denominator=denominator, cap=cap,
                         **targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-12)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(features.grad, copied.grad, rtol=1e-6, atol=1e-12)


TARGETS = {
    'supcon': lambda: {'labels': torch.tensor([0, 1, 0, 2, 1, 0, 9])},         # the classes 2 and 9 are alone
    'simclr': lambda: {},
    'mask': lambda: {'mask': (torch.rand(7, 7) < 0.4).double()},               # asymmetric, not all its diagonal
    'weights': lambda: {'mask': torch.rand(7, 7).double() * (torch.arange(7) != 3)[:, None]},
    'ood': lambda: {'labels': torch.tensor([0, -1, 0, 1, -2, 1, -3])},         # made from classes 0, 1 and 2
    'simclr_ood': lambda: {'labels': torch.tensor([0, -1, 0, 1, -2, 1, -3]), 'positives': 'image'},
}


@pytest.mark.parametrize('mode', ['all', 'one'])
@pytest.mark.parametrize('n_views', [1, 2, 3])
@pytest.mark.parametrize('targets', TARGETS)
@pytest.mark.parametrize('block', [losses.BLOCK, 40])                          # one block, and several uneven ones
def test_value_and_gradient_match_reference(set_blocks, mode, n_views, targets, block):
    set_blocks(block)
    check(random_features(7, n_views), mode, **TARGETS[targets]())


ABLATIONS = [(location, denominator, cap) for location in ('out', 'in')
             for denominator in ('all', 'one_positive', 'only_negatives') for cap in (-1, 0, 6, 12)]


@pytest.mark.parametrize('mode', ['all', 'one'])
@pytest.mark.parametrize('n_views', [1, 2, 3])
@pytest.mark.parametrize('targets', TARGETS)
@pytest.mark.parametrize('block', [losses.BLOCK, 40])
def test_ablations_match_reference(set_blocks, mode, n_views, targets, block):
    set_blocks(block)
    for ablation in ABLATIONS:
        check(random_features(7, n_views), mode, *ablation, **TARGETS[targets]())


def test_ablations_differ():
    """On labels with positives to cap and negatives, every setting gives another loss."""
    features, labels = random_features(12, 2), torch.arange(12) % 3
    values = {SupConLoss(0.1, 'all', 0.07, location, denominator, cap)(features, labels).item()
              for location, denominator, _ in ABLATIONS for cap in (-1, 0, 4, 6)}
    # 6 is all there are, as -1. With cap 0 one positive is left: then only leaving it out of the denominator differs.
    assert len({round(value, 9) for value in values}) == 2 * 6 + 2


@pytest.mark.parametrize('targets', ['supcon', 'ood', 'weights'])
@pytest.mark.parametrize('ablation', ABLATIONS)
def test_gradcheck_of_ablations(set_blocks, targets, ablation):
    set_blocks(40)
    keywords = TARGETS[targets]()
    criterion = SupConLoss(0.5, 'all', 0.07, *ablation, hard_negatives=True)
    assert torch.autograd.gradcheck(lambda f: criterion(f, **keywords), (random_features(),))


def double_loop(features, labels, loss_of_anchor, temperature):
    """The mean of loss_of_anchor(positives, negatives) over all views: similarities of each, lists of scalars."""
    views = [(z, i) for i, image in enumerate(features) for z in image]
    values = []
    for a, (anchor, i) in enumerate(views):
        positives, negatives = [], []
        for b, (contrast, j) in enumerate(views):
            if a != b:
                same = i == j if labels is None else labels[i] == labels[j]
                (positives if same else negatives).append(anchor @ contrast / temperature)
        values.append(loss_of_anchor(positives, negatives))
    return sum(values) / len(values)


def sincere(positives, negatives):
    """Feeney and Hughes, https://arxiv.org/abs/2309.14277."""
    exp_negatives = sum(s.exp() for s in negatives)
    return sum(-s + (s.exp() + exp_negatives).log() for s in positives) / len(positives)


def dcl(positives, negatives):
    """Yeh et al., https://arxiv.org/abs/2110.06848."""
    return sum(s.exp() for s in negatives).log() - sum(positives) / len(positives)


@pytest.mark.parametrize('setting, loss_of_anchor', [('one_positive', sincere), ('only_negatives', dcl)])
@pytest.mark.parametrize('with_labels', [True, False])
@pytest.mark.parametrize('block', [losses.BLOCK, 40])
def test_sincere_and_dcl_match_double_loops(set_blocks, setting, loss_of_anchor, with_labels, block):
    set_blocks(block)
    features, labels = random_features(), torch.tensor([0, 1, 0, 2, 1, 0, 9]) if with_labels else None
    loss = SupConLoss(0.2, base_temperature=0.2, denominator_mode=setting)(features, labels)
    expected = double_loop(features, labels, loss_of_anchor, 0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    ours, theirs = (torch.autograd.grad(value, features)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)


def balanced_double_loop(features, labels, prototypes, temperature, mode='all'):
    """Zhu et al., https://arxiv.org/abs/2207.09052, with the class sizes counted for each pair."""
    contrasts = [(i, z) for i, image in enumerate(features) for z in image]
    classes = [labels[i].item() for i, _ in contrasts]
    if prototypes is not None:
        contrasts += [(None, prototype) for prototype in prototypes]
        classes += range(len(prototypes))
    values = []
    for a, (i, anchor) in enumerate(contrasts):
        if i is None or (mode == 'one' and anchor is not features[i, 0] and a % features.shape[1]):
            continue
        others = [b for b in range(len(contrasts)) if b != a]
        s = {b: anchor @ contrasts[b][1] / temperature for b in others}
        denominator = sum(s[b].exp() / sum(classes[c] == classes[b] for c in others) for b in others)
        positives = [b for b in others if classes[b] == classes[a]]
        values.append(sum(denominator.log() - s[b] for b in positives) / max(1, len(positives)))
    return sum(values) / len(values)


@pytest.mark.parametrize('mode', ['all', 'one'])
@pytest.mark.parametrize('n_views', [1, 2])
@pytest.mark.parametrize('with_prototypes', [True, False])
@pytest.mark.parametrize('block', [losses.BLOCK, 40])
def test_balanced_loss_matches_a_double_loop(set_blocks, mode, n_views, with_prototypes, block):
    set_blocks(block)
    features, labels = random_features(7, n_views), torch.tensor([0, 1, 0, 2, 1, 0, 4])     # nobody has class 3
    prototypes = random_features(5, 1)[:, 0].detach().requires_grad_() if with_prototypes else None
    inputs = (features, prototypes) if with_prototypes else (features,)
    loss = BalancedSupConLoss(0.2, mode, 0.2)(features, labels, prototypes)
    expected = balanced_double_loop(features, labels, prototypes, 0.2, mode)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(value, inputs) for value in (loss, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *x: BalancedSupConLoss(0.5, mode)(x[0], labels, *x[1:]), inputs)


def test_balanced_loss_of_equal_classes_is_supcon():
    """Each class has 4 views: 3 of the anchor's own, so that only its weight differs."""
    features, labels = random_features(6, 2), torch.arange(6) % 3
    z = features.transpose(0, 1).flatten(0, 1)
    not_self = ~torch.eye(12, dtype=torch.bool)
    weights = (labels.repeat(2)[:, None] == labels.repeat(2)) & not_self
    expected = reference_loss(z, z, weights, not_self, 0.1, log_weights=torch.where(weights, 4 / 3, 1.).log())
    loss = BalancedSupConLoss(0.1, base_temperature=0.1)(features, labels)
    torch.testing.assert_close(loss, expected.mean() - math.log(4))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_balanced_loss_in_half_precision(dtype):
    features = random_features(16, 2, (32,), torch.float32).detach().to(dtype)
    prototypes = random_features(3, 1, (32,), torch.float32)[:, 0].detach().requires_grad_()
    labels = torch.randint(3, (16,))
    with torch.autocast('cpu', torch.bfloat16):
        loss = BalancedSupConLoss()(features, labels, prototypes)
    loss.backward()
    assert loss.dtype == prototypes.grad.dtype == torch.float32
    torch.testing.assert_close(loss, BalancedSupConLoss()(features.float(), labels, prototypes))


@pytest.mark.parametrize('labels, prototypes, words', [
    ([0, 1, 2, 3], (3, 8), ['labels are too large', 'less than 3', 'found 3']),
    ([0, -1, 2, 1], (3, 8), ['labels are negative', 'found -1']),
    ([0, 1, 2], (3, 8), ['[3]', '[4]', '[4, 2, 8]']),
    ([0, 1, 2, 1], (3, 7), ['[3, 7]', '[C, 8]', '[4, 2, 8]']), ([0, 1, 2, 1], (3, 1, 8), ['[3, 1, 8]', '[C, 8]'])])
def test_wrong_labels_and_prototypes_are_named(labels, prototypes, words):
    with pytest.raises(ValueError) as error:
        BalancedSupConLoss()(torch.zeros(4, 2, 8), torch.tensor(labels), torch.zeros(prototypes))
    assert all(word in str(error.value) for word in words)


def test_an_anchor_without_negatives():
    """All images of one class: there is nothing to sum over in 'only_negatives', which adds 0."""
    features, labels = random_features(4, 2), torch.zeros(4)
    for location in ('in', 'out'):
        loss = SupConLoss(summation_location=location, denominator_mode='only_negatives')(features, labels)
        loss.backward()
        assert loss == 0 and (features.grad == 0).all()
        assert SupConLoss(denominator_mode='one_positive')(features, labels) == 0          # log 1


KEYS = {
    'supcon': lambda: {'labels': torch.tensor([0, 1, 0, 2]), 'key_labels': torch.tensor([0, 1, 0, 2, 0, 1, 7, 7])},
    'simclr': lambda: {},
    'simclr_labels': lambda: {'labels': torch.tensor([0, 1, 0, 2]), 'positives': 'image',
                              'key_labels': torch.tensor([0, 1, 0, 2, 0, 1, 7, 7])},
    'ood': lambda: {'labels': torch.tensor([0, -1, 0, 1]), 'key_labels': torch.tensor([0, -1, 0, 1, -1, -2, -4, 0])},
}


@pytest.mark.parametrize('targets', KEYS)
@pytest.mark.parametrize('n_views', [1, 2])
@pytest.mark.parametrize('block', [losses.BLOCK, 20])
def test_keys_are_the_contrasts(set_blocks, targets, n_views, block):
    set_blocks(block)
    keys = F.normalize(torch.randn(8, 5, dtype=torch.float64), dim=1)
    for ablation in [('out', 'all', -1), ('out', 'all', 1), *ABLATIONS]:        # a key is one view
        check(random_features(4, n_views), 'all', *ablation, keys=keys, **KEYS[targets]())
    keywords = KEYS[targets]()
    for criterion in (SupConLoss(0.5, hard_negatives=True),
                      SupConLoss(0.5, denominator_mode='one_positive', hard_negatives=True)):
        assert torch.autograd.gradcheck(lambda f, k, criterion=criterion: criterion(f, keys=k, **keywords),
                                        (random_features(4, n_views), keys.clone().requires_grad_()))


def test_a_queue_may_change_before_the_backward_pass():
    """Its labels; that the keys or the mask have changed is an error of PyTorch's."""
    features, keys = random_features(4, 1), random_features(8, 1)[:, 0].detach()
    labels, key_labels = torch.arange(4) % 2, torch.arange(8) % 2
    criterion = SupConLoss(summation_location='in')
    expected, = torch.autograd.grad(criterion(features, labels, keys=keys, key_labels=key_labels), features)
    loss = criterion(features, labels, keys=keys, key_labels=key_labels)
    key_labels[:] = 7
    torch.testing.assert_close(torch.autograd.grad(loss, features)[0], expected)
    mask = torch.ones(4, 4)
    loss = criterion(features, mask=mask)
    mask.zero_()
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


@pytest.mark.parametrize('mode', ['all', 'one'])
@pytest.mark.parametrize('targets', TARGETS)
def test_gradcheck(set_blocks, mode, targets):
    set_blocks(40)
    keywords = TARGETS[targets]()
    criterion = SupConLoss(0.5, mode, hard_negatives=True)
    assert torch.autograd.gradcheck(lambda f: criterion(f, **keywords), (random_features(),))


SOFT = {
    'random': lambda: torch.rand(2, 7, 5, dtype=torch.float64),
    'sharp': lambda: (8 * torch.randn(2, 7, 5, dtype=torch.float64)).softmax(2),
    'mixed': lambda: 0.3 * F.one_hot(torch.randint(9, (2, 7)), 9).double() + 0.7 * F.one_hot(
        torch.randint(9, (2, 7)), 9).double(),
    'one_hot': lambda: F.one_hot(torch.tensor([0, 1, 0, 2, 1, 0, 4]), 5).repeat(2, 1, 1),
    'alone': lambda: torch.stack([torch.eye(15)[:7], torch.eye(15)[7:14]]),     # nobody has a positive
    'none': lambda: torch.rand(2, 7, 5) * (torch.arange(7) != 3)[:, None],      # an image without label
}


@pytest.mark.parametrize('mode', ['all', 'one'])
@pytest.mark.parametrize('targets', SOFT)
@pytest.mark.parametrize('block', [losses.BLOCK, 40])
def test_soft_labels_match_reference(set_blocks, mode, targets, block):
    set_blocks(block)
    labels = SOFT[targets]()
    features = random_features()
    copied = copy.deepcopy(features)
    loss = GenSupConLoss(0.1, mode, 0.07)(features.unbind(1), labels.unbind(0))
    expected = reference_soft(copied.unbind(1), labels.unbind(0), 0.1, mode)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-12)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(features.grad, copied.grad, rtol=1e-6, atol=1e-12)
    assert torch.autograd.gradcheck(lambda f: GenSupConLoss(0.5, mode)(f.unbind(1), labels.unbind(0)), (features,))


@pytest.mark.parametrize('mode', ['all', 'one'])
@pytest.mark.parametrize('alpha', [0., 0.5, 3.])
def test_the_loss_of_a_teacher_is_added_with_one_log_sum_exp(monkeypatch, mode, alpha):
    """Of its own number of classes, with some anchors that only one of both gives positives."""
    computed, log_sum_exp = [], losses._log_sum_exp
    monkeypatch.setattr(losses, '_log_sum_exp', lambda *args: computed.append(args) or log_sum_exp(*args))
    labels, teacher = torch.rand(2, 7, 4), torch.rand(2, 7, 6).softmax(2)
    labels[:, 2] = 0.
    features = random_features()
    copied = copy.deepcopy(features)
    loss = GenSupConLoss(0.1, mode, 0.07)(features.unbind(1), labels.unbind(0), teacher.unbind(0), alpha)
    assert len(computed) == 1
    expected = sum(weight * reference_soft(copied.unbind(1), target.unbind(0), 0.1, mode)
                   for weight, target in ((1., labels), (alpha, teacher)))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-12)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(features.grad, copied.grad, rtol=1e-6, atol=1e-12)
    with pytest.raises(ValueError, match=r'labels \[\[7, 6\], \[6, 6\]\]'):
        GenSupConLoss()(features.unbind(1), labels.unbind(0), (teacher[0], teacher[0, :6]))


def test_one_hot_labels_match_supcon():
    features, labels = random_features(64, 2, (16,), torch.float32), torch.randint(9, (64,))
    expected = SupConLoss(0.1)(features, labels)
    loss = GenSupConLoss(0.1)(features.unbind(1), [F.one_hot(labels, 9)] * 2)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, features)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_nearly_one_hot_labels_in_float32():
    """What an anchor adds to its own sums is nearly all of them, and must vanish."""
    labels = torch.stack([torch.eye(14)[:7], torch.eye(14)[7:]]) + 1e-6
    features = random_features(dtype=torch.float32)
    loss = GenSupConLoss(0.1)(features.unbind(1), labels.unbind(0))
    torch.testing.assert_close(loss.double(), reference_soft(features.double().unbind(1), labels.unbind(0), 0.1),
                               rtol=1e-4, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_with_soft_labels(dtype):
    features, labels = random_features(16, 2, (32,), torch.float32).detach().to(dtype), torch.rand(2, 16, 5)
    with torch.autocast('cpu', torch.bfloat16):
        loss = GenSupConLoss()(features.unbind(1), labels.unbind(0))
    torch.testing.assert_close(loss, GenSupConLoss()(features.float().unbind(1), labels.unbind(0)))


@pytest.mark.parametrize('features, labels', [
    ([(4, 8), (5, 8)], [(4, 3), (4, 3)]), ([(4, 8), (4, 8)], [(4, 3), (4, 2)]), ([(4, 8)], [(4, 3)]),
    ([(4, 8), (4, 8)], [(4,), (4,)]), ([(4, 2, 8), (4, 2, 8)], [(4, 3), (4, 3)]), ([(4, 8), (4, 8)], [(5, 3), (5, 3)])])
def test_wrong_shapes_of_tuples_are_named(features, labels):
    with pytest.raises(ValueError, match=r'expected two of the same') as error:
        GenSupConLoss()([torch.zeros(shape) for shape in features], [torch.zeros(shape) for shape in labels])
    assert str(list(labels[-1])) in str(error.value)


def test_more_dimensions_are_flattened():
    check(random_features(4, 2, (3, 2, 2)), 'all', labels=torch.tensor([0, 1, 0, 1]))


def test_other_view_of_the_same_image_is_a_positive():
    # Two images of different classes: the only positive of each view is the other view of its image.
    features = random_features(2, 2)
    torch.testing.assert_close(SupConLoss()(features, torch.tensor([3, 8])), SupConLoss()(features))
    assert SupConLoss()(features, torch.tensor([3, 8])) > 0


def test_class_zero_has_hard_negatives():
    features = random_features(3, 2)
    criterion = SupConLoss(hard_negatives=True)
    own, foreign, none = (criterion(features, torch.tensor([0, 1, third])) for third in (-1, -3, 2))
    assert own > foreign                                        # class 0 sees the image made from it
    torch.testing.assert_close(foreign, SupConLoss()(features[:2], torch.tensor([0, 1])))   # nobody sees it
    assert not torch.isclose(own, none)


def test_without_hard_negatives_it_is_supcon_and_simclr():
    features, labels = random_features(), torch.tensor([0, 1, 0, 2, 1, 0, 9])
    criterion = SupConLoss(hard_negatives=True)
    torch.testing.assert_close(SupConLoss()(features, labels, positives='image'), SupConLoss()(features))
    # Hard negatives of classes that have no anchors change nothing.
    more = torch.cat([features, random_features(2, 2)])
    for positives in ('class', 'image'):
        torch.testing.assert_close(criterion(more, torch.cat([labels, torch.tensor([-8, -4])]), positives=positives),
                                   SupConLoss()(features, labels, positives=positives))


@pytest.mark.parametrize('targets', [{}, {'positives': 'image'},
                                     {'keys': torch.eye(5)[:4], 'key_labels': torch.tensor([0, 1, 2, 0])}])
@pytest.mark.parametrize('location', ['out', 'in'])
def test_negative_labels_need_hard_negatives(targets, location):
    """Most people mean "ignore" by -1."""
    features, labels = random_features(4, 2, dtype=torch.float32), torch.tensor([0, 1, -1, 0])
    with pytest.raises(ValueError, match=r'labels are negative, .* hard_negatives=True .* found -1'):
        SupConLoss(summation_location=location)(features, labels, **targets)
    if 'keys' not in targets:
        with pytest.raises(ValueError, match='hard_negatives=True'):
            contrastive_accuracy(features, labels, **targets)


def test_negative_keys_need_no_hard_negatives():
    """As the empty places of a queue: nobody sees them."""
    features, labels = random_features(4, 1), torch.tensor([0, 1, 2, 0])
    keys = F.normalize(torch.randn(6, 5, dtype=torch.float64), dim=1)
    for criterion in (SupConLoss(), SupConLoss(summation_location='in')):
        loss = criterion(features, labels, keys=keys, key_labels=torch.cat([labels, torch.tensor([-2**40, -2**40])]))
        torch.testing.assert_close(loss, criterion(features, labels, keys=keys[:4], key_labels=labels))


def test_collapsed_features_give_the_value_that_users_report():
    features = F.normalize(torch.ones(256, 2, 128), dim=2)
    loss = SupConLoss(temperature=0.1)(features, torch.randint(10, (256,)))
    assert loss.item() == pytest.approx(8.909, abs=5e-4)
    assert loss.item() == pytest.approx(math.log(511) * 0.1 / 0.07, rel=1e-5)


@pytest.mark.parametrize('labels', [[0], [-1], [0, -2], [0, 1]])
@pytest.mark.parametrize('as_mask', [False, True])
@pytest.mark.parametrize('scale', [1, 100])                    # 100**2 / 0.07: its exponential is inf
def test_no_positives_adds_zero(labels, as_mask, scale):
    features = scale * random_features(len(labels), 1).detach()
    targets = {'mask': torch.zeros(len(labels), len(labels))} if as_mask else {'labels': torch.tensor(labels)}
    for location, denominator, cap in ABLATIONS:
        features = features.detach().requires_grad_()
        criterion = SupConLoss(0.07, 'all', 0.07, location, denominator, cap, hard_negatives=True)
        loss = criterion(features, **targets)
        loss.backward()
        assert loss == 0 and (features.grad == 0).all()


@pytest.mark.parametrize('ablation', [('out', 'all', -1), *ABLATIONS])
def test_nan_is_not_hidden(ablation):
    features = random_features()
    with torch.no_grad():
        features[2] = torch.nan
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    for targets in ({'labels': labels}, {'mask': labels[:, None] == labels}):
        assert SupConLoss(0.07, 'all', 0.07, *ablation)(features, **targets).isnan()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    features = random_features(16, 2, (32,), torch.float32).detach().to(dtype).requires_grad_()
    labels = torch.randint(3, (16,))
    with torch.autocast('cpu', torch.bfloat16):
        loss = SupConLoss()(features, labels)
        loss.backward()
    exact = features.detach().float().requires_grad_()
    expected = SupConLoss()(exact, labels)
    expected.backward()
    assert loss.dtype == torch.float32 and features.grad.dtype == dtype
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(features.grad.float(), exact.grad, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize('labels', [torch.tensor([5., 2., 5.]), torch.tensor([[5], [2], [5]]),
                                    torch.tensor([10**12, 7, 10**12]), torch.tensor([True, False, True])])
def test_labels_of_any_kind(labels):
    features = random_features(3, 2)
    torch.testing.assert_close(SupConLoss()(features, labels), SupConLoss()(features, torch.tensor([0, 1, 0])))


@pytest.mark.parametrize('features, targets, words', [
    ((4, 8), {}, ['[4, 8]']),
    ((4, 2, 8), {'labels': torch.zeros(5)}, ['[5]', '[4, 2, 8]']),
    ((4, 2, 8), {'labels': torch.zeros(2, 2)}, ['[2, 2]', '[4, 2, 8]']),
    ((4, 2, 8), {'mask': torch.zeros(4, 3)}, ['[4, 3]', '[4, 4]', '[4, 2, 8]']),
    ((4, 2, 8), {'mask': torch.eye(4), 'labels': torch.zeros(4)}, ['labels', 'mask']),
    ((4, 2, 8), {'positives': 'views'}, ["'views'", "'class'", "'image'"]),
    ((4, 2, 8), {'keys': torch.zeros(3, 8)}, ['[3, 8]', '[4 or more, 8]']),
    ((4, 2, 8), {'keys': torch.zeros(5, 7)}, ['[5, 7]', '[4, 2, 8]']),
    ((4, 2, 8), {'keys': torch.zeros(5, 8), 'labels': torch.zeros(4)}, ['key_labels']),
    ((4, 2, 8), {'keys': torch.zeros(5, 8), 'labels': torch.zeros(4), 'key_labels': torch.zeros(4)}, ['key_labels']),
    ((4, 2, 8), {'keys': torch.zeros(5, 8), 'mask': torch.eye(4)}, ['keys', 'mask']),
])
def test_wrong_shapes_are_named(features, targets, words):
    with pytest.raises(ValueError) as error:
        SupConLoss()(torch.zeros(features), **targets)
    assert all(word in str(error.value) for word in words)


STANDALONE = """
import sys
import torch
sys.path.insert(0, '.')                                         # -I: nothing else but the packages of Python
before = set(sys.modules)
from losses import SupConLoss
new = set(sys.modules) - before
assert {name for name in new if not name.startswith('torch.')} == {'losses'}, new
layer, x, labels = torch.load('in.pt', weights_only=False)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
loss = SupConLoss()(torch.nn.functional.normalize(layer(x), dim=2), labels)
loss.backward()
optimizer.step()
torch.save((loss.detach(), layer.weight.grad, layer.weight.detach()), 'out.pt')
"""


def test_the_file_alone_trains(tmp_path):
    """Copied to an empty folder, out of reach of this repository, where users of SupContrast would put it."""
    shutil.copy(losses.__file__, tmp_path)
    layer, x, labels = torch.nn.Linear(6, 4).double(), torch.randn(8, 2, 6, dtype=torch.float64), torch.arange(8) % 3
    torch.save((layer, x, labels), tmp_path / 'in.pt')
    subprocess.run([sys.executable, '-I', '-c', STANDALONE], cwd=tmp_path, check=True)
    loss, gradient, weight = torch.load(tmp_path / 'out.pt')
    expected = reference(F.normalize(layer(x), dim=2), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, layer.weight.grad)
    torch.testing.assert_close(weight, layer.weight.detach() - 0.1 * gradient)


def test_signatures_match_supcontrast():
    features, labels = random_features(), torch.tensor([0, 1, 0, 2, 1, 0, 9])
    criterion = SupConLoss(0.1, 'one', 0.05)
    assert (criterion.temperature, criterion.contrast_mode, criterion.base_temperature) == (0.1, 'one', 0.05)
    mask = (labels[:, None] == labels).double()
    torch.testing.assert_close(criterion(features, None, mask), criterion(features, labels))
    assert SupConLoss(temperature=0.07, contrast_mode='all', base_temperature=0.07)(features, labels, mask=None) > 0


@pytest.mark.parametrize('loss', [SupConLoss, GenSupConLoss])
@pytest.mark.parametrize('keywords', [{'contrast_mode': 'two'}, {'temperature': 0}, {'base_temperature': -1}])
def test_wrong_settings_are_rejected(loss, keywords):
    with pytest.raises(ValueError):
        loss(**keywords)


@pytest.mark.parametrize('temperature', [1e-3, 0.01, 0.022, 0.03, 0.07, 10.])
@pytest.mark.parametrize('scale', [0.1, 1., 3.])
def test_every_temperature_and_length_in_float32(monkeypatch, spy, temperature, scale):
    """Half of the matrix is used only where none of its exponentials can vanish."""
    monkeypatch.setattr(losses, 'TILE', 5)
    symmetric = spy(losses._SymmetricLogSumExp, 'apply')
    exact = (scale * random_features()).detach().requires_grad_()
    features = exact.detach().float().requires_grad_()
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 9])
    loss = SupConLoss(temperature)(features, labels)
    expected = reference(exact, labels=labels, temperature=temperature)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-4)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(features.grad, exact.grad.float(), rtol=1e-3, atol=1e-4)
    assert bool(symmetric) == (scale**2 / temperature < 31.1)


@pytest.mark.parametrize('ablation', [ablation for ablation in ABLATIONS if ablation[2] < 0])
@pytest.mark.parametrize('temperature', [0.002, 0.01, 0.07, 10.])
@pytest.mark.parametrize('targets', ['supcon', 'weights', 'ood'])
def test_ablations_at_every_temperature_in_float32(ablation, temperature, targets):
    """Exponentials that overflow or vanish give neither inf nor nan, in values or in gradients."""
    exact, targets = random_features(), TARGETS[targets]()
    features = exact.detach().float().requires_grad_()
    loss = SupConLoss(temperature, 'all', 0.07, *ablation, hard_negatives=True)(features, **targets)
    location, denominator, _ = ablation
    expected = reference(exact, temperature=temperature, location=location, denominator=denominator, **targets)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-4)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(features.grad, exact.grad.float(), rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize('temperature', [0.02, 0.032, 0.034, 0.07, 10.])
@pytest.mark.parametrize('loss', ['SupCon', 'GenSCL'])
def test_features_of_unit_length_on_a_gpu(monkeypatch, spy, loss, temperature):
    """Half of the matrix, of tensors that only pretend to be on a GPU, where no exponential can overflow or vanish."""
    monkeypatch.setattr(torch.Tensor, 'is_cuda', property(lambda x: True))
    monkeypatch.setattr(losses, 'TILE_CUDA', 5)
    symmetric = spy(losses._SymmetricLogSumExp, 'apply')
    exact = F.normalize(random_features(), dim=2).detach().requires_grad_()
    exact.data[0, 1] = exact.data[0, 0]                                     # the largest and the smallest similarity
    exact.data[1, 0] = -exact.data[0, 0]
    features = exact.detach().float().requires_grad_()
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    if loss == 'SupCon':
        found = SupConLoss(temperature, unit_length=True)(features, labels)
    else:
        found = GenSupConLoss(temperature, unit_length=True)(features.unbind(1), [F.one_hot(labels)] * 2)
    expected = reference(exact, labels=labels, temperature=temperature)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-4)
    found.backward()
    expected.backward()
    torch.testing.assert_close(features.grad, exact.grad.float(), rtol=1e-3, atol=1e-4)
    assert bool(symmetric) == (temperature > 0.0328)


def test_longer_features_are_rejected_where_unit_length_is_expected(monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'is_cuda', property(lambda x: True))
    monkeypatch.setattr(losses, 'TILE_CUDA', 5)
    features = F.normalize(random_features(), dim=2).detach()
    criterion = SupConLoss(unit_length=True)
    assert criterion(1.005 * features) > 0                                  # rounded in half precision
    features[3, 1] *= 1.02
    with pytest.raises(RuntimeError, match='features are longer than 1.01, expected unit length'):
        criterion(features)
    features[3, 1] = math.nan                                               # said of the loss, by the programs
    assert criterion(features).isnan()


def test_gpus_are_not_waited_for(monkeypatch, spy):
    """Tensors without values, as if on a GPU: who asks for one gets an error."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    assertions = spy(torch, '_assert_async')
    monkeypatch.setattr(losses, 'TILE_CUDA', 4)
    with FakeTensorMode():
        features = torch.empty(8, 2, 16, device='cuda', requires_grad=True)
        labels = torch.empty(8, dtype=torch.long, device='cuda')
        with pytest.raises(DataDependentOutputException):
            (labels >= 0).all().item()
        for criterion in (SupConLoss(), SupConLoss(hard_negatives=True), SupConLoss(positives_cap=2),
                          SupConLoss(unit_length=True),
                          *[SupConLoss(0.1, 'all', 0.07, *ablation) for ablation in ABLATIONS[::4]]):
            for targets in ({'labels': labels}, {}, {'labels': labels, 'positives': 'image'},
                            {'keys': features[:, 0].detach()}, {'mask': labels == labels[:, None]},
                            {'labels': labels, 'keys': features[:, 0].detach(), 'key_labels': labels}):
                assertions.clear()
                assert criterion(features, **targets).device.type == 'cuda'
                # Negative labels stop the GPU, where they are not hard negatives, and features that are too long.
                assert len(assertions) == ('labels' in targets and not criterion.hard_negatives) + (
                    criterion.unit_length and not {'keys', 'mask'} & set(targets))
        for unit_length in (False, True):
            criterion = GenSupConLoss(unit_length=unit_length)
            criterion(features.unbind(1), [torch.empty(8, 3, device='cuda')] * 2)
        BalancedSupConLoss()(features, labels, torch.empty(3, 16, device='cuda'))
        contrastive_accuracy(features, labels)
        contrastive_accuracy(features, labels, hard_negatives=True)


def test_a_single_view_has_no_contrasts():
    features = random_features(1, 1)
    loss = SupConLoss()(features)
    loss.backward()
    assert loss == 0 and (features.grad == 0).all()


def one_hot(labels):
    return [F.one_hot(labels, 4).double()] * 2


# Name: (a loss, its arguments after the features for labels [bsz])
VARIANTS = {
    'SupCon': (SupConLoss(), lambda y: {'labels': y}), 'SimCLR': (SupConLoss(), lambda y: {}),
    'GenSCL': (lambda f, labels: GenSupConLoss()(f.unbind(1), labels), lambda y: {'labels': one_hot(y)}),
    'BCL': (lambda f, labels: BalancedSupConLoss()(f, labels, f[:4, 0]), lambda y: {'labels': y}),
    'mask': (SupConLoss(), lambda y: {'mask': y[:, None] == y}),
    'weights': (SupConLoss(0.1, 'all', 0.07, 'in', 'one_positive', 4), lambda y: {'mask': (y[:, None] == y) * 0.3}),
    'hard negatives': (SupConLoss(summation_location='in', hard_negatives=True), lambda y: {'labels': y - 1}),
    'keys': (lambda f, labels: SupConLoss(summation_location='in')(f, labels, keys=f[:, 0], key_labels=labels),
             lambda y: {'labels': y}),
    'one': (SupConLoss(contrast_mode='one', denominator_mode='only_negatives'), lambda y: {'labels': y}),
    'SimCLR, one_positive': (SupConLoss(denominator_mode='one_positive'), lambda y: {}),
    **{'/'.join(map(str, ablation)): (SupConLoss(0.07, 'all', 0.07, *ablation), lambda y: {'labels': y})
       for ablation in ABLATIONS if ablation[2] in (-1, 6)}}


@pytest.mark.parametrize('variant', VARIANTS)
def test_memory_is_linear(monkeypatch, variant):
    """No tensor of the loss, forward or backward, is larger than a block or than the features."""
    monkeypatch.setattr(losses, 'BLOCK', 8192)
    monkeypatch.setattr(losses, 'TILE', 64)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if torch.is_tensor(tensor):
                    largest = max(largest, tensor.numel())
            return result

    loss, arguments = VARIANTS[variant]
    features = random_features(1024, 2, (4,))
    arguments = arguments(torch.randint(4, (1024,)))
    with Watch():
        loss(features, **arguments).backward()
    assert largest <= 8192 + 4 * 4                              # the whole matrix would have 2048 * 2048


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.usefixtures('two_threads')
def test_gradients_are_the_same_every_time(variant):
    loss, arguments = VARIANTS[variant]
    features = random_features(512, 2, (128,), torch.float32)
    arguments = arguments(torch.arange(512) % 4)
    gradients = [torch.autograd.grad(loss(features, **arguments), features)[0] for _ in range(4)]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_contrastive_accuracy():
    near, far = torch.tensor([1., 0.]), torch.tensor([0., 1.])
    features = torch.stack([torch.stack(pair) for pair in ((near, near), (far, far), (near, far))])
    assert contrastive_accuracy(features[:2]) == 100
    assert contrastive_accuracy(features[:2].flip(1)) == 100
    assert contrastive_accuracy(F.normalize(torch.tensor([[[1., 0.], [0., 1.]], [[.9, .1], [.1, .9]]]), dim=2)) == 0
    assert contrastive_accuracy(features[[0, 0]], torch.tensor([1, 1])) == 100
    # Only the two views of image 0 count.
    assert contrastive_accuracy(features[:2], torch.tensor([0, -1]), hard_negatives=True) == 100
    assert contrastive_accuracy(features[:2], torch.tensor([0, 0]), 'image') == 100
    crossed = torch.stack([torch.stack([near, far]), torch.stack([near, far])])
    assert contrastive_accuracy(crossed, torch.tensor([0, 0])) == 100
    assert contrastive_accuracy(crossed, torch.tensor([0, 0]), 'image') == 0


def test_contrastive_accuracy_of_soft_labels():
    """The weight of the most similar view; for one-hot labels the fraction of positives."""
    features, labels = random_features(30, 2), torch.randint(4, (30,))
    one_hot = F.one_hot(labels, 4).float()[:, None].repeat(1, 2, 1)
    torch.testing.assert_close(contrastive_accuracy(features, one_hot), contrastive_accuracy(features, labels))
    near, far = torch.tensor([1., 0.]), torch.tensor([0., 1.])
    features = torch.stack([torch.stack([near, near]), torch.stack([far, far])])
    labels = torch.tensor([[[1., 0.], [1., 1.]], [[3., 0.], [2., 0.]]])
    expected = 100 * (2 * 0.5 ** 0.5 + 2) / 4                   # cos 45 degrees, and equal directions
    torch.testing.assert_close(contrastive_accuracy(features, labels), torch.tensor(expected))


@pytest.mark.parametrize('keywords, words', [
    ({'summation_location': 'inside'}, "'inside'"), ({'denominator_mode': 'none'}, 'only_negatives'),
    ({'positives_cap': -2}, '-2'), ({'positives_cap': 3}, 'multiple of 2')])
def test_wrong_ablations_are_rejected(keywords, words):
    with pytest.raises(ValueError, match=words):
        SupConLoss(**keywords)(random_features(), torch.zeros(7))


@pytest.mark.parametrize('backend, setting', [('cuda', 'tf32'), ('mkldnn', 'bf16'), ('mkldnn', 'none')])
def test_similarities_are_computed_in_full_precision(backend, setting):
    """Forward and backward, where a container or a user allows less; afterwards it is as it was."""
    matmul, seen = getattr(torch.backends, backend).matmul, []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm):
                seen.append(matmul.fp32_precision)
            return function(*args, **(kwargs or {}))
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = setting
        for criterion in (SupConLoss(0.1), SupConLoss(0.1, summation_location='in')):
            with Products():
                criterion(random_features(dtype=torch.float32), torch.arange(7) % 3).backward()
        assert matmul.fp32_precision == setting
    finally:
        matmul.fp32_precision = before
    assert len(seen) >= 6 and set(seen) == {'none' if setting == 'none' else 'ieee'}


@pytest.mark.parametrize('temperature', [torch.tensor(0.1), math.nan, math.inf, 0, '0.1'])
def test_the_temperature_is_a_positive_number(temperature):
    """A tensor would get no gradient; what learns a temperature divides the features."""
    for criterion in (SupConLoss, BalancedSupConLoss, GenSupConLoss):
        with pytest.raises(ValueError, match='expected a number above 0'):
            criterion(temperature)
        with pytest.raises(ValueError, match='expected a number above 0'):
            criterion(base_temperature=temperature)


@pytest.mark.parametrize('criterion', [SupConLoss(0.1), SupConLoss(0.01), SupConLoss(0.1, summation_location='in'),
                                       BalancedSupConLoss(0.1)])
def test_second_derivatives_are_an_error(criterion):
    """Not silently those of a constant."""
    features = random_features()
    loss = criterion(features, torch.arange(7) % 3)
    with pytest.raises(RuntimeError, match='no second derivatives'):
        torch.autograd.grad(loss, features, create_graph=True)


@pytest.mark.parametrize('criterion', [SupConLoss(0.1), SupConLoss(0.1, denominator_mode='one_positive')])
def test_the_loss_can_be_compiled(criterion):
    features, labels = random_features(dtype=torch.float32), torch.arange(7) % 3
    found = torch.compile(criterion, backend='aot_eager')(features, labels)
    expected = criterion(features, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, features)[0] for loss in (found, expected)))


def test_gradients_of_a_scaled_loss_are_finite():
    """The largest and the smallest similarity, at a temperature where only half of the matrix was computed once."""
    features = torch.tensor([[[1., 0.], [-1., 0.]]], requires_grad=True)
    (SupConLoss(0.0265)(features) * 2**16).backward()
    assert features.grad.isfinite().all()


def test_labels_of_any_type_mark_no_hard_negatives():
    """On a GPU, which is not asked whether there are any."""
    with torch.device('meta'):
        assert losses._source_class(torch.zeros(3, dtype=torch.uint8)).dtype == torch.int64
