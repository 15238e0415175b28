import re
import subprocess
import sys
from pathlib import Path

import pytest

import main_ce
import main_linear
import main_supcon
from util import arguments, options

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {'main_supcon': main_supcon, 'main_ce': main_ce, 'main_linear': main_linear}


def parse(program, *words):
    required = ('--ckpt', 'x') if program == 'main_linear' else ()
    return arguments.parse(program, '', [*required, *words])


@pytest.mark.parametrize('program, expected', [         # the table of the original programs' defaults
    ('main_supcon', {'epochs': 1000, 'batch_size': 256, 'learning_rate': 0.05, 'lr_decay_epochs': [700, 800, 900],
                     'lr_decay_rate': 0.1, 'weight_decay': 1e-4, 'momentum': 0.9, 'temp': 0.07, 'model': 'resnet50',
                     'print_freq': 10, 'save_freq': 50, 'dataset': 'cifar10', 'method': 'SupCon', 'trial': '0',
                     'cosine': False, 'warm': False, 'syncBN': False}),
    ('main_ce', {'epochs': 500, 'batch_size': 256, 'learning_rate': 0.2, 'lr_decay_epochs': [350, 400, 450],
                 'lr_decay_rate': 0.1, 'weight_decay': 1e-4, 'momentum': 0.9, 'model': 'resnet50', 'print_freq': 10,
                 'save_freq': 50}),
    ('main_linear', {'epochs': 100, 'batch_size': 256, 'learning_rate': 0.1, 'lr_decay_epochs': [60, 75, 90],
                     'lr_decay_rate': 0.2, 'weight_decay': 0, 'momentum': 0.9, 'print_freq': 10, 'save_freq': 50}),
])
def test_defaults(monkeypatch, program, expected):
    monkeypatch.setattr(options.os, 'cpu_count', lambda: 64)
    opt = vars(parse(program))
    assert {name: opt[name] for name in expected} == expected
    assert opt['num_workers'] == 64


@pytest.mark.parametrize('program', PROGRAMS)
def test_help_needs_no_slow_imports(program):
    """`--help` answers at once: PyTorch alone takes seconds to import."""
    code = f"""import runpy, sys
sys.argv = ['{program}.py', '--lr', '0.1', '--help']
try:
    runpy.run_path('{program}.py', run_name='__main__')
finally:
    print(sorted({{'torch', 'numpy', 'PIL', 'sklearn', 'tqdm'}} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.endswith('\n[]\n') and '--learning_rate LR' in done.stdout


def test_garbage_collection_sees_nothing_that_is_imported():
    """Looking through the objects of all imports takes half a second while importing, and a second at exit."""
    code = """import gc
from util import errors, options
options.answer_early('main_ce', '')
ballast, before = [[] for _ in range(1000)], gc.isenabled()
errors.run(lambda: print(before, gc.isenabled(), gc.get_freeze_count() > 1000))"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == 'False True True\n', done.stderr


def test_never_more_workers_than_cores(monkeypatch):
    monkeypatch.setattr(options.os, 'cpu_count', lambda: 2)
    assert parse('main_ce').num_workers == 2
    assert parse('main_ce', '--num_workers', '1').num_workers == 1


@pytest.mark.parametrize('program', PROGRAMS)
@pytest.mark.parametrize('spelling, name, value', [
    ('--learning_rate 0.5', 'learning_rate', 0.5), ('--lr 0.5', 'learning_rate', 0.5), ('--cosine', 'cosine', True),
    ('--learning-rate=0.5', 'learning_rate', 0.5), ('--lr=0.5', 'learning_rate', 0.5), ('--lr_cosine', 'cosine', True),
    ('--lr-cosine', 'cosine', True), ('--warm', 'warm', True), ('--lr_warmup', 'warm', True),
    ('--size 48', 'size', 48), ('--image_size=48', 'size', 48), ('--data_folder a-b', 'data_folder', 'a-b'),
    ('--data-dir a-b', 'data_folder', 'a-b'), ('--output_name my-run', 'output_name', 'my-run'),
    ('--desc my-run', 'output_name', 'my-run'), ('--model resnet-50', 'model', 'resnet50'),
    ('--model=resnet-18', 'model', 'resnet18'), ('--lr-decay-epochs 5,10', 'lr_decay_epochs', [5, 10])])
def test_every_spelling(program, spelling, name, value):
    assert getattr(parse(program, *spelling.split()), name) == value


def test_spellings_of_pretraining():
    assert parse('main_supcon', '--temperature', '0.2').temp == parse('main_supcon', '--temp=0.2').temp == 0.2


