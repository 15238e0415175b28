from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from test_views import compare
from torchvision import transforms
from torchvision.transforms import InterpolationMode, autoaugment

from datasets import views
from datasets.auto_augment import Policy
from datasets.views import View

POLICIES = [('cifar10', None), ('imagenet', None), ('svhn', None), (None, (2, 9)), (None, (1, 30)), (None, (1, 0))]


def images(size, n=24):
    """Random and smooth uint8 images [n, 3, size, size], and such as have few values."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    smooth = torch.rand(n, 3, 4, 4, generator=generator) * 255
    x[8:] = torch.nn.functional.interpolate(smooth[8:], (size, size), mode='bicubic').clamp(0, 255).byte()
    x[0], x[1], x[2], x[3], x[4] = 7, 0, 255, x[3] // 128 * 255, x[4] // 200 * 3 + 100
    x[5, 1], x[6], x[7] = 5, x[6] // 4 + 90, x[7].clamp(0, 3)
    return x


def torchvision_result(image, *operations):
    """The bytes of torchvision's operations, (name, magnitude) each, on a PIL image."""
    image = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    for name, magnitude in operations:
        image = autoaugment._apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize('size', [16, 33])
@pytest.mark.parametrize('policy', POLICIES)
def test_operations_match_torchvision(policy, size):
    x, policy = images(size), Policy(*policy, size)
    for number, operation in enumerate(policy.operations):
        result = policy.apply(x / 255, torch.full((len(x), 1), number))
        expected = torch.stack([torchvision_result(image, operation) for image in x])
        assert torch.equal(result, expected), operation


@pytest.mark.parametrize('policy', [('imagenet', None), (None, (3, 9))])
def test_each_image_has_its_own_operations(policy):
    x, policy = images(20, 60), Policy(*policy, 20)
    numbers = policy.sample(len(x), torch.Generator().manual_seed(0))
    assert len(numbers.unique(dim=0)) > 30
    expected = [torchvision_result(image, *(policy.operations[number] for number in row))
                for image, row in zip(x, numbers)]
    assert torch.equal(policy.apply(x / 255, numbers), torch.stack(expected))


def test_floats_are_rounded_to_bytes_to_the_nearest_even():
    x = torch.tensor([0.4, 0.6, 1, 1.4, 2.6, 254.4, 254.6, 255]).repeat(8, 3, 8, 1)
    assert torch.equal(Policy(None, (1, 9), 8).apply(x / 255, torch.zeros(8, 1).long()), x.round().byte())


@pytest.mark.parametrize('auto, rand', POLICIES[:4])
def test_operations_are_sampled_as_torchvision_samples(auto, rand, monkeypatch):
    n, size = 4000, 32
    seen, image = [], torch.zeros(3, size, size, dtype=torch.uint8)
    monkeypatch.setattr(autoaugment, '_apply_op', lambda image, *operation, **_: seen.append(operation) or image)
    policy = Policy(auto, rand, size)
    transform = transforms.AutoAugment(autoaugment.AutoAugmentPolicy(auto)) if auto else transforms.RandAugment(*rand)
    expected = Counter()
    torch.manual_seed(0)
    for _ in range(n):
        seen.clear()
        transform(image)
        expected[tuple((name, magnitude) for name, magnitude, *_ in seen if name != 'Identity')] += 1
    numbers = policy.sample(n, torch.Generator().manual_seed(0)).tolist()
    sampled = Counter(tuple(policy.operations[number] for number in row if number) for row in numbers)
    # The same pairs with the same magnitudes, equally often: as many as two samples of n differ by chance.
    for pair in sampled.keys() | expected.keys():
        a, b = sampled[pair], expected[pair]
        assert abs(a - b) <= 5.5 * (a + b) ** 0.5 + 3, (pair, a, b)
    assert {operation for pair in expected for operation in pair} <= set(policy.operations)


@pytest.mark.parametrize('view', [
    View(32, (0.49,) * 3, (0.2,) * 3, crop=(0.2, 1.), flip=0.5, auto='cifar10'),
    View(32, (0.49,) * 3, (0.2,) * 3, flip=0.5, padding=4, rand=(2, 9), cutout=(1, 8)),
    View(32, (0.49,) * 3, (0.2,) * 3, crop=(0.2, 1.), rand=(1, 15), jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)])
def test_both_executors_have_the_same_statistics_on_real_images(real_images, view):
    data, heights, widths = real_images.decode(view.short_side)
    params = views.sample_params(view, heights, widths, torch.Generator().manual_seed(0))
    transform = views.per_sample(view)
    expected = torch.stack([transform(real_images.load(i)) for i in range(len(real_images))])
    # Black borders vary more than colors: of 50,000 images all differ by less than 0.5 %, of 5,000 by chance.
    compare(views.apply(view, data, params), expected, rtol=0.07)


def test_local_slices_of_a_batch_are_the_same_views():
    """What each of several processes computes is its slice of what one computes."""
    x = images(16).transpose(2, 3).contiguous()
    view = View(16, (0.,) * 3, (1.,) * 3, crop=(0.2, 1.), auto='svhn', rand=(2, 9))
    params = views.sample_params(view, *torch.full((2, 2 * len(x)), 16), torch.Generator().manual_seed(0))
    whole = views.apply(view, x, params).view(2, len(x), 3, 16, 16)
    for rows in (slice(0, 9), slice(9, 24)):
        part = views.apply(view, x[rows], params.local(rows, len(x)))
        assert torch.equal(part.view(2, -1, 3, 16, 16), whole[:, rows])
