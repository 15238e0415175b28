"""The documentation: what it names exists, its commands are taken, and the examples of the README run."""
import re
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from torch.nn import functional as F

import main_linear
import main_supcon
from datasets import DATASETS
from methods import METHODS
from util import arguments, options

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text()
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'benchmarks' / 'README.md', *(ROOT / 'docs').glob('*.md')]
FOLDERS = ('', 'benchmarks', 'datasets', 'docs', 'networks', 'scripts', 'scripts/results', 'tests', 'util')

every_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def example(heading, page=README):
    """The Python code of a section of the README, or of another page."""
    return re.search(rf'^## {heading}\n.*?^```python\n(.*?)^```', page, re.MULTILINE | re.DOTALL)[1]


def code(text):
    """What stands in code blocks and between backticks, a list; the lines of a command are joined."""
    blocks = re.findall(r'^```\w*\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
    text = re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)
    return [*(line for block in blocks for line in block.replace('\\\n', ' ').splitlines()),
            *re.findall(r'`([^`]+)`', text)]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')
            for heading in re.findall(r'^#+ (.*)$', page.read_text(), re.MULTILINE)}


def test_length():
    assert len(README.splitlines()) <= 200
    assert len((ROOT / 'CONTRIBUTING.md').read_text().splitlines()) <= 40


def test_every_page_is_linked_from_the_readme():
    assert {f'docs/{page.name}' for page in (ROOT / 'docs').iterdir()} <= set(re.findall(r'\]\(([^)]+)\)', README))


@every_page
def test_links_and_figures_are_there(page):
    for link in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        if not link.startswith('https://'):
            file, _, anchor = link.partition('#')
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@every_page
def test_files_that_are_named_are_there(page):
    for file in re.findall(r'[\w./-]+\.(?:py|sh|md|toml|yml|cff)\b', ' '.join(code(page.read_text()))):
        assert any((ROOT / folder / file).exists() for folder in FOLDERS), file


@every_page
def test_tests_that_are_named_are_there(page):
    for file, test in re.findall(r'(\w+\.py)::(\w+)', page.read_text()):
        assert f'def {test}(' in (ROOT / 'tests' / file).read_text(), (file, test)


def test_every_difference_has_a_test():
    rows = re.findall(r'^\| (.*) \|$', (ROOT / 'docs' / 'differences.md').read_text(), re.MULTILINE)
    rows = [row for row in rows if not row.endswith('| test')]
    assert len(rows) > 25 and all(re.search(r'\| (`test_\w+\.py::\w+`(, )?)+$', row) for row in rows)


@every_page
def test_options_that_are_named_are_there(page):
    """An option of one of the three programs, or of a script."""
    known = {flag for program in options.PROGRAMS for action in options.make_parser(program, '')._actions
             for flag in action.option_strings}
    scripts = ' '.join(file.read_text() for folder in ('scripts', 'scripts/results', 'benchmarks')
                       for file in (ROOT / folder).iterdir() if file.suffix in ('.py', '.sh'))
    known |= set(re.findall(r'--\w+', scripts))
    known |= {'--nnodes', '--rdzv_backend', '--rdzv_endpoint', '--shm_size'}            # of torchrun and Docker
    for option in re.findall(r'(?<![\w-])--[a-zA-Z][\w-]*', page.read_text()):
        assert f"--{option[2:].replace('-', '_')}" in known, option


@every_page
def test_commands_are_taken(page):
    """Those of the three programs; <run> stands for a name, and three dots for more of them."""
    for line in code(page.read_text()):
        for program, words in re.findall(r'(?:python|torchrun .*?) (main_\w+)\.py (.*)', line):
            words = words.replace('<run>', 'run').replace('...', '')
            arguments.parse(program, '', shlex.split(words, comments=True))


def test_dependencies_are_those_of_requirements_txt():
    text = (ROOT / 'pyproject.toml').read_text()                # tomllib is not in Python 3.10
    listed = re.findall(r'"(.*?)"', re.search(r'^dependencies = \[(.*?)^\]', text, re.MULTILINE | re.DOTALL)[1])
    assert listed == (ROOT / 'requirements.txt').read_text().split()


def test_measured_numbers_of_the_readme_are_those_of_the_logs():
    folder = ROOT / 'scripts' / 'results' / 'cpu'
    digits, cifar = ((folder / f'{table}.md').read_text() for table in ('methods', 'epochs'))
    rows = re.findall(r'^\| ([^|]+) \| (\S+ ± \S+) \| ([\d. ±]*?) ?\|', README, re.MULTILINE)
    assert len(rows) == 5 and sum(bool(top1) for _, _, top1 in rows) == 4
    for title, on_digits, on_cifar in rows:
        assert f'\n| {title} | {on_digits} |' in digits, title
        assert not on_cifar or re.search(rf'^\| {title} \|.* {on_cifar} \|', cifar, re.MULTILINE), title


@pytest.mark.parametrize('heading', ['Add a dataset', 'Add a loss', 'Add a method'])
def test_examples_are_short(heading):
    assert len([line for line in example(heading).splitlines() if line]) <= 15


