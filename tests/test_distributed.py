"""Several processes: the loss, the gradients and the metrics of one process with the whole batch."""
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, train_one_epoch
from timm.layers import BatchNormAct2d
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

import main_ce
import main_linear
import main_supcon
from datasets import loader as loaders
from datasets.image_set import ImageSet
from datasets.views import View
from losses import BalancedSupConLoss, GenSupConLoss, SupConLoss, contrastive_accuracy
from networks.sync_bn import SyncBatchNorm, average_statistics, synchronized
from networks.timm_encoder import TimmEncoder
from util import arguments, checkpoints, distributed, metrics, training

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def in_processes(tmp_path, monkeypatch):
    """in_processes(n, function): what function() returns in n processes with gloo, by rank; 1: in this process."""
    monkeypatch.chdir(tmp_path)

    def run(n, function):
        if n == 1:
            return [function()]
        name = uuid.uuid4().hex
        sys.stdout.flush()
        children = [os.fork() or _child(rank, n, function, tmp_path / name) for rank in range(n)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == [0] * n
        return [torch.load(f'{tmp_path / name}.{rank}', weights_only=False) for rank in range(n)]
    return run


def _child(rank, n, function, name):
    code = 1
    try:
        signal.alarm(100)
        torch.set_num_threads(1)                        # the threads of the parent are not in its copy
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n))
        dist.init_process_group('gloo', init_method=f'file://{name}', rank=rank, world_size=n)
        torch.save(function(), f'{name}.{rank}')
        dist.barrier()
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    os._exit(code)


def mine(x):
    """This process's share of the rows of x."""
    return x[distributed.local_slice(len(x))]


class Loader:
    """The same batches of random images for any number of processes: views [2 * bsz, 3, 8, 8], labels [bsz]; with
    small crops ((views, [small * bsz, 3, 6, 6]), labels)."""

    def __init__(self, sizes, views, labels, small=0):
        self.batch_sizes, self.views, self.labels, self.small = sizes, views, labels, small

    def __len__(self):
        return len(self.batch_sizes)

    def set_epoch(self, epoch, step):
        pass

    def __iter__(self):
        rng = torch.Generator().manual_seed(1)
        for bsz in self.batch_sizes:
            images = torch.rand(self.views, bsz, 3, 8, 8, generator=rng)
            labels = torch.tensor(self.labels)[torch.arange(bsz) % len(self.labels)]
            images = images[:, distributed.local_slice(bsz)]
            crops = images[:self.small, ..., 1:7, 1:7].flatten(0, 1)
            yield (images.flatten(0, 1), crops) if self.small else images.flatten(0, 1), mine(labels)


METHODS = {
    'supcon': [], 'one': ['--contrast_mode', 'one'], 'in': ['--summation_location', 'in'],
    'cap': ['--positives_cap', '2', '--denominator_mode', 'one_positive'], 'simclr': ['--method', 'SimCLR'],
    'genscl': ['--method', 'GenSCL', '--mix', 'mixup_cutmix', '--no_warm'],
    'genscl with a teacher': ['--method', 'GenSCL', '--no_warm'],
    'hard negatives': [], 'simclr with hard negatives': ['--method', 'SimCLR'],
    'cross-entropy and hard negatives': ['--ce_weight', '2'],
    'moco': ['--moco', '--moco_k', '26'], 'moco simclr': ['--moco', '--moco_k', '26', '--method', 'SimCLR'],
    'accum_steps': ['--accum_steps', '3'], 'head_bn': ['--head_bn'], 'dcl': ['--method', 'DCL'],
    'three views': ['--n_views', '3', '--accum_steps', '2'],
    'genscl of four views': ['--method', 'GenSCL', '--mix', 'mixup', '--no_warm', '--n_views', '4'],
    'bcl': ['--method', 'BCL', '--n_views', '3'], 'bcl in parts': ['--method', 'BCL', '--accum_steps', '3'],
    'multi-crop': ['--local_crops', '2', '--ce_weight', '1', '--temp', '0.2'],
    'moco of three views': ['--moco', '--moco_k', '26', '--n_views', '3'], 'several labels': [],
}


