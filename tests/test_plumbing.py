"""Every option reaches what it names: a value lost on the way would go unnoticed in a run that merely ends well."""
import ctypes
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, train_one_epoch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import main_ce
import main_linear
import main_supcon
import methods
from datasets import classification_view, make_loader, views
from datasets.image_set import ImageSet
from datasets.loader import Batches
from datasets.views import View
from losses import SupConLoss
from util import arguments, checkpoints, errors, runs, training, weights

ROOT = Path(__file__).resolve().parent.parent
SMALL = [*TINY, '--max_samples', '40', '--epochs', '1', '--output_name', 'a']


def run(call, program, *arguments):
    status, out, err = call(program.main, *SMALL, *arguments)
    assert status == 0, err
    return out


@pytest.mark.parametrize('program', [main_supcon, main_ce])
def test_optimizer_options(call, spy, program):
    calls = spy(torch.optim, 'SGD')
    run(call, program, '--learning_rate', 0.123, '--weight_decay', 0.003, '--momentum', 0.7)
    (groups,), settings = calls[0]
    assert settings == {'momentum': 0.7, 'nesterov': False, 'fused': True}
    assert [(group['lr'], group['weight_decay']) for group in groups] == [(0.123, 0.003)]


@pytest.mark.parametrize('program', [main_supcon, main_ce])
def test_the_schedule_reaches_the_optimizer_at_every_step(call, spy, program):
    calls = spy(runs, 'set_learning_rate')
    run(call, program, '--epochs', 4, '--warm', '--cosine', '--learning_rate', 0.5)
    opt = program.parse_option([*SMALL, '--epochs', '4', '--warm', '--cosine', '--learning_rate', '0.5'])
    training.set_warmup(opt)
    expected = [training.learning_rate(opt, epoch, step, 2) for epoch in range(1, 5) for step in range(2)]
    assert [args[1] for args, _ in calls] == pytest.approx(expected)
    events = EventAccumulator('output/a/trial=0')
    events.Reload()
    assert [event.value for event in events.Scalars('learning_rate')] == pytest.approx(expected[1::2])


@pytest.mark.parametrize('method, positives', [('SupCon', 'class'), ('SimCLR', 'image')])
def test_temperature_and_method_reach_the_loss(call, spy, method, positives):
    called, made = spy(methods.SupConLoss, 'forward'), spy(methods, 'SupConLoss')
    run(call, main_supcon, '--method', method, '--temp', 0.23, '--base_temperature', 0.3, '--contrast_mode', 'one',
        '--summation_location', 'in', '--denominator_mode', 'one_positive', '--positives_cap', 2)
    made = inspect.signature(SupConLoss.__init__).bind(None, *made[0][0], **made[0][1]).arguments
    assert made.items() >= {'temperature': 0.23, 'base_temperature': 0.3, 'contrast_mode': 'one',
                            'summation_location': 'in', 'denominator_mode': 'one_positive', 'positives_cap': 2}.items()
    assert {kwargs['positives'] for _, kwargs in called} == {positives}
    features, labels = called[0][0][1:]
    assert features.shape[:2] == (32, 2) and len(labels) == 32


def test_both_views_of_a_image_stand_side_by_side(call, spy, monkeypatch):
    """Without random views, the two views of each image give the same features."""
    from datasets import evaluation_view
    monkeypatch.setattr(main_supcon, 'pretraining_view', evaluation_view)
    monkeypatch.setattr(main_supcon.SupConResNet, 'train', lambda self, mode=True: torch.nn.Module.train(self, False))
    called = spy(methods.SupConLoss, 'forward')
    run(call, main_supcon)
    features = called[0][0][1]
    torch.testing.assert_close(features[:, 0], features[:, 1])
    assert not torch.allclose(features[0, 0], features[1, 0], atol=1e-5)


def test_amp_is_bfloat16_where_the_cpu_has_it(call, monkeypatch):
    """PyTorch emulates it on others, ten times as slowly as float32."""
    from networks.resnet_big import BasicBlock
    seen = set()
    original = BasicBlock.forward

    def forward(self, x):
        result = original(self, x)
        seen.add(self.conv1(x).dtype)
        return result
    monkeypatch.setattr(BasicBlock, 'forward', forward)
    for has_bfloat16, options, expected in ((True, ['--amp'], torch.bfloat16), (False, ['--amp'], torch.float32),
                                            (True, [], torch.float32)):
        monkeypatch.setattr(training, 'cpu_has_bfloat16', lambda answer=has_bfloat16: answer)
        out = run(call, main_supcon, *options, '--overwrite')
        assert seen == {expected}
        assert ('--amp has no effect' in out) == (options == ['--amp'] and not has_bfloat16)
        seen.clear()


