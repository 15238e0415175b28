"""GenSCL: mixing, teachers, optimizers, policies, models of timm, and its published commands."""
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, ok
from torch.nn import functional as F

import main_ce
import main_linear
import main_supcon
import methods
from datasets import classification_view, pretraining_view
from datasets.mixing import cutmix, mix, mix_views
from networks.timm_encoder import TimmEncoder, timm_model
from util import checkpoints, options, runs, training
from util.errors import UserError
from util.metrics import accuracy

GENSCL = [*TINY, '--method', 'GenSCL', '--epochs', '1']
TEACHER = 'output/teacher/trial=0'
ROOT = Path(__file__).resolve().parent.parent


class Rng:
    """A generator that gives the numbers it was made with."""

    def __init__(self, lam=0.25, order=None, integers=(), coin='mixup'):
        self.lam, self.order, self.sampled, self.coin = lam, order, list(integers), coin

    def beta(self, a, b):
        self.alpha = a, b
        return self.lam

    def permutation(self, n):
        return np.array(self.order)

    def integers(self, high):
        return self.sampled.pop(0)

    def choice(self, kinds):
        assert kinds == ['mixup', 'cutmix']
        return self.coin


def batch(n=3, size=8):
    return torch.rand(n, 3, size, size), F.one_hot(torch.arange(n), n).float()


def test_mixup_averages_images_and_labels():
    (images, labels), rng = batch(), Rng(0.25, [1, 2, 0])
    mixed, soft = mix(images, labels, 'mixup', 0.7, rng)
    for i, other in enumerate([1, 2, 0]):
        torch.testing.assert_close(mixed[i], 0.25 * images[i] + 0.75 * images[other])
        torch.testing.assert_close(soft[i], 0.25 * labels[i] + 0.75 * labels[other])
    assert rng.alpha == (0.7, 0.7)


@pytest.mark.parametrize('center, box, fraction', [
    ((4, 4), (2, 6, 2, 6), 16), ((0, 4), (0, 2, 2, 6), 8), ((7, 7), (5, 8, 5, 8), 9)])
def test_cutmix_pastes_a_box_and_labels_follow_its_area(center, box, fraction):
    images, labels = batch()
    rng = Rng(0.75, [1, 2, 0], center)                          # 1 - lam = 1/4: a box of 4 x 4 in 8 x 8
    mixed, soft = mix(images, labels, 'cutmix', 1., rng)
    top, bottom, left, right = box
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    assert inside.sum() == fraction
    for i, other in enumerate([1, 2, 0]):
        torch.testing.assert_close(mixed[i], torch.where(inside, images[other], images[i]))
        torch.testing.assert_close(soft[i], (1 - fraction / 64) * labels[i] + fraction / 64 * labels[other])


@pytest.mark.parametrize('lam, stays', [(1., 1.), (0., 0.)])
def test_cutmix_of_nothing_and_of_everything(lam, stays):
    images, _ = batch(2)
    mixed, fraction = cutmix(images, images.flip(0), lam, Rng(integers=(4, 4)))
    assert fraction == stays
    torch.testing.assert_close(mixed, images if stays else images.flip(0))


@pytest.mark.parametrize('kind', ['mixup', 'cutmix', 'mixup_cutmix'])
def test_views_are_mixed_on_their_own(kind):
    images, labels = batch(16)
    mixed, soft = mix_views(torch.cat([images, images]), labels, 2, kind, 1., np.random.default_rng(0))
    torch.testing.assert_close(soft.sum(1), torch.ones(32))
    assert (soft > 0).sum(1).max() == 2 and not torch.equal(soft[:16], soft[16:])
    assert not torch.equal(mixed[:16], mixed[16:])


def test_coin_and_share_are_sampled_for_each_batch_and_view():
    kinds, shares = [], []
    for seed in range(300):
        images, labels = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]), torch.eye(2)
        rng = np.random.default_rng(seed)
        mixed, soft = mix(images, labels, 'mixup_cutmix', 1., rng)
        if 0 < soft[0, 0] < 1:
            kinds.append('cutmix' if set(mixed.unique().tolist()) == {0., 1.} else 'mixup')
            shares.append(soft[0, 0].item())
    assert 0.35 < kinds.count('mixup') / len(kinds) < 0.65
    assert min(shares) < 0.1 and max(shares) > 0.9              # Beta(1, 1) is uniform


@pytest.mark.parametrize('alpha', [1e-300, 1e-3, 1e3])
def test_extreme_alpha_gives_distributions(alpha):
    images, labels = batch()
    mixed, soft = mix(images, labels, 'mixup', alpha, np.random.default_rng(0))
    assert torch.isfinite(mixed).all() and torch.allclose(soft.sum(1), torch.ones(3))


def test_accuracy_of_mixed_labels():
    output = torch.tensor([[2., 1.], [0., 3.]])
    assert accuracy(output, torch.tensor([0, 0])) == 50
    torch.testing.assert_close(accuracy(output, torch.tensor([[0.7, 0.3], [0.6, 0.4]])), torch.tensor(55.))


# Programs

@pytest.fixture
def teacher(call):
    ok(call, main_ce, *TINY, '--epochs', 2, '--mix', 'mixup_cutmix', '--output_name', 'teacher')