@pytest.mark.parametrize('text', ['(0.4914, 0.4822, 0.4465)', '[0.4914,0.4822,0.4465]', '0.4914 0.4822 0.4465'])
def test_mean_and_std_are_read_as_data(text):
    opt = parse('main_supcon', '--mean', text, '--std', text)
    assert opt.mean == opt.std == (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize('arguments, name', [
    ('--batch_size 1024 --learning_rate 0.5 --temp 0.1 --cosine',
     'SupCon_cifar10_resnet50_lr_0.5_decay_0.0001_bsz_1024_temp_0.1_trial_0_cosine_warm'),
    ('--batch_size 256 --method SimCLR --trial 3',
     'SimCLR_cifar10_resnet50_lr_0.05_decay_0.0001_bsz_256_temp_0.07_trial_3'),
    ('--warm', 'SupCon_cifar10_resnet50_lr_0.05_decay_0.0001_bsz_256_temp_0.07_trial_0_warm')])
def test_run_names_of_pretraining(arguments, name):
    assert main_supcon.parse_option(arguments.split()).output_name == name


def test_run_name_of_cross_entropy():
    opt = main_ce.parse_option(['--batch_size', '1024', '--learning_rate', '0.8', '--cosine', '--syncBN'])
    assert opt.output_name == 'SupCE_cifar10_resnet50_lr_0.8_decay_0.0001_bsz_1024_trial_0_cosine_warm' and opt.warm


def test_method_of_cross_entropy_is_said_to_be_unused(call):
    status, out, _ = call(main_ce.parse_option, '--method', 'SupCon')
    assert status == 0 and '--method SupCon is not used' in out


@pytest.mark.parametrize('program', PROGRAMS)
def test_help_is_grouped_and_reports_defaults(capsys, program):
    with pytest.raises(SystemExit) as stop:
        arguments.parse(program, 'What it does.', ['--help'])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f'\n{group}:\n' in text for group in ('data', 'network', 'method', 'optimization', 'run')) or (
        program == 'main_linear')
    described = re.split(r'\n  (?=--)', text.partition('\ndata:')[2])[1:]
    assert len(described) > 25
    for option in described:                            # flags need none
        settled = 'default' in option or 'needed' in option or re.match(r'--\w+(, --\w+)*(  |\n)', option)
        assert settled or '--method NAME' in option, option
        assert option.count('default: ') <= 1, option


@pytest.mark.parametrize('arguments, words', [
    (['--batch_size', '0'], ['--batch_size', "'0'", 'at least 2']),
    (['--batch_size', '1.5'], ['--batch_size', "'1.5'", 'whole number']),
    (['--epochs', '-3'], ['--epochs', '-3']),
    (['--learning_rate', 'nan'], ['--lr', "'nan'"]),
    (['--learning_rate', 'inf'], ['--lr', "'inf'"]),
    (['--learning_rate', '0'], ['--lr', 'above 0']),
    (['--temp', '-1'], ['--temp', '-1']),
    (['--momentum', '2'], ['--momentum', 'at most 1']),
    (['--model', 'resnet19'], ['--model', 'resnet19', 'resnet50']),
    (['--dataset', 'mnist'], ['--dataset', 'mnist', 'cifar10']),
    (['--method', 'Sup'], ['--method', 'Sup', 'SupCon']),
    (['--mean', '(0.5, 0.5)'], ['--mean', '(0.5, 0.5)', 'three']),
    (['--mean', '__import__("os").system("touch hacked")'], ['--mean', 'three']),
    (['--std', '(0.5, 0, 0.5)'], ['--std', 'at least']),
    (['--std', '(0.5, x, 0.5)'], ['--std', "'x'"]),
    (['--lr_decay_epochs', '10,5'], ['--lr_decay_epochs', '10,5', 'rising']),
    (['--lr_decay_epochs', '5;6'], ['--lr_decay_epochs', '5;6']),
    (['--output_name', '../../elsewhere'], ['--output_name', '../../elsewhere']),
    (['--output_name', '.hidden'], ['--output_name', '.hidden']),
    (['--trial', 'a/b'], ['--trial', 'a/b']),
    (['--trial', ''], ['--trial']),
    (['--loader', 'fast'], ['--loader', 'fast', 'batched']),
    (['--seed', '-1'], ['--seed', '-1']),
    (['--bach_size', '4'], ['--bach_size', 'did you mean --batch_size?']),
    (['--batch', '4'], ['--batch']),                    # no guesses from abbreviations
    (['--epochs'], ['--epochs', 'expected one argument']),
    (['--dataset', 'path'], ['--data_folder', 'missing']),
    (['--dataset', 'path', '--data_folder', 'nowhere'], ['nowhere', 'no such folder']),
    (['--resume', '--overwrite'], ['--resume', '--overwrite']),
    (['--resume', ''], ['--resume', 'empty']),
    (['--dataset', 'digits', '--mvip_num_classes', '3'], ['--mvip_num_classes has no effect', '--dataset mvip']),
    (['--dataset', 'digits', '--aug_ex_ood', '3'], ['--aug_ex_ood has no effect', '--aug_name_ood']),
    (['--dataset', 'digits', '--aug_root', 'x'], ['--aug_root has no effect', '--aug_output_name']),
    (['--method', 'GenSCL', '--KD', '--teacher_path', 'x' * 300], ['--teacher_path', 'no such folder']),
])
def test_wrong_options_are_refused_in_one_line(rejected, arguments, words):
    rejected(main_supcon.main, *arguments, words=words)


def test_linear_needs_a_checkpoint(rejected):
    rejected(main_linear.main, words=['--ckpt'])
    rejected(main_linear.main, '--ckpt', 'nowhere.pth', words=['nowhere.pth', 'no such checkpoint'])
    rejected(main_linear.main, '--ckpt', '', words=['--ckpt', 'empty'])
    rejected(main_linear.main, '--ckpt', 'x' * 300, words=['no such checkpoint'])


@pytest.mark.parametrize('typed, suggested', [
    ('--gpu', None), ('--device', None), ('--local_rank', None), ('--epoch', '--epochs'),
    ('--batchsize', '--batch_size'),
    ('--learning-rat', '--learning_rate'), ('--temperatur', '--temperature')])
def test_only_options_of_like_names_are_suggested(rejected, call, typed, suggested):
    rejected(main_supcon.main, typed, '0', words=[f'did you mean {suggested}?' if suggested else 'unrecognized'])
    assert ('did you mean' in call(main_supcon.main, typed, '0')[2]) == bool(suggested)
