"""The methods: what they ask of the loss for any number of views, and the settings that their names stand for."""
import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from torch.nn import functional as F

import main_linear
import main_supcon
import methods
from datasets import local_view, pretraining_view, views
from losses import GenSupConLoss, SupConLoss
from networks.moco import MomentumContrast
from networks.resnet_big import SupConResNet
from util import training


def options(*arguments):
    opt = main_supcon.parse_option([str(argument) for argument in arguments])
    opt.device = 'cpu'
    return opt


def views_of(n_views, bsz=6, dim=5):
    """Features [n_views * bsz, dim] of unit length, view after view, with gradient, and labels [bsz] of two classes."""
    features = F.normalize(torch.randn(n_views * bsz, dim, dtype=torch.float64), dim=1)
    return features.requires_grad_(), torch.arange(bsz) % 2


def plain_loss(features, labels, n_views, positives='class', temperature=0.1, denominator='all'):
    """The mean over the anchors of mean_P log(D / exp s), by loops; D sums over all, or the negatives (and one)."""
    n, bsz, losses = len(features), len(labels), []
    ids = (labels if positives == 'class' else torch.arange(bsz)).repeat(n_views)
    s = features @ features.T / temperature
    for i in range(n):
        p = [j for j in range(n) if j != i and ids[j] == ids[i]]
        negatives = sum(s[i, j].exp() for j in range(n) if ids[j] != ids[i])
        total = negatives + sum(s[i, j].exp() for j in p)
        of = {'all': lambda j, total=total: total, 'only_negatives': lambda j, negatives=negatives: negatives,
              'one_positive': lambda j, i=i, negatives=negatives: negatives + s[i, j].exp()}[denominator]
        losses.append(sum(of(j).log() - s[i, j] for j in p) / len(p))
    return sum(losses) / n


@pytest.mark.parametrize('n_views', [2, 3, 5])
@pytest.mark.parametrize('arguments, positives, denominator', [
    ([], 'class', 'all'), (['--method', 'SimCLR'], 'image', 'all'), (['--positives', 'image'], 'image', 'all'),
    (['--method', 'SINCERE'], 'class', 'one_positive'), (['--method', 'DCL'], 'class', 'only_negatives'),
    (['--method', 'DCL', '--positives', 'image'], 'image', 'only_negatives')])
def test_loss_of_any_number_of_views_is_the_plain_loop_s(n_views, arguments, positives, denominator):
    opt = options(*arguments, '--temp', 0.1, '--base_temperature', 0.1, '--n_views', n_views)
    features, labels = views_of(n_views)
    method = methods.METHODS[opt.method](opt)
    by_image, loss, accuracy = method(lambda images, n: features, features, labels, None)
    assert by_image.shape == (6, n_views, 5) and torch.equal(by_image[1, n_views - 1], features[6 * (n_views - 1) + 1])
    torch.testing.assert_close(loss, plain_loss(features, labels, n_views, positives, denominator=denominator))
    s = (features @ features.T).fill_diagonal_(-2)
    ids = (labels if positives == 'class' else torch.arange(6)).repeat(n_views)
    assert accuracy.item() == pytest.approx(100 * (ids[s.argmax(1)] == ids).float().mean().item())


def test_genscl_of_four_views_is_supcon_where_nothing_is_mixed():
    """Its loss takes two groups of views: the first two and the last two of each image."""
    opt = options('--method', 'GenSCL', '--n_views', 4, '--base_temperature', 0.1)
    opt.num_classes = 2
    features, labels = views_of(4)
    _, loss, _ = methods.GenSCL(opt)(lambda images, n: features, features, labels, None)
    torch.testing.assert_close(loss, plain_loss(features, labels, 4))
    opt.contrast_mode = 'one'
    _, loss, _ = methods.GenSCL(opt)(lambda images, n: features, features, labels, None)
    soft = F.one_hot(labels).repeat(2, 1)
    torch.testing.assert_close(loss, GenSupConLoss(0.1, 'one', 0.1)((features[:12], features[12:]), (soft, soft)))