def test_defaults_of_the_method():
    opt = main_supcon.parse_option(['--method', 'GenSCL'])
    assert (opt.batch_size, opt.epochs, opt.learning_rate, opt.temp, opt.seed) == (1024, 500, 0.5, 0.1, 3407)
    assert opt.cosine and opt.warm and opt.teacher_kind is None and (opt.warm_epochs, opt.warmup_from) == (10, 0.01)
    assert opt.output_name == 'cifar10_bsz_1024_SGD_lr_0.5'
    opt = main_supcon.parse_option(['--method', 'GenSCL', '--no_cosine', '--seed', '1', '--no-warm'])
    assert opt.cosine is False and opt.warm is False and opt.seed == 1
    assert main_ce.parse_option(['--batch_size', '512', '--no_warm']).warm is False
    assert main_ce.parse_option(['--batch_size', '512']).warm is True
    assert main_supcon.parse_option([]).temp == 0.07                        # of the other methods untouched
    assert main_supcon.parse_option(['--method', 'GenSCL', '--dataset', 'mvip']).batch_size == 16


@pytest.mark.parametrize('arguments, name', [
    ('--mix mixup_cutmix --KD --KD-alpha 1 --teacher-path x', 'cifar10_bsz_1024_mixup_cutmix_1.0_KD_1.0_SGD_lr_0.5'),
    ('--dataset cifar100 --cutout --mix mixup --mix-alpha 0.5 --optim-kind Adam --lr 0.001',
     'cifar100_bsz_1024_cutout_mixup_0.5_Adam_lr_0.001'),
    ('--KD --KD-alpha inf --teacher-path x --LARS', 'cifar10_bsz_1024_KD_inf_LARS_lr_0.5'),
    ('--desc mine', 'mine')])
def test_run_names(arguments, name):
    assert main_supcon.parse_option(['--method', 'GenSCL', *arguments.split()]).output_name == name


def test_the_published_pair(call, teacher, tmp_path):
    """As typed, with data and network made small: the second command finds the first's run by its default name."""
    data = [*TINY[:2], *TINY[6:10], '--num_workers', 0]
    small = [*TINY[2:6], '--epochs', 1, '--batch_size', 1024]
    out = ok(call, main_supcon, '--method', 'GenSCL', '--mix', 'mixup_cutmix', '--KD', '--KD-alpha', '1',
             '--teacher-path', TEACHER, *data, *small)
    assert f'{TEACHER}/last.ckpt: resnet18 as teacher' in out
    name = 'digits_bsz_1024_mixup_cutmix_1.0_KD_1.0_SGD_lr_0.5'             # with resnet50 of the usual width and size
    Path('output', name + '_model_resnet18_width_0.0625_size_8').rename(Path('output', name))
    out = ok(call, main_linear, '--pretrained', name, '--augment-policy', 'no', '--amp', *data, '--debug')
    assert f'output/{name}/trial=0/last.ckpt: resnet18 after 1 epochs' in out
    opt = json.loads(next(tmp_path.glob('output/digits_resnet18_*/trial=0/options.json')).read_text())
    assert (opt['batch_size'], opt['learning_rate'], opt['warmup_from'], opt['seed']) == (512, 5, 1e-5, 3407)
    assert (opt['lr_decay_epochs'], opt['lr_decay_rate'], opt['warm']) == ([60, 75, 90], 0.2, True)
    assert opt['epochs'] == 1                                               # --debug


def test_loss_is_that_of_labels_and_of_the_teacher(call, teacher, spy, tmp_path):
    called, updates = spy(methods.GenSupConLoss, 'forward'), spy(training, 'update')
    losses = {}
    for alpha in ('0', '0.5', 'inf'):
        called.clear()
        updates.clear()
        ok(call, main_supcon, *GENSCL, '--mix', 'mixup', '--KD', '--KD_alpha', alpha, '--KD_temp', 2, '--teacher_path',
           TEACHER, '--output_name', alpha)
        _, features, *targets, weight, _ = called[0][0]
        assert weight == float(alpha) and (targets[1] is None) == (alpha == 'inf')
        targets = [target for target in targets if target is not None]
        terms = [methods.GenSupConLoss(0.1)(features, target).item() for target in targets]
        losses[alpha] = updates[0][0][0].item(), terms
        assert [part.shape for part in targets[-1]] == [(32, 10), (32, 10)]
        torch.testing.assert_close(targets[-1][0].sum(1), torch.ones(32))
        assert (targets[-1][0] > 0).all()                                   # a softmax
        if alpha != 'inf':
            assert ((targets[0][0] > 0).sum(1) <= 2).all()                  # two images mixed
    for alpha in ('0', '0.5'):
        total, (of_labels, of_teacher) = losses[alpha]
        assert total == pytest.approx(of_labels + float(alpha) * of_teacher, rel=1e-5)
    total, (of_teacher, *_) = losses['inf']
    assert total == pytest.approx(of_teacher, rel=1e-5)
    assert losses['0.5'][1][1] == pytest.approx(of_teacher, rel=1e-5)       # the same first batch


