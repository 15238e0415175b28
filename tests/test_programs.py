"""The three programs from end to end: on digits, on real images, interrupted, and with what users do wrong."""
import argparse
import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_ce
import main_linear
import main_supcon
from networks.resnet_big import SupConResNet
from util import checkpoints

LINEAR = ['--dataset', 'digits', '--size', '8', '--max_samples', '96', '--num_workers', '0']
PRETRAINED = 'output/a/trial=0/last.ckpt'
SMALL = '_width_0.0625_size_8'                                  # of TINY, in default names


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={'images': 0})
    accumulator.Reload()
    return accumulator


def scalars(folder, tag):
    return [event.value for event in events(folder).Scalars(tag)]


def parameters(file):
    return checkpoints.load_checkpoint(file)['model']


@pytest.fixture
def pretrained(call):
    status, _, err = call(main_supcon.main, *TINY, '--epochs', 1, '--output_name', 'a')
    assert status == 0, err


@pytest.mark.parametrize('method', ['SupCon', 'SimCLR'])
def test_pretraining_run(call, tmp_path, method):
    status, out, err = call(main_supcon.main, *TINY, '--method', method, '--epochs', 2, '--eval_freq', 1,
                            '--save_freq', 1, '--print_freq', 1, '--temp', 0.1)
    assert status == 0, err
    folder = tmp_path / f'output/{method}_digits_resnet18_lr_0.05_decay_0.0001_bsz_32_temp_0.1_trial_0{SMALL}/trial=0'
    assert {file.name.split('.tfevents')[0] for file in folder.iterdir()} == {
        '.lock', 'last.ckpt', 'ckpt_epoch_1.ckpt', 'ckpt_epoch_2.ckpt', 'options.json', 'log.txt', 'views.png',
        'events.out'}
    number = r'\d+\.\d{3}'
    assert re.search(rf'^Train: \[2\]\[3/3\]\tBT {number} \({number}\)\tDT {number} \({number}\)\t'
                     rf'loss {number} \({number}\)$', out, re.MULTILINE)
    assert re.search(r'^epoch 2, total time \d+\.\d\d$', out, re.MULTILINE)
    assert 'No GPU found' in out
    assert (folder / 'log.txt').read_text() == out
    assert json.loads((folder / 'options.json').read_text())['method'] == method

    shown = events(folder)
    assert {'loss', 'learning_rate', 'contrastive_acc', 'knn_acc', 'images_per_second'} <= set(
        shown.Tags()['scalars'])
    assert [event.step for event in shown.Scalars('loss')] == [1, 2]
    image = shown.Images('views')[0]
    assert (image.width, image.height) == Image.open(folder / 'views.png').size
    checkpoint = torch.load(folder / 'last.ckpt', weights_only=True)
    assert checkpoint['epoch'] == 2 and checkpoint['classes'] == [str(i) for i in range(10)]
    assert {key.split('.')[0] for key in checkpoint['model']} == {'encoder', 'head'}