def steps(method, sizes, labels=(0, 1, 2, 1, 0)):
    """Pretrain for a step with each of the batch sizes, in float64: loss and accuracy, last gradients, the network."""
    torch.set_default_dtype(torch.float64)
    try:
        opt = main_supcon.parse_option(['--dataset', 'digits', '--model', 'resnet18', '--width', '0.0625', '--syncBN',
                                        '--batch_size', '13', '--temp', '0.5', '--lr', '0.1', '--epochs', '2',
                                        *METHODS[method]])
        opt.size, opt.print_freq, opt.aug_mode = 8, 1, 'with_both' if 'negatives' in method else 'none'
        opt.class_sizes, opt.multi_label = [20, 10, 5], 'several' in method
        training.set_device(opt)
        training.set_warmup(opt)
        teacher = (lambda images: images.mean((2, 3))) if 'teacher' in method else None
        loader = Loader(sizes, opt.n_views, labels, opt.local_crops)
        averages, model = train_one_epoch(main_supcon, opt, loader, 3, teacher)
        average_statistics(model)
        return ((averages['loss'], averages['contrastive_acc']),
                {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
                {name: value for name, value in model.state_dict().items() if 'num_batches' not in name})
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('method', METHODS)
def test_processes_compute_the_loss_and_gradient_of_the_whole_batch(in_processes, monkeypatch, method, n):
    """13 images in uneven shares, with batch norm over all processes."""
    labels = (0, 1, -1, 2, 1, -3, 0) if 'negatives' in method else (0, 1, 2, 1, 0)
    if 'several' in method:
        labels = (1., 0., 1.), (0., 1., 0.), (1., 1., 1.)
    near = 1e-5 if 'cross-entropy' in method or 'bcl' in method or 'crop' in method else 1e-10
    if 'accum_steps' in str(METHODS[method]):           # each of its micro-batches has its own batch norms
        monkeypatch.setattr(main_supcon.SupConResNet, 'train', lambda self, mode=True: nn.Module.train(self, False))
    whole, = in_processes(1, lambda: steps(method, [13], labels))
    assert len(whole[1]) > 20 and whole[0][0] > 0
    for part in in_processes(n, lambda: steps(method, [13], labels)):
        assert part[0] == (pytest.approx(whole[0][0], rel=near), pytest.approx(whole[0][1], rel=1e-6))
        assert part[1].keys() == whole[1].keys()
        for name, gradient in whole[1].items():
            torch.testing.assert_close(part[1][name], gradient, rtol=0, atol=near)


@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('method', ['supcon', 'simclr', 'genscl', 'genscl with a teacher', 'hard negatives', 'moco',
                                    'head_bn'])
def test_processes_train_the_same_network(in_processes, method, n):
    """Three steps, the last of 3 images: of four processes three get none of them."""
    labels = (0, 1, -1, 2, 1, -3, 0) if 'negatives' in method else (0, 1, 2, 1, 0)
    whole, = in_processes(1, lambda: steps(method, [13, 12, 3], labels))
    for part in in_processes(n, lambda: steps(method, [13, 12, 3], labels)):
        assert part[0][0] == pytest.approx(whole[0][0], rel=1e-8)
        assert part[2].keys() == whole[2].keys()
        for name, value in whole[2].items():
            torch.testing.assert_close(part[2][name], value, rtol=0, atol=1e-8)


def test_processes_that_each_normalize_still_have_one_network(in_processes):
    """Without --syncBN: another run than that of one process, but the same in all of them, statistics too."""
    def train():
        opt = main_supcon.parse_option([*TINY, '--batch_size', '13', '--epochs', '1'])
        opt.size = 8
        training.set_device(opt)
        training.set_warmup(opt)
        _, model = train_one_epoch(main_supcon, opt, Loader([13, 12, 3], 2, (0, 1, 2)), 3)
        average_statistics(model)
        return {name: value for name, value in model.state_dict().items() if 'num_batches' not in name}
    one, other = in_processes(2, train)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize('n', [2, 3])
@pytest.mark.parametrize('program, extra', [
    *((program, extra) for program in ('ce', 'linear') for extra in ([], ['--mix', 'mixup'],
                                                                     ['--label_smoothing', '0.1'])),
    ('finetune', [])])
def test_classifiers_learn_the_same_in_processes(in_processes, program, extra, n):
    def classify():
        torch.set_default_dtype(torch.float64)
        try:
            opt = arguments.parse('main_ce', '', ['--dataset', 'digits', '--model', 'resnet18', '--width', '0.0625',
                                             '--syncBN', '--batch_size', '13', '--epochs', '1', *extra])
            opt.size, opt.output_name = 8, 'x'
            training.set_device(opt)
            model = None
            if program != 'ce':
                opt.finetune, opt.freeze_bn, opt.num_classes = program == 'finetune', False, 3
                opt.syncBN = opt.finetune
                encoder = main_ce.SupCEResNet('resnet18', width=0.0625)
                model, _ = main_linear.set_model(opt, {'model': encoder.state_dict()})
            values, model = train_one_epoch(main_ce, opt, Loader([13, 5, 3], 1, (0, 1, 2)), 3, model=model)
            return values['train_loss'], values['train_acc'], dict(model.named_parameters())
        finally:
            torch.set_default_dtype(torch.float32)
    whole, = in_processes(1, classify)
    for part in in_processes(n, classify):
        assert part[:2] == pytest.approx(whole[:2], rel=1e-5)           # cross-entropy is computed in float32
        for name, value in whole[2].items():
            torch.testing.assert_close(part[2][name], value, rtol=0, atol=1e-4)


class Prototypes(nn.Linear):
    """Features [..., 4], and a vector for each of four classes, which all processes have."""

    def __init__(self):
        super().__init__(5, 4, dtype=torch.float64)
        self.prototypes = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x):
        return super().forward(x), self.prototypes


