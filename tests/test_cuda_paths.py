"""What GPUs depend on, as far as it can be held without one: how many operations are launched, that no value is asked
of the device, how many messages are sent, how many graphs are compiled. A tensor on PyTorch's meta device has no values
and takes the paths of a GPU: asking it for one is an error, and every operation on it can be counted."""
import collections
import contextlib
import copy
import threading
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import train_one_epoch
from torch import distributed as dist
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.testing._internal.distributed import fake_pg  # noqa: F401, registers the backend `fake`
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import main_ce
import main_linear
import main_supcon
from datasets import image_set, loader, make_loader, views
from datasets.mixing import mix_views
from datasets.views import View
from losses import SupConLoss
from networks.moco import MomentumContrast
from networks.resnet_big import ResNet, SupConResNet
from networks.sync_bn import SyncBatchNorm, synchronized
from util import arguments, checkpoints, distributed, errors, metrics, teachers, training
from util.metrics import AverageMeter

META = torch.device('meta')
SMALL = ['--dataset', 'digits', '--model', 'resnet18', '--width', '0.0625', '--size', '8', '--num_workers', '0']


class Operations(TorchDispatchMode):
    """Counts the operations on tensors of a device, and those that copy to it from the CPU."""

    def __init__(self, device):
        super().__init__()
        self.device, self.count, self.copies = device, collections.Counter(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x) and (
            x.is_meta or x.dim())}                      # an optimizer counts its steps on the CPU
        if self.device in devices and not operation.is_view:
            self.count[str(operation)] += 1
            self.copies += len(devices) > 1
        return result


def operations(function, *args, device='meta'):
    with Operations(device) as counted:
        function(*args)
    return sum(counted.count.values()), counted.copies


# Operations

