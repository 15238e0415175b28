"""Weights that a run starts from: names of torchvision and timm, kinds of files, fine-tuning, rates of the encoder."""
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from conftest import ROOT, TINY, ok
from torch import nn

import main_ce
import main_linear
import main_supcon
from datasets import load_images
from networks.resnet_big import RESNETS, LinearProbe, ResNet, SupCEResNet, SupConResNet, make_encoder
from scripts import publish
from util import arguments, training, weights
from util.checkpoints import from_torchvision_names, load_checkpoint, load_encoder
from util.errors import UserError
from util.export import to_torchvision_names
from util.runs import RESUME_MAY_CHANGE

LAST = 'output/{}/trial=0/last.ckpt'
SMALL = ['--dataset', 'digits', '--size', 16, '--max_samples', 40, '--batch_size', 20, '--num_workers', 0,
         '--epochs', 1, '--model', 'resnet18']


def randomized(network, seed=0):
    """The network with random weights and statistics, none of them at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.dtype.is_floating_point:
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(0.5 + noise if name.endswith(('var', 'bn1.weight', 'bn2.weight')) else (noise - 0.5) / 8)
    return network


@pytest.mark.parametrize('name', [name for name in RESNETS if name != 'resnet200'])
def test_names_are_torchvision_s_in_both_directions(name):
    """And timm's, whose ResNets have the same."""
    with torch.device('meta'):
        ours, theirs = ResNet(name, 'imagenet'), torchvision.models.get_model(name)
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    written = to_torchvision_names(ours, theirs.fc)
    assert {key: value.shape for key, value in written.items()} == shapes
    read = from_torchvision_names(theirs.state_dict(), name)
    assert {key: value.shape for key, value in read.items()} == {
        f'encoder.{key}': value.shape for key, value in ours.state_dict().items()}
    if name == 'resnet50':
        with torch.device('meta'):
            assert {key: value.shape for key, value in timm.create_model(name).state_dict().items()} == shapes


WRAPPED = {
    'plain.pth': lambda state: state,
    'state_dict.pth': lambda state: {'state_dict': state, 'epoch': 3},
    'model.pth': lambda state: {'model': state, 'opt': None},
    'parallel.pth': lambda state: {f'module.{name}': value for name, value in state.items()},
    'of_supcontrast.pth': lambda state: {'model': {
        f'encoder.module.{name.replace("downsample", "shortcut")}': value for name, value in state.items()
        if not name.startswith('fc.')}},
    'before_0.4.1.pth': lambda state: {name: value for name, value in state.items() if 'num_batches' not in name},
    'x.safetensors': lambda state: state,
}


@pytest.mark.parametrize('file', WRAPPED)
def test_every_kind_of_file_gives_the_network(file, tmp_path):
    theirs, file = randomized(torchvision.models.resnet18()).eval(), tmp_path / file
    content = WRAPPED[file.name](theirs.state_dict())
    if file.suffix == '.safetensors':
        safetensors.torch.save_file(content, file, {'format': 'pt'})
    else:
        torch.save(content, file)
    model = SupConResNet('resnet18', stem='imagenet').eval()
    opt = arguments.parse('main_supcon', '', ['--model', 'resnet18', '--stem', 'imagenet', '--ckpt', str(file)])
    weights.start_from_weights(model, opt, weights.read_start(opt))
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.encoder(images), theirs(images))


