"""Checkpoints: plain tensors, numbers and texts, written whole or not at all, and read without executing anything."""
import argparse
import math
import os
import pickletools
import re
import reprlib
import struct
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


FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
DTYPES = FLOATS | {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool}


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

    Raises UserError where they do not fit, or where a parameter is not finite.
    """
    check_parameters(model, state, source)
    model.load_state_dict({name: state[name.replace('module.', '')] for name in model.state_dict()})
    for name, value in strip_wrappers(model.state_dict()).items():      # as they are now: 1e300 is inf in float32
        if not value.isfinite().all():
            raise UserError(f'{source}: {name} is not finite everywhere, expected a network that has not diverged')


def load_optimizer(optimizer, saved, begun=True, optional=()):
    """Load an optimizer's state_dict(): what it holds of the parameters, and the learning rate, which a schedule sets.

    Its other settings stay those of the options. After the first step (`begun`) every parameter must have a state but
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
            if state or begun and expected and parameter not in optional:
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


class Float64:
    """Stands for numpy.dtype in a checkpoint, and takes no type but float64: NumPy's own would take all."""

    def __init__(self, kind, align, copy):
        if kind != 'f8':
            raise ValueError('numbers of NumPy that are no float64')

    def __setstate__(self, state):
        if state[1] != '<':
            raise ValueError('numbers of NumPy in another byte order')


def float64(dtype, content):
    """Stands for the function that makes a number of NumPy in a checkpoint: 8 bytes -> float."""
    if not isinstance(dtype, Float64):
        raise ValueError('numbers of NumPy without a type')
    return struct.unpack('<d', content)[0]


# The original programs keep a Namespace in `opt`, and a number of NumPy (1 or 2) as learning rate after it has decayed.
STAND_INS = [(argparse.Namespace, 'argparse.Namespace'), (Float64, 'numpy.dtype'),
             (float64, 'numpy.core.multiarray.scalar'), (float64, 'numpy._core.multiarray.scalar')]
# All that a checkpoint may be made of, beside texts, numbers, lists, tuples and dicts.
PARTS = {*(name for _, name in STAND_INS), '_codecs.encode', 'collections.OrderedDict', 'collections.Counter',
         'torch.Size', 'torch.device', 'torch._utils._rebuild_parameter', 'torch._utils._rebuild_tensor',
         'torch._utils._rebuild_tensor_v2', *(f'torch.{kind}Storage' for kind in (
             'Half', 'BFloat16', 'Float', 'Double', 'Byte', 'Char', 'Short', 'Int', 'Long', 'Bool'))}
# How much the operations of a pickle take from the stack; None: all above a mark.
TAKEN = {'TUPLE': None, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3, 'APPEND': 1, 'APPENDS': None, 'SETITEM': 2,
         'SETITEMS': None, 'BUILD': 1, 'REDUCE': 2, 'NEWOBJ': 2, 'BINPERSID': 1}
EMPTY = {'EMPTY_DICT': {}, 'EMPTY_LIST': [], 'EMPTY_TUPLE': ()}


class Part(str):
    """The name of one of PARTS on the stack of check_pickle, where a text is a str."""


def check_pickle(data):
    """ValueError where a pickle (bytes, or a stream that is read to its end) is not made as that of a checkpoint.

    PyTorch's reader executes nothing of it, but it can be made to fill the memory (encode(encode(..., 'hex'), 'hex')),
    show it (torch.Tensor(1000) is not initialized), crash (a tuple in a million tuples as a key) or go on forever.
    """
    stack, marks, memo = [], [], {}
    for operation, value, _ in pickletools.genops(data):
        name = operation.name
        if name == 'MARK':
            marks.append(len(stack))
        elif name.endswith('PUT'):
            memo[value] = stack[-1]
        elif name.endswith('GET'):
            stack.append(memo[value])
        elif name == 'GLOBAL':
            stack.append(Part(value.replace(' ', '.')))
            if stack[-1] not in PARTS:
                raise ValueError(f'{stack[-1]:.99} is in it')
        elif name in TAKEN:
            start = marks.pop() if TAKEN[name] is None else len(stack) - TAKEN[name]
            taken = stack[start:]
            if not _usual(name, taken):
                raise ValueError(f'{name} in it is not as in a checkpoint')
            del stack[start:]
            if name.startswith('TUPLE'):
                stack.append(tuple(taken))
            elif name in ('REDUCE', 'NEWOBJ', 'BINPERSID'):
                stack.append(...)
        elif operation.stack_after:
            stack.append(EMPTY.get(name, value))


