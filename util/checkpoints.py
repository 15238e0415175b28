"""Checkpoints: plain tensors, numbers and texts, written completely or not at all, read without executing anything."""
import argparse
import contextlib
import math
import os
import re
import reprlib
from concurrent.futures import ThreadPoolExecutor

import torch

from networks.resnet_big import make_encoder, network_name
from util.errors import UserError
from util.options import MEAN, STD, number, one_of
from util.unpickling import plain_values, read_pickled


def write_checkpoint(state, file):
    """Save a dict; at any moment `file` is the old checkpoint or the complete new one. UserError where it cannot."""
    partial = file.with_name(f'{file.name}.partial')
    try:
        partial.unlink(missing_ok=True)                                 # not through a link
        with open(partial, 'wb') as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())                                   # before it gets its name
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        while error.__context__ is not None:            # PyTorch's writer follows a full disk with errors of its own
            error = error.__context__
        raise UserError(f'{file}: cannot be written ({error})') from error


class Writer:
    """Writes files in a thread, one after the other, while training continues.

    A call of `submit` or `finish` waits for the one before and raises its error. After `finish` everything is written.
    """

    def __init__(self):
        self.thread, self.pending = ThreadPoolExecutor(1), None

    def submit(self, write, *args):
        self.finish()
        self.pending = self.thread.submit(write, *args)

    def finish(self):
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def copy_on_host(state):
    """A copy of nested dicts and lists, with their tensors in the host's memory."""
    if isinstance(state, dict):
        return {name: copy_on_host(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(copy_on_host, state))
    return state.to('cpu', copy=True) if torch.is_tensor(state) else state


def kept_checkpoints(folder, up_to=math.inf):
    """The files ckpt_epoch_<N>.ckpt of a run's folder, up to an epoch, the newest first."""
    found = [(int(match[1]), file) for file in folder.glob('ckpt_epoch_*.ckpt')
             if (match := re.fullmatch(r'ckpt_epoch_(\d+)\.ckpt', file.name))]
    return [file for epoch, file in sorted(found, reverse=True) if epoch <= up_to]


def newest_valid_checkpoint(folder):
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


FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def check_parameters(model, state, source):
    """UserError where a state dict without wrappers' prefixes is not of this model, which may be on the meta device."""
    expected = strip_wrappers(model.state_dict())
    wrong = sorted(expected.keys() ^ state.keys()) or [
        name for name in expected if expected[name].shape != state[name].shape]
    if wrong:
        found, wanted = (f'{list(tensors[wrong[0]].shape)!s:.99}' if wrong[0] in tensors else 'none'
                         for tensors in (state, expected))
        raise UserError(f'{source} holds another network: {len(wrong)} parameters differ, {wrong[0]:.99} is {found} '
                        f'there, expected {wanted}')
    for name, value in expected.items():
        if state[name].dtype != value.dtype and not {state[name].dtype, value.dtype} <= FLOATS:
            raise UserError(f'{source}: {name} is {state[name].dtype}, expected {value.dtype}')


def load_parameters(model, state, source):
    """Load a state dict without wrappers' prefixes into a model, wrapped or not.

    Returns how many there are. Raises UserError where they do not fit, or where one is not finite.
    """
    check_parameters(model, state, source)
    model.load_state_dict({name: state[name.replace('module.', '')] for name in model.state_dict()})
    for name, value in strip_wrappers(model.state_dict()).items():      # as they are now: 1e300 is inf in float32
        if not value.isfinite().all():
            raise UserError(f'{source}: {name} is not finite everywhere, expected a network that has not diverged')
    return len(state)


def load_optimizer(optimizer, saved, started=True, optional=()):
    """Load an optimizer's state_dict(): what it holds of the parameters, and the learning rate, which a schedule sets.

    Its other settings stay those of the options. After the first step (`started`) every parameter must have a state but
    the `optional` ones, which may never have had a gradient. Raises an exception of some kind where it does not fit.
    """
    groups, states = optimizer.state_dict()['param_groups'], {}
    if [group['params'] for group in saved['param_groups']] != [group['params'] for group in groups]:
        raise ValueError('the optimizer has other parameters')
    for group, old, now in zip(groups, saved['param_groups'], optimizer.param_groups):
        expected = _state_after_a_step(optimizer, {**now, **{name: old[name] for name in now.keys() & old.keys()}})
        _state_after_a_step(optimizer, now, expected)                   # fails where --force needs more than there is
        for index, parameter in zip(group['params'], now['params']):
            state = saved['state'].pop(index, {})
            if state or started and expected and parameter not in optional:
                states[index] = _checked_state(state, expected, parameter.shape, f'parameter {index}')
        group['lr'] = float(old['lr'])
        if not 0 <= group['lr'] < math.inf:
            raise ValueError(f"the learning rate is {group['lr']}")
    if saved['state']:
        raise ValueError('the optimizer has states of other parameters')
    optimizer.load_state_dict({'state': states, 'param_groups': groups})


def _state_after_a_step(optimizer, settings, state=()):
    """What an optimizer of this kind with these settings keeps of a parameter [1]: {name: tensor}."""
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.zeros(1)
    probe = type(optimizer)([{**settings, 'params': [parameter]}])
    probe.state[parameter].update(state)
    probe.step()
    return {name: value for name, value in probe.state[parameter].items() if value is not None}


def _checked_state(state, expected, shape, owner):
    """A copy of what an optimizer keeps of a parameter; ValueError where it is not like `expected`, that of another."""
    state = {name: value for name, value in state.items() if value is not None}
    if state.keys() != expected.keys():
        raise ValueError(f'{owner} has the state {reprlib.repr(list(state))}, expected {list(expected)}')
    for name, value in state.items():
        wanted = shape if expected[name].dim() else ()
        if not torch.is_tensor(value) or value.dtype not in FLOATS or value.shape != wanted:
            raise ValueError(f'{name} of {owner}: expected a tensor {list(wanted)} of floats')
        if not value.isfinite().all() or not value.dim() and value < 0:
            raise ValueError(f'{name} of {owner} is not finite, or negative')
    return {name: value.clone() for name, value in state.items()}       # in the file they may share memory


def load_scaler(scaler, saved):
    """Load a GradScaler's state_dict(), which is {} for one that is not used. ValueError where it is none."""
    expected = torch.amp.GradScaler('cpu').state_dict() if saved else {}
    if {name: type(value) for name, value in saved.items()} != {name: type(value) for name, value in expected.items()}:
        raise ValueError(f'the scaler has {reprlib.repr(saved)}, expected {expected}')
    if not all(0 <= value < math.inf for value in saved.values()):
        raise ValueError(f'the scaler has {saved}')
    if saved:
        scaler.load_state_dict(saved)


def whole_number(value, name):
    """The value, or ValueError where it is no whole number from 0 to 2**31."""
    if type(value) is not int or not 0 <= value <= 2**31:
        raise ValueError(f'{name} is {reprlib.repr(value)}, expected a whole number')
    return value


def read_checkpoint(file, keys, plain=False):
    """A checkpoint as a dict, of which one of `keys` holds parameters: -> (the dict, the parameters by their names).

    With `plain` the dict may also be one of parameters, as model.state_dict() is, and counts as empty beside them.
    Nothing in the file is executed. What the dict holds beside the parameters is to be used as `plain_values` gives it.
    Raises UserError where the file is missing or no checkpoint.
    """
    if not os.path.isfile(file):                        # Path.is_file raises OSError where it may not look
        raise UserError(f'{file}: no such checkpoint')
    try:
        checkpoint = read_pickled(file)
    except Exception as error:          # a corrupted file can raise anything; PyTorch's advice is not ours
        reason = error if type(error) is ValueError else type(error).__name__
        raise UserError(f'{file}: not a readable checkpoint ({reason!s:.200})') from error
    checkpoint = dict(dict.items(checkpoint)) if isinstance(checkpoint, dict) else {}
    if plain and checkpoint and all(map(torch.is_tensor, checkpoint.values())):
        checkpoint = {keys[0]: checkpoint}
    try:
        model = plain_values(next(checkpoint[key] for key in keys if key in checkpoint), tensors=True)
        state = strip_wrappers(model)
        if len(state) < len(model) or not all(torch.is_tensor(value) for value in model.values()):
            raise ValueError('found other values')
    except (AttributeError, StopIteration, ValueError) as error:
        raise UserError(f"{file}: not a checkpoint of these programs, expected the parameters under "
                        f"{' or '.join(map(repr, keys))}{f' ({error})' if str(error) else ''}") from error
    return checkpoint, state


def load_checkpoint(file):
    """A checkpoint of ours or of the original programs as a dict with `model`, `epoch` and the options `opt`, a dict.

    Raises UserError as read_checkpoint.
    """
    checkpoint, model = read_checkpoint(file, ['model'])
    try:
        whole_number(plain_values(checkpoint.get('epoch', 0)), 'epoch')
    except ValueError as error:
        raise UserError(f'{file} is no valid checkpoint of a run ({error})') from error
    return {**checkpoint, 'opt': check_recorded(checkpoint, file), 'model': model}


RECORDED = {                            # options that decide method, network and images, and how each is parsed
    'model': network_name, 'stem': one_of('cifar', 'imagenet'), 'method': str, 'width': number(float, 1 / 64, 16),
    'size': number(int, 8, 4096),
    'mean': MEAN, 'std': STD, 'dataset': str, 'data_folder': str,
    'split_seed': number(int, 0, 2**31), 'loader_chosen': one_of('batched', 'workers'),
}


def check_recorded(checkpoint, file):
    """The options `opt` of a checkpoint; those that decide method, network and images as if parsed again."""
    try:
        opt, classes = plain_values(checkpoint.get('opt')), plain_values(checkpoint.get('classes'))
        opt = {} if opt is None else opt
        if not isinstance(opt, dict) or not all(isinstance(name, str) for name in opt):
            raise ValueError('expected names and values')
        if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise ValueError('expected the names of the classes')
        for name in RECORDED.keys() & opt.keys():
            if isinstance(opt[name], (dict, list, tuple)) and len(opt[name]) != 3:
                raise ValueError(f'--{name}: found {reprlib.repr(opt[name])}')
        opt.update({name: parse(str(opt[name])) for name, parse in RECORDED.items() if opt.get(name) is not None})
        unknown = {name for name in ('model', 'stem', 'width') if opt.get(name) is None}        # as if not there
        return {name: value for name, value in opt.items() if name not in unknown}
    except (UserError, argparse.ArgumentTypeError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f'{file}: its recorded options are corrupted ({error!s:.300})') from error


def load_encoder(checkpoint, opt, source):
    """The encoder of a checkpoint, built of opt.model, stem, width and size; `source` names it in errors."""
    def build():
        return make_encoder(opt.model, size=opt.size, stem=opt.stem, width=opt.width)
    prefix = 'encoder.'
    state = {name[len(prefix):]: value for name, value in from_torchvision_names(checkpoint['model'], opt.model).items()
             if name.startswith(prefix)}
    with torch.device('meta'):                          # without memory, of which a file could ask for any amount
        check_parameters(build(), state, source)
    encoder = build()
    load_parameters(encoder, state, source)
    return encoder


def from_torchvision_names(state, model):
    """Parameters under the names of these programs, encoder.<name>; `model` names the network.

    Those of torchvision's and timm's ResNets (layer2.0.downsample.0.weight), and of other backbones of timm, are
    renamed, and their classifier is left out. The inverse is export.to_torchvision_names.
    """
    prefix = 'encoder.backbone.' if model.startswith('timm/') else 'encoder.'
    if any(name.startswith(prefix) for name in state):
        return state
    classifier = ('fc.',)
    if model.startswith('timm/'):
        from networks.timm_encoder import classifier_names  # here, since timm takes seconds to import
        classifier = classifier_names(model.removeprefix('timm/'))
    else:
        state = {name.replace('.downsample.', '.shortcut.'): value for name, value in state.items()}
    kept = {name: value for name, value in state.items() if not name.startswith(classifier)}
    for name in list(kept):                             # files from before PyTorch 0.4.1 lack these counts
        if name.endswith('.running_mean'):
            kept.setdefault(name.replace('running_mean', 'num_batches_tracked'), torch.tensor(0))
    return {prefix + name: value for name, value in kept.items()}
