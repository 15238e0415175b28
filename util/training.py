"""What the training loops share: devices and processes, networks on them, optimizers, schedules, steps."""
import contextlib
import glob
import inspect
import math
import os
import random
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from networks.sync_bn import average_statistics, synchronized
from util.distributed import all_sizes, gather, local_rank, rank, slice_sizes, start_processes, world_size
from util.errors import UserError
from util.log import log, progress
from util.memory import keep_freed_memory

# The argument of DistributedDataParallel by which it does not send all buffers in each step; PyTorch renamed it.
BUFFERS = next(name for name in ('forward_sync_buffers', 'broadcast_buffers')
               if name in inspect.signature(DistributedDataParallel).parameters)


def set_device(opt):
    """Seed all random numbers, rendezvous with torchrun's other processes and choose opt.device: the visible GPUs, or
    the CPU, which is reported. UserError where GPUs are there that cannot be used."""
    opt.device = 'cuda' if gpus_work() else 'cpu'
    gpu = None
    if opt.device == 'cuda':
        gpu, found = local_rank(), torch.cuda.device_count()
        if gpu >= found:
            raise UserError(f'LOCAL_RANK is {gpu}: found {found} GPUs, expected torchrun with --nproc_per_node of at '
                            'most that')
        if several_devices(opt):
            if opt.compile:
                raise UserError(f'--compile works on one GPU in each process, found {found}: start with torchrun, or '
                                'choose one with CUDA_VISIBLE_DEVICES')
            log(f'{found} GPUs in one process: torchrun --nproc_per_node {found} is faster (docs/distributed.md)')
        torch.cuda.set_device(gpu)                      # before the rendezvous, which opens connections from it
    start_processes(gpu)
    if world_size() > 1:
        log(f'{world_size()} processes, each with its slice of every batch')
    if opt.device == 'cpu':
        log('No GPU found: running on the CPU')
        if opt.amp and not precision(opt):
            log('--amp has no effect: this CPU has no bfloat16 instructions, and is several times slower without them')
        keep_freed_memory()
    if getattr(opt, 'syncBN', False) and world_size() == 1:
        log('--syncBN has no effect in a single process: every device normalizes its own part of the batch; it works '
            'with torchrun')
    if opt.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(opt.deterministic, warn_only=True)       # a line for what CUDA cannot repeat
    torch.utils.deterministic.fill_uninitialized_memory = False                 # a check for bugs, which takes time
    torch.backends.cudnn.benchmark = not opt.deterministic
    torch.manual_seed(opt.seed)


NVIDIA = '/dev/nvidia[0-9]*'                    # the devices of the driver


def gpus_work():
    """Whether there are GPUs to use.

    UserError where there is an NVIDIA GPU whose driver this PyTorch cannot use: without a word it would train on the
    CPU, many times slower.
    """
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter('always')
        works = torch.cuda.is_available()
    if not works and torch.version.cuda and glob.glob(NVIDIA) and os.environ.get('CUDA_VISIBLE_DEVICES') != '':
        reason = str(reasons[-1].message) if reasons else 'no reason is given'
        raise UserError(f'found an NVIDIA GPU that PyTorch {torch.__version__} cannot use ({reason}), expected a newer '
                        "driver or another PyTorch, or CUDA_VISIBLE_DEVICES='' to train on the CPU")
    return works


def several_devices(opt):
    """Whether this process uses several GPUs, with DataParallel: not one that torchrun started, even alone."""
    return opt.device == 'cuda' and torch.cuda.device_count() > 1 and 'LOCAL_RANK' not in os.environ


