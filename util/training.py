"""What the training loops share: devices, schedules, meters, accuracies."""
import contextlib
import ctypes
import math
import os

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from util.options import UserError
from util.runs import log, progress

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4               # of malloc.h


def set_device(opt):
    """Seed everything and choose opt.device: the visible GPUs, or the CPU with a line that says so."""
    if os.environ.get('WORLD_SIZE', '1') not in ('', '1'):
        raise UserError('torchrun with several processes is not supported yet, expected plain python, which uses all '
                        'GPUs in CUDA_VISIBLE_DEVICES')
    opt.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if opt.compile and opt.device == 'cuda' and torch.cuda.device_count() > 1:
        raise UserError(f'--compile works on one GPU, found {torch.cuda.device_count()}: choose one with '
                        'CUDA_VISIBLE_DEVICES')
    if opt.device == 'cpu':
        log('No GPU found: running on the CPU')
        keep_freed_memory()
    if getattr(opt, 'syncBN', False):
        log('--syncBN has no effect in a single process: every device normalizes its own part of the batch')
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(opt.seed)


def keep_freed_memory():
    """Let this process keep the memory that it frees, for its next allocations.

    The GNU C library gives large blocks back at once, and the kernel clears every page of the next one: a third of the
    time of a training step on a CPU, and most of that of drawing views (benchmarks/README.md). Where there is another C
    library nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory():
    """Give back what `keep_freed_memory` kept, where much was freed that is not needed again."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def moved(x, device):
    """A tensor on a device; a GPU is not waited for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' != x.device.type else x.to(device)


def prepare(model, opt):
    """Move a network with an `encoder` to the device; compile the encoder and spread it over the GPUs as asked.

    Convolutions are fastest with the channels of a pixel side by side: measured on CPUs, NVIDIA's advice for --amp.
    """
    model.to(opt.device, memory_format=torch.channels_last)
    for network in [model] + ([model.moco.network] if getattr(model, 'moco', None) else []):
        network.encoder.precision = precision(opt)
        if opt.compile:
            network.encoder.compile()
        network.encoder = spread(network.encoder, opt)
    return model


def spread(network, opt):
    """The network, over all visible GPUs where there are several."""
    return nn.DataParallel(network) if opt.device == 'cuda' and torch.cuda.device_count() > 1 else network


def precision(opt, mixed=None):
    """The dtype of mixed precision (of --amp, unless told): bfloat16, which needs no loss scaling, or float16 on GPUs
    that lack it. None without.
    """
    if not (opt.amp if mixed is None else mixed):
        return None
    return torch.bfloat16 if opt.device == 'cpu' or torch.cuda.is_bf16_supported(False) else torch.float16


def autocast(opt):
    """The context of --amp."""
    return torch.autocast(opt.device, precision(opt), enabled=opt.amp)


def fused(opt):
    """Whether the optimizer is one kernel: not with float16, since fused SGD starts with uninitialized momentum where
    the scaler skips the first step (seen in PyTorch 2.15)."""
    return precision(opt) != torch.float16


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
    """The optimizer of --optim_kind, or LARS, with the `scaler` that float16 needs.

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
    optimizer = OPTIMIZERS['LARS' if opt.LARS else opt.optim_kind](
        groups, opt, {} if opt.optim_eps is None else {'eps': opt.optim_eps})
    optimizer.scaler = torch.amp.GradScaler(opt.device, enabled=precision(opt) == torch.float16)
    return optimizer


def forward(model, images, opt, n_views=1):
    """Outputs for images [n_views * bsz, ...], view after view, and what `update` needs to know.

    With --accum_steps the batch goes through the network in pieces, by gradient caching (Gao et al., 2021,
    https://arxiv.org/abs/2101.06983): first without graph, to have all outputs and their loss; then `update` goes
    through the pieces again and passes them the gradient of the outputs. So the loss is that of the whole batch, in the
    memory of a piece; batch norms normalize each piece.
    """
    pieces = pieces_of(images, opt, n_views)
    if len(pieces) == 1:
        with autocast(opt):
            return model(images), None
    seeds = torch.randint(2**62, (len(pieces),)).tolist()               # dropout is the same both times

    def of(piece, seed):
        torch.manual_seed(seed)
        with autocast(opt):
            output = model(piece.flatten(0, 1))
        return output if isinstance(output, tuple) else (output,)

    with torch.no_grad(), _frozen_statistics(model):
        parts = [of(piece, seed) for piece, seed in zip(pieces, seeds)]
    outputs = tuple(torch.cat([part.unflatten(0, (n_views, -1)) for part in column], 1).flatten(0, 1).requires_grad_()
                    for column in zip(*parts))

    def backward():
        gradients = [output.grad.unflatten(0, (n_views, -1)).split([piece.shape[1] for piece in pieces], 1)
                     for output in outputs]
        for piece, seed, *gradient in zip(pieces, seeds, *gradients):
            torch.autograd.backward(of(piece, seed), [part.flatten(0, 1) for part in gradient])
    return outputs if len(outputs) > 1 else outputs[0], backward