def test_teacher_is_asked_in_eval_mode_without_gradient_about_the_mixed_views(call, teacher, monkeypatch):
    from util.teachers import Teacher
    seen = []
    original = Teacher.forward

    def forward(self, images):
        logits = original(self, images)
        seen.append((self.training or any(m.training for m in self.modules()), logits.requires_grad, images, logits))
        return logits
    monkeypatch.setattr(Teacher, 'forward', forward)
    given = []
    network = main_supcon.SupConResNet.forward
    monkeypatch.setattr(main_supcon.SupConResNet, 'forward', lambda self, x: (given.append(x), network(self, x))[1])
    ok(call, main_supcon, *GENSCL, '--mix', 'cutmix', '--KD', '--teacher_path', TEACHER, '--output_name', 'a',
       '--seed', 0)                                                        # the sample that the teacher knows
    assert seen and not any(training or grad for training, grad, *_ in seen)
    del seen[:2]                                            # a trial, and its accuracy, before anything is written
    assert torch.equal(seen[0][2], given[0])
    checkpoint = checkpoints.load_checkpoint(f'{TEACHER}/last.ckpt')
    from networks.resnet_big import SupCEResNet
    model = SupCEResNet('resnet18', 10, width=0.0625)
    model.load_state_dict(checkpoint['model'])
    torch.testing.assert_close(seen[0][3], model.eval()(given[0]).detach(), rtol=1e-4, atol=1e-5)
    seen.clear()
    ok(call, main_supcon, *GENSCL, '--KD', '--teacher_path', TEACHER, '--output_name', 'b', '--amp')
    assert seen[2][3].dtype == torch.bfloat16


