import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from networks.cpu_conv import Conv2d, ThinShortcut
from networks.resnet_big import RESNETS, LinearProbe, ResNet, SupCEResNet, SupConResNet


@pytest.mark.parametrize('name, dim, parameters', [       # parameters of the encoders with the 3x3 stem, in millions
    ('resnet18', 512, 11.17), ('resnet34', 512, 21.28), ('resnet50', 2048, 23.50), ('resnet101', 2048, 42.49),
    ('resnet152', 2048, 58.14), ('resnet200', 2048, 62.62)])
def test_sizes(name, dim, parameters):
    with torch.device('meta'):
        encoder = ResNet(name)
        assert encoder(torch.empty(2, 3, 32, 32)).shape == (2, dim)
    assert encoder.dim_out == dim
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(parameters, abs=0.01)


def test_the_computation_matches_torchvision():
    """With the ImageNet stem the encoder is torchvision's ResNet-50, parameter for parameter."""
    from torchvision.models import resnet50
    reference, encoder = resnet50(), ResNet('resnet50', stem='imagenet')
    reference.fc = torch.nn.Identity()
    state = {name.replace('downsample', 'shortcut'): value for name, value in reference.state_dict().items()}
    encoder.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder.eval()(x), reference.eval()(x))


def test_parameter_names_are_those_of_released_checkpoints():
    with torch.device('meta'):
        names = set(SupConResNet('resnet50').state_dict())
        assert {'encoder.conv1.weight', 'encoder.bn1.running_mean', 'encoder.layer1.0.conv3.weight',
                'encoder.layer1.0.bn3.bias', 'encoder.layer1.0.shortcut.0.weight', 'encoder.layer4.2.bn1.weight',
                'encoder.layer2.0.shortcut.1.running_var', 'head.0.weight', 'head.2.bias'} <= names
        assert {name.split('.')[0] for name in names} == {'encoder', 'head'}
        assert 'head.weight' in SupConResNet('resnet18', head='linear').state_dict()
        assert {'fc.weight', 'fc.bias'} <= set(SupCEResNet('resnet18').state_dict())


@pytest.mark.parametrize('stem, side', [('cifar', 32), ('imagenet', 8)])
def test_stem_resolution(stem, side):
    encoder = ResNet('resnet18', stem=stem, width=0.0625).eval()
    shapes = []
    encoder.layer1.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    encoder(torch.randn(1, 3, 32, 32))
    assert shapes[0][2:] == (side, side)


def test_width_scales_every_layer():
    thin, normal = (ResNet('resnet18', width=width) for width in (0.5, 1))
    assert thin.dim_out == 256
    for a, b in zip(thin.state_dict().values(), normal.state_dict().values()):
        assert a.ndim == 0 or a.shape[0] * 2 == b.shape[0]


def test_zero_init_starts_blocks_as_the_identity():
    encoder = ResNet('resnet50', width=0.0625, zero_init=True).eval()
    x = torch.rand(2, encoder.layer1[1].conv1.in_channels, 4, 4)
    torch.testing.assert_close(encoder.layer1[1](x), x)
    assert not torch.allclose(ResNet('resnet50', width=0.0625).eval().layer1[1](x), x)


def test_heads():
    x = torch.randn(3, 3, 8, 8)
    for head in ('mlp', 'linear'):
        features = SupConResNet('resnet18', head, 16, width=0.0625)(x)
        assert features.shape == (3, 16)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    features, logits = SupConResNet('resnet18', num_classes=7, width=0.0625)(x)
    assert features.shape == (3, 128) and logits.shape == (3, 7)
    with torch.autocast('cpu', torch.bfloat16):
        features = SupConResNet('resnet18', width=0.0625)(x)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_linear_probe_leaves_the_encoder_as_it_is():
    model = LinearProbe(ResNet('resnet18', width=0.0625), 5)
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model.train()
    weight = model.classifier.fc.weight.clone()
    F.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.randint(5, (8,))).backward()
    optimizer.step()
    for name, value in model.encoder.state_dict().items():      # running statistics of the batch norms included
        assert torch.equal(value, before[name]), name
    assert not torch.equal(model.classifier.fc.weight, weight)


@pytest.mark.parametrize('build', [lambda: ResNet('resnet19'), lambda: ResNet('resnet18', stem='large'),
                                   lambda: SupConResNet('resnet18', head='round'), lambda: ResNet(width=0.001)])
def test_unknown_settings_are_rejected(build):
    with pytest.raises(ValueError):
        build()


def test_every_network_is_known():
    assert list(RESNETS) == ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnet200']


THIN = '''
import torch
from networks.resnet_big import ResNet
network = ResNet("resnet18", width=1 / 16).to(memory_format=torch.channels_last)
for _ in range(30):
    images = torch.randn(32, 3, 8, 8).to(memory_format=torch.channels_last)
    network(images).sum().backward()
    network.zero_grad()
'''


def test_thin_networks_do_not_corrupt_memory():
    """On a CPU without AVX-512 the gradient of PyTorch's own strided 1x1 convolution wrote beyond its memory."""
    environment = {**os.environ, 'ONEDNN_MAX_CPU_ISA': 'AVX2', 'PYTHONPATH': '.'}
    run = subprocess.run([sys.executable, '-c', THIN], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_thin_shortcut_is_the_convolution():
    shortcut = ThinShortcut(4, 8, 1, 2, bias=False)
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(shortcut(x), F.conv2d(x, shortcut.weight, stride=2))


class Convolutions(TorchDispatchMode):
    """Counts PyTorch's own convolutions while it is entered."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.convolution.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize('h, w', [(1, 1), (2, 2), (1, 2), (3, 4), (4, 4), (5, 2)])
@pytest.mark.parametrize('stride', [1, 2])
def test_convolutions_of_small_maps_are_the_convolution(h, w, stride):
    layer = Conv2d(3, 5, 3, stride).double()
    x = torch.randn(8, 3, h, w, dtype=torch.double, requires_grad=True)
    with Convolutions() as convolutions:
        out = layer(x)
    assert convolutions.count == (max(h, w) > 2)
    expected = F.conv2d(x, layer.weight, stride=stride, padding=1)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, (x, layer.weight), grad),
                               torch.autograd.grad(expected, (x, layer.weight), grad))
    assert layer(x[:0]).shape == (0, *out.shape[1:])            # the empty slice of a process
    with Convolutions() as convolutions:
        torch.testing.assert_close(layer(x[:2]), out[:2])
    assert convolutions.count == 1                              # of which a matrix product takes three times as long
    with Convolutions() as convolutions:
        torch.testing.assert_close(layer.eval()(x), out)
    assert convolutions.count == 1                              # what is exported and evaluated is a plain convolution


@pytest.mark.parametrize('n, side, stride', [(64, 2, 1), (64, 4, 2), (2, 1, 2)])
def test_convolutions_of_small_maps_in_bfloat16(n, side, stride):
    layer = Conv2d(16, 32, 3, stride).to(memory_format=torch.channels_last)
    x = torch.randn(n, 16, side, side).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast('cpu', torch.bfloat16), Convolutions() as convolutions:
        out = layer(x)
    assert convolutions.count == 0
    expected = F.conv2d(x.float(), layer.weight, stride=stride, padding=1)
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(out)
    pairs = [(out, expected), *zip(torch.autograd.grad(out, (x, layer.weight), grad),
                                   torch.autograd.grad(expected, (x, layer.weight), grad.float()))]
    assert all((a - b).norm() < 0.01 * b.norm() for a, b in pairs)
