"""Several processes, as torchrun starts them: which one this is, its slice of a batch, and collectives.

Every function also serves a single process, and sends nothing there.

Each process calls backward on the same number, the loss of the whole batch. What `gather` and `all_reduce_sum` pass
back is the sum of what the processes pass to them, so that the gradients of the parameters have to be averaged
afterwards, as DistributedDataParallel does: the average is the gradient of that loss.
"""
import contextlib
import os

import torch
from torch import distributed as dist

from util.errors import UserError


def start_processes(gpu):
    """Rendezvous with the other processes, if torchrun started several: gloo for the CPU, and NCCL for GPUs.

    gpu: the number of this process's GPU, or None.
    """
    if _number('WORLD_SIZE', 1) == 1 or _started():
        return
    if rank() >= expected_processes():                  # it and the others would wait for minutes
        raise UserError(f'RANK is {rank()} and WORLD_SIZE {expected_processes()} in the environment, expected a RANK '
                        'below WORLD_SIZE, as torchrun sets it')
    try:
        if gpu is None:
            dist.init_process_group('gloo')
        else:
            dist.init_process_group('cpu:gloo,cuda:nccl', device_id=torch.device('cuda', gpu))
    except (ValueError, RuntimeError) as error:
        raise UserError(f'WORLD_SIZE is {_number("WORLD_SIZE", 1)}, but the rendezvous failed ({error}): expected '
                        'torchrun to start the processes, and on several machines GLOO_SOCKET_IFNAME and '
                        'NCCL_SOCKET_IFNAME to name the network interface that connects them') from error


def _number(name, default):
    """An environment variable that torchrun sets, of at least its default."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < default:
        raise UserError(f'{name} is {text!r} in the environment, expected a whole number of at least {default}, as '
                        'torchrun sets it')
    return int(text)


def expected_processes():
    """How many processes there will be after the rendezvous."""
    return _number('WORLD_SIZE', 1)


def _started():
    return dist.is_available() and dist.is_initialized()


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if _started() else 1


def rank():
    """The number of this process: 0 is the one that prints and writes."""
    if _started():
        return dist.get_rank()
    return _number('RANK', 0) if _number('WORLD_SIZE', 1) > 1 else 0


def local_rank():
    """The number of this process on its machine."""
    return _number('LOCAL_RANK', 0) if expected_processes() > 1 else 0


def local_processes():
    """How many processes share this machine."""
    return _number('LOCAL_WORLD_SIZE', 1) if expected_processes() > 1 else 1


def local_slice(n):
    """The slice of a batch of n images that is this process's: at least two, which batch norm needs, or none."""
    bounds = _bounds(n)
    return slice(bounds[rank()], bounds[rank() + 1])


def _bounds(n):
    """Where the slices of a batch of n images begin and end: [world_size() + 1] numbers."""
    active = max(1, min(world_size(), n // 2))
    return [n * min(i, active) // active for i in range(world_size() + 1)]


_batch = None                           # see training_on


@contextlib.contextmanager
def training_on(n):
    """Within it all processes train on a batch of n images, their slices of it: `slice_sizes` needs no message."""
    global _batch
    _batch = n
    try:
        yield
    finally:
        _batch = None


def slice_sizes(n):
    """How many images of the batch each process has, a list; n: how many this one has, its local_slice."""
    if _batch is None or world_size() == 1:
        return all_sizes(n)
    bounds = _bounds(_batch)
    sizes = [end - start for start, end in zip(bounds, bounds[1:])]
    if n != sizes[rank()]:
        raise ValueError(f'process {rank()} has {n} images of a batch of {_batch}, expected {sizes[rank()]}')
    return sizes


def all_sizes(n):
    """The numbers n of all processes, a list; each sends its own."""
    if world_size() == 1:
        return [n]
    mine = torch.tensor([n], device=_device_of_numbers())
    numbers = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(numbers, mine)
    return torch.cat(numbers).tolist()


def all_max(n):
    """The largest of the numbers n of all processes; waits for all of them."""
    return max(all_sizes(n))


def _device_of_numbers():
    """The CPU where the processes have a way to send from there: no GPU has to be waited for."""
    config = dist.get_backend_config()
    return 'cpu' if 'cpu' in config or config in ('gloo', 'mpi') else 'cuda'


def gather(x, sizes):
    """The rows of all processes, with gradient: [n, ...] -> [sum(sizes), ...]; sizes as `all_sizes(n)`."""
    return x if len(sizes) == 1 else _Gather.apply(x, sizes)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes):
        ctx.rows = slice(sum(sizes[:rank()]), sum(sizes[:rank() + 1]))
        padded = x.new_zeros(max(sizes), *x.shape[1:])                  # collectives want equal shapes
        padded[:len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, sizes)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.rows], None


def all_reduce_sum(x):
    """The sum of x over all processes, with gradient."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _AllReduceSum.forward(ctx, grad)


def global_mean(values, counted=None):
    """The mean of the values [n] of all processes, or of those that are `counted` ([n] bool); 0 where there is none."""
    if counted is None:
        counted = torch.ones_like(values, dtype=torch.bool)
    both = all_reduce_sum(torch.stack([torch.where(counted, values, 0).sum(), counted.sum().to(values.dtype)]))
    return both[0] / both[1].clamp(min=1)


def to_device(x, device):
    """A tensor on a device; a GPU is not waited for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' != x.device.type else x.to(device)


def all_to_device(tensors, device):
    """Tensors of numbers that float32 can hold, as float32 on a device: packed into one copy. None stays None."""
    known = [x.float() for x in tensors if x is not None]
    packed = iter(known)
    if device.type != 'cpu':
        parts = to_device(torch.cat([x.flatten() for x in known]), device).split([x.numel() for x in known])
        packed = (part.view(x.shape) for part, x in zip(parts, known))
    return [None if x is None else next(packed) for x in tensors]


def all_to_all_rows(x, order, sizes):
    """Of the rows of all processes, put into another order, those that come to this process.

    x [n, ...], its rows of the whole batch; order [sum(sizes)], a permutation that is the same everywhere; sizes as
    `all_sizes(n)` -> [n, ...]. Each row is sent only to where it is wanted.
    """
    if len(sizes) == 1:
        return x[to_device(order, x.device)]
    ends = torch.tensor(sizes).cumsum(0)
    owner = torch.bucketize(order, ends, right=True)                    # of the row that is wanted at each place
    first = int(ends[rank()]) - sizes[rank()]
    wanted = owner.split(sizes)
    sent = [part[of == rank()] - first for part, of in zip(order.split(sizes), wanted)]
    mine = wanted[rank()]
    received = x.new_empty(len(mine), *x.shape[1:])
    dist.all_to_all_single(received, x[to_device(torch.cat(sent), x.device)],
                           torch.bincount(mine, minlength=len(sizes)).tolist(), [len(part) for part in sent])
    return received[to_device(mine.argsort(stable=True).argsort(), x.device)]


def rank_zero_first(make):
    """make(), in process 0 first, then in the first of every other machine, then in the others: where the first finds
    what all need and writes it down, the others read that."""
    mine = 0 if rank() == 0 else 1 if local_rank() == 0 else 2
    for turn in range(3):
        if turn == mine:
            made = make()
        all_max(0)
    return made
