import itertools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.v2 import functional as tv

from datasets import views
from datasets.image_set import ImageSet
from datasets.views import View, ViewParams

MEAN, STD = (0.49, 0.48, 0.45), (0.2, 0.21, 0.22)
PRETRAINING = View(32, MEAN, STD, crop=(0.2, 1.), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)


def random_images(n=6, h=20, w=24):
    """The same random images as uint8 [n, 3, w, h], ours, and float [n, 3, h, w], torchvision's."""
    images = torch.randint(0, 256, (n, 3, w, h), dtype=torch.uint8)
    return images, images.transpose(2, 3).float() / 255


def crop_resize(images, boxes, flips, size):
    """The crops alone: [n, 3, size, size] in 0..1."""
    n = len(images)
    view = View(size, (0., 0., 0.), (1., 1., 1.), crop=(0.2, 1.))
    groups = views.groups_of(n, view)
    params = ViewParams(boxes, boxes, flips, *[None] * 6, orders=[None] * len(groups), groups=groups)
    return views.apply(view, images, params)


@pytest.mark.parametrize('ours, theirs, factors', [
    (views.adjust_brightness, tv.adjust_brightness, [0.6, 0.9, 1.0, 1.2, 1.4, 0.0]),
    (views.adjust_contrast, tv.adjust_contrast, [0.6, 0.9, 1.0, 1.2, 1.4, 0.0]),
    (views.adjust_saturation, tv.adjust_saturation, [0.6, 0.9, 1.0, 1.2, 1.4, 0.0]),
    (views.adjust_hue, tv.adjust_hue, [-0.5, -0.1, 0.0, 0.05, 0.1, 0.5]),
])
def test_color_operations_match_torchvision(ours, theirs, factors):
    _, images = random_images()
    images[0, :, 0] = images[0, :1, 0]                              # gray, black, white and saturated pixels too
    images[1, :, 0], images[2, :, 0], images[3, 1:, 0] = 0, 1, 0
    x = ours(images, torch.tensor(factors))
    expected = torch.stack([theirs(image, factor) for image, factor in zip(images, factors)])
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize('size, box', [
    (16, (0, 0, 20, 24)), (16, (3, 5, 7, 8)), (8, (2, 1, 17, 20)), (32, (4, 4, 9, 3)), (16, (19, 23, 1, 1)),
    (5, (0, 0, 20, 24)), (20, (0, 2, 20, 20))])
@pytest.mark.parametrize('flip', [False, True])
def test_crop_matches_torchvision_antialiased_resize(size, box, flip):
    ours, theirs = random_images()
    n = len(ours)
    boxes = torch.tensor(box).float().repeat(n, 1)
    x = crop_resize(ours, boxes, torch.full((n,), flip), size)
    expected = tv.resized_crop(theirs, *box, [size, size], antialias=True)
    expected = tv.horizontal_flip(expected) if flip else expected
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