class Network:
    """A model on its devices, as a training loop calls it: compiled, in mixed precision, in micro-batches, in replicas.

    `model`, a module with an `encoder`, is moved to opt.device, in channels_last memory format: the fastest measured on
    CPUs, and NVIDIA's advice for --amp. With several processes the gradients of all are averaged.

    With --accum_steps a batch goes through the model in micro-batches, by gradient caching (Gao et al., 2021,
    https://arxiv.org/abs/2101.06983): first without graph, for all outputs and their loss; then the backward pass goes
    through the micro-batches again and passes them the gradient of the outputs. So the loss is that of the whole batch,
    in the memory of a micro-batch; batch norms normalize each micro-batch.
    """

    def __init__(self, model, opt):
        if opt.compile:
            check_compiler(opt.device)
        model.to(opt.device, memory_format=torch.channels_last)
        if getattr(opt, 'syncBN', False) and world_size() > 1:
            synchronized(model)
        for network in [model] + ([model.moco.network] if getattr(model, 'moco', None) else []):
            network.encoder.precision, network.encoder.memory_format = precision(opt), torch.channels_last
            network.encoder = data_parallel(compiled(network.encoder, opt), opt)
        self.model, self.opt, self.wrapped = model, opt, model
        if world_size() > 1:
            # Statistics of batch norms are averaged when they are used; backbones of timm may have parameters that give
            # no features.
            self.wrapped = DistributedDataParallel(model, find_unused_parameters=opt.model.startswith('timm/'),
                                                   gradient_as_bucket_view=True, **{BUFFERS: False})

    def __call__(self, images, n_views=1):
        """Outputs of the model for images [n_views * bsz, ...], view after view; for a tuple, of views and small crops,
        the outputs of both, one after the other."""
        if isinstance(images, tuple):
            outputs = [self(part) for part in images]
            return tuple(map(torch.cat, zip(*outputs))) if isinstance(outputs[0], tuple) else torch.cat(outputs)
        micro_batches = split_into_micro_batches(images, self.opt, n_views)
        if len(micro_batches) == 1:
            with autocast(self.opt):
                return self.wrapped(images)
        start = torch.empty(0, requires_grad=True)              # without which there would be no backward pass
        outputs = _GradientCaching.apply(start, self, micro_batches)
        return outputs if len(outputs) > 1 else outputs[0]


class _GradientCaching(torch.autograd.Function):
    """The outputs [n_views * bsz, ...] of a Network for micro-batches [n_views, part of bsz, ...]."""

    @staticmethod
    def forward(ctx, start, network, micro_batches):
        ctx.network, ctx.micro_batches = network, micro_batches
        ctx.seeds = torch.randint(2**62, (len(micro_batches),)).tolist()        # dropout is the same both times
        with _frozen_statistics(network.model):
            parts = [_GradientCaching.outputs(network, *part) for part in zip(micro_batches, ctx.seeds)]
        n_views = len(micro_batches[0])
        return tuple(torch.cat([part.unflatten(0, (n_views, -1)) for part in column], 1).flatten(0, 1)
                     for column in zip(*parts))

    @staticmethod
    def outputs(network, micro_batch, seed):
        torch.manual_seed(seed)
        with autocast(network.opt):
            output = network.wrapped(micro_batch.flatten(0, 1))
        return output if isinstance(output, tuple) else (output,)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        network, micro_batches = ctx.network, ctx.micro_batches
        sizes = [part.shape[1] for part in micro_batches]
        gradients = [gradient.unflatten(0, (len(micro_batches[0]), -1)).split(sizes, 1) for gradient in gradients]
        for number, (part, seed, *gradient) in enumerate(zip(micro_batches, ctx.seeds, *gradients), 1):
            # Of several processes, the gradients are averaged once, with the last micro-batch.
            alone = network.wrapped is not network.model and number < len(sizes)
            with torch.enable_grad(), network.wrapped.no_sync() if alone else contextlib.nullcontext():
                outputs = _GradientCaching.outputs(network, part, seed)
                torch.autograd.backward(outputs, [values.flatten(0, 1) for values in gradient])
        ctx.micro_batches = None                        # the loss may live on while the next batch is made
        return None, None, None