def test_a_timm_network_from_a_file_through_pretraining_fine_tuning_and_export(call, tmp_path):
    torch.save(randomized(timm.create_model('resnet18')).state_dict(), 'start.pth')
    small = [*SMALL[:-1], 'timm/resnet18', '--stem', 'imagenet', '--ckpt', 'start.pth']
    out = ok(call, main_supcon, *small, '--lr', 1e-6, '--output_name', 'a')
    assert '--ckpt start.pth: loaded encoder (120 tensors); starts from random weights: head\n' in out
    start, trained = torch.load('start.pth'), load_checkpoint(LAST.format('a'))['model']
    name = 'layer4.1.conv2.weight'
    torch.testing.assert_close(trained[f'encoder.backbone.{name}'], start[name], atol=1e-4, rtol=0)
    assert not torch.equal(trained[f'encoder.backbone.{name}'], start[name])
    ok(call, main_linear, *SMALL[:-2], '--pretrained', 'a', '--finetune', '--output_name', 'b',
       '--export', 'x.safetensors')
    tuned = load_checkpoint(LAST.format('b'))
    assert not torch.equal(tuned['model'][f'encoder.backbone.{name}'], trained[f'encoder.backbone.{name}'])

    with safetensors.safe_open('x.safetensors', 'pt') as file:
        info = json.loads(file.metadata()['info'])
    network = timm.create_model('resnet18', num_classes=len(info['classes'])).eval()
    network.load_state_dict(safetensors.torch.load_file('x.safetensors'))
    images = torch.randn(3, 3, 16, 16)
    ours = LinearProbe(make_encoder('timm/resnet18', stem='imagenet')).eval()
    ours.load_state_dict(tuned['model'])
    torch.testing.assert_close(network(images), ours(images), rtol=1e-4, atol=1e-5)
    assert info['model'] == 'timm/resnet18' and info['size'] == 16 and info['classes'] == [str(i) for i in range(10)]
    read = weights.read_weights('x.safetensors')                # and is a start again, with the network that it records
    opt = arguments.parse('main_ce', '', [f'--{name}={read["opt"][name]}' for name in ('model', 'stem', 'size')])
    again = load_encoder(read, opt, 'x.safetensors').state_dict()
    assert all(torch.equal(value, tuned['model'][f'encoder.{key}']) for key, value in again.items())


def test_own_checkpoints_start_encoder_and_head_and_resume_without_the_file(call, rejected, tmp_path):
    ok(call, main_supcon, *TINY, '--epochs', 1, '--ce_weight', 1, '--output_name', 'a')
    words = [*TINY, '--lr', 1e-9, '--ckpt', LAST.format('a')]
    out = ok(call, main_supcon, *words, '--epochs', 1, '--ce_weight', 1)
    assert 'loaded encoder (120 tensors), head (4 tensors); starts from random weights: fc; not used: fc\n' in out
    new = next(path for path in Path('output').glob('*_from_a*'))
    before, after = load_checkpoint(LAST.format('a'))['model'], load_checkpoint(new / 'trial=0/last.ckpt')['model']
    for name in ('encoder.layer1.0.conv1.weight', 'head.0.weight'):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    out = ok(call, main_supcon, *words, '--epochs', 1, '--feat_dim', 16, '--output_name', 'b', '--moco', '--moco_k', 32)
    assert 'starts from random weights: head; not used: head, fc\n' in out
    assert 'loaded encoder' in ok(call, main_ce, *words, '--epochs', 1, '--output_name', 'ce')
    shutil.move('output/a', 'moved')
    out = ok(call, main_ce, *words, '--epochs', 2, '--output_name', 'ce', '--resume')
    assert 'loaded encoder' not in out
    rejected(main_ce.main, *words, words=['output/a/trial=0/last.ckpt: no such checkpoint'])


def test_weights_of_another_network_are_one_line(rejected, tmp_path):
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), 'r18.pth')
    torch.save({'model': {'encoder.x': torch.zeros(1)}, 'opt': {'model': 'resnet34'}}, 'r34.pth')
    torch.save({'a': torch.zeros(1), 'b': 3}, 'other.pth')
    Path('x.safetensors').write_bytes(b'\xff' * 100)
    for file, model, words in (
            ('r18.pth', 'resnet18', ['--ckpt r18.pth (for --model resnet18 --stem cifar --width 1)',
                                     'conv1.weight is [64, 3, 7, 7]']),
            ('r18.pth', 'resnet34', ['r18.pth', 'layer1.2.bn1.bias is none there']),
            ('r34.pth', 'resnet18', ['r34.pth holds an encoder with --model resnet34']),
            ('r18.pth', 'timm/vit_tiny_patch16_224', ['r18.pth', 'parameters differ']),
            ('other.pth', 'resnet18', ['other.pth: not a checkpoint']),
            ('x.safetensors', 'resnet18', ['x.safetensors: not a readable file']),
            ('hf://a', 'resnet18', ['hf://a: expected hf://owner/name']),
            ('missing.safetensors', 'resnet18', ['missing.safetensors: no such'])):
        rejected(main_ce.main, *SMALL[:-1], model, '--ckpt', file, words=words)