def test_teacher_with_other_statistics_sees_its_own(call, spy):
    from util.teachers import Teacher
    teacher = Teacher(torch.nn.Identity(), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), (0.4, 0.4, 0.4), (0.2, 0.2, 0.3))
    image = torch.rand(2, 3, 4, 4)

    def normalized(mean, std):
        return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(teacher(normalized((0.4, 0.4, 0.4), (0.2, 0.2, 0.3))),
                               normalized((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))


def test_teacher_of_linear_evaluation_and_of_the_original(call, tmp_path):
    ok(call, main_supcon, *TINY, '--epochs', 1, '--output_name', 'a')
    ok(call, main_linear, *TINY[:2], *TINY[6:10], '--ckpt', 'output/a/trial=0/last.ckpt', '--epochs', 1,
       '--output_name', 'linear')
    out = ok(call, main_supcon, *GENSCL, '--KD', '--teacher_path', 'output/linear/trial=0', '--output_name', 'b')
    assert 'resnet18 as teacher' in out


def test_teacher_of_timm(call, tmp_path):
    """A checkpoint as training scripts of timm write it: state_dict, of several GPUs, beside other things."""
    model = timm_model('resnet10t', 10, 'cifar', 32)
    state = {f'module.{name}': value for name, value in model.state_dict().items()}
    (tmp_path / 'saves').mkdir()
    torch.save({'epoch': 3, 'arch': 'resnet10t', 'state_dict': state}, tmp_path / 'saves' / 'ckpt_best.pth')
    arguments = [*GENSCL, '--KD', '--teacher_path', 'saves', '--teacher_kind', 'resnet10t', '--size', '16']
    out = ok(call, main_supcon, *arguments, '--output_name', 'a')
    right, = re.findall(r'timm/resnet10t as teacher, right on ([\d.]+) % of 32 training views', out)
    assert ('little better than chance' in out) == (float(right) < 15)
    torch.save({'state_dict': state}, tmp_path / 'saves' / 'other.pth')
    ok(call, main_supcon, *arguments, '--teacher_ckpt', 'other.pth', '--output_name', 'b')


def test_the_published_teacher_has_a_small_stem():
    model = timm_model('efficientnetv2_rw_m', 10, 'cifar', 32)
    assert (model.conv_stem.kernel_size, model.conv_stem.stride) == ((3, 3), (1, 1))
    assert timm_model('efficientnetv2_rw_m', 10, 'imagenet', 32).conv_stem.stride == (2, 2)


@pytest.mark.parametrize('arguments, words', [
    (['--KD'], ['--KD', '--teacher_path is missing']),
    (['--teacher_path', 'x'], ['--teacher_path', '--KD is missing']),
    (['--KD', '--teacher_path', 'nowhere'], ['--teacher_path nowhere', 'no such folder']),
    (['--KD', '--teacher_path', 'output'], ['--teacher_path output', 'no ckpt_best.pth or last.ckpt']),
    (['--KD', '--teacher_path', TEACHER, '--teacher_ckpt', 'x.pth'], ['no x.pth in it']),
    (['--KD', '--teacher_path', TEACHER, '--dataset', 'path', '--data_folder', 'images'],
     [TEACHER, 'knows 10 classes', 'have 2']),
    (['--KD', '--teacher_path', 'pretrained'], ['pretrained/last.ckpt', 'no classifier']),
    (['--KD', '--teacher_path', 'corrupted'], ['corrupted/ckpt_best.pth', 'not a readable checkpoint']),
    (['--KD', '--teacher_path', 'timm'], ['timm/ckpt_best.pth', 'efficientnetv2_rw_m']),
    (['--KD', '--teacher_path', 'timm', '--teacher_kind', 'resnet10t'], ['knows 7 classes', 'have 10']),
    (['--KD', '--teacher_path', 'renamed'], ['other classes', '1, 0, 2']),
    (['--KD', '--teacher_path', 'x', '--teacher_kind', 'efficientnetv2_rw'],
     ['--teacher_kind', "'efficientnetv2_rw'", 'did you mean']),
    (['--model', 'timm/nothing_like_it'], ['--model', 'nothing_like_it', 'timm']),
    (['--model', 'timm/resnet10t'], ['--width 0.0625']),
    (['--mix', 'mixup', '--mix-alpha', '0'], ['--mix_alpha', "'0'", 'above 0']),
    (['--mix', 'mix'], ['--mix', 'mixup_cutmix']),
    (['--KD-alpha', '-1'], ['--KD_alpha', "'-1'"]),
    (['--KD-temp', '0'], ['--KD_temp', "'0'"]),
    (['--method', 'SupCon', '--mix', 'mixup'], ['--mix', '--method GenSCL']),
    (['--method', 'SimCLR', '--KD', '--teacher_path', 'x'], ['--KD', '--method GenSCL']),
    (['--optim-kind', 'Adam', '--LARS'], ['--LARS', 'Adam']),
    (['--optim-kind', 'Adam', '--momentum', '0.5'], ['--momentum', 'Adam']),
    (['--KD-temp', '4'], ['--KD_temp', '--KD is missing']),
    (['--mix-alpha', '0.2'], ['--mix_alpha', '--mix is missing']),
    (['--rand-n', '2'], ['--rand_n', '--augment_policy rand']),
    (['--n-holes', '2'], ['--n_holes', '--cutout is missing']),
    (['--wandb-project', 'p'], ['--wandb_project', '--wandb is missing']),
    (['--no-warm', '--warmup-from', '0.1'], ['--warmup_from', '--warm is missing']),
    (['--KD', '--teacher_path', TEACHER, '--teacher_kind', 'resnet10t'], ['--teacher_kind resnet10t', 'resnet18']),
    (['--KD', '--teacher_path', 'large', '--teacher_kind', 'vit_tiny_patch16_224'],
     ['large/ckpt_best.pth', 'pos_embed']),
    (['--KD', '--teacher_path', 'nan'], ['nan/last.ckpt', 'fc.bias is not finite']),
    (['--KD', '--teacher_path', TEACHER, '--size', '16'], ['trained on images of 8 pixels', '--size 16']),
    (['--optim-kind', 'Lion'], ['--optim_kind', 'Lion', 'AdamW']),
    (['--cutout'], ['--cutout_length 16', '8 pixels']),
    (['--rand-m', '31'], ['--rand_m', '30']),
    (['--aug_mode', 'with_both', '--aug_output_name', 'x', '--aug_name_id', 'a', '--aug_name_ood', 'b'], ['GenSCL']),
])
def test_mistakes(call, rejected, teacher, image_folder, tmp_path, arguments, words):
    image_folder()
    for name in ('pretrained', 'corrupted', 'timm', 'renamed', 'large', 'nan'):
        (tmp_path / name).mkdir()
    torch.save({'model': main_supcon.SupConResNet('resnet18', width=0.0625).state_dict(),
                'opt': {'model': 'resnet18', 'width': 0.0625}}, tmp_path / 'pretrained' / 'last.ckpt')
    (tmp_path / 'corrupted' / 'ckpt_best.pth').write_bytes(b'PK')
    seven = timm_model('resnet10t', 7, 'cifar', 32).state_dict()
    torch.save({'state_dict': seven}, tmp_path / 'timm' / 'ckpt_best.pth')
    large = timm_model('vit_tiny_patch16_224', 10, 'cifar', 224).state_dict()
    torch.save({'state_dict': large}, tmp_path / 'large' / 'ckpt_best.pth')
    checkpoint = torch.load(tmp_path / TEACHER / 'last.ckpt', weights_only=True)
    bias = checkpoint['model']['fc.bias'].clone()
    checkpoint['model']['fc.bias'] = bias * torch.nan
    torch.save(checkpoint, tmp_path / 'nan' / 'last.ckpt')
    checkpoint['model']['fc.bias'] = bias
    checkpoint['classes'] = ['1', '0', *checkpoint['classes'][2:]]
    torch.save(checkpoint, tmp_path / 'renamed' / 'last.ckpt')
    rejected(main_supcon.main, *GENSCL, *arguments, words=words)


def test_pretrained_or_ckpt(rejected):
    rejected(main_linear.main, words=['--ckpt', '--pretrained'])
    rejected(main_linear.main, '--ckpt', 'a', '--pretrained', 'b', words=['--ckpt', '--pretrained'])
    rejected(main_linear.main, '--pretrained', 'b', words=['output/b/trial=0/last.ckpt', 'no such checkpoint'])
    rejected(main_linear.main, '--pretrained', '../b', words=['--pretrained'])


@pytest.mark.parametrize('program', [main_supcon, main_ce])
@pytest.mark.parametrize('kind, made', [('SGD', torch.optim.SGD), ('RMSProp', torch.optim.RMSprop),
                                        ('Adam', torch.optim.Adam), ('AdamW', torch.optim.AdamW)])
def test_optimizers(program, kind, made):
    more = {'SGD': ['--momentum', '0.8', '--nesterov'], 'RMSProp': ['--momentum', '0.8', '--optim_eps', '0.5']}
    opt = program.parse_option(['--optim-kind', kind, '--lr', '0.01', '--weight_decay', '0.02', *more.get(kind, [])])
    opt.device = 'cpu'
    optimizer = training.set_optimizer(opt, torch.nn.Linear(3, 2))
    assert type(optimizer) is made
    group, = optimizer.param_groups
    assert (group['lr'], group['weight_decay']) == (0.01, 0.02) and group.get('momentum', 0.8) == 0.8
    assert group.get('nesterov', kind == 'SGD') == (kind == 'SGD')
    assert group.get('eps') == {'SGD': None, 'RMSProp': 0.5}.get(kind, 1e-8)


def test_rmsprop_with_epsilon_inside_the_root():
    opt = main_ce.parse_option(['--optim_kind', 'RMSPropTF', '--lr', '0.1', '--momentum', '0', '--optim_eps', '0.5',
                                '--weight_decay', '0'])
    opt.device = 'cpu'
    weight = torch.nn.Parameter(torch.tensor([2.]))
    optimizer = training.set_optimizer(opt, torch.nn.ParameterList([weight]))
    training.update((3 * weight).sum(), optimizer, training.set_scaler(opt))
    mean_square = 0.9 * 1 + 0.1 * 9                             # TensorFlow's starts from one
    assert weight.item() == pytest.approx(2 - 0.1 * 3 / (mean_square + 0.5)**0.5)


def test_biases_and_norms_are_not_decayed_when_asked():
    for flag, decays in ((['--no_bias_decay'], [0.3, 0.]), ([], [0.3])):
        opt = main_supcon.parse_option(['--weight_decay', '0.3', *flag])
        opt.device = 'cpu'
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        groups = training.set_optimizer(opt, model).param_groups
        assert [group['weight_decay'] for group in groups] == decays
        assert sum(len(group['params']) for group in groups) == 4
        assert not flag or [p.dim() for p in groups[0]['params']] == [2]


@pytest.mark.parametrize('weight_decay', [0.02, 0.])
def test_lars_adapts_weights_and_leaves_biases_alone(weight_decay):
    opt = main_supcon.parse_option(['--LARS', '--lr', '0.1', '--momentum', '0', '--weight_decay', str(weight_decay)])
    opt.device = 'cpu'
    layer = torch.nn.Linear(3, 2)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = training.set_optimizer(opt, layer)
    training.update(((layer(torch.ones(4, 3)) - 5) ** 2).mean(), optimizer, training.set_scaler(opt))
    grad = layer.weight.grad
    trust = 0.001 * weight.norm() / (grad.norm() + weight_decay * weight.norm())        # You et al., Eq. 6
    torch.testing.assert_close(layer.weight.detach(), weight - 0.1 * trust * (grad + weight_decay * weight))
    torch.testing.assert_close(layer.bias.detach(), bias - 0.1 * layer.bias.grad)


@pytest.mark.parametrize('arguments', [
    ['--optim-kind', 'RMSProp', '--lr', '0.001'], ['--optim-kind', 'AdamW', '--lr', '0.001'], ['--LARS'],
    ['--augment-policy', 'auto', '--loader', 'batched'],
    ['--augment-policy', 'stacked_rand', '--cutout', '--cutout-length', '4'],
    ['--augment-policy', 'no', '--cutout', '--cutout-length', '4', '--n_holes', '2'],
    ['--mix', 'cutmix', '--ce_weight', '1'], ['--no_cosine', '--no_warm']])
def test_options_run(call, arguments):
    out = ok(call, main_supcon, *GENSCL, *arguments)
    assert 'collapsed' not in out


@pytest.mark.parametrize('arguments', [
    ['--mix', 'mixup_cutmix'], ['--erasing', '--augment-policy', 'auto'], ['--erasing', '--erasing-p', '1'],
    ['--label-smoothing', '0.1'], ['--cutout', '--n-holes', '3', '--cutout-length', '3']])
def test_options_run_in_cross_entropy(call, arguments):
    ok(call, main_ce, *TINY, '--epochs', 1, *arguments)


def test_label_smoothing_is_of_training_alone(call, spy):
    calls = spy(main_ce.nn, 'CrossEntropyLoss')
    ok(call, main_ce, *TINY, '--epochs', 1, '--label_smoothing', 0.3)
    ok(call, main_supcon, *TINY, '--epochs', 1, '--output_name', 'a')
    ok(call, main_linear, *TINY[:2], *TINY[6:10], '--epochs', 1, '--pretrained', 'a', '--label_smoothing', 0.2)
    assert [settings['label_smoothing'] for _, settings in calls] == [0.3, 0.2]


def test_cross_entropy_learns_from_mixed_images(call, spy):
    calls, mixed = spy(torch.nn.CrossEntropyLoss, 'forward'), spy(main_ce, 'mix')
    ok(call, main_ce, *TINY, '--epochs', 1, '--mix', 'cutmix', '--mix-alpha', 0.4)
    logits, labels = calls[0][0][1:]
    assert labels.shape == logits.shape == (32, 10) and ((labels > 0).sum(1) == 2).any()
    assert mixed[0][0][2:4] == ('cutmix', 0.4)


def test_random_numbers_of_a_step():
    """The same again; others in each step, epoch and run; of mixing and of the network."""
    def numbers(seed, epoch, step):
        return (training.seed_step(main_supcon.parse_option(['--seed', str(seed)]), epoch, step).random(),
                torch.rand(()).item())
    steps = list(itertools.product((3, 4), (1, 2), (0, 1)))
    for i in (0, 1):
        sampled = [numbers(*step)[i] for step in steps]
        assert len(set(sampled)) == len(steps) and sampled[0] == numbers(*steps[0])[i]


@pytest.mark.parametrize('program', [main_supcon, main_ce])
def test_every_step_has_its_own_random_numbers(call, spy, program):
    calls = spy(runs, 'seed_step')
    ok(call, program, *TINY, '--epochs', 2, '--seed', 5)
    assert [(args[0].seed, *args[1:]) for args, _ in calls] == [(5, e, s) for e in (1, 2) for s in range(3)]


class FakeTeacher:
    """Logits that tell which image was asked about."""

    def __call__(self, images):
        return torch.stack([images.mean((1, 2, 3)), torch.zeros(len(images)), torch.ones(len(images))], 1)


def test_soft_labels_row_by_row(monkeypatch):
    """Both views mixed with their own samples; labels and the teacher's answers beside the right images."""
    orders, lams = iter(([1, 2, 0], [2, 0, 1])), iter((0.75, 0.6))

    def mix(images, labels, kind, alpha, rng):
        assert (kind, alpha) == ('mixup', 0.3)
        order, lam = next(orders), next(lams)
        return lam * images + (1 - lam) * images[order], lam * labels + (1 - lam) * labels[order]
    monkeypatch.setattr('datasets.mixing.mix', mix)
    opt = main_supcon.parse_option(['--method', 'GenSCL', '--mix', 'mixup', '--mix-alpha', '0.3', '--KD', '--KD-alpha',
                                    '0.4', '--KD-temp', '2', '--teacher-path', 'x'])
    opt.device, opt.num_classes, seen, learned = 'cpu', 3, [], []
    values = torch.arange(6.)                                               # view after view
    network = lambda images, n_views: (seen.append(images), torch.rand(6, 4))[1]        # noqa: E731
    method = methods.GenSCL(opt, FakeTeacher())
    def criterion(features, labels, teacher, alpha, sizes):
        learned.extend(torch.stack(target) for target in (labels, teacher) if target is not None)
        return torch.ones(()) * alpha
    method.criterion = criterion
    _, loss, _ = method(network, values[:, None, None, None].expand(6, 3, 2, 2), torch.tensor([0, 1, 2]), None)
    mixed = torch.tensor([0.75 * 0 + 0.25 * 1, 0.75 * 1 + 0.25 * 2, 0.75 * 2 + 0.25 * 0,
                          0.6 * 3 + 0.4 * 5, 0.6 * 4 + 0.4 * 3, 0.6 * 5 + 0.4 * 4])
    torch.testing.assert_close(seen[0][:, 0, 0, 0], mixed)
    assert loss.item() == pytest.approx(0.4)                                # --KD-alpha
    torch.testing.assert_close(learned[0], torch.tensor([[[.75, .25, 0], [0, .75, .25], [.25, 0, .75]],
                                                         [[.6, 0, .4], [.4, .6, 0], [0, .4, .6]]]))
    logits = torch.stack([mixed, torch.zeros(6), torch.ones(6)], 1) / 2
    torch.testing.assert_close(learned[1], logits.softmax(1).view(2, 3, 3))
    opt.mix, method.teacher = None, None
    method(network, torch.rand(6, 3, 2, 2), torch.tensor([2, 0, 1]), None)
    torch.testing.assert_close(learned[2], torch.eye(3)[[2, 0, 1]].expand(2, 3, 3))


def test_cross_entropy_sees_mixed_images(call, monkeypatch):
    monkeypatch.setattr(main_ce, 'mix', lambda images, labels, *rest: (torch.full_like(images, 0.5), labels))
    seen = []
    original = main_ce.SupCEResNet.forward
    monkeypatch.setattr(main_ce.SupCEResNet, 'forward', lambda self, x: (seen.append(x), original(self, x))[1])
    ok(call, main_ce, *TINY, '--epochs', 1, '--mix', 'mixup')
    assert (seen[0] == 0.5).all()


@pytest.mark.parametrize('program, arguments', [
    (main_supcon, ['--method', 'GenSCL', '--mix', 'mixup_cutmix', '--KD', '--teacher_path', TEACHER,
                   '--ce_weight', '1']),
    (main_ce, ['--mix', 'mixup_cutmix', '--model', 'timm/test_vit', '--size', '32', '--width', '1'])])
def test_resumed_is_the_same_run(call, interrupt, teacher, monkeypatch, program, arguments):
    """With mixing, a teacher and classifier; and with a network that samples random numbers of its own."""
    arguments = [*TINY, *arguments, '--epochs', 3, '--cosine']
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, **settings: create(name, **settings, drop_path_rate=0.5))
    ok(call, program, *arguments, '--output_name', 'whole')
    interrupt(program, 2, *arguments, '--output_name', 'halves')
    ok(call, program, *arguments, '--output_name', 'halves', '--resume')
    whole, halves = (checkpoints.load_checkpoint(f'output/{name}/trial=0/last.ckpt')['model']
                     for name in ('whole', 'halves'))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_teacher_and_student_hold_out_the_same_images(call, image_folder, spy):
    image_folder('images', {'a': 30, 'b': 30})
    data = ['--dataset', 'path', '--data_folder', 'images', *TINY[2:8], '--batch_size', 16, '--epochs', 1]
    calls = spy(main_ce, 'load_images')
    ok(call, main_ce, *data, '--output_name', 'teacher', '--seed', 1)
    ok(call, main_supcon, *data, '--method', 'GenSCL', '--KD', '--teacher_path', TEACHER, '--output_name', 'student')
    ok(call, main_linear, '--dataset', 'path', '--data_folder', 'images', '--pretrained', 'student', '--epochs', 1)
    splits = [json.loads(file.read_text())['split_seed'] for file in Path('output').glob('*/trial=0/options.json')]
    assert splits == [1, 1, 1] and calls