@pytest.mark.parametrize('method', ['SupCon', 'SimCLR'])
def test_anchors_of_momentum_contrast_are_all_views_but_the_last(method):
    opt = options('--method', method, '--moco', '--moco_k', 256, '--n_views', 3, '--head', 'linear', '--feat_dim', 5)
    model = SupConResNet('resnet18', 'linear', 5, width=1 / 16)
    model.moco, seen = MomentumContrast(model, 256, 0.9), []
    network = training.Network(model.eval(), opt)
    images, labels = torch.rand(12, 3, 8, 8), torch.arange(4) % 2
    criterion = methods.Momentum(opt)
    forward, criterion.criterion = criterion.criterion, lambda *args, **more: (seen.append((args, more)), forward(
        *args, **more))[1]
    features, loss, _ = criterion(network, images, labels, np.random.default_rng(0))
    (anchors, _), more = seen[0]
    assert anchors.shape == (4, 2, 5) and features.shape == (4, 3, 5)
    torch.testing.assert_close(anchors, model(images[:8]).view(2, 4, 5).transpose(0, 1))
    torch.testing.assert_close(more['keys'][:4], model.moco.network(images[8:]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features[:, 2], more['keys'][:4])
    assert more['positives'] == opt.positives == {'SupCon': 'class', 'SimCLR': 'image'}[method] and loss.isfinite()


@pytest.mark.parametrize('arguments', [
    ['--n_views', '3', '--accum_steps', '3', '--ce_weight', '1'], ['--n_views', '3', '--moco', '--moco_k', '64'],
    ['--n_views', '4', '--method', 'GenSCL', '--mix', 'mixup_cutmix'], ['--method', 'DCL', '--positives', 'image'],
    ['--n_views', '3', '--moco', '--moco_k', '50', '--positives_cap', '2'],
    ['--n_views', '3', '--positives_cap', '3', '--loader', 'per_sample'], ['--n_views', '4', '--loader', 'workers']])
def test_options_run(call, arguments):
    status, out, err = call(main_supcon.main, *TINY, '--epochs', 1, '--output_name', 'a', *arguments)
    assert status == 0 and 'contrastive accuracy' in out, err


def test_views_are_all_of_the_same_images(call):
    """Without anything random in them, all views of an image are the same."""
    for loader in ('batched', 'workers', 'per_sample'):
        opt = options(*TINY, '--n_views', 3, '--loader', loader, '--augment_policy', 'no', '--crop_min', 1)
        opt.device = 'cpu'
        images, labels = next(iter(main_supcon.set_loader(opt)[0]))
        views = images.unflatten(0, (3, 32))
        assert len(labels) == 32 and (views[0] - views[2]).abs().mean() < (views[0] - views[0, :1]).abs().mean() / 4


def test_names_of_methods_are_settings_of_one_loss(call, spy):
    """--method SINCERE trains as SupCon with its --denominator_mode, and DCL too; names of runs tell them apart."""
    results = {}
    for name, arguments in (('a', ['--method', 'SINCERE']), ('b', ['--denominator_mode', 'one_positive']),
                            ('c', ['--method', 'SimCLR']), ('d', ['--positives', 'image'])):
        _, out, err = call(main_supcon.main, *TINY, '--epochs', 1, '--output_name', name, *arguments)
        results[name] = [line.partition('loss')[2] for line in out.splitlines() if line.startswith('Train')]
    assert results['a'] == results['b'] != results['c'] == results['d'] and all(results['a']), err
    names = [options('--method', method).output_name for method in ('SimCLR', 'SINCERE', 'DCL')]
    assert [name.split('_')[0] for name in names] == ['SimCLR', 'SINCERE', 'DCL']
    assert all(name.endswith('trial_0') for name in names)
    assert options('--positives', 'image', '--n_views', 4).output_name.endswith('trial_0_positives_image_n_views_4')
    assert call(main_linear.main, *TINY[:2], '--size', 8, '--max_samples', 40, '--num_workers', 0, '--epochs', 1,
                '--ckpt', 'output/a/trial=0/last.ckpt')[0] == 0


# Multi-crop

@pytest.mark.parametrize('loader', ['batched', 'workers', 'per_sample'])
def test_small_crops_are_further_views_of_the_same_images(monkeypatch, tmp_path, loader):
    """Each image has one color. The large views are those without small ones, and small ones are other crops."""
    monkeypatch.chdir(tmp_path)
    colors = np.random.default_rng(0).integers(0, 256, (24, 3), dtype=np.uint8)
    (tmp_path / 'images' / 'a').mkdir(parents=True)
    for number, color in enumerate(colors):
        Image.fromarray(np.broadcast_to(color, (20, 20, 3))).save(tmp_path / 'images' / 'a' / f'{number:02}.png')
    data = ['--dataset', 'path', '--data_folder', 'images', '--loader', loader, '--num_workers', 0, '--size', 16,
            '--augment_policy', 'no', '--mean', '(0, 0, 0)', '--std', '(1, 1, 1)', '--batch_size', 10]
    whole = main_supcon.set_loader(options(*data))[0]
    train = main_supcon.set_loader(options(*data, '--local_crops', 3, '--local_size', 8))[0]
    for loaders in (whole, train):
        loaders.set_epoch(2)
    assert len(train) == 3 and train.batch_sizes == [10, 10, 2]               # a tenth is held out
    for (usual, _), ((images, local), labels) in zip(whole, train):
        n = len(labels)
        assert torch.equal(images, usual) and local.shape == (3 * n, 3, 8, 8)
        torch.testing.assert_close(local[:, :, 0, 0].view(3, n, 3), images[:n, :, 0, 0].expand(3, n, 3))
    train.set_epoch(2, 1)
    (_, resumed), _ = next(iter(train))
    train.set_epoch(2)
    assert torch.equal(resumed, [local for (_, local), _ in train][1])
    opt = options(*TINY, '--size', 224, '--crop_min', 0.14, '--mean', '(0, 0, 0)', '--std', '(1, 1, 1)', '--cutout',
                  '--cutout_length', 112)
    view = local_view(pretraining_view(opt), opt)
    assert (view.size, view.crop) == (96, (0.05, 0.14))                 # as published
    assert view.cutout == (1, 48)                                       # half of the side, as of the large views


def test_small_crops_are_sampled_on_their_own(monkeypatch, capsys):
    """Not at the places of the large views; what does nothing in both is said once."""
    opt, boxes = options(*TINY, '--local_crops', 2, '--blur_p', 0.5), []
    sample = views.sample_params
    monkeypatch.setattr(views, 'sample_params', lambda *args: (boxes.append(sample(*args)), boxes[-1])[1])
    next(iter(main_supcon.set_loader(opt)[0]))
    assert capsys.readouterr().out.count('--blur_p has no effect on views of 8 pixels') == 1
    large, small = (params.boxes.double() for params in boxes)
    assert len(large) == len(small) == 64
    correlation = torch.corrcoef(torch.stack([large[:, 2] * large[:, 3], small[:, 2] * small[:, 3]]))[0, 1]
    assert abs(correlation) < 0.4


@pytest.mark.parametrize('arguments', [
    ['--ce_weight', '1'], ['--method', 'BCL', '--n_views', '3'], ['--method', 'SimCLR', '--amp']])
def test_multi_crop_runs(call, arguments):
    status, out, err = call(main_supcon.main, *TINY, '--size', 16, '--local_crops', 2, '--epochs', 1, '--local_size',
                            8, '--output_name', 'a', *arguments)
    assert status == 0 and 'contrastive accuracy' in out, err


def test_loss_of_small_crops_is_that_of_all_views():
    opt = options('--local_crops', 2, '--temp', 0.1, '--base_temperature', 0.1)
    model = SupConResNet('resnet18', 'linear', 5, width=1 / 16).eval()
    images, local, labels = torch.rand(8, 3, 16, 16), torch.rand(8, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    features, loss, _ = methods.SupCon(opt)(training.Network(model, opt), (images, local), labels, None)
    expected = torch.cat([model(images), model(local)])
    assert features.shape == (4, 4, 5)
    torch.testing.assert_close(features[:, 3], expected[12:])
    torch.testing.assert_close(loss, plain_loss(expected, labels, 4))


@pytest.mark.parametrize('arguments, words', [
    (['--local_size', '8'], ['--local_size', '--local_crops is missing']),
    (['--local_crops', '2', '--moco'], ['--local_crops', '--moco']),
    (['--local_crops', '2', '--accum_steps', '2'], ['--local_crops', '--accum_steps']),
    (['--local_crops', '4', '--method', 'GenSCL'], ['--local_crops', 'GenSCL']),
    (['--local_crops', '1', '--positives_cap', '4'], ['--positives_cap 4', 'multiple of 3']),
    (['--n_views', '1'], ['--n_views', "'1'", 'at least 2']),
    (['--n_views', '3', '--positives_cap', '4'], ['--positives_cap 4', 'multiple of 3']),
    (['--n_views', '3', '--method', 'GenSCL'], ['--n_views 3', 'GenSCL', 'even']),
    (['--method', 'SimCLR', '--positives', 'class'], ['--positives class', 'SimCLR', '--positives image']),
    (['--method', 'DCL', '--denominator_mode', 'all'], ['--denominator_mode all', 'DCL', 'only_negatives']),
    (['--method', 'GenSCL', '--positives', 'image'], ['--positives', 'GenSCL'])])
def test_mistakes(rejected, arguments, words):
    rejected(main_supcon.main, *TINY, *arguments, words=words)


def test_sincere_and_dcl_have_gradients_of_the_plain_loop():
    features, labels = views_of(3)
    for denominator in ('one_positive', 'only_negatives'):
        criterion = SupConLoss(0.1, base_temperature=0.1, denominator_mode=denominator)
        ours = torch.autograd.grad(criterion(methods.by_image(features, 3), labels), features)[0]
        theirs = torch.autograd.grad(plain_loss(features, labels, 3, denominator=denominator), features)[0]
        torch.testing.assert_close(ours, theirs)
