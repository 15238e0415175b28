"""Evaluation without training, and networks for other programs (--evaluate, --export)."""
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, ok, options
from torchvision import models

import main_ce
import main_linear
import main_supcon
from datasets import make_loader
from datasets.image_set import ImageSet
from datasets.views import View
from networks.resnet_big import SupConResNet
from util import checkpoints
from util.export import encoder_and_classifier, to_torchvision_names

DATA = ['--dataset', 'digits', '--size', '8', '--max_samples', '96', '--num_workers', '0']


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
    theirs.load_state_dict(to_torchvision_names(*encoder_and_classifier(ours)))
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs(image), ours(image), rtol=1e-4, atol=1e-5)


def test_exported_state_dict_of_timm(call, tmp_path):
    import timm
    run = ['--dataset', 'digits', '--size', 16, '--max_samples', 40, '--epochs', 1, '--model', 'timm/resnet10t',
           '--stem', 'imagenet', '--output_name', 'a', '--export']
    ok(call, main_ce, *run, 'x.pth')
    exported = torch.load('x.pth', weights_only=True)
    model = timm.create_model(exported['model'].removeprefix('timm/'), num_classes=10).eval()
    model.load_state_dict(exported['state_dict'])
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(image), logits_of('a', image), rtol=1e-4, atol=1e-5)
    ok(call, main_ce, *run, 'x.pt2', '--evaluate')
    traced, images = torch.export.load('x.pt2').module(), torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-5)


def test_export_at_the_end_of_a_run(linear_run):
    exported = torch.load('first.pth', weights_only=True)
    assert exported['classes'] == [str(i) for i in range(10)] and exported['state_dict']['fc.weight'].shape == (10, 32)
    assert 'layer2.0.downsample.0.weight' in exported['state_dict']


def test_example_of_features(call, tmp_path):
    """The documented way gives what forward_all gives."""
    ok(call, main_supcon, *TINY, '--epochs', 1, '--output_name', 'pre')
    text = (Path(__file__).parent.parent / 'docs' / 'export.md').read_text()
    code = re.search(r'^## Features of .*?^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL)[1]
    names = {'images': torch.rand(5, 3, 8, 8)}
    exec(code.replace('<run>', 'pre'), names)
    model = SupConResNet('resnet18', width=0.0625).eval()
    model.load_state_dict(names['state'])
    expected = model.encoder((names['images'] - names['mean']) / names['std'])
    assert expected.std() > 0
    torch.testing.assert_close(names['features'], expected)


def test_export_refuses_before_it_trains(rejected, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'onnxscript' else found(name))
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
    for free, workers, prefetch in ((10**9, 2, 4), (4 * 2 * 40 * 2 * 3 * 64, 2, 1), (10, 1, 1)):
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