def test_rotation_matches_torchvision():
    _, images = random_images(5, 20, 20)
    angles = [-15., -7.3, 0., 4., 15.]
    x = views.rotate(images, torch.tensor(angles))
    bilinear = transforms.InterpolationMode.BILINEAR
    expected = torch.stack([tv.rotate(image, angle, bilinear) for image, angle in zip(images, angles)])
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def test_every_image_has_its_own_parameters():
    ours, theirs = random_images()
    boxes = torch.tensor([[i, 2 * i, 20 - 2 * i, 24 - 3 * i] for i in range(6)]).float()
    flips = torch.tensor([0, 1, 0, 1, 1, 0])
    x = crop_resize(ours, boxes, flips, 12)
    for i, (box, flip) in enumerate(zip(boxes.int().tolist(), flips)):
        expected = tv.resized_crop(theirs[i:i + 1], *box, [12, 12], antialias=True)
        expected = tv.horizontal_flip(expected) if flip else expected
        torch.testing.assert_close(x[i:i + 1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('order', list(itertools.permutations(range(4))))
def test_whole_view_with_the_same_parameters(order):
    """apply() against torchvision's functions in the sampled order, several groups, flips, grayscale, normalization."""
    ours, theirs = random_images(70)
    view = View(16, MEAN, STD, crop=(0.2, 1.), flip=0.5, rotation=15., jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)
    n, heights, widths = 70, torch.full((70,), 20), torch.full((70,), 24)
    params = views.sample_params(view, heights, widths, torch.Generator().manual_seed(1))
    params.orders = [list(order)] * len(params.orders)
    functions = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    expected = []
    for i in range(n):
        image = tv.resized_crop(theirs[i], *params.boxes[i].int().tolist(), [16, 16], antialias=True)
        image = tv.horizontal_flip(image) if params.flips[i] else image
        image = tv.rotate(image, params.angles[i].item(), transforms.InterpolationMode.BILINEAR)
        for operation in order:
            image = functions[operation](image, params.factors[operation, i].item())
        image = tv.rgb_to_grayscale(image, 3) if params.gray[i] else image
        expected.append(tv.normalize(image, MEAN, STD))
    torch.testing.assert_close(views.apply(view, ours, params), torch.stack(expected), rtol=0, atol=3e-5)


def test_every_group_may_lack_what_is_drawn_for_some():
    """Groups of one view: some without blur, without grayscale, with neither."""
    ours, _ = random_images(40, 40, 40)
    view = View(40, MEAN, STD, crop=(0.2, 1.), jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.5, blur=0.5)
    params = views.sample_params(view, *torch.full((2, 40), 40), torch.Generator().manual_seed(0))
    params.orders, params.groups = [[0, 1, 2, 3]] * 40, [slice(i, i + 1) for i in range(40)]
    one_by_one = views.apply(view, ours, params)
    params.orders, params.groups = [[0, 1, 2, 3]], [slice(0, 40)]
    together = views.apply(view, ours, params)
    torch.testing.assert_close(one_by_one, together)


@pytest.mark.parametrize('sizes', [[(32, 32), (20, 20), (26, 32)], [(28, 28), (28, 28)]])
@pytest.mark.parametrize('resize', [32, 36])
def test_small_images_are_evaluated_as_torchvision_does(tmp_path, sizes, resize):
    """Images of unlike sizes, or of the view's size that are to be resized first."""
    for i, (w, h) in enumerate(sizes):
        smooth = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(smooth).resize((w, h), Image.Resampling.BICUBIC).save(tmp_path / f'{i}.png')
    images = ImageSet([str(tmp_path / f'{i}.png') for i in range(len(sizes))], torch.zeros(len(sizes)).long(), ['a'])
    batched, per_sample = executors(View(32 if resize == 32 else 28, (0.,) * 3, (1.,) * 3, resize=resize), images)
    torch.testing.assert_close(batched, per_sample, rtol=0, atol=2.5 / 255)         # Pillow rounds


def test_views_are_of_the_images_in_turn(monkeypatch):
    """Two views of each image, in groups that begin and end anywhere in the batch."""
    ours, _ = random_images(7, 16, 16)
    view = View(16, MEAN, STD, crop=(0.2, 1.), jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)
    monkeypatch.setattr(View, 'cpu_group', 4)
    params = views.sample_params(view, *torch.full((2, 14), 16), torch.Generator().manual_seed(0))
    torch.testing.assert_close(views.apply(view, ours, params), views.apply(view, ours.repeat(2, 1, 1, 1), params))


@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
def test_compiled_views_are_the_same(real_images):
    images = real_images.sample(300, 0)
    operations = views.compiled_operations(torch.device('cpu'))
    assert operations is not views.OPERATIONS and operations.keys() == views.OPERATIONS.keys()
    view = View(20, MEAN, STD, crop=(0.2, 1.), flip=0.5, jitter=(0.8, 0.8, 0.8, 0.2), grayscale=0.2, blur=0.5)
    data, heights, widths = images.decode(view.short_side)
    params = views.sample_params(view, heights, widths, torch.Generator().manual_seed(0))
    torch.testing.assert_close(views.apply(view, data, params, operations), views.apply(view, data, params),
                               rtol=0, atol=3e-5)


def test_without_a_working_compiler_views_are_sampled_eagerly(monkeypatch, capsys):
    def compiler(operation, **_):
        def fail(*_):
            raise RuntimeError('no C++ compiler')
        return fail
    monkeypatch.setattr(torch, 'compile', compiler)
    assert views.compiled_operations.__wrapped__(torch.device('cpu')) is views.OPERATIONS
    assert 'without torch.compile' in capsys.readouterr().out


def test_groups_have_their_own_order(monkeypatch):
    monkeypatch.setattr(View, 'cpu_group', 8)
    params = views.sample_params(PRETRAINING, *torch.full((2, 80), 32), torch.Generator().manual_seed(0))
    assert len(params.orders) == 10
    assert all(sorted(order) == [0, 1, 2, 3] for order in params.orders)
    assert len(set(map(tuple, params.orders))) > 3


@pytest.mark.parametrize('h, w', [(32, 32), (375, 500), (8, 8), (40, 900), (900, 40)])
def test_random_boxes_are_distributed_as_torchvision(h, w):
    n = 4000
    ours = views.random_boxes(torch.full((n,), h), torch.full((n,), w), (0.2, 1.), torch.Generator().manual_seed(0))
    image = torch.empty(3, h, w)
    theirs = torch.tensor([transforms.RandomResizedCrop.get_params(image, (0.2, 1.), views.RATIO) for _ in range(n)])
    top, left, box_h, box_w = ours.T
    assert (ours[:, :2] >= 0).all() and (box_h >= 1).all() and (box_w >= 1).all()
    assert (top + box_h <= h).all() and (left + box_w <= w).all()
    for fraction in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):                 # quantiles within 4 % of the side
        difference = ours.quantile(fraction, dim=0) - theirs.double().quantile(fraction, dim=0)
        assert (difference.abs() <= 0.04 * torch.tensor([h, w, h, w]) + 1).all(), (fraction, difference)


def test_crop_that_never_fits_is_central():
    boxes = views.random_boxes(torch.tensor([10, 200, 50]), torch.tensor([200, 10, 50]), (0.9, 1.),
                               torch.Generator().manual_seed(0), tries=1)
    assert boxes[:2].tolist() == [[0, 93, 10, 13], [93, 0, 13, 10]]     # as transforms.RandomResizedCrop.get_params


def test_shares_of_flips_jitter_and_grayscale():
    n = 20000
    params = views.sample_params(PRETRAINING, *torch.full((2, n), 32), torch.Generator().manual_seed(0))
    assert params.flips.float().mean() == pytest.approx(0.5, abs=0.015)
    assert params.gray.float().mean() == pytest.approx(0.2, abs=0.015)
    jittered = (params.factors != torch.tensor([1., 1, 1, 0])[:, None]).any(0)
    assert jittered.float().mean() == pytest.approx(0.8, abs=0.015)
    low, high = params.factors.amin(1), params.factors.amax(1)
    torch.testing.assert_close(low, torch.tensor([0.6, 0.6, 0.6, -0.1]), atol=1e-3, rtol=0)
    torch.testing.assert_close(high, torch.tensor([1.4, 1.4, 1.4, 0.1]), atol=1e-3, rtol=0)
    torch.testing.assert_close(params.factors[:, jittered].mean(1), torch.tensor([1., 1, 1, 0]), atol=5e-3, rtol=0)


def executors(view, images):
    """The same view of all images by both executors: [n, 3, size, size] each."""
    data, heights, widths = images.decode(view.short_side, cropped=bool(view.crop))
    params = views.sample_params(view, heights, widths, torch.Generator().manual_seed(0))
    transform = views.per_sample(view)
    return views.apply(view, data, params), torch.stack([transform(images.load(i)) for i in range(len(images))])


def statistics(x):
    """Moments of values, of local differences, of colorfulness, and between the two halves of the view."""
    size = x.shape[-1] // 2
    return x.mean((0, 2, 3)), torch.stack([x.std((0, 2, 3)), x.mean((2, 3)).std(0), x.std((2, 3)).mean(0),
                        x.diff(dim=2).abs().mean((0, 2, 3)), x.diff(dim=3).abs().mean((0, 2, 3)),
                        (x - x.mean(1, keepdim=True)).abs().mean((0, 2, 3)),
                        (x[..., :size].mean((2, 3)) - x[..., -size:].mean((2, 3))).std(0)])


def compare(batched, per_sample, rtol=0.04):
    (mean, others), (expected_mean, expected_others) = statistics(batched), statistics(per_sample)
    # Pillow rounds down after each operation: its images are darker by about 1/255, here 0.02.
    torch.testing.assert_close(mean, expected_mean, rtol=0, atol=0.05)
    torch.testing.assert_close(others, expected_others, rtol=rtol, atol=0)


@pytest.mark.parametrize('size, rotation', [(32, 0.), (20, 15.), (48, 0.), (12, 0.)])        # of 32; the last scales it
def test_both_executors_have_the_same_statistics_on_real_images(real_images, size, rotation):
    assert len(real_images) == 5000
    view = View(**{**PRETRAINING.__dict__, 'size': size, 'rotation': rotation})
    compare(*executors(view, real_images))


def test_statistics_would_see_a_missing_operation(real_images):
    """The comparison above is worth something: without any one part of the view it fails."""
    images = real_images.sample(2000, 0)
    _, reference = executors(PRETRAINING, images)
    for change in ({'crop': None}, {'rotation': 45.}, {'grayscale': 0.}, {'jitter': None}, {'jitter_p': 0.2}):
        view = View(**{**PRETRAINING.__dict__, **change})
        changed, _ = executors(view, images)
        with pytest.raises(AssertionError):
            compare(changed, reference)


@pytest.mark.parametrize('h, w, size', [(32, 32, 32), (40, 30, 24), (31, 50, 16), (8, 8, 16)])
def test_evaluation_view_is_the_same_by_both_executors(h, w, size):
    smooth = torch.nn.functional.interpolate(torch.rand(4, 3, 5, 5), (h, w), mode='bicubic').clamp(0, 1)
    images = ImageSet((smooth.permute(0, 2, 3, 1) * 255).byte().numpy(), torch.zeros(4).long(), ['a'])
    batched, per_sample = executors(View(size, (0., 0., 0.), (1., 1., 1.)), images)
    torch.testing.assert_close(batched, per_sample, rtol=0, atol=1.5 / 255)         # Pillow rounds


def test_evaluation_of_images_of_the_right_size_only_normalizes():
    source = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    batched, per_sample = executors(View(32, MEAN, STD), ImageSet(source, torch.zeros(5).long(), ['a']))
    torch.testing.assert_close(batched, per_sample, rtol=0, atol=1e-6)


def test_largest_scaling_still_serves_the_smallest_crop():
    assert PRETRAINING.short_side == 72                                 # 32 / sqrt(0.2)
    assert View(32, MEAN, STD).short_side == 32


def test_shifted_views_match_torchvision_padded_crops():
    _, images = random_images(5, 20, 20)
    shifts = torch.tensor([[0, 0], [8, 8], [4, 4], [1, 6], [7, 0]])
    x = views.shift(images, shifts, 4)
    expected = torch.stack([tv.crop(tv.pad(image, 4), *shift.tolist(), 20, 20)
                            for image, shift in zip(images, shifts)])
    torch.testing.assert_close(x, expected)
    params = views.sample_params(View(20, MEAN, STD, padding=4), torch.full((5000,), 20), torch.full((5000,), 20),
                       torch.Generator().manual_seed(0))
    assert params.shifts.amin() == 0 and params.shifts.amax() == 8
    assert params.shifts.double().mean(0).tolist() == pytest.approx([4, 4], abs=0.15)


def test_erase_matches_torchvision():
    _, images = random_images(4, 16, 16)
    boxes = torch.tensor([[[2, 3, 5, 6]], [[0, 0, 16, 4]], [[10, 10, 0, 0]], [[-3, 12, 8, 8]]]).double()
    expected = [tv.erase(images[0], 2, 3, 5, 6, torch.zeros(1)), tv.erase(images[1], 0, 0, 16, 4, torch.zeros(1)),
                images[2], tv.erase(images[3], 0, 12, 5, 4, torch.zeros(1))]
    torch.testing.assert_close(views.erase(images.clone(), boxes), torch.stack(expected))


def test_cutout_hides_squares_around_every_pixel():
    boxes = views.cutout_boxes(5000, 2, 6, 16, torch.Generator().manual_seed(0))
    assert boxes.shape == (5000, 2, 4) and (boxes[..., 2:] == 6).all()
    assert (boxes[..., :2] + 3).unique().tolist() == list(range(16))
    hidden = (views.erase(torch.ones(5000, 3, 16, 16), boxes[:, :1]) == 0).float().mean((0, 1))
    assert hidden[8, 8] == pytest.approx(36 / 256, abs=0.02) and hidden[0, 0] == pytest.approx(16 / 256, abs=0.01)


def test_erased_boxes_are_distributed_as_torchvision():
    n, size = 6000, 32
    ours = views.erasing_boxes(n, 0.5, size, torch.Generator().manual_seed(0))[:, 0]
    erased = ours[:, 2] > 0
    assert erased.double().mean() == pytest.approx(0.5, abs=0.03) and (ours[~erased] == 0).all()
    theirs = torch.tensor([transforms.RandomErasing.get_params(torch.empty(3, size, size), views.ERASING_AREA,
                                                               views.ERASING_RATIO, [0.])[:4] for _ in range(n // 2)])
    for fraction in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
        difference = ours[erased].quantile(fraction, dim=0) - theirs.double().quantile(fraction, dim=0)
        assert (difference.abs() <= 0.04 * size + 1).all(), (fraction, difference)


@pytest.mark.parametrize('view', [
    View(32, MEAN, STD, flip=0.5, padding=4), View(24, MEAN, STD, flip=0.5, padding=3),
    View(32, MEAN, STD, crop=(0.2, 1.), cutout=(2, 10)), View(32, MEAN, STD, crop=(0.2, 1.), erasing=0.7)])
def test_executors_agree_on_what_hides_pixels(real_images, view):
    compare(*executors(view, real_images))


@pytest.mark.parametrize('view', [View(32, MEAN, STD, crop=(0.2, 1.), auto='cifar10'),
                                  View(32, MEAN, STD, padding=4, rand=(2, 9), cutout=(1, 8), erasing=1.)])
def test_policies_of_torchvision_run_per_sample(real_images, view):
    transform = views.per_sample(view)
    names = [type(step).__name__ for step in transform.transforms]
    assert ('AutoAugment' if view.auto else 'RandAugment') in names
    assert names.index('Normalize') == len(names) - 1 - (2 if view.erasing else 0)      # what hides pixels comes last
    x = torch.stack([transform(real_images.load(i)) for i in range(20)])
    assert x.shape == (20, 3, 32, 32) and torch.isfinite(x).all() and len(x.flatten(1).unique(dim=0)) == 20
