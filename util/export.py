"""A trained encoder with its classifier as one file that other programs can use."""
import copy
import importlib.util
import io
import json
import os
import re
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from networks.resnet_big import LinearClassifier, ResNet
from util.errors import UserError
from util.files import replace_file
from util.log import log

SUFFIXES = ('.pth', '.safetensors', '.pt2', '.onnx')


class Exporter:
    """Writes a network of main_ce.py or main_linear.py to --export.

    The file takes images [bsz, 3, size, size] of 0..1, minus mean, divided by std, and gives logits. It holds
    `classes`, `mean`, `std`, `size`, `model`, `stem`, `width`, `dataset` and `split_seed` (which images were held out)
    too, and `multi_label` where the sigmoid of each logit is a probability:

    - .pth: beside `state_dict`; a ResNet's parameters have torchvision's names (with stem cifar conv1 is 3x3 of stride
      1 and there is no max-pool), another backbone's timm's.
    - .safetensors: the same names; as JSON in `info` of the metadata.
    - .pt2: as JSON in the extra file info.json: torch.export.load(file, extra_files=extra).module()(images).
    - .onnx: as JSON in the metadata; needs the packages onnx and onnxscript.

    Raises UserError for a file that it could not write, when it is made and when it writes.
    """

    def __init__(self, model, opt, classes):
        self.model, self.opt, self.file = model, opt, Path(opt.export)
        self.info = {'classes': list(classes), 'mean': list(opt.mean), 'std': list(opt.std), 'size': opt.size,
                     'model': opt.model, 'stem': opt.stem, 'width': opt.width, 'dataset': opt.dataset}
        if opt.split_seed is not None:
            self.info['split_seed'] = opt.split_seed
        if opt.multi_label:
            self.info['multi_label'] = True
        if self.file.suffix not in SUFFIXES:
            raise UserError(f"--export {self.file}: expected a name that ends in {', '.join(SUFFIXES)}")
        if self.file.suffix == '.onnx' and not importlib.util.find_spec('onnxscript'):
            raise UserError(f'--export {self.file}: the package onnxscript is missing: pip install onnx onnxscript')
        if os.path.isdir(self.file):
            raise UserError(f'--export {self.file}: found a folder, expected the name of a file')
        partial = self.file.with_name(self.file.name + '.partial')
        self._contents()                                # whatever goes wrong does so before training
        try:
            partial.touch()
            partial.unlink()
        except OSError as error:
            raise UserError(f'--export {self.file}: cannot be written ({error})') from error

    def write(self):
        """Write the file; its name appears only when it is complete."""
        contents = self._contents()
        try:
            replace_file(self.file, contents)
        except OSError as error:
            raise UserError(f'--export {self.file}: cannot be written ({error})') from error
        log(f'{self.file}: {self.opt.model} with its classifier')

    def _contents(self):
        encoder, fc = encoder_and_classifier(self.model)
        buffer = io.BytesIO()
        try:
            if self.file.suffix == '.pth':
                torch.save({'state_dict': to_torchvision_names(encoder, fc), **self.info}, buffer)
            elif self.file.suffix == '.safetensors':
                metadata = {'info': json.dumps(self.info)}
                buffer.write(safetensors.torch.save(to_torchvision_names(encoder, fc), metadata))
            else:
                self._trace(nn.Sequential(encoder, fc), buffer)
        except Exception as error:                      # not every backbone can be traced; they raise anything
            raise UserError(f'--export {self.file}: {self.opt.model} cannot be exported so ({error})') from error
        return buffer.getvalue()

    def _trace(self, network, buffer):
        images = torch.zeros(2, 3, self.opt.size, self.opt.size)
        batch = torch.export.Dim('batch', min=1)
        program = torch.export.export(network.eval(), (images,), dynamic_shapes=({0: batch},))
        if self.file.suffix == '.pt2':
            torch.export.save(program, buffer, extra_files={'info.json': json.dumps(self.info)})
            return
        onnx = torch.onnx.export(program, verbose=False)
        for name, value in self.info.items():
            onnx.model.metadata_props[name] = json.dumps(value)
        buffer.write(onnx.model_proto.SerializeToString())


def encoder_and_classifier(model):
    """Copies on the CPU of the encoder and of the last linear layer of a SupCEResNet or LinearProbe."""
    encoder = getattr(model.encoder, 'module', model.encoder)           # of DataParallel, or compiled
    fc = model.classifier.fc if isinstance(getattr(model, 'classifier', None), LinearClassifier) else model.fc
    encoder = copy.deepcopy(encoder).to('cpu', torch.float32, memory_format=torch.contiguous_format).eval()
    fc = copy.deepcopy(fc).cpu().float()
    encoder.precision, encoder.memory_format = None, torch.preserve_format
    return encoder, fc


def to_torchvision_names(encoder, fc):
    """The parameters under the names of torchvision's ResNets, or of timm's model."""
    state = encoder.state_dict()
    if isinstance(encoder, ResNet):
        state = {re.sub(r'\bshortcut\b', 'downsample', name): value for name, value in state.items()}
        last = 'fc'
    else:
        state = {name.removeprefix('backbone.'): value for name, value in state.items()}
        last = encoder.backbone.default_cfg.get('classifier')
        if not isinstance(last, str):
            raise ValueError('timm gives it several classifiers')
    return {**state, **{f'{last}.{name}': value for name, value in fc.state_dict().items()}}