def test_amp_does_not_depend_on_the_thread():
    """DataParallel's threads know that autocast is on, but not its type."""
    import threading

    from networks.resnet_big import ResNet
    encoder, seen = ResNet('resnet18', width=0.0625), []
    encoder.precision = torch.bfloat16
    thread = threading.Thread(target=lambda: seen.append(encoder(torch.randn(2, 3, 8, 8)).dtype))
    thread.start()
    thread.join()
    assert seen == [torch.bfloat16]


def test_compile_on_several_gpus_is_rejected(rejected, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    rejected(main_ce.main, *SMALL, '--compile', words=['--compile', 'found 2'])


def test_network_options(call):
    run(call, main_supcon, '--feat_dim', 24, '--zero_init', '--width', 0.125)
    state = checkpoints.load_checkpoint('output/a/trial=0/last.ckpt')['model']
    assert state['head.2.weight'].shape == (24, 64) and state['encoder.conv1.weight'].shape[0] == 8
    opt = main_ce.parse_option(['--model', 'resnet18', '--width', '0.0625', '--zero_init'])
    opt.device, opt.num_classes = 'cpu', 2
    assert (main_ce.set_model(opt)[0].encoder.layer1[0].bn2.weight == 0).all()


def test_ce_weight_scales_the_gradient_of_the_classifier(call, spy):
    """--ce_weight 0.5 changes the classifier by what cross-entropy asks, halved."""
    calls = spy(methods.F, 'cross_entropy')
    original = torch.Tensor.backward
    seen = []
    torch.Tensor.backward = lambda self, *args: (seen.append(self.item()), original(self, *args))[1]
    try:
        losses = spy(methods.SupConLoss, 'forward')
        run(call, main_supcon, '--ce_weight', 0.5, '--batch_size', 40)
    finally:
        torch.Tensor.backward = original
    (logits, targets), keywords = calls[0]
    criterion = methods.SupConLoss(0.07)
    contrastive = criterion(losses[0][0][1], losses[0][0][2]).item()
    assert keywords == {'reduction': 'none'} and len(targets) == 80
    expected = contrastive + 0.5 * torch.nn.functional.cross_entropy(logits, targets).item()
    assert seen[0] == pytest.approx(expected, rel=1e-5)


def test_knn_remembers_training_images_and_asks_validation_images(call, spy):
    calls = spy(main_supcon, 'knn_accuracy')
    run(call, main_supcon, '--max_samples', 30, '--batch_size', 8)
    memory, memory_labels, features, labels = calls[0][0]
    data = main_supcon.load_images(arguments.defaults(dataset='digits', max_samples=30))
    assert memory_labels.tolist() == data.train.labels.tolist() and labels.tolist() == data.val.labels.tolist()
    assert not torch.equal(memory, features)


@pytest.mark.parametrize('program', [main_supcon, main_ce])
def test_evaluation_is_in_eval_mode(call, monkeypatch, program):
    modes = []
    original = training.forward_all

    def forward_all(model, loader, opt):
        result = original(model, loader, opt)
        modes.append(any(module.training for module in model.modules()))
        return result
    monkeypatch.setattr(training, 'forward_all', forward_all)
    run(call, program)
    assert modes and not any(modes)


def test_frequencies(call, tmp_path):
    out = run(call, main_supcon, '--epochs', 5, '--save_freq', 2, '--eval_freq', 2, '--print_freq', 1)
    assert sorted(file.name for file in (tmp_path / 'output/a/trial=0').glob('ckpt*')) == ['ckpt_epoch_2.ckpt',
                                                                                          'ckpt_epoch_4.ckpt']
    assert out.count('kNN accuracy') == 3 and out.count('Train: ') == 10        # after epochs 2, 4 and the last
    out = run(call, main_supcon, '--epochs', 3, '--eval_freq', 0, '--overwrite')
    assert out.count('kNN accuracy') == 1


def folder_of_colors(root, size=(20, 20), count=20):
    for c, name in enumerate(('a', 'b')):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new('RGB', size, (120 * c + i, 250 - 9 * i, 7 * i)).save(root / name / f'{i:02}.png')


def test_linear_evaluation_sees_the_images_as_pretraining_did(call, tmp_path):
    """Size, statistics and the held-out images come from the checkpoint, whatever this program's --seed."""
    folder_of_colors(tmp_path / 'images')
    network = ['--model', 'resnet18', '--width', 0.0625]
    data = ['--dataset', 'path', '--data_folder', 'images', '--epochs', 1, '--batch_size', 8]
    assert call(main_supcon.main, *data, *network, '--size', 16, '--seed', 5, '--output_name', 'a',
                '--mean', '(0.1, 0.2, 0.3)')[0] == 0
    status, _, err = call(main_linear.main, *data, '--ckpt', 'output/a/trial=0/last.ckpt', '--seed', 6,
                          '--output_name', 'b')
    assert status == 0, err
    ours, theirs = (json.loads((tmp_path / f'output/{name}/trial=0/options.json').read_text()) for name in 'ab')
    for name in ('size', 'mean', 'std', 'split_seed'):
        assert ours[name] == theirs[name]
    assert ours['split_seed'] == 5 and theirs['seed'] == 6
    # An exported file too, and a run that starts from weights, also where it resumes.
    start = [*data, *network, '--cosine', '--size', 16, '--output_name', 'c', '--ckpt', 'output/a/trial=0/last.ckpt']
    assert call(main_ce.main, *start, '--export', 'c.safetensors')[0] == 0
    status, out, _ = call(main_ce.main, *start, '--epochs', 2, '--resume')
    assert status == 0 and '--epochs 2, was 1: the learning rate goes on with the cosine of 2 epochs' in out
    assert call(main_linear.main, *data, '--ckpt', 'c.safetensors', '--output_name', 'd')[0] == 0
    for name in 'cd':
        found = json.loads((tmp_path / f'output/{name}/trial=0/options.json').read_text())
        assert (found['size'], found['split_seed'], found['seed']) == (16, 5, 0)


@pytest.mark.parametrize('n, bsz, sizes', [
    (41, 10, [10, 10, 10, 6, 5]), (132, 64, [64, 34, 34]), (135, 64, [64, 36, 35]), (136, 64, [64, 64, 8]),
    (5, 2, [2, 3]), (4, 3, [2, 2]), (7, 3, [3, 2, 2]), (7, 8, [7]), (128, 64, [64, 64])])
def test_a_tiny_last_batch_shares_the_images_of_the_one_before(n, bsz, sizes):
    """In training; as many steps, none larger. A last batch that is not tiny stays, as does evaluation's."""
    opt = arguments.defaults(batch_size=bsz, seed=0)
    batches = Batches(torch.zeros(n, dtype=torch.long), opt, train=True)
    assert [len(indices) for _, indices in batches] == batches.batch_sizes == sizes
    assert sorted(i for _, indices in batches for i in indices.tolist()) == list(range(n))
    rest = [n % bsz] * (n % bsz > 0)
    assert Batches(torch.zeros(n, dtype=torch.long), opt, train=False).batch_sizes == [bsz] * (n // bsz) + rest


def test_crops_that_a_policy_does_not_make():
    opt = arguments.parse('main_ce', '', ['--augment_policy', 'rand', '--crop_min', '0.5'])
    with pytest.raises(errors.UserError, match='--crop_min has no effect'):
        classification_view(opt)


def test_a_start_and_a_teacher_that_held_out_other_images():
    opt = arguments.defaults(split_seed=3)
    weights.hold_out_same_images({'dataset': 'path', 'split_seed': 4}, opt, '--ckpt x')     # of another dataset
    assert opt.split_seed == 3
    with pytest.raises(errors.UserError, match='held out other images'):
        weights.hold_out_same_images({'dataset': opt.dataset, 'split_seed': 4}, opt, '--ckpt x')


@pytest.mark.parametrize('arguments, words', [
    (['--batch_size', '1'], ['--batch_size', 'at least 2']),
    (['--batch_size', '9' * 30], ['--batch_size', 'at most']),
    (['--learning_rate', '1e300'], ['--lr', 'at most']),
    (['--weight_decay', '1e300'], ['--weight_decay', 'at most']),
    (['--epochs', '9' * 30], ['--epochs', 'at most']),
    (['--mean', '0 0 1e300'], ['--mean', 'at most']),
    (['--std', '1 1 1e-40'], ['--std', 'at least']),
    (['--output_name', 'é' * 150], ['--output_name', 'at most 200']),
    (['--max_samples', '1'], ['1 training image', 'at least 2'])])
def test_extreme_options_are_rejected(rejected, arguments, words):
    rejected(main_ce.main, *TINY, *arguments, words=words)


def test_a_file_in_the_place_of_the_run(rejected, tmp_path):
    (tmp_path / 'output' / 'a').mkdir(parents=True)
    (tmp_path / 'output' / 'a' / 'trial=0').write_text('x')
    rejected(main_ce.main, *SMALL, words=['output/a/trial=0'])


def test_resume_keeps_earlier_checkpoints(call, rejected, tmp_path):
    run(call, main_ce, '--save_freq', 1)
    (tmp_path / 'output/a/trial=0/last.ckpt').unlink()
    rejected(main_ce.main, *SMALL, '--resume', words=['--resume', 'last.ckpt: no such', 'ckpt_epoch_1.ckpt'])
    (tmp_path / 'output/a/trial=0/ckpt_epoch_1.ckpt').unlink()
    run(call, main_ce, '--resume')                              # stopped before its first checkpoint: from the start


@pytest.mark.parametrize('program, arguments', [
    (main_supcon, []), (main_supcon, ['--method', 'SimCLR', '--ce_weight', '1']),
    (main_supcon, ['--moco', '--moco_k', '8']), (main_supcon, ['--method', 'GenSCL', '--mix', 'mixup_cutmix']),
    (main_ce, []), (main_ce, ['--mix', 'mixup_cutmix'])])
def test_training_waits_for_the_device_only_to_print(monkeypatch, program, arguments):
    """No step but the last of three, which prints, asks for a tensor's value; tests/test_losses.py has the loss."""
    opt = program.parse_option([*TINY, '--batch_size', '8', *arguments])
    opt.device = 'cpu'
    monkeypatch.setattr(methods.SupConLoss, 'forward', lambda self, features, *rest, **more: features.square().sum())
    monkeypatch.setattr(methods.GenSupConLoss, 'forward', lambda self, features, *rest: features[0].square().sum())
    # PyTorch's looks at the labels, on CPUs only.
    monkeypatch.setattr(torch.nn.functional, 'one_hot', lambda labels, classes: torch.eye(classes)[labels])
    monkeypatch.setattr(losses, '_check_labels', lambda *_: None)               # asks on CPUs only too
    waited, step = [], None                             # None: not yet in training

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket._qualified_op_name.split('::')[1]
            masks = name.startswith('index') and any(torch.is_tensor(index) and index.dtype == torch.bool for index in (
                args[1] if isinstance(args[1], (list, tuple)) else [args[1]]))
            asks = masks or name in ('_local_scalar_dense', 'nonzero', 'equal', 'masked_select', 'item')
            if asks and step is not None:
                waited.append(step)
            return func(*args, **(kwargs or {}))

    class Loader:
        __len__ = (3).__int__
        batch_sizes = [8] * 3

        def set_epoch(self, epoch, step):
            pass

        def __iter__(self):
            nonlocal step
            views = 2 if program is main_supcon else 1
            for number in range(3):
                step = number
                yield torch.rand(8 * views, 3, 8, 8), torch.zeros(8, dtype=torch.long)
    with Watch():
        train_one_epoch(program, opt, Loader(), 10)
    assert set(waited) == {2}


def test_a_long_run_draws_compiled_views(monkeypatch, spy):
    """On a CPU: a GPU's are computed by a thread, where compiling would reset the random numbers of the step."""
    monkeypatch.setattr(views, 'compiled_operations', lambda device: 'compiled')
    images = ImageSet(torch.zeros(2**10, 32, 32, 3, dtype=torch.uint8).numpy(), torch.zeros(2**10).long(), ['a'])
    for epochs, train, expected in ((2**12, True, 'compiled'), (2**12, False, views.OPERATIONS),
                                    (2**12 - 1, True, views.OPERATIONS)):
        opt = arguments.defaults(device='cpu', loader='batched', epochs=epochs, num_workers=0)
        view = View(32, (0.5,) * 3, (0.2,) * 3, crop=(0.2, 1.))
        assert make_loader(images, view, opt, 2, train).operations is expected
        opt.device = 'meta'
        assert make_loader(images, view, opt, 2, train).operations is views.OPERATIONS


def test_convolutions_have_the_channels_side_by_side(call, spy):
    prepared = spy(training.Network, '__init__')
    run(call, main_supcon, '--moco', '--moco_k', '32')
    for network in (prepared[0][0][1], prepared[0][0][1].moco.network):
        assert network.encoder.conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='needs the GNU C library')
def test_freed_memory_is_kept():
    """After a few a large tensor takes the pages of one that was freed; without the setting they always are new."""
    code = ("import resource, torch; from util import memory; {}\n"
            "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "counts = []\n"
            "for i in range(40):\n"
            "    before = faults(); torch.ones(2**24); counts.append(faults() - before)\n"
            "print(min(counts))")
    counts = [int(subprocess.run([sys.executable, '-c', code.format(line)], capture_output=True, text=True, check=True,
                                 cwd=ROOT).stdout) for line in ('memory.keep_freed_memory()', '0')]
    assert counts[0] < 100 < counts[1]