def test_teacher_is_what_its_checkpoint_reports(call, spy):
    """Stem and statistics are the teacher's own."""
    from util import teachers
    ok(call, main_ce, *TINY, '--epochs', 1, '--stem', 'imagenet', '--size', 32, '--mean', '(0.1, 0.2, 0.3)',
       '--output_name', 'teacher')
    made = spy(teachers, 'Teacher')
    ok(call, main_supcon, *GENSCL, '--KD', '--teacher_path', TEACHER, '--size', 32)
    classifier, mean, std, student_mean, student_std = made[0][0]
    assert classifier.encoder.conv1.kernel_size == (7, 7)
    assert list(mean) == [0.1, 0.2, 0.3] and list(student_mean) != [0.1, 0.2, 0.3]


@pytest.mark.parametrize('changes, words', [
    ({'classes': 5}, 'corrupted'), ({'classes': torch.ones(3)}, 'corrupted'), ({'opt': torch.ones(3)}, 'corrupted'),
    ({'opt': {'model': 'resnet18', 'stem': 'foo'}}, 'foo'),
    ({'opt': {'model': 'resnet18', 'method': ['x']}}, 'last.ckpt'),
    ({'fc.weight': torch.ones(())}, 'knows 0 classes'), ({'fc.weight': torch.ones(10, 2)}, 'another network'),
    ({'fc.weight': torch.ones(10, 32, dtype=torch.complex64)}, 'not a readable checkpoint')])