def test_files_of_the_hub(call, rejected, tmp_path, monkeypatch):
    """hf://owner/name[/file] is what the hub's own package gives for it; without network one line."""
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    rejected(main_ce.main, *SMALL, '--ckpt', 'hf://owner/name', words=['hf://owner/name: cannot be downloaded'])
    safetensors.torch.save_file(torchvision.models.resnet18().state_dict(), 'hub.safetensors')
    asked = []

    def download(*words):
        asked.append(words)
        return 'hub.safetensors'
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
    for name in ('hf://owner/name', 'hf://owner/name/sub/x.safetensors'):
        ok(call, main_ce, *SMALL, '--stem', 'imagenet', '--ckpt', name, '--overwrite', '--output_name', 'a')
    assert asked == [('owner/name', 'model.safetensors'), ('owner/name', 'sub/x.safetensors')]


def test_timm_pretrained_follows_the_weights(call, rejected, tmp_path, monkeypatch):
    torch.save(randomized(timm.create_model('resnet10t')).state_dict(), 'timm.pth')
    create = timm.create_model

    def from_file(name, pretrained=False, **settings):
        return create(name, pretrained, pretrained_cfg_overlay={'file': 'timm.pth'}, **settings)
    words = ['--timm_pretrained', '--model', 'timm/resnet10t.c3_in1k']
    opt = arguments.parse('main_supcon', '', words)
    assert (opt.size, opt.mean, opt.stem) == (176, (0.485, 0.456, 0.406), 'imagenet')
    with monkeypatch.context() as patch:
        patch.setattr(timm, 'create_model', from_file)
        out = ok(call, main_ce, *SMALL[:-2], *words, '--lr', 1e-9, '--output_name', 'a')
    assert 'starts from pretrained weights' in out
    trained = load_checkpoint(LAST.format('a'))
    torch.testing.assert_close(trained['model']['encoder.backbone.layer1.0.conv1.weight'],
                               torch.load('timm.pth')['layer1.0.conv1.weight'], rtol=0, atol=1e-6)
    assert trained['opt']['mean'] == (0.485, 0.456, 0.406)
    ok(call, main_linear, *SMALL[:-2], '--ckpt', LAST.format('a'), '--output_name', 'b')      # needs no download
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    rejected(main_ce.main, *SMALL[:-2], *words, words=['--timm_pretrained: the weights of resnet10t.c3_in1k cannot'])
    for wrong, expected in ((words[1:], 'resnet10t, with random weights, or --timm_pretrained'),
                            ([*words, '--stem', 'cifar'], '--stem imagenet'), (words[:1], '--model timm/<name>'),
                            ([words[0], '--model', 'timm/resnet10t.nowhere'], 'no weights nowhere of resnet10t'),
                ([*words, '--ckpt', 'x'], 'at most one')):
        rejected(main_supcon.main, *wrong, words=[expected])


# Fine-tuning

def test_the_encoder_s_rate_follows_the_schedule_in_proportion():
    for words in ([], ['--LARS'], ['--no_bias_decay']):
        opt = arguments.parse('main_ce', '', ['--model', 'resnet18', '--lr', '0.4', '--encoder_lr', '0.1', *words])
        opt.device, opt.num_classes = 'cpu', 3
        model, _ = main_ce.set_model(opt)
        optimizer = training.set_optimizer(opt, model)
        training.set_learning_rate(optimizer, 0.2)
        groups = optimizer.param_groups
        rates = {p: group['lr'] for group in groups for p in group['params']}
        assert len(rates) == len(list(model.parameters())) == sum(len(group['params']) for group in groups)
        assert all(rates[p] == 0.05 for p in model.encoder.parameters())
        assert all(rates[p] == 0.2 for p in model.fc.parameters())
        decays = {p: group['weight_decay'] for group in groups for p in group['params']}
        assert {decays[p] for p in model.parameters() if p.dim() > 1} == {1e-4}
        assert {decays[p] for p in model.parameters() if p.dim() < 2} == {0. if words else 1e-4}
        assert all(group.get('always_adapt', False) == (words == ['--LARS'] and group['params'][0].dim() > 1)
                   for group in groups)