def _usual(name, taken):
    """Whether an operation of a pickle takes what it does in checkpoints: keys are texts and numbers, for example."""
    if name in ('SETITEM', 'SETITEMS'):
        return all(type(key) is str or type(key) is int and abs(key) < 2**63 for key in taken[::2])
    if name == 'BINPERSID':                             # of ('storage', its type, key, place, size) and maybe None
        return type(taken[0]) is tuple and type(taken[0][2]) is str and taken[0][5:] in ((), (None,))
    if name == 'BUILD':                                 # attributes, or the state of numpy.dtype
        return type(taken[0]) is dict or type(taken[0]) is tuple and len(taken[0]) == 8
    if name == 'NEWOBJ':
        return taken == ['argparse.Namespace', ()]
    if name == 'REDUCE':
        function, args = taken
        if function == '_codecs.encode':
            return len(args) == 2 and type(args[0]) is str and args[1] == 'latin1'
        return type(function) is Part and type(args) is tuple and (
            not function.startswith('collections.') or args in ((), ({},)))
    return True


def zipped_pickles(file):
    """The pickles in a zip file. ValueError where they could be others for PyTorch, or something could inflate.

    PyTorch takes the list of members from where the end of the file says, Python from directly before that.
    """
    if stored_bytes(file) is None:
        raise ValueError('it is cut off, or parts of it are compressed')        # PyTorch's own are not
    with zipfile.ZipFile(file) as archive:
        size = archive.fp.seek(0, os.SEEK_END)
        archive.fp.seek(-min(98, size), os.SEEK_END)
        end = archive.fp.read().rjust(98)
        large = end[56:60] == b'PK\x06\x07'                             # above 4 GB its end is a longer one
        start, = struct.unpack('<Q', end[48:56]) if large else struct.unpack('<L', end[92:96])
        if start != archive.start_dir or archive.comment or large and struct.unpack('<Q', end[64:72])[0] != size - 98:
            raise ValueError('it has two lists of its parts')
        return [archive.read(member) for member in archive.infolist() if member.filename.lower().endswith('.pkl')]


def read_pickled(file):
    """The contents of a checkpoint's file; an exception of any kind where it is none."""
    size = os.path.getsize(file)
    with open(file, 'rb') as stream:
        zipped = stream.read(4) == b'PK\x03\x04'
        stream.seek(0)
        for pickle in zipped_pickles(file) if zipped else [stream] * 5:
            check_pickle(pickle)

    def place(storage, location):                       # of tensors: on the CPU
        nonlocal size
        size -= storage.nbytes()
        if size < 0:
            raise ValueError('its tensors are larger than the file')
        # In files from before PyTorch 1.6 it still has to be filled: what the file leaves out shall be NaN.
        return storage if zipped else torch.from_numpy(np.full(storage.nbytes(), 255, np.uint8)).untyped_storage()
    with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.load(file, map_location=place, weights_only=True)