def check_compiler(device):
    """UserError where torch.compile does not work: without a C++ compiler, or with a cache that cannot be written."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:                  # of the compiler, of its search for it, of its cache folder
        reason = ' '.join((str(error).strip() or type(error).__name__).splitlines()[:2])
        raise UserError(f'--compile: torch.compile does not work here ({reason}), expected a C++ compiler (g++) and a '
                        'writable TORCHINDUCTOR_CACHE_DIR, or no --compile') from error


def compiled(network, opt):
    """The network, with --compile compiled for the batches of training."""
    return Compiled(network) if opt.compile else network


def _compiling_backward():
    """The context in which torch.compile does not leave the backward pass until it is needed."""
    config, setting = torch._functorch.config, 'force_non_lazy_backward_lowering'
    return config.patch(setting, True) if hasattr(config, setting) else contextlib.nullcontext()


class Compiled(nn.Module):
    """A network that is compiled for one shape of batches: the largest so far, in training if there was any.

    Others (the last batch of an epoch, the empty slice of a process, those of evaluation) are computed without the
    compiler, which takes minutes for each kind; and all are if it fails. It compiles the backward pass with the forward
    pass, and may fail there; a PyTorch without this setting does so in backward, where an error ends the program.
    """

    def __init__(self, module):
        super().__init__()
        self.module, self.largest, self.fails = module, (False, 0), False
        self.compiled = torch.compile(module.forward, dynamic=False)

    def forward(self, x):
        kind = self.module.training, x.numel()              # of crops of several sizes not the many small ones
        self.largest = max(self.largest, kind)
        if kind == self.largest and len(x) and not self.fails:
            try:
                with _compiling_backward():
                    return self.compiled(x)
            except torch._dynamo.exc.TorchDynamoException as error:
                log(f'--compile: torch.compile fails on this network ({type(error).__name__}), which is computed '
                    'without it')
                self.fails = True
        return self.module(x)


def data_parallel(network, opt):
    """The network, over all visible GPUs where one process has several."""
    return DataParallel(network) if several_devices(opt) else network


def precision(opt, mixed=None):
    """The dtype of mixed precision (of --amp, unless `mixed` is given), None without: bfloat16, which needs no loss
    scaling, or float16 on GPUs that lack it. None on CPUs that lack it too."""
    if not (opt.amp if mixed is None else mixed):
        return None
    if opt.device == 'cpu':
        return torch.bfloat16 if cpu_has_bfloat16() else None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16


def cpu_has_bfloat16():
    """Whether oneDNN, PyTorch's convolutions on a CPU, computes in bfloat16 here; where it does not (before AVX-512),
    PyTorch's own loops take ten times as long as float32."""
    supported = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', None)
    return supported is None or supported()


def autocast(opt):
    """The context in which networks compute: mixed precision with --amp."""
    dtype = precision(opt)
    return torch.autocast(opt.device, dtype, enabled=dtype is not None)


def fused(opt):
    """Whether the optimizer is one kernel; with float16 None, PyTorch's choice, since fused SGD starts with
    uninitialized momentum where the scaler skips the first step (seen in PyTorch 2.15)."""
    return None if precision(opt) == torch.float16 else True


OPTIMIZERS = {
    'SGD': lambda groups, opt, eps: torch.optim.SGD(groups, momentum=opt.momentum, nesterov=opt.nesterov,
                                                    fused=fused(opt)),
    'LARS': lambda groups, opt, eps: timm_optimizers().Lars(groups, momentum=opt.momentum, nesterov=opt.nesterov),
    'RMSProp': lambda groups, opt, eps: torch.optim.RMSprop(groups, momentum=opt.momentum, **eps),
    'RMSPropTF': lambda groups, opt, eps: timm_optimizers().RMSpropTF(groups, momentum=opt.momentum, **eps),
    'Adam': lambda groups, opt, eps: torch.optim.Adam(groups, fused=fused(opt), **eps),
    'AdamW': lambda groups, opt, eps: torch.optim.AdamW(groups, fused=fused(opt), **eps),
}


def timm_optimizers():
    import timm.optim  # here, since timm takes seconds to import
    return timm.optim


