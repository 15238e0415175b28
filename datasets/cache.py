"""Arrays on disk that are slow to compute from files: --cache_dir."""
import hashlib
import os
import uuid

import numpy as np
import PIL

from util import UserError, log
from util.checkpoints import stored_bytes

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


def cached(file, make, check):
    """The dict of arrays that `make()` gives, from `file` where that holds it whole; otherwise it is written there.

    `check(arrays)` tells whether arrays of a file are of the right shapes and types. Nothing in a file is executed, and
    its checksums are verified. A file that cannot be written is said and does without.
    """
    if file.exists():
        try:
            if stored_bytes(file) is None:
                raise ValueError
            with np.load(file, allow_pickle=False) as arrays:
                arrays = dict(arrays)
            if check(arrays):
                return arrays
        except Exception:               # a damaged archive can raise anything
            pass
        log(f'{file}: not a whole cache, made again')
    arrays, partial = make(), file.with_name(f'{file.name}.{uuid.uuid4().hex}.partial')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, 'wb') as stream:
            np.savez(stream, **arrays)
        os.replace(partial, file)                       # at any moment the file is whole
    except OSError as error:
        log(f'{file}: cannot be written ({error}), going on without')
    finally:
        partial.unlink(missing_ok=True)
    return arrays
