"""Images with several labels: lists in csv, losses with overlap, binary cross-entropy, mAP and F1."""
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ok
from PIL import Image
from torch.nn import functional as F

import main_ce
import main_linear
import main_supcon
from datasets import load_images
from methods import make_method
from scripts import make_mosaics
from util import arguments, metrics
from util.checkpoints import load_checkpoint

LAST = 'output/{}/trial=0/last.ckpt'
NETWORK = ['--model', 'resnet18', '--width', 0.0625, '--size', 8, '--num_workers', 0, '--batch_size', 16]
DATA = ['--dataset', 'csv', '--data_folder', 'listed']


@pytest.fixture
def listed(tmp_path):
    """listed(rows of train.csv, rows of val.csv): a folder `listed` with images, the channels of which are labels."""
    def make(train, val, header='file,labels'):
        root = tmp_path / 'listed'
        (root / 'images').mkdir(parents=True, exist_ok=True)
        for name, rows in (('train', train), ('val', val)):
            (root / f'{name}.csv').write_text('\n'.join([header, *rows, '']))
            for row in rows:
                file, _, labels = row.partition(',')
                if re.fullmatch(r'images/\w+\.png', file):
                    rng = np.random.default_rng(list(row.encode()))
                    array = rng.integers(0, 100, (8, 8, 3)).astype(np.uint8)
                    for channel, label in enumerate(('red', 'green', 'blue')):
                        array[..., channel] += 150 * (label in labels)
                    Image.fromarray(array).save(root / file)
        return root
    return make


def rows(part, n, several=True):
    sets = ['red', 'green', 'blue', 'green;blue', 'red;green', 'red;blue;green'][:6 if several else 3]
    return [f'images/{part}{i}.png,{sets[i % len(sets)]}' for i in range(n)]


def loaded(*words):
    return load_images(arguments.parse('main_ce', '', [*DATA, '--size', '8', *words]))


