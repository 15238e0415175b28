"""Arrays on disk that are slow to compute from files: --cache_dir."""
import contextlib
import hashlib
import math
import os
import uuid
import zipfile

import numpy as np
import PIL

from util.errors import UserError
from util.files import stored_bytes
from util.log import log

try:
    import fcntl
except ImportError:                                     # Windows
    fcntl = None

FORMAT = 1                              # to be raised when the same files would give other arrays


def key_of(files):
    """A name for what is decoded of files with these names, sizes and times of change."""
    folder, stamps = os.getcwd(), [f'{FORMAT} {PIL.__version__}']
    for file in files:
        try:
            status = os.stat(file)
        except OSError as error:
            raise UserError(f'{file}: cannot be read ({error})') from error
        stamps.append(f'{os.path.join(folder, file)}\0{status.st_size}\0{status.st_mtime_ns}')
    return hashlib.sha256(os.fsencode('\0'.join(stamps))).hexdigest()[:32]


def size_in_cache(file):
    """Bytes of the arrays in a cache file; None where there is none, or one that would inflate."""
    return stored_bytes(file) if os.path.isfile(file) else None         # a pipe would have to be waited for


def cached(file, make, check):
    """The dict of arrays that `make()` gives, from `file` where that is a valid cache; otherwise it is written there.

    `check(arrays)` is whether the arrays of a file have the right shapes and types. Nothing in a file is executed, and
    its checksums are verified. A file that cannot be written is reported, and the run does without.
    """
    if os.path.lexists(file):
        try:
            arrays = _read(file)
            if check(arrays):
                return arrays
        except MemoryError:
            raise
        except Exception:               # a corrupted archive can raise anything
            pass
        log(f'{file}: not a valid cache, written again')
    arrays, partial = make(), file.with_name(f'{file.name}.{uuid.uuid4().hex}.partial')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _remove_partial_files(file.parent)
        with open(partial, 'wb') as stream:
            with contextlib.suppress(OSError):          # a file system without locks
                _lock(stream)
            np.savez(stream, **arrays)
        os.replace(partial, file)                       # at any moment the file is complete
    except OSError as error:
        log(f'{file}: cannot be written ({error}), continuing without')
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return arrays


def _read(file):
    """The arrays of a file, a dict.

    ValueError where a header has another size than is there: NumPy would allocate as much as the header has.
    """
    if size_in_cache(file) is None:
        raise ValueError
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            with archive.open(member) as stream:
                np.lib.format.read_magic(stream)
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                if stream.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                    raise ValueError
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _lock(stream):
    """Lock a file that this process writes, as long as it is open; OSError where another process has."""
    if fcntl:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_partial_files(folder):
    """Remove what was left by processes that were killed while they wrote a cache: nobody has it locked."""
    for partial in folder.glob('*.npz.*.partial') if fcntl else ():
        with contextlib.suppress(OSError):
            if partial.is_file():
                with open(partial, 'r+b') as stream:
                    _lock(stream)
                    partial.unlink()