def test_the_same_rate_for_the_encoder_is_the_run_without_it(call, interrupt):
    for name, words in (('a', []), ('b', ['--encoder_lr', 0.2])):
        ok(call, main_ce, *TINY, '--epochs', 2, '--lr', 0.2, *words, '--output_name', name)
    a, b = (load_checkpoint(LAST.format(name))['model'] for name in 'ab')
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    words = [*TINY, '--epochs', 3, '--lr', 0.2, '--encoder_lr', 0.02, '--output_name']
    ok(call, main_ce, *words, 'whole')
    interrupt(main_ce, 3, *words, 'cut')
    ok(call, main_ce, *words, 'cut', '--resume')
    a, b = (load_checkpoint(LAST.format(name))['model'] for name in ('whole', 'cut'))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_fine_tuning_trains_all_layers_but_frozen_batch_norms(call, rejected):
    ok(call, main_supcon, *TINY, '--epochs', 1, '--output_name', 'a')
    before, changed = load_checkpoint(LAST.format('a'))['model'], {}
    encoder = {key for key in before if key.startswith('encoder.')}
    data = [*TINY[:2], *TINY[6:], '--pretrained', 'a', '--epochs', 1]
    for name, words in (('linear', []), ('tuned', ['--finetune']), ('frozen', ['--finetune', '--freeze_bn'])):
        ok(call, main_linear, *data, *words, '--output_name', name)
        after = load_checkpoint(LAST.format(name))['model']
        changed[name] = {key for key in encoder if not torch.equal(after[key], before[key])}
    assert changed['linear'] == set() and changed['tuned'] == encoder
    assert changed['frozen'] == {key for key in encoder if before[key].dim() == 4}
    for words, expected in ((['--freeze_bn'], '--finetune is missing'), (['--encoder_lr', 1], 'has no effect'),
                            (['--finetune', '--cache_features'], 'at most one')):
        rejected(main_linear.main, *data, *words, words=expected.splitlines())


def test_a_fraction_of_the_labels_is_stratified_and_seeded():
    def labels(*words):
        opt = arguments.parse('main_ce', '', ['--dataset', 'digits', *words])
        data = load_images(opt)
        assert len(data.val) == 359
        return data.train.labels, data.train.source
    whole, _ = labels()
    for fraction in (0.1, 0.001):
        some, images = labels('--label_fraction', str(fraction))
        expected = [max(1, round(fraction * int(count))) for count in whole.bincount()]
        assert some.bincount().tolist() == expected
        assert (labels('--label_fraction', str(fraction))[1] == images).all()
        assert (labels('--label_fraction', str(fraction), '--seed', '1')[1] != images).any()
    with pytest.raises(UserError, match='at most one'):
        labels('--label_fraction', '0.1', '--samples_per_class', '3')


def test_a_fraction_of_a_long_tail_is_of_the_images_that_pretraining_has_seen():
    def images(*words):
        opt = arguments.parse('main_ce', '', ['--dataset', 'digits', '--imbalance', '10', *words])
        opt.split_seed = 0                              # as a checkpoint has it
        return {image.tobytes() for image in load_images(opt).train.source}
    seen, some = images(), images('--label_fraction', '0.5', '--seed', '1')
    assert some < seen and len(some) == pytest.approx(len(seen) / 2, abs=10)


def test_weights_of_timm_keep_their_stem(call):
    """With --stem cifar this network has parameters of the same shapes, and other strides."""
    torch.save(randomized(timm.create_model('mobilenetv3_small_050')).state_dict(), 'start.pth')
    start = ['--dataset', 'digits', '--model', 'timm/mobilenetv3_small_050', '--ckpt', 'start.pth']
    assert main_linear.parse_option(start)[0].stem == 'imagenet'
    assert main_linear.parse_option([*start, '--stem', 'cifar'])[0].stem == 'cifar'
    small = [*start, '--max_samples', 32, '--epochs', 1, '--num_workers', 0, '--size', 32]
    assert 'start.pth records no stem' in ok(call, main_ce, *small, '--output_name', 'a')
    assert 'records no stem' not in ok(call, main_ce, *small, '--stem', 'imagenet', '--output_name', 'b')


# Weights that travel

@pytest.fixture
def exported(call):
    """A run output/ce of a ResNet-18 of the usual width, and its classifier.safetensors."""
    ok(call, main_ce, *SMALL, '--size', 8, '--cosine', '--output_name', 'ce', '--export', 'classifier.safetensors')
    model = SupCEResNet('resnet18', 10).eval()
    model.load_state_dict(load_checkpoint(LAST.format('ce'))['model'])
    return model