def test_lists_of_files(listed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed(rows('t', 12), rows('v', 6))
    train, val = loaded().train, loaded().val
    assert train.classes == val.classes == ['blue', 'green', 'red']
    assert train.labels[2:4].tolist() == [[1, 0, 0], [1, 1, 0]] and train.labels.dtype == torch.float32
    assert [Path(file).name for file in train.source[:2]] == ['t0.png', 't1.png'] and len(val) == 6
    listed(['images/t0.png,a', '"images/t1.png", b '], ['images/v0.png,b'])         # one class each; csv's quotes
    assert loaded().train.labels.tolist() == [0, 1] and loaded().val.labels.tolist() == [1]
    listed(['images/t0.png,red'], ['images/v0.png,red;red'], header='\ufefffile,labels')
    assert loaded().train.labels.tolist() == [0]


@pytest.mark.parametrize('train, words', [
    (['images/missing,a'], ['train.csv, line 2: images/missing: no such file']),
    (['images/t0.png,a', '../x.png,a'], ['train.csv, line 3: ../x.png is outside of the folder']),
    (['/etc/passwd,a'], ['line 2: /etc/passwd is outside']), (['images/../../x,a'], ['line 2', 'is outside']),
    (['images/t0.png,a', '', 'images/t0.png,b'], ['line 4: images/t0.png is listed already', 'train.csv, line 2)']),
    (['images/t0.png,a', './images//t0.png,b'], ['is listed already']),
    (['images/v0.png,a'], ['val.csv, line 2: images/v0.png is listed already', 'train.csv, line 2']),
    (['images/t0.png,'], ['line 2: an empty label']), (['images/t0.png,a;;b'], ['line 2: an empty label']),
    (['images/t0.png'], ['line 2: found 1 fields']), (['images/t0.png,a,b'], ['line 2: found 3 fields']),
    ([], ['train.csv: no images in it']), (['"images/t0.png,a'], ['train.csv: cannot be read']),
    (['images/t0.png,b'], ["val.csv, line 2: label 'a' has validation but no training images"]),
    (['images,a'], ['images: no such file']),
])
def test_wrong_lists_are_one_line_with_its_number(listed, rejected, train, words):
    listed(train, ['images/v0.png,a'])
    Image.new('RGB', (8, 8)).save('listed/images/t0.png')
    rejected(main_ce.main, *DATA, *NETWORK, words=words)


def test_other_mistakes(listed, rejected, tmp_path):
    rejected(main_ce.main, '--dataset', 'csv', words=['--data_folder is missing'])
    rejected(main_ce.main, *DATA, *NETWORK, words=['listed/train.csv: cannot be read', 'No such file'])
    listed(rows('t', 6), rows('v', 6), header='path,label')
    rejected(main_ce.main, *DATA, *NETWORK, words=['train.csv', 'found the header path,label, expected file,labels'])
    (tmp_path / 'listed/train.csv').write_bytes(b'file,labels\n\xff\xfe,a\n')
    rejected(main_ce.main, *DATA, *NETWORK, words=['train.csv: cannot be read'])
    listed(rows('t', 6), rows('v', 6))
    for program, words in ((main_ce, ['--label_smoothing', 0.1]), (main_supcon, ['--moco', '--moco_k', 16]),
                           (main_supcon, ['--summation_location', 'in']), (main_supcon, ['--positives_cap', 2]),
                           (main_supcon, ['--method', 'BCL']), (main_supcon, ['--method', 'SINCERE']),
                           (main_supcon, ['--label_noise', 0.1]),
                           (main_supcon, ['--sampler', 'class_balanced']), (main_ce, ['--imbalance', 10])):
        rejected(program.main, *DATA, *NETWORK, *words, words=[words[0], 'have several labels'])


def test_a_part_of_the_images_has_as_many_of_each_label(listed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed([f'images/t{i}.png,common{";rare" * (i < 4)}' for i in range(40)], ['images/v0.png,rare'])
    assert loaded('--max_samples', '4').train.labels.sum(0).tolist() == [4, 2]
    assert loaded('--label_fraction', '0.1').train.labels.sum(0).tolist() == [5, 1]
    assert loaded('--samples_per_class', '3').train.labels.sum(0).tolist() == [6, 3]


def method_of(name, *words):
    opt = arguments.parse('main_supcon', '', ['--method', name, '--temp', '0.2', '--no_warm', *words])
    opt.multi_label, opt.num_classes = True, 4
    return make_method(opt)


def features_of(images, n_views):
    """A network whose images [n_views, bsz, dim] are its features."""
    return images.flatten(0, 1)


@pytest.mark.parametrize('method, n_views', [('SupCon', 2), ('SupCon', 3), ('SimCLR', 2), ('GenSCL', 2)])
def test_loss_weighs_images_by_their_labels(method, n_views):
    """Against a plain loop over the views; SimCLR does not see the labels."""
    weight = {'SupCon': lambda same, cosine: math.exp(cosine / 0.2), 'SimCLR': lambda same, cosine: float(same),
              'GenSCL': lambda same, cosine: cosine}[method]
    z = F.normalize(torch.randn(n_views, 7, 5, dtype=torch.float64), dim=2)
    labels = (torch.rand(7, 4) < 0.4).float()
    labels[:, 0] = 1.
    found, loss, accuracy = method_of(method, '--n_views', str(n_views))(features_of, z, labels, None)
    torch.testing.assert_close(found, z.transpose(0, 1))
    views, losses = [(view, image) for view in range(n_views) for image in range(7)], []
    for a in views:
        others = [b for b in views if b != a]
        similarity = {b: float(z[a] @ z[b]) / 0.2 for b in others}
        weights = {b: weight(a[1] == b[1], float(F.cosine_similarity(labels[a[1]], labels[b[1]], dim=0)))
                   for b in others}
        log_denominator = math.log(sum(map(math.exp, similarity.values())))
        mean_positive = sum(weights[b] * similarity[b] for b in others) / sum(weights.values())
        losses.append(0.2 / 0.07 * (log_denominator - mean_positive))
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert 0 <= accuracy <= 100


def test_supcon_is_lowest_where_features_are_as_similar_as_labels():
    labels = (torch.rand(9, 4) < 0.5).float()
    labels[:, 0] = 1.
    z = F.normalize(labels, dim=1).expand(2, -1, -1).clone().requires_grad_()
    _, loss, _ = method_of('SupCon')(features_of, z, labels, None)
    loss.backward()
    assert z.grad.abs().max() < 1e-6
    _, other, _ = method_of('SupCon')(features_of, F.normalize(z.detach() + 0.1 * torch.randn_like(z), dim=2), labels,
                                      None)
    assert other > loss


def test_scores_against_plain_loops():
    logits, labels = torch.randn(30, 4), (torch.rand(30, 4) < 0.3).float()
    labels[:, 3] = 0.
    values, per_class = metrics.multi_label_scores(logits, labels)
    assert list(per_class) == [0, 1, 2]
    f1, counts = [], np.zeros(3)
    for c in range(4):
        order = sorted(range(30), key=lambda i, c=c: -logits[i, c])
        hits, precisions = 0, []
        for place, i in enumerate(order, 1):
            if labels[i, c]:
                hits += 1
                precisions.append(hits / place)
        if precisions:
            assert per_class[c] == pytest.approx(100 * sum(precisions) / len(precisions))
        true, wrong, missed = (sum(bool(labels[i, c]) == a and bool(logits[i, c] > 0) == b for i in range(30))
                               for a, b in ((True, True), (False, True), (True, False)))
        counts += true, wrong, missed
        f1.append(2 * true / max(1, 2 * true + wrong + missed))
    assert values['mAP'] == pytest.approx(sum(per_class.values()) / 3)
    assert values['F1_macro'] == pytest.approx(25 * sum(f1))
    assert values['F1_micro'] == pytest.approx(200 * counts[0] / (2 * counts[0] + counts[1] + counts[2]))


def test_neighbors_vote_for_all_their_labels():
    memory, features = torch.randn(20, 6), torch.randn(9, 6)
    memory_labels, labels = (torch.rand(20, 3) < 0.5).float(), (torch.rand(9, 3) < 0.5).float()
    labels[0] = 1.
    scores = torch.zeros(9, 3)
    for i in range(9):
        similarity = F.cosine_similarity(features[i:i + 1], memory)
        nearest = similarity.argsort(descending=True)[:5].tolist()
        weights = [float((similarity[j] / 0.1).exp()) for j in nearest]
        for j, weight in zip(nearest, weights):
            scores[i] += memory_labels[j] * weight / sum(weights)
    expected = metrics.average_precisions(scores, labels).values()
    assert metrics.knn_map(memory, memory_labels, features, labels, k=5) == pytest.approx(sum(expected) / 3)


def test_the_three_programs(call, listed):
    listed(rows('t', 34), rows('v', 12))
    words = [*DATA, *NETWORK]
    for method, more in (('SupCon', ['--ce_weight', 1]), ('GenSCL', ['--mix', 'mixup_cutmix', '--ce_weight', 1]),
                         ('SimCLR', [])):
        out = ok(call, main_supcon, *words, '--epochs', 2, '--method', method, *more, '--output_name', method)
        assert re.search(r' \* contrastive accuracy \d+\.\d\d\tkNN mAP \d+\.\d\d\n', out)
    out = ok(call, main_linear, *NETWORK[6:], '--pretrained', 'SupCon', '--epochs', 2, '--output_name', 'b',
             '--per_class', '--export', 'x.safetensors')
    last = re.findall(r' \* mAP (\S+) F1_micro \S+ F1_macro \S+\n', out)[-1]
    assert re.search(r'AP of blue: \d', out) and float(re.search(r'best mAP: (\S+)', out)[1]) >= float(last) - 0.01
    again = ok(call, main_linear, '--output_name', 'b', '--evaluate', '--num_workers', 0)
    assert f' * mAP {last} ' in again
    out = ok(call, main_ce, *words, '--epochs', 12, '--lr', 0.05, '--output_name', 'c')
    assert float(re.search(r'best mAP: (\S+)', out)[1]) > 85
    ok(call, main_ce, *words, '--epochs', 1, '--mix', 'mixup', '--loader', 'workers', '--output_name', 'd')
    assert load_checkpoint(LAST.format('c'))['opt']['multi_label'] is True


def test_one_class_each_is_an_ordinary_dataset(call, listed):
    listed(rows('t', 30, several=False), rows('v', 9, several=False))
    out = ok(call, main_supcon, *DATA, *NETWORK, '--epochs', 1, '--moco', '--moco_k', 16, '--output_name', 'a')
    assert 'kNN accuracy' in out
    out = ok(call, main_linear, *NETWORK[4:], '--pretrained', 'a', '--epochs', 1, '--cache_features')
    assert 'Acc@1' in out


def test_mosaics(call, monkeypatch):
    """Two by two images, labeled with their classes; the folder that is made is read as it is."""
    words = ['--dataset', 'digits', '--side', '16', '--train', '30', '--val', '8', '--output', 'listed']
    monkeypatch.setattr(sys, 'argv', ['make_mosaics.py', *words])
    status, out, err = call(lambda argv: make_mosaics.main())
    assert status == 0, err
    data = loaded()
    assert len(data.train) == 30 and len(data.val) == 8 and data.train.load(0).size == (16, 16)
    counts = data.train.labels.sum(1)
    assert counts.min() >= 1 and counts.max() <= 4 and len(data.train.classes) == 10
    status, _, err = call(lambda argv: make_mosaics.main())
    assert status == 2 and 'is there already' in err and err.count('\n') == 1