def set_optimizer(opt, model):
    """The optimizer of --optim_kind, or LARS. The encoder has a group of its own with --encoder_lr.

    LARS neither adapts nor decays biases and norms (You et al., 2017, https://arxiv.org/abs/1708.03888).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = {'lr': opt.learning_rate, 'weight_decay': opt.weight_decay}
    groups = [{'params': parameters, **settings}]
    if opt.LARS or opt.no_bias_decay:
        groups = [{'params': [p for p in parameters if p.dim() > 1], **settings},
                  {'params': [p for p in parameters if p.dim() <= 1], **settings, 'weight_decay': 0.}]
    if opt.LARS:
        groups[0]['always_adapt'] = True
    if opt.encoder_lr:
        encoder, factor = set(model.encoder.parameters()), opt.encoder_lr / opt.learning_rate
        of_encoder = [{**group, 'params': [p for p in group['params'] if p in encoder], 'lr_factor': factor}
                      for group in groups]                              # see set_learning_rate
        others = [{**group, 'params': [p for p in group['params'] if p not in encoder]} for group in groups]
        groups = [group for group in others + of_encoder if group['params']]
    eps = {} if opt.optim_eps is None else {'eps': opt.optim_eps}
    return OPTIMIZERS['LARS' if opt.LARS else opt.optim_kind](groups, opt, eps)


def set_scaler(opt):
    """The GradScaler that float16 needs; it does nothing in other precisions."""
    return torch.amp.GradScaler(opt.device, enabled=precision(opt) == torch.float16)


def split_into_micro_batches(images, opt, n_views=1):
    """Images [n_views * bsz, ...] in at most opt.accum_steps parts [n_views, part of bsz, ...], each of at least two
    images, which batch norm needs; equally many in all processes."""
    views = images.unflatten(0, (n_views, -1))
    return views.tensor_split(_n_micro_batches(views.shape[1], opt), 1)


def _n_micro_batches(bsz, opt, n_views=1):
    smallest = n_views * min(slice_sizes(bsz)) if opt.accum_steps > 1 else 0
    return max(1, min(opt.accum_steps, smallest // 2))


@torch.no_grad()
def in_micro_batches(module, images, opt, n_views=1):
    """Outputs of a module for images [n_views * bsz, ...] in micro-batches, as in training but without gradient; the
    views of an image may be in several of them."""
    number = _n_micro_batches(len(images) // n_views, opt, n_views)
    with autocast(opt):
        return torch.cat([module(part) for part in images.tensor_split(number)])


@contextlib.contextmanager
def _frozen_statistics(model):
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def update(loss, optimizer, scaler):
    """One step down the gradient of the loss."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def gradient_norm(model, scaler):
    """Euclidean norm of the last gradient, a scalar tensor; None with float16, where it is scaled or not finite."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return None if scaler.is_enabled() else torch.nn.utils.get_total_norm(gradients)


def seed_step(opt, epoch, step):
    """The NumPy generator of a training step, in the same state in all processes, so that a run can resume there.

    Also seeds Python, NumPy and PyTorch themselves, differently in each process.
    """
    rng = np.random.default_rng([opt.seed, epoch, step])
    seed = int(rng.integers(2**62)) + rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return rng


def set_warmup(opt):
    """Limit opt.warm_epochs to half of the run; 0 without --warm."""
    requested = opt.warm_epochs
    opt.warm_epochs = min(requested, opt.epochs // 2) if opt.warm else 0
    if opt.warm and opt.epochs == 1:
        log('No warm-up: a run of one epoch is too short')
    elif opt.warm and opt.warm_epochs < requested:
        log(f'Warm-up over {opt.warm_epochs} epochs, half of the run, instead of {requested}')


def learning_rate(opt, epoch, step=0, steps=1):
    """The learning rate at step 0 .. steps - 1 of an epoch, counted from 1.

    Cosine from opt.learning_rate down to learning_rate * lr_decay_rate**3, or decay by lr_decay_rate after each of
    lr_decay_epochs, both constant within an epoch; or decay by exp_decay every exp_decay_epochs. Warm-up rises linearly
    per step from opt.warmup_from (a tenth of learning_rate, if that is not above it) to the schedule's value at the end
    of opt.warm_epochs.
    """
    if epoch <= opt.warm_epochs:
        start = opt.warmup_from if opt.learning_rate > opt.warmup_from else opt.learning_rate / 10
        done = ((epoch - 1) * steps + step) / (opt.warm_epochs * steps)
        return start + done * (_schedule(opt, opt.warm_epochs, 1.) - start)
    return _schedule(opt, epoch, step / steps)


def _schedule(opt, epoch, part):
    if opt.exp_decay:
        decays = math.floor((epoch - 1 + part) / opt.exp_decay_epochs + 1e-9)      # 0.3 is three times 0.1, rounded
        return opt.learning_rate * opt.exp_decay**decays
    if opt.cosine:
        eta_min = opt.learning_rate * opt.lr_decay_rate**3              # as SupContrast
        return eta_min + (opt.learning_rate - eta_min) * (1 + math.cos(math.pi * epoch / opt.epochs)) / 2
    return opt.learning_rate * opt.lr_decay_rate**sum(epoch > e for e in opt.lr_decay_epochs)


def set_learning_rate(optimizer, lr):
    """Set the learning rate; that of the encoder with --encoder_lr is in proportion."""
    for group in optimizer.param_groups:
        group['lr'] = lr * group.get('lr_factor', 1.)


@torch.no_grad()
def forward_all(model, loader, opt):
    """Outputs [n, dim] float32 of a network in eval mode for all images of a loader, and their labels [n]; all
    processes get those of all."""
    average_statistics(model)
    model.eval()
    outputs, labels = [], []
    for images, target in progress(loader, 'evaluation'):
        sizes = all_sizes(len(target))
        outputs.append(gather(in_micro_batches(model, images, opt).float(), sizes))
        labels.append(gather(target, sizes))
    return torch.cat(outputs), torch.cat(labels)
