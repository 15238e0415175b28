"""ResNets for small and large images, with the heads of contrastive learning.

The residual networks of He et al., 2015 (https://arxiv.org/abs/1512.03385). "Big" is the variant for 32x32
images, stem='cifar': a 3x3 stem of stride 1 and no max-pool, so that a 32x32 image keeps its resolution through
the first stage. Parameter names are those of the released SupContrast checkpoints: encoder.layer1.0.conv1.weight,
encoder.layer2.0.shortcut.0.weight, head.0.weight, head.2.weight, fc.weight.
"""
import torch
from torch import nn
from torch.nn import functional as F

from networks.cpu_conv import Conv2d, ThinShortcut
from networks.precision import mixed_precision
from util.errors import UserError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [bsz, in_planes, h, w] -> [bsz, planes, h / stride, w / stride]."""
    expansion = 1

    def __init__(self, in_planes, planes, stride=1):
        super().__init__()
        self.conv1 = conv(in_planes, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = shortcut(in_planes, planes, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: [bsz, in_planes, h, w] -> [bsz, 4 planes, h / stride, w / stride].

    The 3x3 convolution has the stride.
    """
    expansion = 4

    def __init__(self, in_planes, planes, stride=1):
        super().__init__()
        self.conv1 = conv(in_planes, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv(planes, self.expansion * planes, 1)
        self.bn3 = nn.BatchNorm2d(self.expansion * planes)
        self.shortcut = shortcut(in_planes, self.expansion * planes, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def conv(in_planes, planes, size, stride=1):
    return nn.Conv2d(in_planes, planes, 1, stride, bias=False) if size == 1 else Conv2d(in_planes, planes, size, stride)


def shortcut(in_planes, planes, stride):
    """The identity where shapes allow, else a 1x1 convolution with batch norm."""
    if stride == 1 and in_planes == planes:
        return nn.Sequential()
    convolution = conv(in_planes, planes, 1, stride) if in_planes >= 8 else ThinShortcut(
        in_planes, planes, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(planes))


RESNETS = {                             # block and depth of the four stages
    'resnet18': (BasicBlock, (2, 2, 2, 2)),
    'resnet34': (BasicBlock, (3, 4, 6, 3)),
    'resnet50': (Bottleneck, (3, 4, 6, 3)),
    'resnet101': (Bottleneck, (3, 4, 23, 3)),
    'resnet152': (Bottleneck, (3, 8, 36, 3)),
    'resnet200': (Bottleneck, (3, 24, 36, 3)),
}


def feature_dim(name):
    """Dimensions of the features of a ResNet of the usual width."""
    return 512 * RESNETS[name][0].expansion


def network_name(text, option='--model'):
    """The name of a network: resnet50 for resnet-50, or timm/<name>. UserError for one that does not exist."""
    if text.startswith('timm/'):
        from networks.timm_encoder import check_name  # here, since timm takes seconds to import
        check_name(text.removeprefix('timm/'), option)
        return text
    name = text.lower().replace('-', '')
    if name not in RESNETS:
        raise UserError(f"argument {option}: found {text!r}, expected one of {', '.join(RESNETS)} or timm/<name>")
    return name


class ResNet(nn.Module):
    """Encoder: images [bsz, 3, h, w] -> features [bsz, dim_out] after the average pool.

    Args:
        name: a key of RESNETS. dim_out is 512 for resnet18 and 34, 2048 for the others, times the width.
        stem: 'cifar' (3x3, stride 1) or 'imagenet' (7x7, stride 2, then 3x3 max-pool of stride 2).
        width: multiplies the number of channels of every layer.
        zero_init: start the last batch norm of each block at 0, so that blocks start as the identity
            (Goyal et al., 2017, https://arxiv.org/abs/1706.02677, section 5.1).

    Set `precision` to a dtype to compute in mixed precision, and `memory_format` to torch.channels_last to compute in
    that: DataParallel's replicas lose the format of the parameters, but not that of the images.
    """

    def __init__(self, name='resnet50', stem='cifar', width=1.0, zero_init=False):
        super().__init__()
        self.precision, self.memory_format = None, torch.preserve_format
        if name not in RESNETS:
            raise ValueError(f"network is {name!r}, expected one of {', '.join(RESNETS)}")
        if stem not in ('cifar', 'imagenet'):
            raise ValueError(f"stem is {stem!r}, expected 'cifar' or 'imagenet'")
        block, depths = RESNETS[name]
        planes = [round(width * c) for c in (64, 128, 256, 512)]
        if planes[0] < 1:
            raise ValueError(f'width is {width}, expected at least 1/64')
        self.conv1 = conv(3, planes[0], 3) if stem == 'cifar' else conv(3, planes[0], 7, 2)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.maxpool = nn.Identity() if stem == 'cifar' else nn.MaxPool2d(3, 2, padding=1)
        self.dim_out = planes[0]
        for i, (channels, depth) in enumerate(zip(planes, depths)):
            setattr(self, f'layer{i + 1}', self._stage(block, channels, depth, stride=1 if i == 0 else 2))
        self._initialize(zero_init)

    def _stage(self, block, planes, depth, stride):
        blocks = []
        for i in range(depth):
            blocks.append(block(self.dim_out, planes, stride if i == 0 else 1))
            self.dim_out = planes * block.expansion
        return nn.Sequential(*blocks)

    def _initialize(self, zero_init):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            if zero_init and isinstance(module, (BasicBlock, Bottleneck)):
                last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
                nn.init.zeros_(last.weight)

    def forward(self, x):
        with mixed_precision(x, self.precision):
            x = x.to(memory_format=self.memory_format)
            x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return x.mean((2, 3))


def make_encoder(name, size=32, pretrained=False, **settings):
    """The ResNet `name`, or the backbone timm/<name> for images of `size` pixels, with timm's `pretrained` weights or
    random ones; settings as for ResNet."""
    if name.startswith('timm/'):
        from networks.timm_encoder import TimmEncoder
        return TimmEncoder(name[len('timm/'):], size, pretrained=pretrained, **settings)
    return ResNet(name, **settings)


class SupConResNet(nn.Module):
    """Encoder and projection head: images [bsz, 3, h, w] -> features [bsz, feat_dim] of unit length.

    With num_classes there is a linear classifier beside the head, on the encoder's features, and the result is
    (features, logits [bsz, num_classes]).

    Args:
        name, **encoder: as for make_encoder.
        head: 'mlp' (Linear, ReLU, Linear), 'linear', or a list of the sizes of its layers, with ReLU between them; the
            last is feat_dim then.
        feat_dim: dimensions of the projected features.
        num_classes: classes of the classifier; 0: none.
        head_bn: batch norm before each ReLU of the head.
        normalize_embedding: the head sees the encoder's features at unit length.
    """

    def __init__(self, name='resnet50', head='mlp', feat_dim=128, num_classes=0, head_bn=False,
                 normalize_embedding=False, **encoder):
        super().__init__()
        self.encoder = make_encoder(name, **encoder)
        dim = self.encoder.dim_out
        if isinstance(head, str) and head not in ('mlp', 'linear'):
            raise ValueError(f"head is {head!r}, expected 'mlp', 'linear' or a list of sizes")
        sizes = {'mlp': [dim, feat_dim], 'linear': [feat_dim]}[head] if isinstance(head, str) else list(head)
        self.head = make_head(dim, sizes, head_bn)
        self.feat_dim, self.normalize_embedding = sizes[-1], normalize_embedding
        self.fc = nn.Linear(dim, num_classes) if num_classes else None
        self.moco = None                                # or a MomentumContrast, saved with the network

    def forward(self, x):
        encoded = self.encoder(x)
        features = self.project(encoded)
        return features if self.fc is None else (features, self.fc(encoded))

    def project(self, encoded):
        """The encoder's features [n, dim] through the head -> [n, feat_dim] of unit length."""
        projected = self.head(F.normalize(encoded, dim=1) if self.normalize_embedding else encoded)
        # Unit length to float32 precision under autocast too.
        return F.normalize(projected if projected.dtype == torch.float64 else projected.float(), dim=1)


def make_head(dim, sizes, batch_norm):
    """Linear layers from dim to each of sizes, with ReLU between them, and batch norm before it."""
    if len(sizes) == 1:
        return nn.Linear(dim, sizes[0])                 # not in a Sequential: head.weight, as released checkpoints
    layers = []
    for size_in, size in zip([dim, *sizes], sizes[:-1]):
        layers.append(nn.Linear(size_in, size, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(size))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class SupCEResNet(nn.Module):
    """Encoder and classifier for cross-entropy: images [bsz, 3, h, w] -> logits [bsz, num_classes]."""

    def __init__(self, name='resnet50', num_classes=10, **encoder):
        super().__init__()
        self.encoder = make_encoder(name, **encoder)
        self.fc = nn.Linear(self.encoder.dim_out, num_classes)

    def forward(self, x):
        return self.fc(self.encoder(x))


class LinearClassifier(nn.Module):
    """Linear classifier on frozen features: [bsz, dim] -> logits [bsz, num_classes].

    dim: of the features; default: what the ResNet `name` gives.
    """

    def __init__(self, name='resnet50', num_classes=10, dim=None):
        super().__init__()
        self.fc = nn.Linear(dim or feature_dim(name), num_classes)

    def forward(self, features):
        return self.fc(features)


class LinearProbe(nn.Module):
    """A linear classifier on a pretrained encoder: images [bsz, 3, h, w] -> logits [bsz, num_classes].

    Instead of images it also takes the encoder's features of them, [bsz, dim]. The encoder is frozen: it gets no
    gradient and stays in eval mode, so that its batch norms keep their statistics. With `finetune` it is trained too;
    with `freeze_bn` but for its batch norms.
    """

    def __init__(self, encoder, num_classes=10, finetune=False, freeze_bn=False):
        super().__init__()
        self.encoder = encoder.requires_grad_(finetune)
        self.classifier = LinearClassifier(dim=encoder.dim_out, num_classes=num_classes)
        self.finetune, self.freeze_bn = finetune, freeze_bn
        if freeze_bn:
            for norm in batch_norms(encoder):
                norm.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if not self.finetune:
            self.encoder.eval()
        elif self.freeze_bn:
            for norm in batch_norms(self.encoder):
                norm.eval()
        return self

    def forward(self, x):
        if x.dim() == 2:
            return self.classifier(x)
        with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
            features = self.encoder(x)
        return self.classifier(features)


def batch_norms(module):
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