@pytest.mark.parametrize('criterion', [
    SupConLoss(), SupConLoss(denominator_mode='only_negatives'), SupConLoss(contrast_mode='one'),
    SupConLoss(hard_negatives=True), SupConLoss(summation_location='in', positives_cap=2, hard_negatives=True),
    SupConLoss(denominator_mode='one_positive'), SupConLoss(0.07, 'one', 0.07, 'in', 'one_positive', 2),
    GenSupConLoss(), GenSupConLoss(contrast_mode='one'), BalancedSupConLoss(), BalancedSupConLoss(contrast_mode='one')])
def test_the_loss_alone_in_any_training_loop(in_processes, criterion):
    """With PyTorch's own DistributedDataParallel around a network; one process has no image. The processes send each
    other how many they have, or know it."""
    rng = torch.Generator().manual_seed(0)
    x, labels = torch.randn(7, 2, 5, generator=rng, dtype=torch.float64), torch.tensor([0, 1, 0, 2, 1, 0, 1])
    soft, sizes = F.one_hot(labels).double() + 0.1, [4, 0, 3]
    hard_negatives = getattr(criterion, 'hard_negatives', False)
    if hard_negatives:
        labels[1:3] = torch.tensor([-1, -2])

    def step(known=None):
        several = dist.is_initialized()
        torch.manual_seed(0)
        network = Prototypes() if isinstance(criterion, BalancedSupConLoss) else nn.Linear(5, 4).double()
        network = nn.parallel.DistributedDataParallel(network) if several else network
        rows = slice(sum(sizes[:distributed.rank()]), sum(sizes[:distributed.rank() + 1])) if several else slice(0, 7)
        z = network(x[rows])
        z, prototypes = z if isinstance(z, tuple) else (z, None)
        z = F.normalize(z, dim=2)
        if isinstance(criterion, GenSupConLoss):
            loss = criterion(z.unbind(1), (soft[rows], soft[rows]), sizes=known)
        elif prototypes is not None:
            loss = criterion(z, labels[rows], F.normalize(prototypes, dim=1), sizes=known)
        else:
            loss = criterion(z, labels[rows], sizes=known)
        loss.backward()
        accuracy = contrastive_accuracy(z, labels[rows], hard_negatives=hard_negatives, sizes=known)
        return loss.item(), [p.grad for p in network.parameters()], accuracy.item()
    whole, = in_processes(1, step)
    for (loss, gradients, accuracy), known in in_processes(3, lambda: (step(), step(sizes))):
        assert known[0] == loss and known[2] == accuracy and all(map(torch.equal, known[1], gradients))
        assert loss == pytest.approx(whole[0], rel=1e-12) and accuracy == pytest.approx(whole[2])
        torch.testing.assert_close(gradients, whole[1], rtol=1e-10, atol=1e-12)


def test_negative_labels_of_one_process_stop_all(in_processes):
    """None is left waiting for the others."""
    def raises():
        with pytest.raises(ValueError, match='hard_negatives=True'):
            SupConLoss()(torch.ones(2, 2, 3), torch.tensor([0, -1 if distributed.rank() == 1 else 1]))
        return True
    assert in_processes(3, raises) == [True] * 3


