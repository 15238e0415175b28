"""Arrays on disk that are slow to compute from files: --cache_dir."""
import hashlib
import os

import numpy as np
import PIL

from util import UserError, log

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
            with np.load(file, allow_pickle=False) as arrays:
                arrays = dict(arrays)
            if check(arrays):
                return arrays
            reason = 'it holds something else'
        except Exception as error:      # a damaged archive can raise anything
            reason = type(error).__name__
        log(f'{file}: not a whole cache ({reason}), made again')
    arrays, partial = make(), file.with_name(f'{file.name}.{os.getpid()}.partial')
    try:
        with open(partial, 'wb') as stream:
            np.savez(stream, **arrays)
        os.replace(partial, file)                       # at any moment the file is whole
    except OSError as error:
        partial.unlink(missing_ok=True)
        log(f'{file}: cannot be written ({error}), going on without')
    return arrays
