"""What a checkpoint is made of: what the programs and the original ones write loads, all else is one clear line."""
import argparse
import codecs
import collections
import copy
import io
import os
import pickle
import resource
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from numpy._core import multiarray
from torch import _utils

import main_ce
import main_linear
import main_supcon
from datasets.loader import Loader
from networks.timm_encoder import timm_model
from scripts import evaluate
from util import arguments, checkpoints, teachers, training
from util.errors import UserError
from util.runs import Run

LAST = Path('output/a/trial=0/last.ckpt')
DIGITS = [str(i) for i in range(10)]
RUN = [*TINY, '--mean', '0.3,0.3,0.3', '--std', '0.4,0.4,0.4', '--output_name', 'a']
NAN = float('nan')


class Reduced:
    """What a pickle calls this function for, and then gives a state, and items to."""

    def __init__(self, function, *args, state=None, items=None):
        self.parts = function, args, state, None, items and iter(items.items())

    def __reduce__(self):
        return self.parts


def stored(state, **settings):
    buffer = io.BytesIO()
    torch.save(state, buffer, **settings)
    return buffer.getvalue()


def zipped(parts, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', compression) as archive:
        for name, content in parts:
            archive.writestr(name, content)
    return buffer.getvalue()


def members(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def with_pickle(operations):
    """A file of PyTorch whose pickle is made of these operations."""
    return zipped([('archive/data.pkl', b'\x80\x02' + operations + b'.'), ('archive/version', b'3\n')])


def endless(kind=list):
    """Lists in lists that are small in a file, and would be of any length as a text."""
    value = kind([1])
    for _ in range(60):
        value = kind([value] * 10)
    return value


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with a whole run of main_ce.py: output/a."""
    folder, before = tmp_path_factory.mktemp('run'), os.getcwd()
    os.chdir(folder)
    try:
        main_ce.main([*RUN, '--epochs', '1'])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def whole(runs, tmp_path, monkeypatch):
    """The checkpoint of a run, and an empty folder for others."""
    monkeypatch.chdir(tmp_path)
    LAST.parent.mkdir(parents=True)
    return torch.load(runs / LAST, weights_only=True)


def resume(*options):
    opt = main_ce.parse_option([*RUN, '--epochs', '2', '--resume', *options])
    run = Run(opt)
    training.set_device(opt)
    opt.num_classes = 10
    model, _ = main_ce.set_model(opt)
    optimizer = training.set_optimizer(opt, model)
    run.restore(model, optimizer, training.set_scaler(opt))
    return run, model, optimizer


def evaluated():
    opt = main_ce.parse_option([*RUN, '--epochs', '2', '--evaluate'])
    run = Run(opt)
    training.set_device(opt)
    opt.num_classes = 10
    model, _ = main_ce.set_model(opt)
    run.load(model, DIGITS)


def encoder():
    opt, checkpoint = main_linear.parse_option(['--dataset', 'digits', '--ckpt', str(LAST)])
    opt.num_classes = 10
    return main_linear.set_model(opt, checkpoint)


def teacher(*options):
    opt = main_supcon.parse_option([*RUN, '--method', 'GenSCL', '--KD', '--teacher_path', str(LAST.parent), *options])
    opt.device = 'cpu'
    batch = torch.zeros(2, 3, opt.size or 8, opt.size or 8), torch.zeros(1, dtype=torch.long)
    return teachers.load_teacher(teachers.read_teacher(opt), opt, DIGITS, [batch])


def script():
    sys.argv = ['evaluate.py', '--ckpt', str(LAST)]
    evaluate.main()


READERS = [resume, evaluated, encoder, teacher, script]


def rejected(read, content, *words):
    """Assert that a checkpoint, a dict or the bytes of a file, is an error of less than 700 letters with `words`."""
    LAST.write_bytes(content if isinstance(content, bytes) else stored(content))
    with pytest.raises(UserError) as error:
        read()
    line = str(error.value)
    assert len(line) < 700, line
    for word in (str(LAST), *words):
        assert word in line, line


# NumPy's numbers, which the original programs write

def float64(kind='f8', order='<', content='x' * 8):
    dtype = Reduced(np.dtype, kind, False, True, state=(3, order, None, None, None, -1, -1, 0))
    return Reduced(multiarray.scalar, dtype, Reduced(codecs.encode, content, 'latin1'))


@pytest.mark.parametrize('rename', [
    lambda content: content, lambda content: content.replace(b'numpy._core.multi', b'numpy.core.multi'),
    lambda content: content.replace(b'X\x02\x00\x00\x00f8q', b'X\x02\x00\x00\x00f8q')])
def test_a_number_of_numpy_1_or_2_is_a_float(tmp_path, rename):
    file, rate = tmp_path / 'x.pth', 0.05 * 0.1 ** np.sum(np.asarray([1, 2]) < 2)
    parts = members(stored({'model': {}, 'opt': argparse.Namespace(a=1), 'rates': [rate, np.float64(3), rate]}))
    file.write_bytes(zipped([(name, rename(content)) for name, content in parts]))
    checkpoint = checkpoints.load_checkpoint(file)
    assert checkpoint['rates'] == [rate, 3, rate] and type(checkpoint['rates'][0]) is float
    assert checkpoint['opt'] == {'a': 1}


@pytest.mark.parametrize('value', [
    float64('i8'), float64('O'), float64('V100000'), float64('U9'), float64(order='>'), float64(content='x' * 7),
    float64(content='x' * 9), np.float32(3), np.int64(1), np.ones(3), np.array([None], dtype=object),
    Reduced(multiarray.scalar, 'f8', Reduced(codecs.encode, 'x' * 8, 'latin1')),
    Reduced(codecs.encode, 'x' * 8, 'hex'), Reduced(codecs.encode, 'x' * 8, 'utf-32'), Reduced(codecs.encode, 'x'),
    Reduced(codecs.encode, Reduced(codecs.encode, 'x', 'latin1'), 'latin1')])
def test_no_other_number_of_numpy(whole, value):
    rejected(encoder, {**whole, 'best_acc': value}, 'not a readable checkpoint')


# Pickles that PyTorch's reader lets through

STORAGE = b'X\x07\x00\x00\x00storagectorch\nFloatStorage\n%sX\x03\x00\x00\x00cpuK\x04tQ'


@pytest.mark.parametrize('part', [
    Reduced(torch.Tensor, 1000), Reduced(bytearray, 10**12), Reduced(collections.Counter, ['a']),
    Reduced(collections.OrderedDict, [('a', 1)]), Reduced(complex, 1, 2), {1, 2}, torch.float32,
    Reduced(_utils._rebuild_meta_tensor_no_storage, torch.float32, (4,), (1,), False),
    torch.zeros(3, device='meta'), torch.zeros(3).to_sparse(), torch.zeros(3, 3).to_sparse_csr(),
    torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), torch.zeros(3).to(torch.float8_e4m3fn),
    torch.zeros(3, dtype=torch.uint16), torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    torch.zeros(3, dtype=torch.complex64), torch.nn.Linear(1, 1)], ids=lambda part: type(part).__name__)
def test_nothing_but_plain_tensors_and_values(whole, part):
    for state in ({**whole, 'model': {**whole['model'], 'fc.weight': part}}, {**whole, 'opt': part}):
        rejected(encoder, state, 'not a readable checkpoint')


def test_nested_encodings_do_not_fill_the_memory(whole):
    text = Reduced(codecs.encode, 'x' * 100, 'latin1')
    for _ in range(30):
        text = Reduced(codecs.encode, text, 'hex')
    rejected(encoder, {**whole, 'opt': text}, 'not a readable checkpoint')


@pytest.mark.parametrize('operations', [
    b'})' + b'\x85' * 200_000 + b'K\x01s', b'})' + b'q\x01h\x01\x86' * 60 + b'K\x01s',
    b'}()' + b'q\x01h\x01\x86' * 60 + b'K\x01u', b')' + b'q\x01h\x01\x86' * 60 + b')R', b'K\x05)\x81',
    b'ccollections\nOrderedDict\n)R])' + b'\x85' * 200_000 + b'K\x01\x86ab',
    b'cargparse\nNamespace\n)\x81])' + b'\x85' * 200_000 + b'K\x01\x86ab',
    b'(' + STORAGE % (b')' + b'\x85' * 200_000),
    b'}(' + b'\x8a\x09' + b'\xff' * 8 + b'\x1fK\x01u', b'K\x05Q', b')Q', b'h\x05',
    b'cos\nsystem\n', b'c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR', b'c' + b'a' * 10**5 + b'\n\x1b[31m\n', b''],
    ids=range(16))
def test_pickles_made_by_hand(whole, operations):
    """They would crash the program, or go on forever, when a key is hashed or a message written."""
    rejected(encoder, with_pickle(operations), 'not a readable checkpoint')


def test_methods_that_a_file_replaces_are_not_called(whole):
    for name in ('items', 'keys', 'values', 'get'):
        def replaced(items, by, name=name):
            return Reduced(collections.OrderedDict, state={name: by}, items=items)
        for by in (5, collections.OrderedDict):
            LAST.write_bytes(stored(replaced({**whole, **{
                key: replaced(whole[key], by) for key in ('model', 'opt', 'optimizer')}}, by)))
            evaluated()
            LAST.write_bytes(stored(replaced({**whole, **{
                key: replaced(whole[key], by) for key in ('model', 'opt', 'optimizer')}}, by)))
            resume()


# Files of PyTorch before 1.6

def test_files_of_old_versions(whole):
    content = stored(whole, _use_new_zipfile_serialization=False)
    LAST.write_bytes(content)
    evaluated()
    found = checkpoints.load_checkpoint(LAST)['model']
    assert all(torch.equal(found[name], value) for name, value in whole['model'].items())
    for cut in (100, 5000):
        rejected(evaluated, content[:-cut], 'not a readable checkpoint')


def old_file(numel, keys):
    """A file of an old version with a parameter of 1,000 floats, of which there are no bytes."""
    parts = torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}
    tensor = (b'ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000'
              b'X\x03\x00\x00\x00cpu' + numel + b'NtQK\x00M\xe8\x03\x85K\x01\x85\x89NtR')
    state = b'\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00a' + tensor + b'ss.'
    return b''.join(pickle.dumps(part, 2) for part in parts) + state + pickle.dumps(keys, 2) + b'\xff' * 10**5


def test_old_files_do_not_show_memory(tmp_path):
    """Neither do storages that the file does not fill, nor those that would grow to what a tensor needs."""
    file = tmp_path / 'x.pth'
    blocks = [torch.full((1000,), 7.) for _ in range(100)]
    del blocks
    file.write_bytes(old_file(b'M\xe8\x03', []))
    assert checkpoints.load_checkpoint(file)['model']['a'].isnan().all()
    large = b'J\x00\x00\x00\x40', b'\x8a\x06\x00\x00\x00\x00\x00\x01'
    for numel in (b'K\x0a', *large, b'J\xff\xff\xff\xff', b']', b'N'):
        file.write_bytes(old_file(numel, []))
        with pytest.raises(UserError, match='not a readable checkpoint'):
            checkpoints.load_checkpoint(file)


# Zip files

def test_zip_files_that_are_not_as_pytorch_writes_them(whole):
    parts = members(stored(whole))
    content = zipped(parts)
    LAST.write_bytes(content)
    evaluated()
    directory = content.rindex(b'PK\x05\x06')
    short = [(name, part[:-4] if name.endswith('data/0') else part) for name, part in parts]
    for changed in (zipped(parts, zipfile.ZIP_DEFLATED), zipped(parts, zipfile.ZIP_BZIP2), zipped(short),
                    zipped(parts[1:]), content[:-2] + b'\x01\x00x', content + b'x', b'x' + content, content[:-30],
                    content[:directory + 16] + struct.pack('<L', 5) + content[directory + 20:],
                    zipped([*parts, ('archive/DATA.PKL', pickle.dumps(open, 2))])):
        rejected(evaluated, changed, 'not a readable checkpoint')


def test_a_zip_file_has_one_list_of_its_parts(whole):
    """Python reads the list before its end, where all is stored, PyTorch the one its end names, where all inflates."""
    parts = members(stored(whole))
    inflating, harmless = zipped(parts, zipfile.ZIP_DEFLATED), zipped([(name, b'') for name, _ in parts])
    size, start = struct.unpack('<2L', inflating[-10:-2])
    assert size == struct.unpack('<L', harmless[-10:-6])[0]
    rejected(evaluated, inflating[:-22] + harmless[:-22] + inflating[-22:], 'not a readable checkpoint')


# What the values are

STRANGE = {'endless': endless(), 'endless tuple': endless(tuple), 'tensor': torch.ones(3), 'text': 'x' * 10**5,
           'huge': 2**200, 'nan': NAN, 'list': [1], 'names': {5: {}}, 'control': '\x1b[2J\n', 'none': None}
STRANGE['in itself'] = []
STRANGE['in itself'].append(STRANGE['in itself'])


@pytest.mark.parametrize('kind', STRANGE)
def test_values_of_any_kind(whole, kind):
    value = STRANGE[kind]
    may_be = {'wandb': ('none', 'text', 'control'), **dict.fromkeys(('scaler', 'classes', 'opt'), ('none',))}
    keys = 'epoch', 'step', 'best_acc', 'meters', 'optimizer', 'scaler', 'wandb', 'model', 'classes', 'opt'
    for name in keys[::5] if 'endless' in kind else keys:               # to be sure that it has no end takes a moment
        if kind not in may_be.get(name, ()):
            rejected(encoder if name in ('model', 'classes', 'opt') else resume, {**whole, name: value})
    if kind in ('endless', 'tensor', 'in itself'):
        rejected(encoder, {**whole, 'opt': {**whole['opt'], 'warm_epochs': value}}, 'options are corrupted')


SCALER = {'scale': 8., 'growth_factor': 2., 'backoff_factor': 0.5, 'growth_interval': 2000, '_growth_tracker': 0}


@pytest.mark.parametrize('change', [
    {'epoch': 1.}, {'epoch': True}, {'epoch': '1'}, {'epoch': -1}, {'epoch': 2**40}, {'step': 1.}, {'step': 2**40},
    {'step': 2, 'meters': {}}, *({'step': 3, 'meters': dict.fromkeys(names, (1., 96))} for names in (
        ['x'], ['train_loss'], ['train_acc', 'train_loss'], ['loss', 'contrastive_acc'])), {'optimizer': torch.ones(3)},
    {'best_acc': 101}, {'best_acc': -1}, {'meters': {'train_loss': (NAN, 1)}}, {'meters': {'train_loss': (1., 0.5)}},
    {'meters': {'train_loss': (1., -1)}}, {'scaler': {'scale': 1.}}, {'scaler': {**SCALER, 'scale': 'x'}},
    {'scaler': {**SCALER, 'scale': NAN}}, {'scaler': {**SCALER, 'growth_interval': 0.5}}, {'opt': {5: 6}},
    {'opt': 'x'}, {'model': {}}, {'model': {'fc.weight': {}}}, {'classes': [1]}, {'classes': 'x'}])
def test_numbers_that_no_run_has(whole, change):
    rejected(resume, {**whole, **change})


def test_the_scaler_of_float16_loads(whole):
    scaler = torch.amp.GradScaler('cpu')
    checkpoints.load_scaler(scaler, SCALER)
    assert scaler.state_dict() == SCALER
    checkpoints.load_scaler(torch.amp.GradScaler('cpu', enabled=False), SCALER)
    LAST.write_bytes(stored({**whole, 'scaler': SCALER}))
    resume()


def test_an_option_newer_than_the_checkpoint_was_at_its_default(whole):
    for name in ('sampler', 'images_per_class', 'label_fraction', 'encoder_lr', 'timm_pretrained', 'amp'):
        del whole['opt'][name]
    LAST.write_bytes(stored(whole))
    resume()
    for options in (['--sampler', 'class_balanced'], ['--label_fraction', '0.5'], ['--encoder_lr', '0.01'], ['--amp']):
        with pytest.raises(UserError, match=f'{options[0]} .*, was (shuffle|None|False)'):
            resume(*options)


def test_an_epoch_that_was_over_before_features_had_a_spread(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = [*TINY, '--output_name', 'a']
    assert call(main_supcon.main, *run, '--epochs', 1)[0] == 0
    state = torch.load(LAST, weights_only=True)
    meters = {'loss': (6., 1), 'contrastive_acc': (10., 1)}
    LAST.write_bytes(stored({**state, 'epoch': 0, 'step': 3, 'meters': meters}))
    status, _, err = call(main_supcon.main, *run, '--epochs', 1, '--resume')
    assert status == 0, err


def test_a_step_after_the_end_of_the_epoch(call, whole):
    """The last one is none: then the epoch is over."""
    loader = Loader(torch.zeros(96), arguments.defaults(batch_size=32), train=True)
    loader.set_epoch(2, 3)
    with pytest.raises(UserError, match='step'):
        loader.set_epoch(2, 4)
    LAST.write_bytes(stored({**whole, 'step': 99, 'meters': dict.fromkeys(['train_loss', 'train_acc'], (1., 1))}))
    status, _, err = call(main_ce.main, *RUN, '--epochs', 2, '--resume')
    assert status == 2 and err.count('\n') == 1 and '99' in err and '3 steps' in err


# Parameters

@pytest.mark.parametrize('value', [NAN, float('inf')])
@pytest.mark.parametrize('name', ['fc.weight', 'encoder.layer1.0.conv1.weight', 'encoder.bn1.running_var'])
@pytest.mark.parametrize('read', READERS)
def test_parameters_that_are_not_finite_are_named(whole, read, name, value):
    tensor = whole['model'][name].clone()
    tensor.flatten()[-1:].fill_(value)
    tensor[-1] = value
    if read is encoder and name == 'fc.weight':
        return                                          # it does not use that
    rejected(read, {**whole, 'model': {**whole['model'], name: tensor}}, name.removeprefix('encoder.'), 'finite')


def test_a_parameter_that_becomes_infinite_is_named(whole):
    for dtype, factor in ((torch.float64, 1e300), (torch.float16, 0.5), (torch.bfloat16, 0.5), (torch.float64, 0.5)):
        tensor = torch.ones_like(whole['model']['fc.weight'], dtype=dtype) * factor
        state = {**whole, 'model': {**whole['model'], 'fc.weight': tensor}}
        if factor > 1:
            rejected(evaluated, state, 'fc.weight', 'finite')
        else:
            LAST.write_bytes(stored(state))
            evaluated()


@pytest.mark.parametrize('dtype', [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_parameters_of_another_type_are_named(whole, dtype):
    for name in ('encoder.conv1.weight', 'encoder.bn1.num_batches_tracked'):
        value = whole['model'][name]
        if value.dtype != dtype:
            rejected(evaluated, {**whole, 'model': {**whole['model'], name: value.to(dtype)}}, name, str(dtype))
    rejected(evaluated, {**whole, 'model': {**whole['model'], 'module.fc.weight': torch.zeros(3)}}, 'not a checkpoint')


def test_a_tiny_file_that_names_a_gigantic_network_takes_no_memory(whole):
    """11 GB for resnet18 of width 16, 4 GB for the one of timm."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    for options in ({'width': 16.}, {'model': 'timm/vit_giant_patch14_clip_224', 'width': 1.}):
        state = {**whole, 'opt': {**whole['opt'], 'size': 224, **options}}
        resource.setrlimit(resource.RLIMIT_AS, (now + 2 * 2**30, limits[1]))
        try:
            for read in (encoder, lambda: teacher('--size', '224')):
                rejected(read, state, 'another network')
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_network_built_twice_draws_the_same_numbers_and_reports_it_once(whole, spy, capsys):
    """On the meta device first, to compare shapes."""
    model = timm_model('vit_tiny_patch16_224', 10, 'cifar', 32)
    LAST.write_bytes(stored({'state_dict': model.state_dict()}))
    capsys.readouterr()
    torch.manual_seed(3)
    teacher('--teacher_kind', 'vit_tiny_patch16_224', '--size', '32')
    after = torch.rand(1)
    assert capsys.readouterr().out.count('keeps its first layers') == 1
    torch.manual_seed(3)
    timm_model('vit_tiny_patch16_224', 10, 'cifar', 32)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize('classes', [3, 'x', [1], {'a': 1}, torch.ones(2), endless(), ['x' * 10**5] * 10, DIGITS[::-1]])
def test_classes_of_a_teacher_of_timm(whole, classes):
    state = timm_model('resnet10t', 10, 'cifar', 8).state_dict()
    rejected(lambda: teacher('--teacher_kind', 'resnet10t'), {'state_dict': state, 'classes': classes})


def test_a_teacher_of_timm_with_other_things_beside_it(whole):
    state = timm_model('resnet10t', 10, 'cifar', 8).state_dict()
    LAST.write_bytes(stored({'state_dict': state, 'classes': DIGITS, 'opt': 5, 'epoch': 'x', 'optimizer': [1],
                             'schedule': collections.Counter([3, 3, 5]), 'device': torch.device('cuda', 1)}))
    teacher('--teacher_kind', 'resnet10t')


# Optimizers

OPTIMIZERS = {'SGD': [], 'plain': ['--momentum', '0'], 'nesterov': ['--nesterov'], 'LARS': ['--LARS'],
              'two groups': ['--no_bias_decay'], **{
                  kind: ['--optim_kind', kind] for kind in ('Adam', 'AdamW', 'RMSProp', 'RMSPropTF')},
              'RMSProp without momentum': ['--optim_kind', 'RMSProp', '--momentum', '0']}


def optimizer_of(*options, steps=1):
    """An optimizer of a small network, after a step."""
    opt = main_ce.parse_option([*TINY, *options])
    opt.device = 'cpu'
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5))
    optimizer = training.set_optimizer(opt, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(steps):
        optimizer.step()
    return optimizer


@pytest.mark.parametrize('kind', OPTIMIZERS)
def test_an_optimizer_loads_as_it_was_saved(tmp_path, kind):
    for steps in (0, 2):
        saved, loaded = (optimizer_of(*OPTIMIZERS[kind], steps=steps * i) for i in (1, 0))
        state = torch.load(io.BytesIO(stored(saved.state_dict())), weights_only=True)
        checkpoints.load_optimizer(loaded, copy.deepcopy(state), started=steps > 0)
        found = loaded.state_dict()
        assert found['param_groups'] == saved.state_dict()['param_groups']
        for index, values in saved.state_dict()['state'].items():
            for name, value in values.items():
                assert value is None or torch.equal(found['state'][index][name], value)


@pytest.mark.parametrize('kind', [kind for kind in OPTIMIZERS if kind != 'plain'])
def test_a_part_of_an_optimizer_is_none(kind):
    """What is missing would restart without a word."""
    def fails(change, match=''):
        state = copy.deepcopy(optimizer_of(*OPTIMIZERS[kind]).state_dict())
        change(state['state'])
        with pytest.raises((AttributeError, TypeError, ValueError), match=match):
            checkpoints.load_optimizer(optimizer_of(*OPTIMIZERS[kind], steps=0), state)
    names = list(optimizer_of(*OPTIMIZERS[kind]).state_dict()['state'][0])
    fails(lambda state: state.clear(), 'parameter 0')
    fails(lambda state: state.pop(0), 'parameter 0')
    fails(lambda state: state.pop(3), 'parameter 3')
    fails(lambda state: state.update({4: state[0]}), 'other parameters')
    fails(lambda state: state.update({'a': state[0]}), 'other parameters')
    fails(lambda state: state[0].update(more=torch.ones(3)), 'more')
    for name in names:
        fails(lambda state, name=name: state[2].pop(name), 'parameter 2')
        for value in (None, 5, 'x', [], torch.ones(7), torch.tensor(NAN), torch.ones(1, dtype=torch.int64)):
            fails(lambda state, name=name, value=value: state[2].update({name: value}), 'parameter 2')
        fails(lambda state, name=name: state[0].update({name: state[0][name] * NAN}), name)
        fails(lambda state, name=name: state[0].update({name: state[0][name].int()}), name)
    if 'step' in names:
        fails(lambda state: state[0].update(step=torch.tensor(-5.)), 'step')


@pytest.mark.parametrize('change', [
    {'params': [0, 0, 0, 0]}, {'params': [3, 2, 1, 0]}, {'params': None}, {'lr': 'x'}, {'lr': NAN}, {'lr': -1.},
    {'lr': None}, {'lr': torch.ones(3)}])
def test_groups_of_an_optimizer(change):
    state = copy.deepcopy(optimizer_of().state_dict())
    state['param_groups'][0].update(change)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        checkpoints.load_optimizer(optimizer_of(steps=0), state)


def test_parameters_without_gradient_have_no_state():
    """As some of timm's backbones have: they alone may have none."""
    state = copy.deepcopy(optimizer_of('--optim_kind', 'Adam').state_dict())
    del state['state'][1]
    optimizer = optimizer_of('--optim_kind', 'Adam', steps=0)
    first, second, *_ = optimizer.param_groups[0]['params']
    with pytest.raises(ValueError, match='parameter 1'):
        checkpoints.load_optimizer(optimizer, copy.deepcopy(state), optional={first})
    checkpoints.load_optimizer(optimizer, state, optional={second})
    assert second not in optimizer.state and first in optimizer.state


@pytest.mark.parametrize('before, after, works', [
    ('SGD', 'plain', True), ('plain', 'SGD', True), ('SGD', 'nesterov', True), ('SGD', 'LARS', True),
    ('RMSProp', 'RMSProp without momentum', True), ('RMSProp without momentum', 'RMSProp', False),
    ('SGD', 'Adam', False), ('Adam', 'SGD', False), ('Adam', 'AdamW', True)])
def test_an_optimizer_with_other_settings(before, after, works):
    """As --force allows: it resumes, or it is an error before the first step."""
    optimizer = optimizer_of(*OPTIMIZERS[after], steps=0)
    state = copy.deepcopy(optimizer_of(*OPTIMIZERS[before]).state_dict())
    if len(optimizer.param_groups) != len(state['param_groups']):
        works = False
    if works:
        checkpoints.load_optimizer(optimizer, state)
        for parameter in optimizer.param_groups[0]['params']:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    else:
        with pytest.raises((KeyError, ValueError)):
            checkpoints.load_optimizer(optimizer, state)


def test_states_that_share_memory_do_not_share_it_afterwards():
    state, memory = copy.deepcopy(optimizer_of().state_dict()), torch.ones(1000)
    for values in state['state'].values():
        values['momentum_buffer'] = memory[:values['momentum_buffer'].numel()].view(values['momentum_buffer'].shape)
    state['state'][1]['momentum_buffer'] = torch.ones(1).expand(4)
    optimizer = optimizer_of(steps=0)
    checkpoints.load_optimizer(optimizer, state)
    buffers = [values['momentum_buffer'] for values in optimizer.state_dict()['state'].values()]
    buffers[0].zero_()
    buffers[1][0] = 5
    assert buffers[1][1:].eq(1).all() and all(buffer.eq(1).all() for buffer in buffers[2:]) and memory.eq(1).all()


def test_a_resumed_run_names_what_is_missing(whole):
    optimizer = whole['optimizer']
    for state in ({}, {**optimizer['state'], 0: {}}, {index: optimizer['state'][index] for index in (0, 1)}):
        rejected(resume, {**whole, 'optimizer': {**optimizer, 'state': state}}, 'no valid checkpoint', 'parameter')
    LAST.write_bytes(stored({**whole, 'epoch': 0, 'optimizer': {**optimizer, 'state': {}}}))
    resume()                                            # before its first step
    LAST.write_bytes(stored(whole))
    resume()