@pytest.mark.parametrize('criterion', [SupConLoss(), SupConLoss(contrast_mode='one', summation_location='in'),
                                       SupConLoss(denominator_mode='one_positive', positives_cap=2)])
def test_a_mask_has_a_column_for_each_image_of_all_processes(in_processes, criterion):
    rng = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(5, 2, 3, generator=rng, dtype=torch.float64), dim=2)
    mask = torch.rand(5, 5, generator=rng, dtype=torch.float64) * (torch.rand(5, 5, generator=rng) < 0.7)

    def step():
        features = mine(z).clone().requires_grad_()
        loss = criterion(features, mask=mine(mask))
        loss.backward()
        return loss.detach(), features.grad
    whole, = in_processes(1, step)
    parts = in_processes(2, step)
    for loss, _ in parts:
        torch.testing.assert_close(loss, whole[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]) / 2, whole[1], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r'mask is \[2, 5\], expected \[2, 2\]'):
        SupConLoss()(z[:2], mask=mask[:2])


def test_what_is_sent_between_processes(in_processes):
    """gather, exchanged, mean, largest against the same on all rows."""
    sizes, order = [3, 0, 4], torch.from_numpy(np.random.default_rng(0).permutation(7))
    rows = torch.arange(14.).view(7, 2)

    def send():
        own = slice(sum(sizes[:distributed.rank()]), sum(sizes[:distributed.rank() + 1]))
        assert distributed.all_sizes(sizes[distributed.rank()]) == sizes
        assert torch.equal(distributed.gather(rows[own], sizes), rows)
        assert torch.equal(distributed.gather(rows[own] > 3, sizes), rows > 3)
        assert torch.equal(distributed.all_to_all_rows(rows[own], order, sizes), rows[order][own])
        assert distributed.all_max(-distributed.rank()) == 0
        even = rows[own, 0] % 4 == 0
        torch.testing.assert_close(distributed.global_mean(rows[own, 0], even), rows[rows[:, 0] % 4 == 0, 0].mean())
        assert distributed.global_mean(rows[own, 0], even & False) == 0
        return True
    assert in_processes(3, send) == [True] * 3
    assert torch.equal(distributed.all_to_all_rows(rows, order, [7]), rows[order])
    assert distributed.gather(rows, [7]) is rows