def pieces_of(images, opt, n_views=1):
    """The pictures in opt.accum_steps pieces [n_views, part of bsz, ...] of at least two, which batch norm needs."""
    views = images.unflatten(0, (n_views, -1))
    return views.tensor_split(max(1, min(opt.accum_steps, views.shape[1] // 2)), 1)


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


def update(loss, optimizer, backward=None):
    """One step down the gradient of the loss; backward as `forward` gave it."""
    optimizer.zero_grad()
    optimizer.scaler.scale(loss).backward()
    if backward is not None:
        backward()
    optimizer.scaler.step(optimizer)
    optimizer.scaler.update()


def seed_step(opt, epoch, step):
    """The random numbers of a training step, so that a run can continue there; seeds those of the network too."""
    rng = np.random.default_rng([opt.seed, epoch, step])
    torch.manual_seed(int(rng.integers(2**63)))
    return rng


def set_warmup(opt):
    """Limit opt.warm_epochs to half of the run; 0 without --warm."""
    wished = opt.warm_epochs
    opt.warm_epochs = min(wished, opt.epochs // 2) if opt.warm else 0
    if opt.warm and opt.warm_epochs < wished:
        log(f'Warm-up over {opt.warm_epochs} epochs, half of the run, instead of {wished}')


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
        return start + done * (_schedule(opt, opt.warm_epochs, 0.) - start)
    return _schedule(opt, epoch, step / steps)


def _schedule(opt, epoch, part):
    if opt.exp_decay:
        return opt.learning_rate * opt.exp_decay**((epoch - 1 + part) // opt.exp_decay_epochs)
    if opt.cosine:
        eta_min = opt.learning_rate * opt.lr_decay_rate**3              # as SupContrast
        return eta_min + (opt.learning_rate - eta_min) * (1 + math.cos(math.pi * epoch / opt.epochs)) / 2
    return opt.learning_rate * opt.lr_decay_rate**sum(epoch > e for e in opt.lr_decay_epochs)


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group['lr'] = lr


class AverageMeter:
    """A value and its average. Values may be tensors, which stay on their device until `val` or `avg` is read."""

    def __init__(self):
        self._val, self._sum, self.count = 0., 0., 0

    def update(self, val, n=1):
        self._val = val.detach().double() if torch.is_tensor(val) else val
        self._sum = self._sum + self._val * n
        self.count += n

    @property
    def val(self):
        return float(self._val)

    @property
    def avg(self):
        return float(self._sum) / max(self.count, 1)


def check_finite(losses, epoch, step):
    """Stop with a clear error when a loss was not finite; losses is the epoch's AverageMeter."""
    if not math.isfinite(losses.avg):
        raise UserError(f'the loss is {losses.avg} on average up to epoch {epoch}, step {step}, expected a finite '
                        'number: try a lower --learning_rate or --warm')


def accuracy(output, target):
    """Top-1 accuracy (%) of logits [bsz, num_classes] for classes [bsz], a scalar tensor.

    For label distributions [bsz, num_classes], the mean share (%) of the predicted class.
    """
    predicted = output.argmax(1)
    right = predicted == target if target.dim() == 1 else target.gather(1, predicted[:, None])
    return 100 * right.float().mean()


@torch.no_grad()
def forward_all(model, loader, opt):
    """Outputs [n, dim] float32 of a network in eval mode for all pictures of a loader, and their labels [n]."""
    model.eval()
    outputs, labels = [], []
    for images, target in progress(loader, 'evaluation'):
        for piece in pieces_of(images, opt):            # as in training
            with autocast(opt):
                outputs.append(model(piece.flatten(0, 1)).float())
        labels.append(target)
    return torch.cat(outputs), torch.cat(labels)


def ood_metrics(val_logits, id_logits, ood_logits):
    """How a classifier's confidence, its largest softmax probability, tells near-ood pictures; logits [n, num_classes].

    Mean confidence on id and on ood pictures and their difference; and for telling validation pictures, which no one
    was trained on, from ood pictures: AUROC (%), and the share (%) of ood pictures that are taken for validation
    pictures at the threshold where 95 % of these are (Hendrycks and Gimpel, 2017, https://arxiv.org/abs/1610.02136).
    """
    from sklearn.metrics import roc_auc_score, roc_curve
    val, id, ood = (logits.softmax(1).amax(1).double().cpu() for logits in (val_logits, id_logits, ood_logits))
    truth, scores = torch.cat([torch.ones(len(val)), torch.zeros(len(ood))]), torch.cat([val, ood])
    false_positive_rate, true_positive_rate, _ = roc_curve(truth, scores, drop_intermediate=False)
    return {'confidence_id': id.mean().item(), 'confidence_ood': ood.mean().item(),
            'confidence_difference': (id.mean() - ood.mean()).item(),
            'auroc': 100 * float(roc_auc_score(truth, scores)),
            'fpr95': 100 * float(false_positive_rate[(true_positive_rate >= 0.95).argmax()])}


def ood_report(values):
    """The line for a dict of ood_metrics."""
    return (f"confidence id {values['confidence_id']:.3f} ood {values['confidence_ood']:.3f} difference "
            f"{values['confidence_difference']:.3f} AUROC {values['auroc']:.2f} FPR95 {values['fpr95']:.2f}")


@torch.no_grad()
def knn_accuracy(memory, memory_labels, features, labels, k=200, temperature=0.1):
    """Top-1 accuracy (%) of the weighted k-nearest-neighbour classifier.

    Each of the k most cosine-similar of memory [n, dim] votes for its class with exp(similarity / temperature)
    (Wu et al., 2018, https://arxiv.org/abs/1805.01978).
    """
    memory, features = F.normalize(memory, dim=1), F.normalize(features, dim=1)
    num_classes = int(memory_labels.max()) + 1
    correct = 0
    for part, target in zip(features.split(1024), labels.split(1024)):
        similarity, nearest = (part @ memory.T).topk(min(k, len(memory)), dim=1)
        votes = torch.zeros(len(part), num_classes, device=part.device)
        votes.scatter_add_(1, memory_labels[nearest], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == target).sum())
    return 100 * correct / len(labels)