def batch(bsz=6, dim=4, classes=3):
    features = F.normalize(torch.randn(bsz, 2, dim, dtype=torch.float64), dim=2).requires_grad_()
    return features, torch.arange(bsz) % classes


def test_example_of_the_loss():
    features, labels = batch()
    names = {'features': features, 'labels': labels}
    exec(example('The method and its loss'), names)
    assert names['loss'].isfinite() and names['criterion'](features, labels) != names['loss']


def weighted_loss(z, weights, temperature=0.1):
    """The mean of sum_j w_ij (log sum_k exp s_ik - s_ij) / sum_j w_ij, by loops; weights(i, j) of views."""
    n, losses = len(z), []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        s = {j: z[i] @ z[j] / temperature for j in others}
        log_sum = torch.stack(list(s.values())).logsumexp(0)
        losses.append(sum(weights(i, j) * (log_sum - s[j]) for j in others) / sum(weights(i, j) for j in others))
    return sum(losses) / n * temperature / 0.07


def loss_example(heading):
    names = {}
    exec(example(heading, (ROOT / 'docs' / 'loss_examples.md').read_text()), names)
    assert names['loss'].isfinite()
    return names


def test_example_of_several_labels():
    names = loss_example('Several labels per image')
    features, y = names['features'], F.normalize(names['labels'].float(), dim=1)
    z = features.transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(names['loss'], weighted_loss(z, lambda i, j: torch.exp(y[i % 4] @ y[j % 4] / 0.1)))


def test_example_of_regression():
    names = loss_example('Regression')
    z, ages = names['features'].transpose(0, 1).flatten(0, 1), names['ages']
    torch.testing.assert_close(names['loss'], weighted_loss(
        z, lambda i, j: torch.exp(-((ages[i % 4] - ages[j % 4]) / 5) ** 2 / 2)))


def test_example_of_segmentation():
    names = loss_example('Segmentation')
    features, labels = torch.randn(2, 4, 2, 3), torch.tensor([[[0, 1, 255], [1, 1, 0]], [[0, 0, 2], [1, 255, 2]]])
    z = F.normalize(torch.stack([features[b, :, y, x] for b in range(2) for y in range(2) for x in range(3)
                                 if labels[b, y, x] != 255]), dim=1)
    y = labels[labels != 255]
    expected = weighted_loss(z, lambda i, j: float(y[i] == y[j]))
    torch.testing.assert_close(names['pixel_loss'](features, labels), expected)
    assert names['pixel_loss'](features, labels, n=5).isfinite()


def test_example_of_a_new_loss():
    names = {}
    exec(example('Add a loss'), names)
    features, labels = batch()
    loss = names['triplet_loss'](features.float(), labels, margin=0.5)
    views = [(z, y.item()) for image, y in zip(features, labels) for z in image]
    expected = 0.
    for i, (z, y) in enumerate(views):
        positives = [(z - other).norm().item() for j, (other, c) in enumerate(views) if c == y and j != i]
        negatives = [(z - other).norm().item() for other, c in views if c != y]
        expected += max(0., 0.5 + max(positives) - min(negatives)) / len(views)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert features.grad.isfinite().all() and features.grad.any()


def test_example_of_a_new_method(call, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, 'Triplet', None)               # so that it is gone after the test
    flags, settings, _ = next(row for row in options.OPTIONS['method'] if row[0] == '--method')
    monkeypatch.setitem(settings, 'choices', (*settings['choices'], 'Triplet'))
    names = {}
    exec(example('Add a loss') + example('Add a method'), names)
    status, out, err = call(main_supcon.main, *TINY, '--method', 'Triplet', '--epochs', 2, '--output_name', 'a')
    assert status == 0, err
    assert re.search(r'kNN accuracy \d+\.\d\d', out) and (tmp_path / 'output/a/trial=0/last.ckpt').exists()


def test_example_of_a_new_dataset(call, tmp_path, monkeypatch):
    """Pretraining and linear evaluation on files as Fashion-MNIST's, of random pixels."""
    rng, folder = np.random.default_rng(0), tmp_path / 'data' / 'FashionMNIST' / 'raw'
    folder.mkdir(parents=True)
    for part, n in (('train', 40), ('t10k', 20)):
        pixels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        (folder / f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>4i', 2051, *pixels.shape) + pixels.tobytes())
        (folder / f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>2i', 2049, n) + labels.tobytes())
    monkeypatch.setitem(DATASETS, 'fashion', None)              # so that it is gone after the test
    exec(example('Add a dataset'), {})
    small = ['--size', 8, '--batch_size', 20, '--num_workers', 0, '--epochs', 1]
    status, out, err = call(main_supcon.main, *small, '--dataset', 'fashion', '--model', 'resnet18', '--width', 0.0625,
                            '--output_name', 'a')
    assert status == 0, err
    status, out, err = call(main_linear.main, *small, '--ckpt', 'output/a/trial=0/last.ckpt')
    assert status == 0 and 'best accuracy' in out, err