def test_corrupted_teachers(rejected, teacher, changes, words):
    checkpoint = torch.load(f'{TEACHER}/last.ckpt', weights_only=True)
    for name, value in changes.items():
        (checkpoint if name in checkpoint else checkpoint['model'])[name] = value
    torch.save(checkpoint, f'{TEACHER}/last.ckpt')
    rejected(main_supcon.main, *GENSCL, '--KD', '--teacher_path', TEACHER, words=[TEACHER, words])


@pytest.mark.parametrize('network, words', [
    (torch.nn.Linear(7, 10), 'x takes no images of 8 pixels'), (torch.nn.Flatten(), 'x does not give 10 finite')])
def test_teachers_are_tried(network, words):
    from util.teachers import _check_output
    opt = main_supcon.parse_option([])
    opt.size = 8
    with pytest.raises(UserError, match=words):
        _check_output(network, opt, 10, 'x')


def test_other_checkpoints_of_a_run(call):
    ok(call, main_supcon, *TINY, '--epochs', 2, '--save_freq', 1, '--output_name', 'a')
    data = [*TINY[:2], *TINY[6:10], '--epochs', 1]
    out = ok(call, main_linear, *data, '--pretrained', 'a', '--pretrained_ckpt', 'ckpt_epoch_1.ckpt')
    assert 'ckpt_epoch_1.ckpt: resnet18 after 1 epochs' in out