def plain_values(value, tensors=False):
    """A copy of what a checkpoint holds: texts, numbers and, where allowed, tensors, in dicts, lists and tuples.

    ValueError for all else, and for what is endless: lists that share lists are small in a file alone.
    """
    left = 500_000                                      # more than there are in any

    def copy(value):
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError('found values without end')
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(value, dict):                     # dict.items, since a file can give value.items another meaning
            return {copy(key): copy(part) for key, part in dict.items(value)}
        if isinstance(value, (list, tuple)):
            parts = [copy(part) for part in value]
            return parts if isinstance(value, list) else tuple(parts)
        if torch.is_tensor(value) and tensors:
            # A storage that can grow is not the file's: what it holds was in memory.
            if value.dtype in DTYPES and not value.untyped_storage().resizable():
                return value.detach()
            raise ValueError(f'found a tensor of {value.dtype}')
        if isinstance(value, (str, float, type(None))) or isinstance(value, int) and abs(value) < 2**63:
            return value
        if isinstance(value, torch.device):
            return str(value)
        raise ValueError(f'found a {type(value).__name__}')
    try:
        return copy(value)
    except RecursionError:
        raise ValueError('found values without end') from None


def whole_number(value, name):
    """The value, or ValueError where it is no whole number from 0 to 2**31."""
    if type(value) is not int or not 0 <= value <= 2**31:
        raise ValueError(f'{name} is {reprlib.repr(value)}, expected a whole number')
    return value


def read_checkpoint(file, keys):
    """A checkpoint as a dict, of which one of `keys` holds parameters: -> (the dict, the parameters by their names).

    Nothing in the file is executed. What the dict holds beside the parameters is to be used as `plain_values` gives it.
    Raises UserError where the file is missing or no checkpoint.
    """
    if not Path(file).is_file():
        raise UserError(f'{file}: no such checkpoint')
    try:
        checkpoint = read_pickled(file)
    except Exception as error:          # a corrupted file can raise anything; PyTorch's advice is not ours
        reason = error if type(error) is ValueError else type(error).__name__
        raise UserError(f'{file}: not a readable checkpoint ({reason!s:.200})') from error
    checkpoint = dict(dict.items(checkpoint)) if isinstance(checkpoint, dict) else {}
    try:
        model = plain_values(next(checkpoint[key] for key in keys if key in checkpoint), tensors=True)
        state = strip_wrappers(model)
        if len(state) < len(model) or not all(torch.is_tensor(value) for value in model.values()):
            raise ValueError('found other values')
    except (AttributeError, StopIteration, ValueError) as error:
        raise UserError(f"{file}: not a checkpoint of these programs, expected the parameters under "
                        f"{' or '.join(map(repr, keys))}" + f' ({error})' * bool(str(error))) from error
    return checkpoint, state


def load_checkpoint(file):
    """A checkpoint of ours or of the original programs as a dict with `model`, `epoch` and the options `opt`, a dict.

    Raises UserError as read_checkpoint.
    """
    checkpoint, model = read_checkpoint(file, ['model'])
    try:
        whole_number(plain_values(checkpoint.get('epoch', 0)), 'epoch')
    except ValueError as error:
        raise UserError(f'{file} is no whole checkpoint of a run ({error})') from error
    return {**checkpoint, 'opt': check_recorded(checkpoint, file), 'model': model}


RECORDED = {                            # options that decide method, network and images, and how each is parsed
    'model': network, 'stem': stem, 'method': str, 'width': number(float, 1 / 64, 16), 'size': number(int, 8, 4096),
    'mean': channels(number(float, -math.inf)), 'std': channels(POSITIVE), 'dataset': str, 'data_folder': str,
    'split_seed': number(int, 0, 2**31), 'loader_chosen': loader,
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
    except (argparse.ArgumentTypeError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f'{file}: its recorded options are damaged ({error!s:.300})') from error


def load_encoder(checkpoint, opt, source):
    """The encoder of a checkpoint, built as opt.model, stem, width and size say; `source` names it in errors."""
    def build():
        return make_encoder(opt.model, size=opt.size, stem=opt.stem, width=opt.width)
    prefix = 'encoder.'
    state = {name[len(prefix):]: value for name, value in checkpoint['model'].items() if name.startswith(prefix)}
    with torch.device('meta'):                          # without memory, of which a file could ask for any amount
        check_parameters(build(), state, source)
    encoder = build()
    load_parameters(encoder, state, source)
    return encoder
