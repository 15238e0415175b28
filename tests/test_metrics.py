"""Metrics against plain loops, and what TensorBoard and evaluate.py show of them."""
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from PIL import Image
from sklearn import metrics as sk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import main_ce
import main_linear
import main_supcon
from scripts import evaluate
from util import metrics, training
from util.curves import confusion_image


def test_confusion_matrix_is_scikit_learn_s():
    predicted, labels = torch.randint(4, (2, 50))
    expected = sk.confusion_matrix(labels, predicted, labels=range(5))
    assert metrics.confusion_matrix(predicted, labels, 5).tolist() == expected.tolist()


def test_calibration_error_by_hand():
    logits, labels = 3 * torch.randn(60, 3), torch.randint(3, (60,))
    error, bins = metrics.calibration(logits, labels, bins=10)
    found, expected = [], 0.
    for b in range(10):
        inside = [(p.max().item(), p.argmax() == y) for p, y in zip(logits.double().softmax(1), labels)
                  if b / 10 < p.max() <= (b + 1) / 10]
        if inside:
            confidence, accuracy = (sum(float(pair[i]) for pair in inside) / len(inside) for i in (0, 1))
            expected += 100 * len(inside) / 60 * abs(confidence - accuracy)
            found.append([confidence, accuracy, len(inside)])
    assert error == pytest.approx(expected)
    assert bins[bins[:, 2] > 0].tolist() == [pytest.approx(row) for row in found]
    assert metrics.calibration(torch.tensor([[100., 0.], [0., 100.]]), torch.tensor([0, 1]))[0] == pytest.approx(0)


def test_retrieval_by_hand():
    features, labels = torch.randn(25, 3), torch.randint(4, (25,))
    labels[3] = 7                                       # the only one of its class: it has nothing to find
    first, mean = [], []
    for i in range(25):
        others = sorted((j for j in range(25) if j != i), key=lambda j, i=i: -F.cosine_similarity(
            features[i:i + 1], features[j:j + 1]).item())
        same = [bool(labels[j] == labels[i]) for j in others]
        if any(same):
            first.append(same[0])
            mean.append(sum(sum(same[:k + 1]) / (k + 1) for k in range(sum(same)) if same[k]) / sum(same))
    assert metrics.retrieval(features, labels) == pytest.approx([100 * sum(first) / 24, 100 * sum(mean) / 24])


def test_alignment_and_uniformity_by_hand():
    features = F.normalize(torch.randn(6, 2, 5), dim=2)
    found = metrics.feature_statistics(features)
    views = list(features.flatten(0, 1))
    distances = [float((a - b).square().sum()) for i, a in enumerate(views) for b in views[:i]]
    assert found['uniformity'] == pytest.approx(math.log(sum(math.exp(-2 * d) for d in distances) / len(distances)))
    assert found['alignment'] == pytest.approx(sum(float((a - b).square().sum()) for a, b in features) / 6)
    assert found['feature_spread'] == pytest.approx(sum(distances) / 12**2, rel=1e-5)
    assert metrics.feature_statistics(features[:4])['alignment'] == metrics.feature_statistics(features, 8)['alignment']
    crops = features.repeat(1, 3, 1)                    # as many views in all of fewer images
    assert metrics.feature_statistics(crops, 12)['uniformity'] == metrics.feature_statistics(crops[:2])['uniformity']


def test_norm_of_the_gradient():
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert training.gradient_norm(model, torch.amp.GradScaler('cpu', enabled=False)) == pytest.approx(expected)
    assert training.gradient_norm(model, torch.amp.GradScaler('cpu', enabled=True)) is None


def curves(folder):
    events = EventAccumulator(str(folder), {'scalars': 0, 'images': 0}).Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()['scalars']}, events.Tags()['images']


def test_tensorboard_shows_gradients_features_loader_and_confusion(call):
    for main, words, name in ((main_supcon.main, TINY, 'a'), (main_ce.main, TINY, 'ce'),
                              (main_linear.main, [*TINY[:2], *TINY[6:], '--pretrained', 'a'], 'b')):
        status, _, err = call(main, *words, '--epochs', 2, '--output_name', name)
        assert status == 0, err
        folder = Path(f'output/{name}/trial=0')
        scalars, images = curves(folder)
        assert scalars['gradient_norm'] > 0 and 0 <= scalars['loader_fraction'] <= 1
        if name == 'a':
            assert 0 <= scalars['alignment'] <= 4 and -8 <= scalars['uniformity'] <= 0
        else:
            assert 'confusion' in images and (folder / 'confusion.png').exists()


def test_evaluation_and_its_figures(call, monkeypatch):
    assert call(main_ce.main, *TINY, '--epochs', 1, '--output_name', 'a')[0] == 0
    words = ['--ckpt', 'output/a/trial=0/last.ckpt', '--per_class', '--max_images', '50', '--figures', 'figures']
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', *words])
    status, out, err = call(lambda argv: evaluate.main())
    assert status == 0, err
    for line in (r'top-1 \S+', r'kNN accuracy \S+', r'ECE \S+', r'R@1 \S+', r'mAP@R \S+', r'accuracy of 3: \S+'):
        assert re.search(rf'^{line}$', out, re.MULTILINE), line
    assert {file.name for file in Path('figures').iterdir()} == {'confusion.png', 'reliability.png', 'neighbors.png'}
    assert Image.open('figures/neighbors.png').size == (9 * 74, 10 * 74)


def test_confusion_of_many_or_odd_classes_is_drawn():
    for n in (1, 3, 100, 1000):
        image = confusion_image(torch.eye(n, dtype=torch.long), [f'\x1b[31mé\n{i}' * 9 for i in range(n)])
        assert image.shape[2] == 3 and max(image.shape) < 5000
    before = confusion_image(torch.eye(3, dtype=torch.long), list('abc'))
    assert (before != confusion_image(2 * torch.eye(3, dtype=torch.long), list('abc'))).any()