def test_timm_is_imported_only_where_it_is_needed():
    code = 'import sys, main_supcon; main_supcon.parse_option([]); sys.exit("timm" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
    code = 'import networks.timm_encoder'                                   # alone
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


# Views

def view(program, make, *arguments):
    opt = program.parse_option([*arguments])
    opt.size, opt.mean, opt.std = 32, (0, 0, 0), (1, 1, 1)
    return make(opt)


def test_policies():
    def pretraining(*arguments):
        return view(main_supcon, pretraining_view, *arguments)

    def classification(*arguments):
        return view(main_ce, classification_view, *arguments)
    jitter = (0.4, 0.4, 0.4, 0.1)
    assert pretraining() == pretraining('--augment-policy', 'sim') and pretraining().jitter == jitter
    assert classification() == classification('--augment-policy', 'no') and classification().jitter is None
    assert classification('--augment-policy', 'sim').jitter == jitter
    auto = pretraining('--augment-policy', 'auto')
    assert (auto.auto, auto.crop, auto.flip, auto.jitter) == ('cifar10', (0.2, 1.), 0.5, None)
    auto = classification('--augment-policy', 'auto')
    assert (auto.auto, auto.crop, auto.flip, auto.padding) == ('cifar10', None, 0.5, 4)
    rand = classification('--augment-policy', 'rand', '--rand-n', '3', '--rand-m', '7', '--dataset', 'digits')
    assert (rand.rand, rand.crop, rand.padding) == ((3, 7), (0.4, 1.), 0)
    from datasets.views import per_sample
    auto, rand = (next(step for step in per_sample(view).transforms if 'Aug' in type(step).__name__)
                  for view in (auto, rand))
    assert auto.policy.value == 'cifar10' and (rand.num_ops, rand.magnitude) == (3, 7)
    assert classification('--cutout', '--n-holes', '2', '--cutout-length', '5').cutout == (2, 5)
    assert classification('--erasing', '--erasing-p', '0.3').erasing == 0.3 and classification().erasing == 0
    assert classification('--dataset', 'mvip').jitter == jitter             # as published