@pytest.mark.usefixtures('two_threads')
def test_the_same_seed_gives_the_same_run(call, tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        assert call(main_supcon.main, *TINY, '--epochs', 2, '--seed', seed, '--output_name', name)[0] == 0
    a, b, c = (parameters(tmp_path / f'output/{name}/trial=0/last.ckpt') for name in 'abc')
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_linear_evaluation_run(call, pretrained, tmp_path):
    before = parameters(PRETRAINED)
    status, out, err = call(main_linear.main, *LINEAR, '--ckpt', PRETRAINED, '--epochs', 3, '--learning_rate', 1,
                            '--per_class', '--output_name', 'linear')
    assert status == 0, err
    assert re.fullmatch(r'best accuracy: \d+\.\d\d', out.splitlines()[-1])
    assert len(re.findall(r'^accuracy of \d: \d+\.\d\d$', out, re.MULTILINE)) == 10
    assert re.search(r'^Train: \[3\]\[1/1\]\tBT .*\tloss .*\tAcc@1 \d+\.\d{3} \(\d+\.\d{3}\)$', out, re.MULTILINE)
    folder = tmp_path / 'output/linear/trial=0'
    assert {'train_loss', 'train_acc', 'val_loss', 'val_acc', 'learning_rate'} <= set(events(folder).Tags()['scalars'])
    best = max(scalars(folder, 'val_acc'))
    assert float(out.splitlines()[-1].split()[-1]) == pytest.approx(best, abs=0.006)
    after = parameters(folder / 'last.ckpt')
    for name in before:
        if name.startswith('encoder.'):                         # frozen, running statistics included
            assert torch.equal(before[name], after[name]), name
    assert 'classifier.fc.weight' in after


def test_linear_evaluation_of_cached_features(call, pretrained, spy, rejected, monkeypatch, tmp_path):
    """The encoder sees each image once; the result is that of training on images without augmentation."""
    encoded = spy(main_linear.LinearProbe, 'forward')
    arguments = [*LINEAR, '--ckpt', PRETRAINED, '--epochs', 3, '--learning_rate', 1, '--batch_size', 32]
    status, out, err = call(main_linear.main, *arguments, '--cache_features', '--output_name', 'cached')
    assert status == 0, err
    assert out.count('--cache_features: 96 images') == 2          # of training, of validation
    assert all(args[1].dim() == 2 for args, _ in encoded)
    cached = parameters(tmp_path / 'output/cached/trial=0/last.ckpt')

    monkeypatch.setattr(main_ce, 'classification_view', main_ce.evaluation_view)
    assert call(main_linear.main, *arguments, '--output_name', 'plain')[0] == 0
    plain = parameters(tmp_path / 'output/plain/trial=0/last.ckpt')
    assert cached.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(cached[name], plain[name], rtol=1e-4, atol=1e-5)

    best = re.search(r'Acc@1 (\S+)', call(main_linear.main, *arguments, '--cache_features', '--output_name', 'cached',
                                          '--evaluate')[1])[1]
    assert best == re.findall(r'Acc@1 (\S+) Acc@5', out)[-1]
    rejected(main_linear.main, *arguments, '--cache_features', '--cutout', words=['--cutout', '--cache_features'])


def test_cross_entropy_run(call, tmp_path):
    status, out, err = call(main_ce.main, *TINY, '--epochs', 2, '--method', 'SupCon', '--per_class')
    assert status == 0, err
    assert re.fullmatch(r'best accuracy: \d+\.\d\d', out.splitlines()[-1])
    folder = tmp_path / 'output/SupCE_digits_resnet18_lr_0.2_decay_0.0001_bsz_32_trial_0_width_0.0625_size_8/trial=0'
    assert {'train_loss', 'train_acc', 'val_loss', 'val_acc', 'learning_rate'} <= set(events(folder).Tags()['scalars'])
    assert 'fc.weight' in parameters(folder / 'last.ckpt')


def test_real_images_from_end_to_end(call, cifar_jpeg, tmp_path):
    data = ['--dataset', 'path', '--data_folder', cifar_jpeg, '--max_samples', 512, '--batch_size', 128]
    network = ['--model', 'resnet18', '--width', 0.125]
    status, out, err = call(main_supcon.main, *data, *network, '--epochs', 4, '--temp', 0.1, '--output_name', 'a')
    assert status == 0, err
    assert 'Measured on the training images: --mean' in out
    losses = scalars(tmp_path / 'output/a/trial=0', 'loss')
    assert losses[-1] < losses[0]
    status, out, err = call(main_linear.main, *data, '--ckpt', PRETRAINED, '--epochs', 4, '--learning_rate', 1)
    assert status == 0, err
    assert 'Measured' not in out                                # the checkpoint's statistics
    assert float(out.splitlines()[-1].split()[-1]) > 12         # better than chance, 10 %
    status, out, err = call(main_ce.main, *data, *network, '--epochs', 4, '--output_name', 'ce')
    assert status == 0, err
    losses = scalars(tmp_path / 'output/ce/trial=0', 'train_loss')
    assert losses[-1] < losses[0]


@pytest.mark.parametrize('program, extra', [(main_supcon, ['--ce_weight', 0.5]), (main_ce, [])])
@pytest.mark.parametrize('loader', ['batched', 'per_sample'])
def test_interrupted_and_resumed_is_the_same_run(call, interrupt, program, extra, loader):
    arguments = [*TINY, *extra, '--epochs', 4, '--loader', loader, '--eval_freq', 1, '--cosine']
    assert call(program.main, *arguments, '--output_name', 'whole')[0] == 0

    interrupt(program, 3, *arguments, '--output_name', 'halves')
    status, _, err = call(program.main, *arguments, '--output_name', 'halves', '--resume')
    assert status == 0, err

    whole, halves = (checkpoints.load_checkpoint(f'output/{name}/trial=0/last.ckpt') for name in ('whole', 'halves'))
    assert whole['epoch'] == halves['epoch'] == 4 and whole['best_acc'] == halves['best_acc']
    assert all(torch.equal(whole['model'][name], halves['model'][name]) for name in whole['model'])
    assert all(torch.equal(a['momentum_buffer'], b['momentum_buffer']) for a, b in zip(
        whole['optimizer']['state'].values(), halves['optimizer']['state'].values()))


def test_a_run_is_not_overwritten_unasked(call, rejected, pretrained, tmp_path):
    arguments = [*TINY, '--output_name', 'a', '--epochs', 1]
    rejected(main_supcon.main, *arguments, words=['output/a/trial=0', '--overwrite'])
    rejected(main_supcon.main, *arguments, '--resume', '--epochs', 2, '--width', 0.125, '--seed', 3, words=[
        '--width 0.125, was 0.0625', '--seed 3, was 0'])
    assert call(main_supcon.main, *arguments, '--trial', 1)[0] == 0
    status, out, _ = call(main_supcon.main, *arguments, '--overwrite')
    assert status == 0
    assert (tmp_path / 'output/a/trial=0/log.txt').read_text() == out
    assert len(list((tmp_path / 'output/a/trial=0').glob('events*'))) == 1


def save_original(file, name='resnet18', **network):
    """A checkpoint as SupContrast writes it on several GPUs."""
    model = SupConResNet(name, **network)
    state = {key.replace('encoder.', 'encoder.module.'): value for key, value in model.state_dict().items()}
    opt = argparse.Namespace(model=name, dataset='cifar10', batch_size=1024, cosine=True, lr_decay_epochs=[700, 800])
    torch.save({'opt': opt, 'model': state, 'optimizer': {'state': {}, 'param_groups': []}, 'epoch': 1000}, file)
    return model


def test_checkpoint_of_the_original_programs(call, tmp_path):
    model = save_original(tmp_path / 'original.pth')
    status, out, err = call(main_linear.main, *LINEAR, '--max_samples', 20, '--ckpt', 'original.pth', '--epochs', 1)
    assert status == 0, err
    assert 'original.pth: resnet18 after 1000 epochs' in out
    saved = parameters(next(tmp_path.glob('output/digits_resnet18*/trial=0/last.ckpt')))
    assert torch.equal(saved['encoder.layer1.0.conv1.weight'], model.encoder.layer1[0].conv1.weight)


def test_checkpoint_of_the_original_with_its_own_types(call, image_folder, tmp_path):
    """mean and std of --dataset path are texts there, and the learning rate is a NumPy number after its first decay."""
    save_original(tmp_path / 'original.pth')
    image_folder()
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(tmp_path / 'original.pth', weights_only=True)
    checkpoint['opt'] = argparse.Namespace(model='resnet18', dataset='path', size=16, mean='(0.1, 0.2, 0.3)',
                                           std='(0.4, 0.5, 0.6)')
    checkpoint['optimizer']['param_groups'] = [{'lr': 0.05 * 0.1 ** np.sum(np.asarray([700, 800, 900]) < 701)}]
    assert isinstance(checkpoint['optimizer']['param_groups'][0]['lr'], np.float64)
    torch.save(checkpoint, tmp_path / 'original.pth')
    status, _, err = call(main_linear.main, '--dataset', 'path', '--data_folder', 'images', '--ckpt', 'original.pth',
                          '--epochs', 1, '--output_name', 'a')
    assert status == 0, err
    opt = json.loads((tmp_path / 'output/a/trial=0/options.json').read_text())
    assert (opt['size'], opt['mean'], opt['std']) == (16, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


class Evil:
    def __reduce__(self):
        return open, ('hacked', 'w')


@pytest.mark.parametrize('content, words', [
    (b'', ['not a readable checkpoint']), (b'no checkpoint', ['not a readable checkpoint']),
    ({'weights': 1}, ['not a checkpoint of these programs']), ([1, 2], ['not a checkpoint of these programs']),
    ({'model': {'encoder.conv1.weight': torch.zeros(3)}, 'opt': {}}, ['holds another network']),
    ({'model': {3: torch.zeros(3)}}, ['not a checkpoint of these programs']),
    ({'model': {'encoder.conv1.weight': 'text'}}, ['not a checkpoint of these programs']),
    ({'model': {'encoder.conv1.weight': torch.zeros(3).to_sparse()}}, ['not a readable checkpoint']),
    ({'model': {}, 'opt': 'text'}, ['options are corrupted']),
    ({'model': {}, 'opt': {'model': 'resnet19'}}, ['options are corrupted', 'resnet19']),
    ({'model': {}, 'opt': {'model': 'resnet18', 'width': -1}}, ['options are corrupted', '-1']),
    ({'model': {}, 'opt': Evil()}, ['not a readable checkpoint'])])
def test_what_is_no_checkpoint_is_rejected(rejected, tmp_path, content, words):
    if isinstance(content, bytes):
        (tmp_path / 'x.ckpt').write_bytes(content)
    else:
        torch.save(content, tmp_path / 'x.ckpt')
    rejected(main_linear.main, *LINEAR, '--ckpt', 'x.ckpt', words=['x.ckpt', *words])


def test_corrupted_checkpoints_are_rejected(rejected, pretrained, tmp_path):
    """Bytes cut off or changed: one line, whatever PyTorch makes of them."""
    whole = (tmp_path / PRETRAINED).read_bytes()
    rng = np.random.default_rng(0)
    for i in range(40):
        corrupted = bytearray(whole[:rng.integers(1, len(whole))] if i % 2 else whole)
        if not i % 2:                                           # the first part holds the pickle
            for position in rng.integers(0, 4000, 20):
                corrupted[position] = rng.integers(256)
        (tmp_path / 'x.ckpt').write_bytes(bytes(corrupted))
        rejected(main_linear.main, *LINEAR, '--ckpt', 'x.ckpt', words=['x.ckpt'])


def test_linear_evaluation_finds_the_dataset_of_the_encoder(call, image_folder, spy, monkeypatch, tmp_path):
    """Without --dataset: no download of CIFAR-10 instead."""
    image_folder()
    small = ['--size', 8, '--batch_size', 8, '--num_workers', 0]
    status, _, err = call(main_supcon.main, *small, '--dataset', 'path', '--data_folder', 'images', '--model',
                          'resnet18', '--width', 0.0625, '--epochs', 1, '--output_name', 'a')
    assert status == 0, err
    status, _, err = call(main_linear.main, *small, '--ckpt', PRETRAINED, '--epochs', 1, '--output_name', 'b')
    assert status == 0, err
    opt = json.loads((tmp_path / 'output/b/trial=0/options.json').read_text())
    assert (opt['dataset'], opt['data_folder']) == ('path', 'images')
    for arguments in ([], ['--dataset', 'path', '--data_folder', 'images']):
        opt, _ = main_linear.parse_option(['--ckpt', PRETRAINED, *arguments])
        assert (opt.dataset, opt.data_folder) == ('path', 'images')
    opt, _ = main_linear.parse_option(['--ckpt', PRETRAINED, '--dataset', 'cifar100'])
    assert (opt.dataset, opt.data_folder, opt.model, opt.width) == ('cifar100', './data', 'resnet18', 0.0625)
    (tmp_path / 'images').rename(tmp_path / 'moved')
    status, _, err = call(main_linear.main, '--ckpt', PRETRAINED)
    assert status == 2 and 'images: no such folder' in err


def test_recorded_dataset_that_cannot_be_used(rejected, pretrained, tmp_path):
    checkpoint = torch.load(PRETRAINED, weights_only=True)
    for name, value in (('dataset', 'nothing'), ('mvip_num_classes', 'x'), ('data_folder', '')):
        dataset = {'dataset': 'path'} if name == 'data_folder' else {}
        torch.save({**checkpoint, 'opt': {**checkpoint['opt'], **dataset, name: value}}, tmp_path / 'x.ckpt')
        rejected(main_linear.main, '--ckpt', 'x.ckpt', words=['x.ckpt: its recorded options', name])


def test_checkpoint_of_cifar_from_another_machine(pretrained, tmp_path):
    checkpoint = torch.load(PRETRAINED, weights_only=True)
    checkpoint['opt'].update(dataset='cifar100', data_folder='/nowhere/data')
    torch.save(checkpoint, tmp_path / 'x.ckpt')
    opt, _ = main_linear.parse_option(['--ckpt', 'x.ckpt'])
    assert (opt.dataset, opt.data_folder) == ('cifar100', './data')


@pytest.mark.parametrize('program', [main_supcon, main_ce])
def test_cifar_is_not_downloaded_among_other_files_unasked(rejected, image_folder, tmp_path, program):
    image_folder()
    rejected(program.main, '--data_folder', 'images', words=['--data_folder images', '--dataset path'])
    (tmp_path / 'images' / 'cifar-10-batches-py').mkdir()
    assert program.parse_option(['--data_folder', 'images']).dataset == 'cifar10'
    assert program.parse_option(['--data_folder', 'new']).dataset == 'cifar10'


def test_evaluation_takes_the_options_of_the_run(call, rejected, pretrained, tmp_path):
    """--evaluate needs the run's name alone, whatever rate, batch size and image size it was trained with."""
    trained = ['--learning_rate', 3, '--batch_size', 48, '--epochs', 1, '--output_name', 'b']
    status, out, err = call(main_ce.main, *TINY, *trained)
    assert status == 0, err
    found = call(main_ce.main, '--output_name', 'b', '--evaluate', '--num_workers', 0)
    assert found[0] == 0 and re.search(r' \* Acc@1 \S+', out)[0] in found[1] and 'not as in' not in found[1], found
    status, changed, err = call(main_ce.main, '--output_name', 'b', '--evaluate', '--max_samples', 50, '--size', 16)
    assert status == 0, err
    assert '--evaluate: not as in output/b/trial=0/last.ckpt: --size 16, was 8; --max_samples 50, was 96' in changed

    status, out, err = call(main_linear.main, *LINEAR, '--ckpt', PRETRAINED, *trained[:-1], 'c')
    assert status == 0, err
    for extra in ([], ['--ckpt', PRETRAINED], ['--pretrained', 'a']):
        found = call(main_linear.main, *extra, '--output_name', 'c', '--evaluate', '--export', 'c.pth')
        assert found[0] == 0 and re.search(r' \* Acc@1 \S+', out)[0] in found[1], found
    assert (tmp_path / 'c.pth').exists()
    rejected(main_ce.main, '--output_name', 'b', '--evaluate', '--width', 1, words=['holds another network'])
    rejected(main_linear.main, '--evaluate', words=['--ckpt FILE or --pretrained NAME'])


def test_default_names_tell_runs_apart(call, pretrained):
    names = [main_supcon.parse_option([*arguments]).output_name for arguments in (
        [], ['--width', '0.5'], ['--stem', 'imagenet'], ['--size', '64'], ['--head', '64,32'], ['--moco'],
        ['--ce_weight', '1'], ['--samples_per_class', '9'], ['--method', 'GenSCL'],
        ['--method', 'GenSCL', '--model', 'resnet18'])]
    assert len(set(names)) == len(names)
    assert names[1].endswith('_trial_0_width_0.5') and names[4].endswith('_head_64,32')
    assert call(main_supcon.main, *TINY, '--epochs', 1, '--output_name', 'b', '--trial', 1, '--save_freq', 1)[0] == 0
    encoders = [PRETRAINED, 'output/b/trial=1/last.ckpt', 'output/b/trial=1/ckpt_epoch_1.ckpt']
    names = [main_linear.parse_option(['--dataset', 'digits', '--ckpt', file])[0].output_name for file in encoders]
    assert [name.partition('_of_')[2] for name in names] == ['a', 'b_trial_1', 'b_trial_1_ckpt_epoch_1']
    cached = main_linear.parse_option(['--dataset', 'digits', '--ckpt', PRETRAINED, '--cache_features'])[0].output_name
    assert cached != names[0]


@pytest.mark.parametrize('program', [main_supcon, main_ce])
def test_settings_without_effect_are_printed(call, program):
    status, out, err = call(program.main, *TINY, '--batch_size', 128, '--epochs', 1, '--warm', '--blur_p', 0.5,
                            '--augment_policy', 'sim')
    assert status == 0, err
    assert out.count('--batch_size 128: found 96 training images') == 1
    assert 'No warm-up: a run of one epoch is too short' in out and 'over 0 epochs' not in out
    assert out.count('--blur_p has no effect on views of 8 pixels') == 1


def test_timm_models_start_from_random_weights(call, rejected):
    status, out, err = call(main_ce.main, *TINY[:2], *TINY[8:], '--size', 32, '--model', 'timm/mobilenetv3_small_050',
                            '--epochs', 1)
    assert status == 0, err
    assert '--model timm/mobilenetv3_small_050: starts from random weights' in out
    rejected(main_ce.main, '--model', 'timm/resnet18.a1_in1k', words=['a1_in1k', 'pretrained', 'random weights'])


def test_checkpoint_of_another_architecture(rejected, pretrained, tmp_path):
    rejected(main_linear.main, *LINEAR, '--ckpt', PRETRAINED, '--model', 'resnet50', words=[
        '--model resnet50', 'resnet18'])
    rejected(main_linear.main, *LINEAR, '--ckpt', PRETRAINED, '--width', 1, words=['--width', '0.0625'])
    checkpoint = torch.load(PRETRAINED, weights_only=True)
    del checkpoint['opt']                                       # nothing says what network it is
    torch.save(checkpoint, tmp_path / 'bare.ckpt')
    rejected(main_linear.main, *LINEAR, '--ckpt', 'bare.ckpt', '--model', 'resnet34', words=[
        'bare.ckpt holds another network', 'layer', 'expected'])


@pytest.mark.parametrize('program', [main_supcon, main_ce])
def test_wrong_folders_are_rejected(rejected, image_folder, tmp_path, program):
    def data(folder):
        return ['--dataset', 'path', '--data_folder', folder, '--model', 'resnet18']
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'no_images' / 'a').mkdir(parents=True)
    (tmp_path / 'no_images' / 'a' / 'notes.txt').write_text('x')
    broken = image_folder('broken')
    (broken / 'red' / '003.png').write_bytes(b'no image')
    image_folder('few', {'a': 5, 'b': 1})
    image_folder('alone/train')
    image_folder('unknown/train', {'a': 2})
    image_folder('unknown/val', {'z': 2})
    rejected(program.main, *data('empty'), words=['empty', '<class>/<image>'])
    rejected(program.main, *data('file'), words=['--data_folder file', 'no such folder'])
    rejected(program.main, *data('no_images'), words=['no_images', 'a'])
    rejected(program.main, *data('broken'), words=['broken/red/003.png', 'not a readable image'])
    rejected(program.main, *data('broken'), '--loader', 'per_sample', words=['broken/red/003.png'])
    rejected(program.main, *data('few'), words=["class 'b' has 1 image", 'at least 2'])
    rejected(program.main, *data('alone'), words=['alone', 'train/ alone', 'val/'])
    rejected(program.main, *data('unknown'), words=["'z'", 'no training images'])


def test_output_that_cannot_be_written(call, tmp_path):
    (tmp_path / 'output').write_text('a file in the way')
    status, _, err = call(main_supcon.main, *TINY, '--epochs', 1)
    assert status == 2 and err.count('\n') == 1 and 'output/' in err


@pytest.mark.parametrize('program', [main_supcon, main_ce])
def test_loss_that_is_not_finite(call, program, tmp_path):
    status, _, err = call(program.main, *TINY, '--epochs', 2, '--learning_rate', 1e6, '--batch_size', 4,
                          '--output_name', 'a')
    assert status == 2 and 'the loss is nan' in err and '--learning_rate' in err and err.count('\n') == 1
    assert not (tmp_path / PRETRAINED).exists()                 # no checkpoint of such weights
    assert call(program.main, *TINY, '--epochs', 2, '--learning_rate', 1e6, '--batch_size', 4, '--output_name', 'a',
                '--overwrite', '--save_steps', 1, '--print_freq', 1000)[0] == 2
    weights = checkpoints.load_checkpoint(tmp_path / PRETRAINED)['model'].values()
    assert all(value.isfinite().all() for value in weights)     # of the last step whose loss was finite


def test_collapse_is_reported_once_in_words(call, tmp_path):
    for label in 'ab':                                          # views of black images are all the same
        (tmp_path / 'black' / label).mkdir(parents=True)
        for i in range(10):
            Image.new('RGB', (8, 8)).save(tmp_path / 'black' / label / f'{i}.png')
    status, out, err = call(main_supcon.main, '--dataset', 'path', '--data_folder', 'black', '--model', 'resnet18',
                            '--width', 0.0625, '--size', 8, '--epochs', 3, '--batch_size', 9)
    assert status == 0, err
    assert out.count('the network has collapsed') == 1 and '--warm' in out


def test_no_collapse_is_reported_where_there_is_none(call):
    assert 'collapsed' not in call(main_supcon.main, *TINY, '--epochs', 2)[1]


@pytest.mark.parametrize('arguments', [
    ['--amp'], ['--head', 'linear', '--zero_init', '--syncBN'], ['--warm', '--cosine'], ['--eval_freq', '0'],
    ['--stem', 'imagenet', '--size', '32'], ['--batch_size', '95']])
def test_options_run(call, arguments):
    status, out, err = call(main_supcon.main, *TINY, '--epochs', 1, *arguments)
    assert status == 0, err
    assert ('--syncBN has no effect in a single process' in out) == ('--syncBN' in arguments)


def test_cross_entropy_beside_the_contrastive_loss(call, tmp_path):
    assert call(main_supcon.main, *TINY, '--epochs', 1, '--ce_weight', 1, '--output_name', 'both')[0] == 0
    both = parameters('output/both/trial=0/last.ckpt')
    assert both['fc.weight'].shape[0] == 10
    status, out, err = call(main_linear.main, *LINEAR, '--ckpt', 'output/both/trial=0/last.ckpt', '--epochs', 1)
    assert status == 0, err


def test_wrappers_of_several_gpus_do_not_reach_the_checkpoint(tmp_path):
    model = SupConResNet('resnet18', width=0.0625)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    model.encoder = torch.nn.DataParallel(model.encoder)
    assert any('module.' in name for name in model.state_dict())
    assert checkpoints.strip_wrappers(model.state_dict()).keys() == plain.keys()
    checkpoints.load_parameters(model, {name: value + 1 for name, value in plain.items()}, 'x')
    assert torch.equal(model.encoder.module.conv1.weight, plain['encoder.conv1.weight'] + 1)


def test_views_image_shows_the_images(call, tmp_path):
    """Denormalized: a grid of digits is black and white, not washed out."""
    assert call(main_ce.main, *TINY, '--epochs', 1, '--output_name', 'a')[0] == 0
    image = np.asarray(Image.open(tmp_path / 'output/a/trial=0/views.png'))
    assert image.min() == 0 and image.max() > 200 and image.shape == (2 + 66, 2 + 16 * 66, 3)


def test_progress_bar_on_a_terminal(call, monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    _, out, err = call(main_ce.main, *TINY, '--epochs', 1)
    assert 'epoch 1/1' in err and 'epoch 1/1' not in out
    assert re.search(r'\[\d\d:\d\d<', err)                        # time left
