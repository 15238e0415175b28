"""Checkpoints: plain tensors, numbers and texts, written whole or not at all, and read without executing anything."""
import argparse
import codecs
import math
import os
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from networks.resnet_big import make_encoder
from util.options import POSITIVE, UserError, channels, loader, network, number, stem


def write_checkpoint(state, file):
    """Save a dict; at any moment `file` is the old checkpoint or the new one, whole. UserError where it cannot."""
    partial = file.with_name(f'{file.name}.partial')
    try:
        with open(partial, 'wb') as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())                                   # before the name says that it is there
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        while error.__context__ is not None:            # PyTorch's writer follows a full disk with errors of its own
            error = error.__context__
        raise UserError(f'{file}: cannot be written ({error})') from error


def stored_bytes(file):
    """Size of what a zip file holds, as it lies there; None where it is none or something in it would inflate."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    size = sum(member.file_size for member in members)
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    return size if stored and size <= os.path.getsize(file) else None


def kept_checkpoints(folder, up_to=math.inf):
    """The files ckpt_epoch_<N>.ckpt of a run's folder, up to an epoch, the newest first."""
    found = [(int(match[1]), file) for file in folder.glob('ckpt_epoch_*.ckpt')
             if (match := re.fullmatch(r'ckpt_epoch_(\d+)\.ckpt', file.name))]
    return [file for epoch, file in sorted(found, reverse=True) if epoch <= up_to]


def newest_whole_checkpoint(folder):
    """The newest of a run's kept checkpoints that can be read, or None."""
    for file in kept_checkpoints(folder):
        try:
            load_checkpoint(file)
            return file
        except UserError:
            pass
    return None


def strip_wrappers(state):
    """Parameter names without the prefix of DataParallel."""
    return {name.replace('module.', ''): value for name, value in state.items()}


def load_parameters(model, state, source):
    """Load a state dict without wrappers' prefixes into a model, wrapped or not; UserError where they do not fit."""
    names = {name.replace('module.', ''): name for name in model.state_dict()}
    wrong = sorted(names.keys() ^ state.keys()) or [
        name for name in names if model.state_dict()[names[name]].shape != state[name].shape]
    if wrong:
        found, expected = (f'{list(tensors[name].shape)}' if name in tensors else 'none' for tensors, name in (
            (state, wrong[0]), (strip_wrappers(model.state_dict()), wrong[0])))
        raise UserError(f'{source} holds another network: {len(wrong)} parameters differ, {wrong[0]} is {found} there, '
                        f'expected {expected}')
    model.load_state_dict({names[name]: value for name, value in state.items()})


def load_optimizer(optimizer, saved):
    """Load an optimizer's state_dict(): what it holds of the parameters, and the learning rate, which a schedule sets.

    Its other settings stay those of the options. Raises an exception of some kind where it does not fit.
    """
    settings = [{name: value for name, value in group.items() if name != 'params'} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, values in zip(optimizer.param_groups, settings):
        params, lr = group['params'], float(group['lr'])
        group.clear()
        group.update(values, params=params, lr=lr)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.dim() and value.shape != parameter.shape:
                raise ValueError(f'{name} is {list(value.shape)}, expected {list(parameter.shape)}')


# What a pickled NumPy float64 is made of, under the names of NumPy 2 and NumPy 1.
NUMPY_NUMBERS = [np.dtype, np.dtypes.Float64DType, codecs.encode] + [
    (np.float64(0).__reduce__()[0], f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')]


def read_checkpoint(file, keys):
    """A checkpoint as a dict, of which one of `keys` holds parameters: -> (the dict, the parameters by their names).

    Nothing in the file is executed. Raises UserError where the file is missing or no checkpoint.
    """
    if not Path(file).is_file():
        raise UserError(f'{file}: no such checkpoint')
    try:
        if zipfile.is_zipfile(file) and stored_bytes(file) is None:
            raise ValueError('parts of it are compressed')              # PyTorch's own are not, and cannot inflate
        # The original programs keep a Namespace in `opt`, and a NumPy number as learning rate after its first decay.
        with torch.serialization.safe_globals([argparse.Namespace, *NUMPY_NUMBERS]), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            checkpoint = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:          # a damaged file can raise anything; PyTorch's advice is not ours
        raise UserError(f'{file}: not a readable checkpoint ({type(error).__name__})') from error
    model = next((checkpoint[key] for key in keys if key in checkpoint), None) if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict) or not all(
            isinstance(name, str) and torch.is_tensor(value) and value.layout is torch.strided
            and not value.is_complex() for name, value in model.items()):
        raise UserError(f"{file}: not a checkpoint of these programs, expected the parameters under "
                        f"{' or '.join(map(repr, keys))}")
    return checkpoint, strip_wrappers(model)


def load_checkpoint(file):
    """A checkpoint of ours or of the original programs as a dict with `model`, `epoch` and the options `opt`, a dict.

    Raises UserError as read_checkpoint.
    """
    checkpoint, model = read_checkpoint(file, ['model'])
    return {**checkpoint, 'opt': check_recorded(checkpoint, file), 'model': model}


def check_recorded(checkpoint, file):
    """The options `opt` of a checkpoint; those that decide method, network and pictures as if parsed again."""
    opt, classes = ({} if checkpoint.get('opt') is None else checkpoint['opt']), checkpoint.get('classes', [])
    opt = vars(opt) if isinstance(opt, argparse.Namespace) else opt
    if not isinstance(opt, dict) or not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise UserError(f'{file}: its recorded options are damaged')
    types = {'model': network, 'stem': stem, 'method': str, 'width': number(float, 1 / 64, 16),
             'size': number(int, 8, 4096), 'mean': channels(number(float, -math.inf)), 'std': channels(POSITIVE),
             'dataset': str, 'split_seed': number(int, 0, 2**31), 'loader_chosen': loader}
    try:
        for name in types:
            _check_plain(opt.get(name))
        return {**opt, **{name: parse(str(opt[name])) for name, parse in types.items() if opt.get(name) is not None}}
    except (argparse.ArgumentTypeError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f'{file}: its recorded options are damaged ({error})') from error


def _check_plain(value):
    """TypeError for what is no option's value: lists in lists could be of any size as a text."""
    parts = value[:10] if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(part, (str, int, float, type(None))) for part in parts):
        raise TypeError(f'found a {type(value).__name__}')


def load_encoder(checkpoint, opt, source):
    """The encoder of a checkpoint, built as opt.model, stem, width and size say; `source` names it in errors."""
    encoder = make_encoder(opt.model, size=opt.size, stem=opt.stem, width=opt.width)
    prefix = 'encoder.'
    state = {name[len(prefix):]: value for name, value in checkpoint['model'].items() if name.startswith(prefix)}
    load_parameters(encoder, state, source)
    return encoder