# timm

@pytest.mark.parametrize('name, dim', [('resnet10t', 512), ('mobilenetv3_small_050', 1024), ('test_efficientnet', 256),
                                       ('vit_tiny_patch16_224', 192)])
def test_any_model_of_timm_is_an_encoder(name, dim):
    encoder = TimmEncoder(name, 32)
    assert encoder.dim_out == dim == encoder(torch.rand(2, 3, 32, 32)).shape[1] and encoder.backbone.training


def test_small_stems_keep_the_resolution():
    for name in ('resnet10t', 'densenet121'):
        small, large = (timm_model(name, 10, stem, 32).eval() for stem in ('cifar', 'imagenet'))
        image = torch.rand(1, 3, 32, 32)
        assert small.forward_features(image).shape[2] == 4 * large.forward_features(image).shape[2]


def test_sizes_that_a_model_cannot_take():
    with pytest.raises(UserError, match='timm/vit_tiny_patch16_224 .*8 pixels'):
        TimmEncoder('vit_tiny_patch16_224', 8)


def test_model_of_timm_in_all_three_programs(call, tmp_path):
    model = ['--dataset', 'digits', '--size', 16, '--max_samples', 40, '--epochs', 1, '--model', 'timm/resnet10t']
    ok(call, main_ce, *model)
    assert next(tmp_path.glob('output/SupCE_digits_timm-resnet10t_*/trial=0/last.ckpt'))
    ok(call, main_supcon, *model, '--output_name', 'a')
    ok(call, main_linear, *model[:-2], '--pretrained', 'a', '--output_name', 'b')
    trained, linear = (checkpoints.load_checkpoint(f'output/{name}/trial=0/last.ckpt')['model'] for name in 'ab')
    assert all(torch.equal(value, linear[name]) for name, value in trained.items() if name.startswith('encoder.'))


# Mixed precision

def test_float16_scales_the_loss(call, monkeypatch, tmp_path):
    """What GPUs without bfloat16 do; the scale is saved and resumed."""
    monkeypatch.setattr(training, 'precision', lambda opt, mixed=None: torch.float16 if opt.amp else None)
    ok(call, main_ce, *TINY, '--epochs', 1, '--amp', '--output_name', 'a')
    scaler = torch.load('output/a/trial=0/last.ckpt', weights_only=True)['scaler']
    assert scaler['scale'] > 1
    ok(call, main_ce, *TINY, '--epochs', 2, '--amp', '--output_name', 'a', '--resume')
    again = torch.load('output/a/trial=0/last.ckpt', weights_only=True)
    assert not again['optimizer']['param_groups'][0]['fused']      # see training.fused
    again = again['scaler']
    assert again['_growth_tracker'] > scaler['_growth_tracker']


@pytest.mark.parametrize('device, supported, expected', [
    ('cpu', True, torch.bfloat16), ('cpu', False, None), ('cuda', True, torch.bfloat16),
    ('cuda', False, torch.float16)])
def test_precision_of_the_device(monkeypatch, device, supported, expected):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: supported)
    monkeypatch.setattr(training, 'cpu_has_bfloat16', lambda: supported)
    opt = main_ce.parse_option(['--amp'])
    opt.device = device
    assert training.precision(opt) == expected
    opt.amp = False
    assert training.precision(opt) is None


# Weights & Biases

def test_wandb_that_is_missing(rejected, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    monkeypatch.setattr(options.importlib.util, 'find_spec', lambda name: None)
    rejected(main_ce.main, *TINY, '--wandb', words=['--wandb', 'pip install wandb'])


def test_wandb_offline(call, monkeypatch, tmp_path):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    runs = []
    init = wandb.init
    monkeypatch.setattr(wandb, 'init', lambda **settings: runs.append((settings, init(**settings))) or runs[-1][1])
    arguments = [*TINY, '--output_name', 'a', '--wandb', '--wandb-project', 'p', '--wandb-entity', 'e']
    ok(call, main_ce, *arguments, '--epochs', 1)
    settings, run = runs[0]
    assert (settings['project'], settings['entity'], settings['config']['dataset']) == ('p', 'e', 'digits')
    assert run.summary['val_acc'] >= 0 and run.summary['views'] and run.summary['confusion']
    run.finish()
    assert list(tmp_path.glob('wandb/offline-run-*/run-*.wandb'))
    ok(call, main_ce, *arguments, '--epochs', 2, '--resume')
    assert runs[1][1].id == run.id                                          # one curve
    runs[1][1].finish()


def test_wandb_is_off_unless_asked(call, tmp_path):
    ok(call, main_ce, *TINY, '--epochs', 1)
    assert 'wandb' not in [path.name for path in tmp_path.iterdir()]


def test_kd_alpha_of_infinity_is_read_from_the_checkpoint(call, teacher):
    arguments = [*GENSCL, '--KD', '--KD-alpha', 'inf', '--teacher-path', TEACHER, '--output_name', 'a']
    ok(call, main_supcon, *arguments)
    assert checkpoints.load_checkpoint('output/a/trial=0/last.ckpt')['opt']['KD_alpha'] == math.inf
    ok(call, main_supcon, *arguments, '--epochs', 2, '--resume')