def python_blocks(text):
    return re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


def test_exported_weights_load_as_documented_and_are_published(call, rejected, exported, monkeypatch, tmp_path):
    code, names = python_blocks((ROOT / 'docs' / 'export.md').read_text())[0], {}
    assert len([line for line in code.split('\n\n')[1].splitlines() if line]) <= 10
    exec(code, names)
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(names['network'](images), exported(images), rtol=1e-4, atol=1e-5)
    published(call, rejected, monkeypatch, tmp_path)


def published(call, rejected, monkeypatch, tmp_path):
    def main(words):
        monkeypatch.setattr(sys, 'argv', ['publish.py', *words])
        publish.main()
    with open('output/ce/trial=0/log.txt', 'a') as log:                 # a second line, as with --imbalance
        log.write(' * Acc@1 over classes: few 1.000\n')
    status, out, err = call(main, '--run', 'output/ce/trial=0', '--output', 'published')
    assert status == 0, err
    assert sorted(file.name for file in Path('published').iterdir()) == ['README.md', 'log.txt', 'model.safetensors']
    assert Path('published/model.safetensors').read_bytes() == Path('classifier.safetensors').read_bytes()
    card, run = Path('published/README.md').read_text(), Path('output/ce/trial=0')
    assert Path('published/log.txt').read_text() == (run / 'log.txt').read_text()
    assert f"Validation: {re.findall(r' [*] (Acc@1 [0-9].*)', (run / 'log.txt').read_text())[-1]}.\n" in card
    opt, again = load_checkpoint(run / 'last.ckpt')['opt'], re.search(r'python main_ce.py (.*)', card)[1]
    parsed = vars(arguments.parse('main_ce', '', shlex.split(again)))
    assert {name: (parsed[name], opt[name]) for name in parsed if name not in RESUME_MAY_CHANGE
            and parsed[name] != opt[name]} == {}
    monkeypatch.chdir('published')
    names = {}
    exec(python_blocks(card)[0], names)
    assert names['info']['size'] == 8 and 'layer2.0.downsample.0.weight' in names['state']
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    again = ['--run', 'output/ce/trial=0', '--output', 'published']
    rejected(main, *again, '--repo', 'owner/name', words=['--repo owner/name: cannot be uploaded'])
    ok(call, main_supcon, *TINY, '--epochs', 1, '--output_name', 'a')
    rejected(main, '--run', 'output/a/trial=0', '--output', 'x', words=['expected a checkpoint of main_ce.py'])
    checkpoint = torch.load(run / 'last.ckpt')
    torch.save({**checkpoint, 'opt': {**checkpoint['opt'], 'epochs': 9}}, run / 'last.ckpt')
    rejected(main, *again, words=['1 of 9 epochs, expected a finished run'])


@pytest.mark.parametrize('program, words, method', [
    ('main_linear', '--ckpt x --learning_rate 0.1 --batch_size 256 --no_warm --seed 0 --dataset digits', 'GenSCL'),
    ('main_linear', '--pretrained x --warm --warm_epochs 5 --cache_features', None),
    ('main_ce', '--batch_size 512 --no_warm --dataset imagenet --data_folder x', None),
    ('main_ce', '--warm --warm_epochs 2 --aug_output_name x --aug_root y --aug_name_id z --aug_mode with_id', None),
    ('main_ce', '--base_lr 0.1 --augment_policy rand --rand_n 3', None)])
def test_the_command_of_a_card_gives_the_options_of_its_run(program, words, method):
    run = vars(arguments.parse(program, '', words.split(), method))
    command = shlex.split(publish.command_of(program, {**run, 'ckpt': 'last.ckpt', 'pretrained_ckpt': 'last.ckpt'}))
    assert command[:2] == ['python', f'{program}.py'] and not any(word.startswith('--pretrained') for word in command)
    again = vars(arguments.parse(program, '', command[2:], method))
    names = run.keys() - publish.NOT_NEEDED - {'ckpt'}
    assert {name: again[name] for name in names} == {name: run[name] for name in names}


def test_names_of_timm_that_look_like_wrappers():
    encoder = make_encoder('timm/legacy_seresnet18', stem='imagenet')
    model = timm.create_model('legacy_seresnet18', num_classes=3)
    model.load_state_dict(to_torchvision_names(encoder, nn.Linear(512, 3)))