@pytest.mark.parametrize('size, n, blur, most', [(32, 2048, 0., 450), (224, 512, 0.5, 600)])
def test_views_are_few_operations_and_one_copy(size, n, blur, most):
    view = View(size, (0.5,) * 3, (0.2,) * 3, crop=(0.2, 1.), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2,
                blur=blur)
    sides = torch.full((n,), size)
    params = views.sample_params(view, sides, sides, torch.Generator().manual_seed(0), META)
    images = torch.empty(n // 2, 3, size, size, dtype=torch.uint8, device=META)
    count, copies = operations(views.apply, view, images, params)
    assert count <= most and copies == 1


def test_every_view_is_applied_without_asking_the_device():
    """All that a view may have; the same values on the CPU however they are grouped or sent is test_views.py's."""
    view = View(32, (0.5,) * 3, (0.2,) * 3, padding=4, flip=0.5, rotation=15., jitter=(0.4, 0.4, 0.4, 0.1),
                auto='cifar10', rand=(2, 9), grayscale=0.2, blur=0.5, cutout=(2, 8), erasing=0.5)
    sides = torch.full((64,), 40)
    params = views.sample_params(view, sides, sides, torch.Generator().manual_seed(0), META)
    images = torch.empty(32, 3, 40, 40, dtype=torch.uint8, device=META)
    assert views.apply(view, images, params).shape == (64, 3, 32, 32)
    local = params.local(slice(8, 16), 32)
    assert len(local.groups) <= 4 and views.apply(view, images[8:16], local).shape == (16, 3, 32, 32)


def test_packed_parameters_are_what_was_packed(monkeypatch):
    """all_to_device, with a device that only pretends not to be the CPU."""
    tensors = [torch.arange(6).view(2, 3), None, torch.rand(4), torch.tensor([True, False]), torch.empty(0)]
    monkeypatch.setattr(distributed, 'to_device', lambda x, device: x)
    for device in (torch.device('cpu'), META):
        for packed, x in zip(distributed.all_to_device(tensors, device), tensors, strict=True):
            assert packed is None if x is None else torch.equal(packed, x.float())


@pytest.mark.parametrize('n, n_keys, forward, backward', [
    (2048, 0, 75, 60), (16384, 0, 130, 170), (2048, 65536, 100, 70)])
def test_the_loss_is_few_operations(monkeypatch, n, n_keys, forward, backward):
    monkeypatch.setattr(torch.Tensor, 'is_cuda', property(lambda x: True))
    monkeypatch.setattr(torch, 'autocast', lambda *args, **settings: contextlib.nullcontext())      # knows no meta
    z = torch.empty(n // 2, 2, 128, device=META, requires_grad=True)
    labels, key_labels = (torch.empty(number, dtype=torch.long, device=META) for number in (n // 2, n_keys))
    keys = {'keys': torch.empty(n_keys, 128, device=META), 'key_labels': key_labels} if n_keys else {}
    losses = []
    criterion = SupConLoss(unit_length=True)
    count, copies = operations(lambda: losses.append(criterion(z[:, :1] if n_keys else z, labels, **keys)))
    assert count <= forward and not copies
    assert operations(losses[0].backward)[0] <= backward


MOST = {'SGD': 10, 'Adam': 25, 'AdamW': 25, 'RMSProp': 25, 'RMSPropTF': 25, 'LARS': 40}


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('kind', MOST)
def test_a_step_of_an_optimizer_is_few_operations(monkeypatch, kind, amp):
    """Of a ResNet-50, also with float16, where the fused optimizers cannot be used."""
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: False)
    model = SupConResNet('resnet50', width=1 / 64)
    optimizer = training.set_optimizer(arguments.defaults(device='cuda', amp=amp, optim_kind=kind, LARS=kind == 'LARS'),
                                       model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for group in optimizer.param_groups:
        assert not (amp and group.get('fused'))
        if group.get('foreach') is None and group.get('fused') is None:
            group['foreach'] = True                     # what PyTorch chooses on a GPU
    optimizer.step()
    assert operations(optimizer.step, device='cpu')[0] <= MOST[kind]


def test_the_momentum_copy_moves_in_one_operation():
    with META:
        model = SupConResNet()
    moco = MomentumContrast(model, 1024, 0.999)
    assert operations(moco.update, model)[0] == 1


# Nothing is asked of the device

def test_methods_ask_nothing_of_the_device():
    """Mixing, meters, accuracies and momentum contrast; the losses are test_losses.py's."""
    rng, images = np.random.default_rng(0), torch.empty(8, 3, 8, 8, device=META)
    labels = torch.empty(4, 10, device=META)
    for kind in ('mixup', 'cutmix'):
        mixed, soft = mix_views(images, labels, 2, kind, 1., rng)
        assert mixed.shape == images.shape and soft.shape == (8, 10)
    with META:
        model = SupConResNet('resnet18', width=0.0625)
    moco = MomentumContrast(model, 16, 0.9).to(META)
    keys = moco(images[:4])
    moco.contrasts(keys, torch.empty(4, dtype=torch.long, device=META))
    moco.enqueue(keys, torch.empty(4, dtype=torch.long, device=META))
    meter = AverageMeter()
    meter.update(metrics.accuracy(labels, torch.empty(4, dtype=torch.long, device=META)), 4)
    meter.update(metrics.feature_statistics(torch.empty(4, 2, 8, device=META))['uniformity'], 4)
    meter.update(distributed.global_mean(labels[:, 0]), 4)
    with pytest.raises((RuntimeError, NotImplementedError)):
        _ = meter.avg


# Batches

class Rows:
    """Batches of images that remember whether the one before was still there when they were made."""

    def __init__(self, n):
        self.batch_sizes, self.before, self.alive = [8] * n, lambda: None, []

    def __len__(self):
        return len(self.batch_sizes)

    def set_epoch(self, epoch, first_step):
        pass

    def __iter__(self):
        for _ in self.batch_sizes:
            yield self.batch()

    def batch(self):
        self.alive.append(self.before() is not None)
        images = torch.rand(16, 3, 8, 8)
        self.before = weakref.ref(images)
        return images, torch.arange(8)


@pytest.mark.parametrize('extra', [[], ['--accum_steps', '2'], ['--ce_weight', '1'], ['--moco', '--moco_k', '64']])
def test_a_batch_is_freed_before_the_next_is_made(monkeypatch, tmp_path, extra):
    monkeypatch.chdir(tmp_path)
    opt = main_supcon.parse_option([*SMALL, '--batch_size', '8', '--epochs', '1', *extra])
    training.set_device(opt)
    training.set_warmup(opt)
    batches = Rows(3)
    train_one_epoch(main_supcon, opt, batches, 10)
    assert batches.alive == [False] * 3


def loaders(monkeypatch, on_device):
    """Loaders of training and of evaluation as if their images fitted on a GPU, or did not."""
    monkeypatch.setattr(image_set, 'fits', lambda data, device: on_device)
    images = image_set.ImageSet(np.zeros((24, 16, 16, 3), dtype=np.uint8), torch.arange(24), ['a'])
    opt = arguments.defaults(device='meta', loader='batched', batch_size=8, seed=3)
    view = View(16, (0.5,) * 3, (0.2,) * 3, crop=(0.2, 1.), grayscale=0.5)
    return [make_loader(images, view, opt, 2, train) for train in (True, False)]


def test_loaders_share_one_copy_on_the_device(monkeypatch):
    train, evaluation = loaders(monkeypatch, True)
    assert train.data is evaluation.data and train.data.is_meta
    assert [len(images) for images, _ in train] == [16] * 3


@pytest.mark.parametrize('on_device', [False, True])
def test_batches_of_a_gpu_are_made_in_a_thread(monkeypatch, on_device):
    """One on the stream of this one, and so on its GPU: PyTorch chooses both for each thread anew."""
    train, _ = loaders(monkeypatch, on_device)
    threads, chosen, apply = [], [], views.apply
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: 'stream of GPU 3')
    monkeypatch.setattr(torch.cuda, 'set_stream', lambda stream: chosen.append((stream, threading.current_thread())))
    monkeypatch.setattr(views, 'apply', lambda *arguments: threads.append(threading.current_thread())
                        or apply(*arguments))
    batches = iter(train)
    images, labels = next(batches)
    assert images.is_meta and len(images) == 16 and len(labels) == 8 and train.data.is_meta == on_device
    assert [len(images) for images, _ in batches] == [16] * 2
    assert len(threads) == 3 and len(set(threads)) == 1 and chosen == [('stream of GPU 3', threads[0])]
    assert threads[0] != threading.main_thread()


def test_items_made_ahead_come_in_their_order_with_their_errors():
    assert list(loader.prefetch(iter(range(1, 5)))) == [1, 2, 3, 4]

    def fails():
        yield 1
        raise errors.UserError('no image')
    items = loader.prefetch(fails())
    assert next(items) == 1
    with pytest.raises(errors.UserError, match='no image'):
        next(items)


# DataParallel

def replica_of(module):
    """A replica as DataParallel makes it: parameters and buffers go through flat buffers to the other GPU."""
    def broadcast(tensors):
        return iter(_unflatten_dense_tensors(_flatten_dense_tensors(tensors), tensors)) if tensors else iter(())
    replica = copy.deepcopy(module)
    values = broadcast([p.detach() for p in module.parameters()])
    for parameter in replica.parameters():
        parameter.data = next(values)
    return replica


def test_replicas_of_dataparallel_compute_in_channels_last():
    def formats(network, images):
        seen = []
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda module, inputs, output: seen.append(all(
                    x.is_contiguous(memory_format=torch.channels_last) for x in (*inputs, output))))
        network(images)
        return seen
    opt = arguments.defaults(device='cpu', model='resnet18', num_classes=3)
    for name in ('resnet18', 'timm/resnet18'):
        model = main_ce.SupCEResNet(name, 3, size=32)
        encoder = training.Network(model, opt).model.encoder
        replica = replica_of(encoder)
        convolution = next(module for module in replica.modules() if isinstance(module, nn.Conv2d))
        assert not convolution.weight.is_contiguous(memory_format=torch.channels_last)
        seen = formats(replica, torch.rand(2, 3, 32, 32))
        assert len(seen) > 16 and all(seen)
    teacher = teachers.Teacher(ResNet('resnet18', width=0.125), *[(0.5,) * 3] * 4)
    assert all(formats(replica_of(teacher), torch.rand(2, 3, 32, 32)))
    seen = formats(ResNet('resnet18', width=0.125), torch.rand(2, 3, 32, 32))          # not asked for: as given
    assert not any(seen)


# Compiler

@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile makes, by a backend that computes them without compiling; a break is an error."""
    torch._dynamo.reset()
    found, compile_ = [], torch.compile

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, 'compile', lambda function, **settings: compile_(function, **settings, fullgraph=True,
                                                                                backend=backend))
    monkeypatch.setattr(training, 'check_compiler', lambda device: None)
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize('extra, expected', [
    ([], 1), (['--accum_steps', '2'], 2), (['--amp', '--moco', '--moco_k', '64'], 2)])
def test_a_run_compiles_few_graphs(call, graphs, extra, expected):
    """A last batch of another size, evaluations between epochs, and no break."""
    status, _, err = call(main_supcon.main, *SMALL, '--max_samples', 40, '--batch_size', 16, '--epochs', 2,
                          '--eval_freq', 1, '--compile', *extra)
    assert status == 0, err
    assert len(graphs) == expected


def test_a_teacher_is_compiled_too(call, graphs):
    assert call(main_ce.main, *SMALL, '--max_samples', 40, '--epochs', 1, '--batch_size', 16, '--output_name', 't')[
        0] == 0
    status, _, err = call(main_supcon.main, *SMALL, '--max_samples', 40, '--batch_size', 16, '--epochs', 1,
                          '--compile', '--method', 'GenSCL', '--KD', '--teacher_path', 'output/t/trial=0')
    assert status == 0, err
    assert len(graphs) == 2


def test_a_compiler_that_fails_is_done_without(monkeypatch, capsys):
    def backend(graph, inputs):
        raise AssertionError('a bug of the compiler')
    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda function, **settings: compile_(function, backend=backend))
    torch._dynamo.reset()
    network, x = training.Compiled(nn.Linear(3, 2)), torch.rand(4, 3)
    for _ in range(2):
        torch.testing.assert_close(network(x), network.module(x))
    assert capsys.readouterr().out.count('torch.compile fails on this network (BackendCompilerFailed)') == 1
    torch._dynamo.reset()


def test_a_compiler_that_fails_in_the_backward_pass_is_done_without(monkeypatch, capsys):
    def fails(graph, inputs):
        raise AssertionError('a bug of the compiler')
    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=fails)
    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda function, **settings: compile_(function, backend=backend))
    torch._dynamo.reset()
    network = training.Compiled(nn.Linear(3, 2))
    for _ in range(2):
        network(torch.ones(4, 3)).sum().backward()
    torch.testing.assert_close(network.module.weight.grad, torch.full((2, 3), 8.))
    assert capsys.readouterr().out.count('torch.compile fails on this network (BackendCompilerFailed)') == 1
    torch._dynamo.reset()


def test_what_is_compiled_is_what_most_batches_are(graphs):
    """Whatever comes first: an empty slice, an evaluation, the last batch of a resumed epoch."""
    network = training.Compiled(nn.Linear(3, 2))
    for mode, sizes, expected in ((False, [0], 0), (True, [0], 0), (True, [2], 1), (True, [4, 4, 2, 0], 2),
                                  (False, [4, 6], 2), (True, [4, 3], 2)):
        network.train(mode)
        for size in sizes:
            network(torch.rand(size, 3))
        assert len(graphs) == expected
    crops = training.Compiled(nn.Conv2d(3, 2, 3))               # more small crops than views
    for size in (8, 4, 8, 4):
        crops(torch.rand(2 if size == 8 else 6, 3, size, size))
    assert len(graphs) == 3
    frozen = training.Compiled(nn.Linear(3, 2).eval())          # a teacher
    for size in (0, 3, 3):
        frozen(torch.rand(size, 3))
    assert len(graphs) == 4


# Checkpoints

def test_checkpoints_are_written_while_training_goes_on(call, monkeypatch):
    """In a thread, of values that training changes no more; all is on disk when the run says that it stopped."""
    threads, begun, write = [], threading.Event(), checkpoints.write_checkpoint

    def slow(state, file):
        threads.append(threading.current_thread())
        if state['epoch'] == 1:
            assert begun.wait(60)                       # until the second epoch is being trained
        write(state, file)
    monkeypatch.setattr(checkpoints, 'write_checkpoint', slow)
    step = training.update

    def update(*args):
        if threads and not begun.is_set():
            assert not checkpoints.kept_checkpoints(Path('output/a/trial=0'))
            begun.set()
        return step(*args)
    monkeypatch.setattr(training, 'update', update)
    arguments = [*SMALL, '--max_samples', 24, '--batch_size', 8, '--epochs', 3]
    assert call(main_ce.main, *arguments, '--output_name', 'a', '--save_freq', 1)[0] == 0
    assert len(threads) == 6 and threading.main_thread() not in threads
    monkeypatch.setattr(training, 'update', step)
    assert call(main_ce.main, *arguments, '--output_name', 'b', '--epochs', 1, '--lr_decay_epochs', 3)[0] == 0
    first, alone = (checkpoints.load_checkpoint(f'output/{file}')['model'] for file in (
        'a/trial=0/ckpt_epoch_1.ckpt', 'b/trial=0/last.ckpt'))
    assert all(torch.equal(value, alone[name]) for name, value in first.items())


def test_an_error_of_the_writer_is_raised_by_the_next_call():
    writer, done = checkpoints.Writer(), []

    def fails():
        raise errors.UserError('no space left')
    writer.submit(fails)
    with pytest.raises(errors.UserError, match='no space'):
        writer.submit(done.append, 1)
    writer.submit(done.append, 2)
    writer.finish()
    assert done == [2]


def test_cached_features_do_not_write_the_encoder_in_every_epoch(call, spy):
    """The last epoch is there all the same, with the encoder, in a file like any other."""
    assert call(main_supcon.main, *SMALL, '--max_samples', 24, '--epochs', 1, '--output_name', 'e')[0] == 0
    written = spy(checkpoints, 'write_checkpoint')
    assert call(main_linear.main, *SMALL[:2], '--num_workers', 0, '--max_samples', 24, '--epochs', 20, '--ckpt',
                'output/e/trial=0/last.ckpt', '--cache_features', '--output_name', 'a')[0] == 0
    assert len(written) < 5
    checkpoint = checkpoints.load_checkpoint('output/a/trial=0/last.ckpt')
    assert checkpoint['epoch'] == 20 and 'encoder.conv1.weight' in checkpoint['model']


# Devices and processes

@pytest.fixture
def no_driver(monkeypatch, tmp_path):
    """A machine with an NVIDIA GPU whose driver PyTorch cannot use."""
    (tmp_path / 'nvidia0').touch()
    monkeypatch.setattr(training, 'NVIDIA', f'{tmp_path}/nvidia[0-9]*')
    monkeypatch.setattr(torch.version, 'cuda', '13.0')

    def is_available():
        warnings.warn('the driver is too old (found version 11040)', stacklevel=1)
        return False
    monkeypatch.setattr(torch.cuda, 'is_available', is_available)


def test_a_gpu_that_cannot_be_used_is_an_error(no_driver, monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    with pytest.raises(errors.UserError, match=r"NVIDIA GPU .* \(found version 11040\).*CUDA_VISIBLE_DEVICES=''"):
        training.gpus_work()
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert not training.gpus_work()


def test_the_device_is_set_before_the_rendezvous(monkeypatch):
    """And given to it, with NCCL for GPUs beside gloo for the CPU."""
    events = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda number: events.append(number))
    monkeypatch.setattr(dist, 'init_process_group', lambda *args, **settings: events.append((args, settings)))
    for name, value in (('WORLD_SIZE', '4'), ('RANK', '2'), ('LOCAL_RANK', '2'), ('LOCAL_WORLD_SIZE', '4')):
        monkeypatch.setenv(name, value)
    training.set_device(main_supcon.parse_option([*SMALL, '--batch_size', '16']))
    assert events == [2, (('cpu:gloo,cuda:nccl',), {'device_id': torch.device('cuda', 2)})]
    monkeypatch.setenv('LOCAL_RANK', '4')
    with pytest.raises(errors.UserError, match='LOCAL_RANK is 4: found 4 GPUs'):
        training.set_device(main_supcon.parse_option([*SMALL, '--batch_size', '16']))


def test_a_failed_rendezvous_names_the_interfaces(monkeypatch):
    def fails(*args, **settings):
        raise RuntimeError('Connection refused')
    monkeypatch.setattr(dist, 'init_process_group', fails)
    monkeypatch.setenv('WORLD_SIZE', '4')
    with pytest.raises(errors.UserError, match='refused.*GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME'):
        distributed.start_processes(None)


def test_several_gpus_in_one_process_are_told_of_torchrun(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda number: None)
    training.set_device(main_supcon.parse_option(SMALL))
    assert 'torchrun --nproc_per_node 4 is faster' in capsys.readouterr().out


class Collectives(TorchDispatchMode):
    """The collectives that are called: [(name, device of what is sent, its numbers)]."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == 'c10d':
            tensors = [x for x in tree_leaves(args) if torch.is_tensor(x)]
            self.sent.append((operation._opname.strip('_'), tensors[-1].device.type, tensors[-1].numel()))
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def eight_processes(monkeypatch):
    """This process as the second of eight, with a backend that sends nothing: what would be sent can be counted."""
    monkeypatch.setenv('WORLD_SIZE', '8')
    monkeypatch.setenv('RANK', '1')
    dist.init_process_group('fake', rank=1, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('bsz', [4, 3, 0])
def test_batch_norm_of_eight_processes_sends_once_each_way(eight_processes, bsz):
    """On the meta device, so that it asks for no value; the slices may be of any size."""
    library = torch.library.Library('aten', 'IMPL')     # as long as it lives
    library.impl('batch_norm_update_stats', lambda x, mean, var, momentum: (mean.clone(), var.clone()), 'Meta')
    norm = synchronized(nn.Sequential(nn.BatchNorm2d(6))).to(META)
    assert type(norm[0]) is SyncBatchNorm
    x = torch.empty(bsz, 6, 5, 5, device=META, requires_grad=True)
    with Collectives() as collectives:
        norm(x).sum().backward()
    assert collectives.sent == [('allgather', 'meta', 13), ('allreduce', 'meta', 12)]
    assert x.grad.shape == x.shape


MIX, GENSCL, MOCO = ['--mix', 'mixup'], ['--method', 'GenSCL', '--no_warm'], ['--moco', '--moco_k', '64']
STEP = {                                # what a step sends; a resnet18 has 20 batch norms
    'SupCon': (main_supcon, [], 9), 'syncBN': (main_supcon, ['--syncBN'], 9 + 2 * 20),
    'micro-batches': (main_supcon, ['--accum_steps', '2'], 9), 'BCL': (main_supcon, ['--method', 'BCL'], 11),
    'GenSCL': (main_supcon, [*GENSCL, *MIX], 13), 'teacher': (main_supcon, GENSCL, 10),
    'teacher in micro-batches': (main_supcon, [*GENSCL, '--accum_steps', '2'], 10), 'moco': (main_supcon, MOCO, 11),
    'moco in micro-batches': (main_supcon, [*MOCO, '--accum_steps', '2'], 11), 'ce': (main_ce, [], 4),
    'mixed ce': (main_ce, MIX, 6), 'ce in micro-batches': (main_ce, ['--accum_steps', '2'], 4)}


class Slices(Rows):
    """This process's slices of batches [64, 60, 60]: the last two are of 7 or 8 images."""

    def __init__(self, n_views):
        self.batch_sizes, self.n_views = [64, 60, 60], n_views

    def __iter__(self):
        for size in self.batch_sizes:
            labels = torch.arange(size)[distributed.local_slice(size)] % 10
            yield torch.rand(self.n_views * len(labels), 3, 8, 8), labels


@pytest.mark.parametrize('name', STEP)
def test_a_step_of_eight_processes_sends_few_messages(eight_processes, monkeypatch, tmp_path, spy, name):
    """Beside DistributedDataParallel's own: features, labels, sums, and whether a signal stops the run; no sizes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, 'DistributedDataParallel', lambda model, **settings: model)
    program, extra, number = STEP[name]
    opt = program.parse_option([*SMALL, '--batch_size', '64', '--epochs', '1', *extra])
    opt.class_sizes, opt.KD_alpha, opt.KD_temp = [20] * 10, 0.5, 1.
    training.set_device(opt)
    training.set_warmup(opt)
    sent = [spy(dist, function) for function in ('all_gather', 'all_reduce', 'all_to_all_single')]
    numbers, update = [], training.update
    monkeypatch.setattr(training, 'update', lambda *args: (update(*args), numbers.append(sum(map(len, sent)))))
    teacher = (lambda images: images.flatten(1)[:, :10]) if 'teacher' in name else None
    train_one_epoch(program, opt, Slices(2 if program is main_supcon else 1), 10, teacher)
    assert numbers[1] - numbers[0] == numbers[2] - numbers[1] == number


def test_sizes_that_are_known_need_no_message(eight_processes, spy):
    """And those that are wrong are an error in this process."""
    sent = spy(dist, 'all_gather')
    with distributed.training_on(60):
        assert distributed.slice_sizes(8) == [7, 8, 7, 8, 7, 8, 7, 8]
        with pytest.raises(ValueError, match='process 1 has 7 images of a batch of 60, expected 8'):
            distributed.slice_sizes(7)
    assert not sent
    distributed.slice_sizes(7)
    assert len(sent) == 1                               # the batch is not known here
    z = torch.rand(2, 2, 3)
    for sizes in ([2] * 7, [3] * 8):
        with pytest.raises(ValueError, match='one for each of 8 processes, 2 for process 1'):
            SupConLoss()(z, sizes=sizes)
    assert len(sent) == 1


def test_slices_of_unequal_size_are_gathered(eight_processes):
    sizes = [4, 3, 0, 0, 2, 2, 2, 1]
    x = torch.empty(3, 5, device=META, requires_grad=True)
    with Collectives() as collectives:
        rows = distributed.gather(x, sizes)
        rows.sum().backward()
    assert rows.shape == (14, 5) and x.grad.shape == x.shape
    assert [(name, number) for name, _, number in collectives.sent] == [('allgather', 20), ('allreduce', 70)]


@pytest.mark.parametrize('backends, device', [
    ('gloo', 'cpu'), ('mpi', 'cpu'), ('cpu:gloo,cuda:nccl', 'cpu'), ('nccl', 'cuda'), ('cuda:nccl', 'cuda')])
def test_numbers_are_sent_from_the_cpu_where_that_has_a_way(monkeypatch, backends, device):
    monkeypatch.setattr(dist, 'get_backend_config', lambda: backends)
    assert distributed._device_of_numbers() == device