@pytest.mark.parametrize('n', range(1, 12))
def test_every_share_suits_batch_norm(monkeypatch, n):
    """At least two images or none; all images once."""
    for processes in (1, 2, 4):
        monkeypatch.setattr(distributed, 'world_size', lambda processes=processes: processes)
        shares = []
        for number in range(processes):
            monkeypatch.setattr(distributed, 'rank', lambda number=number: number)
            shares.append(list(range(n))[distributed.local_slice(n)])
        assert sum(shares, []) == list(range(n))
        assert n == 1 or all(len(share) != 1 for share in shares)
        assert max(map(len, shares)) <= max(3, -(-n // processes))


@pytest.mark.parametrize('kind', [nn.BatchNorm2d, BatchNormAct2d, nn.BatchNorm1d])
def test_batch_norm_over_processes_is_that_of_the_whole_batch(in_processes, kind):
    """Outputs, gradients of input, weight and bias, running statistics; one process has nothing."""
    rng, shape = torch.Generator().manual_seed(0), (6, 3) if kind is nn.BatchNorm1d else (6, 3, 4, 4)
    x = 3 * torch.randn(shape, generator=rng, dtype=torch.float64) + 100
    sizes, weights = [4, 0, 2], torch.randn(shape, generator=rng, dtype=torch.float64)

    def normalize():
        norm = nn.Sequential(kind(3).double())
        nn.init.uniform_(norm[0].weight, generator=torch.Generator().manual_seed(2))
        several = dist.is_initialized()
        own = slice(sum(sizes[:distributed.rank()]), sum(sizes[:distributed.rank() + 1])) if several else slice(0, 6)
        if several:
            norm = synchronized(norm)
            assert type(norm[0]) is SyncBatchNorm
        part = x[own].clone().requires_grad_()
        y = norm(part)
        (y * weights[own]).sum().backward()
        sums = [p.grad if not several else distributed.all_reduce_sum(p.grad) for p in norm.parameters()]
        norm.eval()
        return [y.detach(), part.grad, norm(x).detach(), *sums, norm[0].running_mean, norm[0].running_var]
    whole, = in_processes(1, normalize)
    parts = in_processes(3, normalize)
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), whole[i], rtol=1e-9, atol=1e-9)
    for part in parts:
        torch.testing.assert_close(part[2:], whole[2:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_batch_norm_over_processes_in_half_precision(in_processes, memory_format):
    """Statistics and sums are float32, also those of a process without images; the images stay in their dtype."""
    x = (torch.randn(6, 3, 4, 4) + 5).contiguous(memory_format=memory_format)

    def normalize(dtype):
        norm = nn.Sequential(nn.BatchNorm2d(3))
        norm = synchronized(norm) if dist.is_initialized() else norm
        mine = slice(0, 6) if distributed.rank() == 0 else slice(0, 0)
        part = x[mine].to(dtype).requires_grad_()
        y = norm(part)
        y.square().sum().backward()
        assert y.dtype == part.grad.dtype == dtype and norm[0].running_mean.dtype == torch.float32
        return y.detach().float(), part.grad.float(), norm[0].running_mean, norm[0].running_var
    whole, = in_processes(1, lambda: normalize(torch.float32))
    first, empty = in_processes(2, lambda: normalize(torch.bfloat16))
    torch.testing.assert_close(first[0], whole[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(first[1], whole[1], rtol=0.02, atol=0.05)
    torch.testing.assert_close(first[2:], whole[2:], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(empty[2:], first[2:], rtol=0, atol=0)


@pytest.mark.parametrize('kind', ['batched', 'workers', 'per_sample'])
def test_processes_share_the_views_of_one(monkeypatch, kind):
    """Same permutation, and each image's views as one process samples them; a last batch that is too small for all."""
    image_set = ImageSet(np.random.default_rng(0).integers(0, 256, (23, 20, 20, 3), dtype=np.uint8),
                        torch.arange(23), ['a'])
    opt = arguments.defaults(device='cpu', loader=kind, batch_size=10, num_workers=0, seed=3)
    view = View(16, (0.5,) * 3, (0.2,) * 3, crop=(0.2, 1.), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2,
                blur=0.5, cutout=(1, 4), rotation=10.)
    monkeypatch.setattr(View, 'cpu_group', 4)

    def batches(processes, number, train):
        monkeypatch.setattr(distributed, 'world_size', lambda: processes)
        monkeypatch.setattr(distributed, 'rank', lambda: number)
        monkeypatch.setattr(loaders, 'all_max', lambda n: n)
        loader = loaders.make_loader(image_set, view, opt, 2, train)
        loader.set_epoch(2)
        assert loader.batch_sizes == [10, 10, 3]
        return [(images.unflatten(0, (2, len(labels))), labels) for images, labels in loader]
    for train in (True, False):
        whole = batches(1, 0, train)
        parts = [batches(4, number, train) for number in range(4)]
        for step, (images, labels) in enumerate(whole):
            assert torch.equal(torch.cat([part[step][1] for part in parts]), labels)
            torch.testing.assert_close(torch.cat([part[step][0] for part in parts], 1), images, rtol=0, atol=1e-5)
        assert [len(part[2][1]) for part in parts] == [3, 0, 0, 0]


def test_evaluation_counts_every_image_once(in_processes):
    """Features and labels of all, in their order; accuracies and ood metrics of them, to the last image."""
    rng = torch.Generator().manual_seed(0)
    images, labels = torch.rand(11, 3, 8, 8, generator=rng), torch.arange(11) % 3

    def evaluate():
        opt = arguments.defaults(device='cpu', accum_steps=2)
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        batches = [(mine(images[i:i + 4]), mine(labels[i:i + 4])) for i in (0, 4, 8)]
        features, found = training.forward_all(network, batches, opt)
        assert torch.equal(found, labels)
        return [features, metrics.knn_accuracy(features, found, features.flip(0), found.flip(0), k=3),
                metrics.accuracy(network(mine(images)), mine(labels)),
                metrics.ood_metrics(features, features, -features)]
    whole, = in_processes(1, evaluate)
    for part in in_processes(3, evaluate):
        torch.testing.assert_close(part[0], whole[0])
        assert part[1] == whole[1] and part[2] == pytest.approx(whole[2])
        assert part[3] == pytest.approx(whole[3], rel=1e-5)


def test_a_backbone_need_not_take_the_empty_part_of_a_process(monkeypatch):
    encoder = TimmEncoder('resnet18', 32)
    monkeypatch.setattr(encoder.backbone, 'forward', None)
    assert encoder(torch.zeros(0, 3, 32, 32)).shape == (0, 512)


def test_a_process_of_torchrun_uses_one_gpu(monkeypatch):
    opt = arguments.defaults(device='cuda')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    assert training.several_devices(opt)
    monkeypatch.setenv('LOCAL_RANK', '0')
    assert not training.several_devices(opt)


def torchrun(processes, program, *arguments):
    """Start a program in several processes in the current folder."""
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', str(processes),
                             '--standalone', ROOT / program, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def worker_pids(job):
    return [int(pid) for pid in Path(f'/proc/{job.pid}/task/{job.pid}/children').read_text().split()]


def until(job, words, seen):
    for line in job.stdout:
        seen.append(line)
        if words in line:
            return
    raise AssertionError(''.join(seen))


def test_torchrun_stops_on_a_signal_and_one_process_resumes(call, monkeypatch, tmp_path):
    """The first process writes and prints alone; SIGTERM to one of them stops all after the same step."""
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, '--output_name', 'a', '--print_freq', 1, '--eval_freq', 1]
    job, seen = torchrun(2, 'main_supcon.py', *arguments, '--epochs', 1000), []
    until(job, 'Train: [2][1/3]', seen)
    os.kill(worker_pids(job)[1], signal.SIGTERM)
    out, _ = job.communicate(timeout=100)
    lines = (''.join(seen) + out).splitlines()
    stopped, = [line for line in lines if 'SIGTERM: stopped after' in line]
    assert len([line for line in lines if line.startswith('Train: [1][1/3]')]) == 1
    assert '2 processes' in lines[0] or any('2 processes' in line for line in lines)
    checkpoint = checkpoints.load_checkpoint('output/a/trial=0/last.ckpt')
    epoch = int(re.search(r'epoch (\d+),', stopped)[1])
    assert checkpoint['epoch'] == epoch - bool(checkpoint['step'])
    assert not any('module' in name for name in checkpoint['model'])
    status, out, err = call(main_supcon.main, *arguments, '--epochs', epoch + 1, '--resume')
    assert status == 0, err
    assert f'Train: [{epoch + 1}][3/3]' in out


def test_a_process_that_dies_ends_the_job(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    job, seen = torchrun(2, 'main_ce.py', *TINY, '--epochs', 100000, '--output_name', 'a', '--save_freq', 1000), []
    until(job, 'Train epoch 1,', seen)
    start = time.time()
    os.kill(worker_pids(job)[1], signal.SIGKILL)
    out, _ = job.communicate(timeout=100)
    assert job.returncode != 0 and time.time() - start < 60
    assert 'SIGKILL' in out


def test_mistakes_in_several_processes_are_reported_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    job = torchrun(2, 'main_linear.py', '--dataset', 'digits', '--ckpt', 'nowhere.ckpt')
    out, _ = job.communicate(timeout=100)
    assert job.returncode != 0
    assert len([line for line in out.splitlines() if 'main_linear.py: error: nowhere.ckpt: no such' in line]) == 1
    assert not list(tmp_path.iterdir())


def test_a_rank_beyond_the_processes_is_rejected_at_once(rejected, monkeypatch):
    monkeypatch.setattr(dist, 'init_process_group', lambda *args, **settings: pytest.fail('waits for the others'))
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)            # rank 0 would print first
    monkeypatch.setenv('WORLD_SIZE', '2')
    for number in ('2', '7'):
        monkeypatch.setenv('RANK', number)
        rejected(main_ce.main, *TINY, words=[f'RANK is {number} and WORLD_SIZE 2', 'below WORLD_SIZE'])


def test_more_processes_than_a_batch_can_serve(rejected, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '8')
    rejected(main_supcon.main, '--batch_size', '15', words=['--batch_size 15', 'each of 8 processes'])
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '0')
    rejected(main_supcon.main, words=['LOCAL_WORLD_SIZE', "'0'", 'at least 1'])
    monkeypatch.setenv('WORLD_SIZE', 'many')
    rejected(main_supcon.main, words=['WORLD_SIZE', "'many'"])
