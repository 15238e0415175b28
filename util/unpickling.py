"""Reading files of torch.save from anywhere: nothing is executed, and nothing but a checkpoint's parts is read."""
import argparse
import os
import pickletools
import struct
import warnings
import zipfile

import numpy as np
import torch

from util.files import stored_bytes

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16,
          torch.int32, torch.int64, torch.bool}


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

    PyTorch takes the list of members from the offset at the end of the file, Python from directly before that.
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
