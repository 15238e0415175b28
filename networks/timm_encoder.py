"""Models of timm, for small images too: backbones as encoders, and classifiers as teachers."""
import difflib

import timm
import torch
from torch import nn

from networks.precision import mixed_precision
from networks.sync_bn import SyncBatchNorm
from util.distributed import rank_zero_first
from util.errors import UserError
from util.log import log


def check_name(name, option):
    """UserError where timm has no model of this name, or no pretrained weights of this tag (<model>.<tag>)."""
    base, _, tag = name.partition('.')
    if tag and timm.is_model(base) and not timm.is_model_pretrained(name):
        raise UserError(f'argument {option}: found {name!r}: timm {timm.__version__} has no weights {tag} of {base}')
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 1)
        raise UserError(f'argument {option}: found {name!r}, expected the name of a model of timm {timm.__version__}'
                        + ''.join(f', did you mean {other}?' for other in close))


def pretrained_settings(name):
    """What timm's weights of a model expect: {'size', 'mean', 'std'}. UserError where it has none."""
    if not timm.is_model_pretrained(name):
        raise UserError(f'--timm_pretrained: timm {timm.__version__} has no weights of {name}')
    config = timm.get_pretrained_cfg(name)
    return {'size': config.input_size[-1], 'mean': tuple(config.mean), 'std': tuple(config.std)}


def classifier_names(name):
    """What the names of a model's classifier parameters begin with, a tuple."""
    config = timm.get_pretrained_cfg(name)
    classifier = config.classifier if config and config.classifier else ()
    return tuple(f'{part}.' for part in ([classifier] if isinstance(classifier, str) else classifier))


def timm_model(name, num_classes, stem, size, pretrained=False):
    """A model of timm with random weights, or `pretrained` ones, downloaded once; num_classes 0: without classifier.

    stem 'cifar' makes its first convolution 3x3 of stride 1 and removes the max-pool after it, so that small images
    keep their resolution, where it has such a stem; with 'imagenet' it stays as it is.
    """
    settings = {'pretrained': pretrained, 'num_classes': num_classes}
    try:
        model = timm.create_model(name, **settings, img_size=size)                  # transformers need to know it
    except TypeError:
        model = timm.create_model(name, **settings)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f'timm/{name} cannot be made for images of {size} pixels ({error})') from error
    if stem == 'cifar':
        _shrink_stem(model, name)
    return model


def _downloaded(name, stem, size):
    """A backbone with timm's weights; UserError where they cannot be had."""
    try:
        return rank_zero_first(lambda: timm_model(name, 0, stem, size, pretrained=True))
    except UserError:
        raise
    except Exception as error:                          # of the connection, the hub, the disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f'--timm_pretrained: the weights of {name} cannot be downloaded, and are not in the cache '
                        f'({reason})') from error


def _shrink_stem(model, name):
    first = model.default_cfg.get('first_conv')
    conv = model.get_submodule(first) if isinstance(first, str) else None
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size == conv.stride:
        if not any(parameter.is_meta for parameter in model.parameters()):      # built again when it is known to fit
            log(f'timm/{name} keeps its first layers: it has no stem that --stem cifar knows how to shrink')
        return
    small = type(conv)(conv.in_channels, conv.out_channels, 3, stride=1, padding=1, bias=conv.bias is not None)
    nn.init.kaiming_normal_(small.weight, mode='fan_out', nonlinearity='relu')
    model.set_submodule(first, small)
    for pool in ('maxpool', 'features.pool0', 'stem.pool'):
        if isinstance(dict(model.named_modules()).get(pool), nn.MaxPool2d):
            model.set_submodule(pool, nn.Identity())


class TimmEncoder(nn.Module):
    """A backbone of timm as encoder: images [bsz, 3, size, size] -> features [bsz, dim_out].

    dim_out is what the backbone gives; pretrained: with timm's own weights. `precision` and `memory_format` as for
    ResNet. Raises UserError where the backbone takes no images of this size, or gives no vectors.
    """

    def __init__(self, name, size=32, stem='cifar', width=1.0, zero_init=False, pretrained=False):
        super().__init__()
        if width != 1 or zero_init:
            raise UserError(f"--model timm/{name} takes no {'--zero_init' if zero_init else f'--width {width}'}")
        self.precision, self.memory_format = None, torch.preserve_format
        self.backbone = _downloaded(name, stem, size) if pretrained else timm_model(name, 0, stem, size)
        try:
            with torch.no_grad():
                features = self.backbone.eval()(torch.zeros(1, 3, size, size))
        except Exception as error:                          # models raise anything for a wrong size
            raise UserError(f'--model timm/{name} takes no images of {size} pixels with --stem {stem} '
                            f'({type(error).__name__}: {error})') from error
        if not torch.is_tensor(features) or features.dim() != 2:
            raise UserError(f'--model timm/{name} gives no feature vectors, expected a model for classification')
        self.dim_out = features.shape[1]
        self.backbone.train()

    def forward(self, x):
        if x.shape[0] == 0 and not any(isinstance(module, SyncBatchNorm) for module in self.modules()):
            return x.new_zeros(0, self.dim_out)             # not every backbone takes the empty part of a process
        with mixed_precision(x, self.precision):
            return self.backbone(x.to(memory_format=self.memory_format))
