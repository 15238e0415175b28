"""Mixed precision inside an encoder."""
import contextlib

import torch


def mixed_precision(x, precision):
    """The context to compute with x in: autocast to a dtype, or unchanged for None.

    Encoders enter it themselves, since DataParallel's threads take over whether autocast is on, but not its dtype.
    """
    return contextlib.nullcontext() if precision is None else torch.autocast(x.device.type, precision)
