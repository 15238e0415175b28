"""The scripts: launch files, quickstart, benchmarks and the plot, each through its own command line."""
import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import main_ce
import main_linear
import main_supcon
import util
from scripts import figures, make_augs, plot_features
from util import UserError

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ['supcon_cifar10', 'supcon_cifar10_linear', 'simclr_cifar10', 'simclr_cifar10_linear', 'ce_cifar10',
          'simclr_path'] + [f'genscl_{data}{stage}' for data in ('cifar10', 'cifar100')
                            for stage in ('_teacher', '', '_linear')]
PAPER = ['supcon_imagenet_resnet50', 'supcon_imagenet_resnet101', 'supcon_imagenet_resnet200',
         'simclr_imagenet_resnet50', 'cross_entropy_imagenet_resnet50', 'supcon_cifar10_resnet50',
         'simclr_cifar10_resnet50', 'cross_entropy_cifar10_resnet50']
HEAD = 'train_classification_head_from_pretrained_encoder'
RECIPES = {                                                     # as published, but for the path of the checkpoint
    'ce_cifar10': 'main_ce.py --batch_size 1024 --learning_rate 0.8 --cosine --syncBN',
    'supcon_cifar10': 'main_supcon.py --batch_size 1024 --learning_rate 0.5 --temp 0.1 --cosine',
    'supcon_cifar10_linear': 'main_linear.py --batch_size 512 --learning_rate 5 --ckpt',
    'simclr_cifar10': 'main_supcon.py --batch_size 1024 --learning_rate 0.5 --temp 0.5 --cosine --syncBN '
                      '--method SimCLR',
    'simclr_cifar10_linear': 'main_linear.py --batch_size 512 --learning_rate 1 --ckpt',
    'simclr_path': 'main_supcon.py --batch_size 1024 --learning_rate 0.5 --temp 0.1 --cosine --dataset path '
                   '--data_folder ./path --mean "(0.4914, 0.4822, 0.4465)" --std "(0.2675, 0.2565, 0.2761)" '
                   '--method SimCLR',
    **{f'genscl_{data}': f'main_supcon.py --method GenSCL --dataset {data} --mix mixup_cutmix --KD --KD-alpha 1 '
       '--teacher-path' for data in ('cifar10', 'cifar100')},
    **{f'genscl_{data}_linear': f'main_linear.py --dataset {data} --pretrained '
       f'{data}_bsz_1024_mixup_cutmix_1.0_KD_1.0_SGD_lr_0.5 --augment-policy no --amp'
       for data in ('cifar10', 'cifar100')},
    **{f'genscl_{data}_teacher': f'main_ce.py --dataset {data} --model timm/efficientnetv2_rw_m --mix mixup_cutmix'
       for data in ('cifar10', 'cifar100')},
}


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository whose runs stay in a temporary folder; its environment is this one."""
    ignore = shutil.ignore_patterns('.git', '.venv', 'output', 'data', '__pycache__', '.*_cache')
    shutil.copytree(ROOT, tmp_path / 'copy', ignore=ignore)
    return tmp_path / 'copy'


def shell(command, cwd, **environment):
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500,
                          env={**os.environ, 'PATH': path, **environment})


def executable(file, script):
    """A shell script that can be started."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'#!/bin/sh\n{script}\n')
    file.chmod(0o755)
    return file


def commands_of(script, tmp_path, *arguments):
    """The command lines that a launch file gives to python, but for those that sort and check options."""
    python = executable(tmp_path / 'bin' / 'python', f'''
if [ "$1" = util/options.py ]; then exec {sys.executable} "$@"; fi
if [ "$1" = -c ]; then exit; fi
printf "%s\\n" "$@" >> "{tmp_path}/commands"; echo end >> "{tmp_path}/commands"''')
    (tmp_path / 'commands').unlink(missing_ok=True)
    result = shell(['bash', str(ROOT / 'scripts' / f'{script}.sh'), *arguments], tmp_path,
                   PATH=f'{python.parent}:{os.environ["PATH"]}')
    assert result.returncode == 0, result.stderr
    return [part.splitlines() for part in (tmp_path / 'commands').read_text().split('end\n')[:-1]]


def command_of(script, tmp_path, *arguments):
    command, = commands_of(script, tmp_path, *arguments)
    return command


def test_every_launch_file_is_tested():
    scripts = {file.stem for file in (ROOT / 'scripts').glob('*.sh')}
    assert scripts == {*LAUNCH, *PAPER, HEAD, 'env', 'mvip_experiments', 'quickstart', 'recipe', 'test'}


@pytest.mark.parametrize('script', LAUNCH)
def test_launch_files_are_the_recipes(script, tmp_path):
    program, *arguments = command_of(script, tmp_path, '--epochs', '3', '--output_name', 'my run')
    recipe = shlex.split(RECIPES[script])
    assert [program, *arguments][:len(recipe)] == recipe
    assert arguments[-4:] == ['--epochs', '3', '--output_name', 'my run']       # "$@" is last
    if program != 'main_linear.py':
        opt = {'main_supcon.py': main_supcon, 'main_ce.py': main_ce}[program].parse_option(arguments)
        assert opt.epochs == 3 and opt.output_name == 'my run'


def run_name(script, tmp_path, *arguments):
    return main_supcon.parse_option(command_of(script, tmp_path, *arguments)[1:]).output_name


@pytest.mark.parametrize('words', [[], ['--trial', '1'], ['--trial=a b', '--dataset', 'cifar100']])
@pytest.mark.parametrize('script', ['supcon_cifar10', 'simclr_cifar10', 'genscl_cifar10', 'genscl_cifar100'])
def test_linear_launch_files_find_the_pretraining_run(script, tmp_path, words):
    """The run that the same words would have trained; GenSCL's is of one dataset, its teacher of the same trial."""
    arguments = command_of(f'{script}_linear', tmp_path, *words)
    trial = {0: '0', 2: '1', 3: 'a b'}[len(words)]
    if '--ckpt' in arguments:
        expected = f'output/{run_name(script, tmp_path, *words)}/trial={trial}/last.ckpt'
        assert arguments[arguments.index('--ckpt') + 1] == expected
    else:
        assert arguments[arguments.index('--pretrained') + 1] == run_name(script, tmp_path)
        arguments = command_of(script, tmp_path, *words)
        teacher = main_ce.parse_option(command_of(f'{script}_teacher', tmp_path, *words)[1:])
        assert arguments[arguments.index('--teacher-path') + 1] == f'output/{teacher.output_name}/trial={trial}'
    for option in ('--ckpt', '--pretrained'):                   # another encoder replaces it
        arguments = command_of(f'{script}_linear', tmp_path, f'{option}=mine')
        assert [word for word in arguments if re.match('--(ckpt|pretrained)', word)] == [f'{option}=mine']


def test_launch_files_run(call, picture_folder, tmp_path):
    """Each to its end, with a small network and little data added to its command; later ones find earlier runs."""
    picture_folder('path', {'a': 6, 'b': 6})
    programs = {'main_supcon.py': main_supcon, 'main_ce.py': main_ce, 'main_linear.py': main_linear}
    for script in sorted(LAUNCH, key=lambda name: (not name.endswith('_teacher'), name.endswith('_linear'))):
        small = [*(TINY[2:] if script == 'simclr_path' else TINY), '--epochs', '1', '--overwrite']
        if script.endswith('_linear'):
            small = [*TINY[:2], *TINY[6:], '--epochs', '1', '--output_name', 'linear', '--overwrite']
        elif not script.endswith('_teacher'):
            small += ['--output_name', run_name(script, tmp_path, *(() if 'genscl' in script else TINY[:2]))]
        program, *arguments = command_of(script, tmp_path, *small)
        status, _, err = call(programs[program].main, *arguments)
        assert status == 0, (script, err)


PROGRAMS = {'main_supcon.py': main_supcon, 'main_ce.py': main_ce, 'main_linear.py': main_linear}
# batch, epochs, rate for 256 pictures, optimizer, weight decay of pretraining (or cross-entropy), then of linear.
TABLE = {
    'supcon_imagenet_resnet50': [(6144, 350, 0.4, 'LARS', 1e-3), (6144, 90, 0.05, 'RMSPropTF', 1e-6)],
    'supcon_imagenet_resnet101': [(4096, 350, 0.4, 'LARS', 1e-4), (4096, 90, 0.05, 'RMSPropTF', 1e-6)],
    'supcon_imagenet_resnet200': [(4096, 700, 0.2, 'LARS', 1e-4), (4096, 90, 0.05, 'RMSPropTF', 1e-6)],
    'simclr_imagenet_resnet50': [(6144, 100, 0.3, 'LARS', 1e-4), (6144, 90, 0.1, 'nesterov', 1e-6)],
    'cross_entropy_imagenet_resnet50': [(6144, 200, 0.1, 'nesterov', 1e-4)],
    'supcon_cifar10_resnet50': [(4096, 1000, 0.5, 'SGD', 1e-4), (4096, 100, 2.5, 'SGD', 0)],
    'simclr_cifar10_resnet50': [(1024, 400, 0.5, 'SGD', 1e-4), (1024, 90, 0.25, 'SGD', 0)],
    'cross_entropy_cifar10_resnet50': [(1024, 1000, 0.1, 'nesterov', 5e-4)],
}


@pytest.mark.parametrize('script', PAPER)
def test_recipes_of_the_paper_are_its_table(script, tmp_path):
    for (program, *arguments), row in zip(commands_of(script, tmp_path, '--mode=train'), TABLE[script], strict=True):
        opt = util.parse(program.removesuffix('.py'), '', arguments)
        optimizer = 'LARS' if opt.LARS else 'nesterov' if opt.nesterov else opt.optim_kind
        assert (opt.batch_size, opt.epochs, opt.base_lr, optimizer, opt.weight_decay) == row
        assert opt.learning_rate == pytest.approx(row[2] * row[0] / 256)
        assert opt.dataset in script and (opt.model is None or opt.model in script)
        if program == 'main_supcon.py':
            assert opt.temp == (0.5 if script == 'simclr_cifar10_resnet50' else 0.1) and opt.base_temperature == 1
            assert (opt.method == 'SimCLR') == script.startswith('simclr')
            assert opt.head == {'supcon_imagenet': [128], 'simclr_imagenet': [2048, 2048, 128]}.get(
                script.rsplit('_', 1)[0], [2048, 128])
            assert opt.head_bn == (script == 'simclr_imagenet_resnet50')
            assert opt.normalize_embedding == script.startswith('supcon_imagenet')
        if program != 'main_linear.py':
            assert (opt.warm, opt.warm_epochs, opt.warmup_from) == (True, 12 if 'imagenet' in script else 10, 0)
            assert opt.cosine and opt.lr_decay_rate == 0
            views = {'simclr_imagenet_resnet50': ('sim', 1., 0.5),
                     'supcon_imagenet_resnet200': ('stacked_rand', 0.5, 0.)}
            views = views.get(script, ('auto' if 'imagenet' in script else 'sim', 0.5, 0.))
            assert (opt.augment_policy or 'sim', opt.jitter_strength, opt.blur_p) == views
        elif 'imagenet' in script:
            assert (opt.exp_decay, opt.exp_decay_epochs, opt.cosine) == (0.97, 0.5, False)
            assert opt.optim_eps == (0.001 if optimizer == 'RMSPropTF' else None)
        if program != 'main_supcon.py':
            assert opt.label_smoothing == (0.05 if 'imagenet' in script else 0)


@pytest.mark.parametrize('script', PAPER)
def test_recipes_of_the_paper_run(call, tmp_path, script):
    """Train and evaluate, in miniature, with options that only one stage knows; then the last step once more."""
    small = [*TINY, '--epochs', '1', '--zero_init', '--label_smoothing', '0.1', '--output-name', 'mine', '--trial=7',
             *(() if 'cross' in script else ['--temp=0.2'])]
    commands = commands_of(script, tmp_path, '--mode=train_then_eval', *small)
    assert [command[0] for command in commands] == (
        ['main_ce.py'] * 2 if 'cross' in script else ['main_supcon.py', 'main_linear.py', 'main_linear.py'])
    assert ('--evaluate' in commands[-1]) and commands_of(script, tmp_path, '--mode', 'eval', *small) == commands[-1:]
    assert commands_of(script, tmp_path, '--mode', 'train', *small) == commands[:-1]
    for program, *arguments in commands:
        status, out, err = call(PROGRAMS[program].main, *arguments)
        assert status == 0, err
    assert 'Acc@1' in out and (tmp_path / 'output/mine/trial=7/last.ckpt').exists()
    if 'cross' not in script:
        for program, *arguments in commands_of(HEAD, tmp_path, '--ckpt', 'output/mine/trial=7/last.ckpt', *TINY[:2],
                                               *TINY[6:], '--epochs', '1', '--mode=train_then_eval'):
            assert program == 'main_linear.py' and call(main_linear.main, *arguments)[0] == 0


def test_a_recipe_is_launched_as_asked():
    done = shell(['bash', 'scripts/supcon_cifar10_resnet50.sh', '--mode=train', '--epochs', '3'], ROOT,
                 LAUNCH='echo torchrun --nproc_per_node 2')
    assert done.returncode == 0, done.stderr
    assert 'torchrun --nproc_per_node 2 main_supcon.py' in done.stdout and '--epochs 3' in done.stdout


def test_a_recipe_through_its_own_command_line(copy):
    small = [*TINY, '--epochs', '1']
    result = shell(['bash', 'scripts/simclr_cifar10_resnet50.sh', '--mode=train_then_eval', *small], copy)
    assert result.returncode == 0, result.stderr
    assert re.search(r'Acc@1 \d+\.\d+ Acc@5', result.stdout.splitlines()[-1])
    for words, expected in ((['--mode=test'], 'train_then_eval'), (['--mode'], '--mode: no value'),
                            (['--use_labels', 'no'], 'True or False')):
        result = shell(['bash', 'scripts/simclr_cifar10_resnet50.sh', *words], copy)
        assert result.returncode == 2 and expected in result.stderr and result.stderr.count('\n') == 1
    result = shell(['bash', 'scripts/simclr_cifar10_resnet50.sh', '--no_such_option', '3'], copy)
    assert result.returncode == 2 and '--no_such_option' in result.stderr


def test_without_labels_supcon_is_simclr(tmp_path):
    for words, script, method in ((['--use_labels=False'], 'supcon', 'SimCLR'),
                                  (['--use_labels', 'False'], 'supcon', 'SimCLR'),
                                  (['--use-labels=True'], 'simclr', 'SupCon')):
        commands = commands_of(f'{script}_cifar10_resnet50', tmp_path, *words, '--mode=train')
        assert util.parse('main_supcon', '', commands[0][1:]).method == method


@pytest.mark.parametrize('words, trial, name', [
    (['--trial', '1'], '1', 'mvip'), (['--trial=a b', '--output-name', 'mine'], 'a b', 'mine'),
    (['--desc=x', '--trial', '0', '--trial', '2'], '2', 'x')])
def test_the_stages_of_the_experiments_take_each_other_s_runs(tmp_path, words, trial, name):
    commands = commands_of('mvip_experiments', tmp_path, *words, '--seed=7', '--temp', '0.2', '--label_smoothing=0.1')
    first, second = ([util.parse(program.removesuffix('.py'), '', words) for program, *words in commands[start::2]]
                     for start in (0, 1))
    assert [opt.aug_mode for opt in first] == ['none', 'with_id', 'with_both'] and len(second) == 3
    for pretraining, linear in zip(first, second):
        assert linear.ckpt == f'output/{pretraining.output_name}/trial={trial}/last.ckpt'
        assert pretraining.trial == linear.trial == trial and pretraining.seed == linear.seed == 7
        assert pretraining.temp == 0.2 and linear.label_smoothing == 0.1
    names = {opt.output_name for opt in first + second}
    assert len(names) == 6 and all(run.startswith(f'{name}-') for run in names)


@pytest.mark.parametrize('script, words, expected', [
    ('supcon_cifar10_resnet50', '--ckpt x', '--ckpt'), ('supcon_cifar10_resnet50', '--pretrained=x', '--pretrained'),
    ('supcon_cifar10_resnet50', '--evaluate', '--evaluate'), ('supcon_cifar10_resnet50', '--resume x.ckpt', '--resume'),
    ('supcon_cifar10_resnet50', '--epochs 3 --trial', '--trial: no value'), ('mvip_experiments', '--ckpt x', '--ckpt'),
    ('mvip_experiments', '--aug-mode=none', '--aug_mode'), ('mvip_experiments', 'LINEAR --trial 3', '--trial'),
    ('mvip_experiments', 'LINEAR --aug_mode none', '--aug_mode'), ('quickstart', '--resume=x.ckpt', '--resume'),
    # Found in the last stage only, or known to none:
    ('supcon_cifar10_resnet50', '--label_smoothing 7', '--label_smoothing'),
    ('mvip_experiments', 'LINEAR --nonsense', '--nonsense'), ('cross_entropy_cifar10_resnet50', '--temp 3', '--temp'),
])
def test_what_would_go_to_the_wrong_stage_is_refused_before_the_first(script, words, expected):
    variable, words = ('LINEAR', words[7:]) if words.startswith('LINEAR') else ('NONE', words)
    command = ['bash', f'scripts/{script}.sh', *words.split() * (variable == 'NONE')]
    result = shell(command, ROOT, LAUNCH='echo started', **{variable: words})
    assert result.returncode == 2 and expected in result.stderr and result.stderr.count('\n') == 1, result.stderr
    assert 'started' not in result.stdout


def test_launch_files_find_their_repository(copy, tmp_path):
    """From other folders, under a name with spaces, with a CDPATH that leads elsewhere, without any input."""
    root = copy.rename(tmp_path / 'a copy')
    (tmp_path / 'trap' / 'scripts').mkdir(parents=True)
    python = executable(tmp_path / 'bin' / 'python', f'''
if [ "$1" = util/options.py ]; then exec {sys.executable} "$@"; fi
if [ "$1" = -c ]; then exit; fi
pwd >> {tmp_path}/places; cat''')
    path = f'{python.parent}:{os.environ["PATH"]}'
    environment = {**os.environ, 'PATH': path, 'CDPATH': f'{tmp_path}/trap', 'LC_ALL': 'C'}
    scripts = ['ce_cifar10', 'genscl_cifar10', 'supcon_cifar10_linear', 'simclr_cifar10_resnet50', 'mvip_experiments']
    for script in scripts:
        for file, cwd in ((f'scripts/{script}.sh', root), (f'{script}.sh', root / 'scripts'),
                          (f'{root}/scripts/{script}.sh', tmp_path)):
            result = subprocess.run(['bash', file], cwd=cwd, env=environment, stdin=subprocess.DEVNULL,
                                    capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
    assert set((tmp_path / 'places').read_text().splitlines()) == {str(root)}


def test_launch_files_with_stages_explain_themselves():
    for script in ('mvip_experiments', 'quickstart', 'supcon_imagenet_resnet50'):
        result = shell(['bash', f'scripts/{script}.sh', '--epochs', '3', '--help'], ROOT, LAUNCH='echo started')
        assert result.returncode == 0 and 'started' not in result.stdout
        assert (ROOT / 'scripts' / f'{script}.sh').read_text().splitlines()[1][2:] == result.stdout.splitlines()[0]


def test_words_that_a_program_knows():
    words = ['--temp', '0.1', '--epochs', '3', '--cosine', '--no-warm', '--temp=2', '--zero-init', '--data-folder', 'x',
             '--unknown', '5', '--per_class', '--moco']
    assert util.options.known_words('main_linear', words) == [
        '--epochs', '3', '--cosine', '--no-warm', '--data-folder', 'x', '--unknown', '5', '--per_class']
    assert util.options.known_words('main_supcon', words) == [word for word in words if word != '--per_class']


def test_quickstart_in_miniature(copy):
    """From its command line to its last three lines, the figure included, in an environment that is there already."""
    venv = copy / '.venv'
    executable(venv / 'bin' / 'python', f'case "$2" in pip | *base_prefix*) exit;; esac\nexec {sys.executable} "$@"')
    (venv / 'bin' / 'activate').write_text('PATH="$PWD/.venv/bin:$PATH"')
    shutil.copy(copy / 'requirements.txt', venv / 'requirements.txt')
    words = ['--epochs', '1', '--max_samples', '60', '--trial=1', '--desc', 'mine', '--zero_init']
    result = shell(['bash', 'scripts/quickstart.sh', *words], copy)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()[-3:]
    for line, name in zip(lines, ('SupCon', 'SimCLR', 'cross-entropy')):
        assert re.fullmatch(rf'{name} \d+\.\d\d', line), result.stdout
    assert (copy / 'output' / 'mine.png').stat().st_size > 10_000
    assert {run.name for run in (copy / 'output').glob('*/*')} == {'trial=1'}
    assert 'Installing' not in result.stdout


def test_the_three_experiments_in_miniature(copy):
    python = [sys.executable, 'scripts/make_augs.py', '--dataset', 'digits', '--aug_output_name', 'mvip-test-dafusion',
              '--per_class', '2', '--variants', '1', '--patches', '2']
    assert shell(python, copy).returncode == 0
    result = shell(['bash', 'scripts/mvip_experiments.sh', *TINY, '--image_size', '8', '--epochs', '1'], copy,
                   PRETRAIN='--lr 0.1 --temp 0.1', LINEAR='--lr 1')
    assert result.returncode == 0, result.stderr
    head, *rows = result.stdout.splitlines()[-4:]
    assert head.split() == ['experiment', 'top-1', 'conf.id', 'conf.ood', 'difference', 'AUROC', 'FPR95']
    for row, title in zip(rows, ('1 real pictures', '2 + id pictures, both stages', '3 + ood pictures in pretraining')):
        assert re.fullmatch(rf'{re.escape(title)} +\d+\.\d\d( +-?\d+\.\d+){{5}}', row), row
    modes = [json.loads((copy / 'output' / f'mvip-{name}' / 'trial=0' / 'options.json').read_text())['aug_mode']
             for name in ('1-real-pre', '1-real-lin', '2-id-pre', '2-id-lin', '3-id-ood-pre', '3-id-ood-lin')]
    assert modes == ['none', 'none', 'with_id', 'with_id', 'with_both', 'with_id']
    picture = [sys.executable, 'scripts/plot_features.py', '--ckpt', 'output/mvip-3-id-ood-pre/trial=0/last.ckpt']
    assert shell(picture, copy).returncode == 0 and (copy / 'features.png').exists()


INSTALL = 'set -euo pipefail; source scripts/env.sh requirements.txt tests/requirements.txt'


@pytest.fixture
def python(copy):
    """Stands in for Python in env.sh, and records what is asked of it; the file `die` kills who asks it to install."""
    return executable(copy / 'fake' / 'python', f'''
echo "$@" >> {copy}/record
case "$1 $2 $3" in
    "-m venv .venv")
        mkdir -p .venv/bin .venv/lib/python3.11/site-packages/pip
        [ -h .venv/bin/python ] || ln -s {copy}/fake/python .venv/bin/python
        echo 'PATH="{copy}/.venv/bin:$PATH"' > .venv/bin/activate ;;
    "-m pip --version") [ -d .venv/lib/python3.11/site-packages/pip ] ;;
    "-m pip install") [ ! -e die ] || kill -9 $PPID ;;
esac''')


def test_environment_is_made_once_and_errors_are_told(copy, python):
    record = copy / 'record'
    for _ in range(2):
        assert shell(['bash', '-c', INSTALL], copy, PYTHON=str(python)).returncode == 0
    asked = record.read_text()
    assert asked.count('-m venv .venv') == 1 and asked.count('pip install') == 2
    with open(copy / 'requirements.txt', 'a') as file:
        file.write('one-more\n')
    shell(['bash', '-c', INSTALL], copy, PYTHON=str(python))
    assert record.read_text().count('pip install') == 3         # only what has changed
    result = shell(['bash', '-c', INSTALL], copy, PYTHON='no-such-python')
    assert result.returncode == 2 and 'Python 3.10' in result.stderr
    other = executable(copy / 'other', 'case "$2" in *print*) echo 3.13;; esac')
    result = shell(['bash', '-c', INSTALL], copy, PYTHON=str(other))
    assert result.returncode == 2 and 'PYTHON is 3.13' in result.stderr


BREAK = {                                                       # what is wrong with .venv: how it came so
    'no pip': 'rm -r .venv/lib/python3.11/site-packages/pip', 'no python': 'rm .venv/bin/python',
    'python is gone': 'ln -sfn /nowhere/python .venv/bin/python', 'not activated': 'rm .venv/bin/activate',
    'moved': 'echo \'PATH="/nowhere/.venv/bin:$PATH"\' > .venv/bin/activate',
    'half made': 'rm -r .venv/bin; mkdir .venv/bin',
}


@pytest.mark.parametrize('state', BREAK)
def test_an_environment_that_does_not_work_is_completed_where_it_is(copy, python, state):
    path = {'PATH': f'{python.parent}:{os.environ["PATH"]}', 'PYTHON': ''}
    executable(copy / 'fake' / 'python3', f'exec {python} "$@"')
    assert shell(['bash', '-c', INSTALL], copy, **path).returncode == 0
    assert shell(['bash', '-c', f'touch .venv/mine; {BREAK[state]}'], copy).returncode == 0
    (copy / 'record').unlink()
    result = shell(['bash', '-c', INSTALL + '; command -v python'], copy, **path)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == f'{copy}/.venv/bin/python', result.stderr
    assert (copy / '.venv' / 'mine').exists() and (copy / 'record').read_text().count('pip install') == 2


def test_an_environment_that_a_killed_call_has_left_is_made_anew(copy, python):
    (copy / 'die').touch()
    assert shell(['bash', '-c', INSTALL], copy, PYTHON=str(python)).returncode == -9
    (copy / '.venv' / 'lib' / 'half-a-package').touch()
    (copy / 'die').unlink()
    assert shell(['bash', '-c', INSTALL], copy, PYTHON=str(python)).returncode == 0
    assert not (copy / '.venv' / 'lib' / 'half-a-package').exists()
    assert not (copy / '.venv' / 'unfinished').exists() and (copy / '.venv' / 'requirements.txt').exists()
    shutil.rmtree(copy / '.venv')
    (copy / '.venv').write_text('a file of mine')
    result = shell(['bash', '-c', INSTALL], copy, PYTHON=str(python))
    assert result.returncode == 2 and (copy / '.venv').read_text() == 'a file of mine'


def test_plot_refuses_in_one_line(tmp_path):
    (tmp_path / 'x.ckpt').write_bytes(b'nothing')
    for ckpt, words in (('nowhere.ckpt', 'no such checkpoint'), ('x.ckpt', 'not a readable checkpoint')):
        result = shell([sys.executable, ROOT / 'scripts' / 'plot_features.py', '--ckpt', ckpt], tmp_path)
        assert result.returncode == 2 and words in result.stderr and result.stderr.count('\n') == 1
    assert not list(tmp_path.glob('*.png'))


@pytest.mark.parametrize('kind', [[], ['--soft']])
def test_loss_benchmark_compares_equal_losses(tmp_path, kind):
    output = benchmark(tmp_path, 'bench_loss.py', '--views', '2048', '--repeat', '1', *kind)
    losses = [line.split()[-1] for line in output if line.startswith(('linear', 'dense'))]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


def benchmark(tmp_path, script, *arguments):
    """The lines that a benchmark prints, the last of which is its ratio."""
    result = shell([sys.executable, ROOT / 'benchmarks' / script, *arguments], tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r'ratio \d+\.\d+', result.stdout.splitlines()[-1])
    return result.stdout.splitlines()


BENCHMARKS = ['bench_mvip.py --pictures 8 --size 16',
              'bench_folder.py --pictures 70 --size 16 --repeat 1 --policies sim auto',
              'bench_views.py --pictures 300 --size 16 --batch_size 100 --repeat 1',
              'bench_step.py --batch_size 4 --size 8 --steps 1 --repeat 1 --forms original amp',
              'bench_linear.py --pictures 64 --batch_size 32 --repeat 1', 'bench_start.py --pictures 60 --repeat 1',
              'bench_epoch.py --pictures 16 --batch_size 8', 'plot_cost.py --largest 11 --pictures 128']


@pytest.mark.parametrize('command', BENCHMARKS)
def test_benchmarks_end_with_their_ratio(tmp_path, command):
    benchmark(tmp_path, *command.split())
    assert (tmp_path / 'cost.png').exists() == command.startswith('plot_cost')


def test_all_benchmarks_are_run_and_tested(tmp_path):
    scripts = {file.name for file in (ROOT / 'benchmarks').glob('*.py')} - {'run_all.py'}
    assert scripts == {command.split()[0] for command in BENCHMARKS} | {'bench_loss.py'}
    table = runpy.run_path(str(ROOT / 'benchmarks' / 'run_all.py'))['BENCHMARKS']
    assert scripts == {command[0] for _, _, command in table.values()}


def test_benchmarks_write_a_table(tmp_path):
    command = [sys.executable, ROOT / 'benchmarks' / 'run_all.py', '--output', 'results', '--only']
    assert shell([*command, 'gpu resnet50'], tmp_path).returncode == 0
    text = next((tmp_path / 'results').glob('*.md')).read_text()
    assert 'PyTorch' in text and ('| not measured: no GPU |' in text or torch.cuda.is_available())


@pytest.mark.parametrize('name', ['.', '..', '', 'folder', 'folder/', 'x.xyz', 'x.png/', 'a' * 300 + '.txt'])
def test_figures_that_cannot_be_written_are_refused_at_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for folder in ('folder', 'x.png'):
        (tmp_path / folder).mkdir()
    with pytest.raises(argparse.ArgumentTypeError, match='found'):
        figures.figure_file(name)


def test_a_figure_is_the_old_one_or_the_new_one(tmp_path):
    class Full:
        def savefig(self, file, **settings):
            file.write_bytes(b'half')
            raise OSError(28, 'No space left on device')

    (tmp_path / 'x.png').write_bytes(b'old')
    with pytest.raises(UserError, match='No space left'):
        figures.save(Full(), tmp_path / 'x.png', 10)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b'old']
    figures.save(plot_features.plt.figure(), tmp_path / 'new' / 'x.PNG', 10)
    assert (tmp_path / 'new' / 'x.PNG').read_bytes()[1:4] == b'PNG'


def test_names_of_classes_are_shown_as_they_are(tmp_path):
    names = ['$a_{$', '_hidden', 'a\nb', '\x1b[31mred', r'\$1$']
    figure, ax = plot_features.plt.subplots()
    legend = plot_features.draw(ax, names[0], np.random.default_rng(0).random((30, 5)), np.arange(30) % 6 - 1, names)
    texts = figure.legend(*legend).get_texts()
    figure.savefig(tmp_path / 'x.png')
    assert [text.get_text().replace(r'\$', '$') for text in texts[:5]] == [
        '$a_{$', '_hidden', r'a\nb', r'\x1b[31mred', r'\$1$'] and len(texts) == 6


@pytest.fixture
def augs(call, monkeypatch, picture_folder, tmp_path):
    """augs(classes, *arguments): run make_augs.py on a folder with these classes."""
    def augs(classes, *arguments):
        if not (tmp_path / 'data').exists():
            picture_folder('data', dict.fromkeys(classes, 4))
        words = ['--dataset', 'path', '--data_folder', 'data', '--patches', '2', '--per_class', '2', '--variants', '2',
                 '--aug_root', 'augs', '--aug_output_name', 'o', *arguments]
        monkeypatch.setattr(sys, 'argv', ['make_augs.py', *words])
        return call(lambda argv: make_augs.main())
    return augs


@pytest.mark.parametrize('classes, words, expected', [
    ('a b,a_b', '', 'the same files'), ('x' * 250 + ',b', '', 'at most 255'), ('é' * 125 + ',b', '', 'at most 255'),
    ('a,b', '--aug_name_id x --aug_name_ood x', 'two folders'), ('a,b', '--aug_name_id .', 'two folders'),
    ('a,b', '--aug_name_id x --aug_name_ood ./x/y', 'two folders'), ('a,b', '--data_folder=', 'is missing'),
    ('a,b', '--aug_root data/a/000.png', '000.png'), ('a,b', '--aug_root data/a --aug_output_name 000.png', '000.png'),
    ('a,b', '--aug_root data --aug_output_name a --aug_name_id 000.png', 'holds files already'),
    ('a,b', '--aug_root . --aug_output_name data --aug_name_ood b', 'holds files already'),
])
def test_synthetic_images_that_cannot_be_written_are_refused(augs, tmp_path, classes, words, expected):
    status, _, err = augs(classes.split(','), *words.split())
    assert status == 2 and expected in err and err.count('\n') == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ['data'] and len(list(tmp_path.rglob('*.png'))) == 8


def test_synthetic_images_appear_when_they_are_whole(augs, tmp_path, monkeypatch):
    """A full disk leaves nothing, a killed run what the next one removes; names of classes may be odd."""
    classes, saved, save = ["it's $x", 'a-1', 'é∕', '-rf'], [], Image.Image.save

    def full(image, file, *args, **settings):
        saved.append(file)
        if len(saved) == 6:
            raise OSError(28, 'No space left on device')
        save(image, file, *args, **settings)
    assert augs(classes, '--aug_name_id', 'first', '--aug_name_ood', 'second')[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, 'save', full)
        status, _, err = augs(classes)
    assert status == 2 and 'No space left' in err and err.count('\n') == 1
    folder = tmp_path / 'augs' / 'o'
    assert sorted(path.name for path in folder.iterdir()) == ['first', 'second']
    (folder / '.augs-id.0.partial').mkdir()
    (folder / '.augs-id.0.partial' / 'a-1-0-0.png').touch()
    (folder / 'augs-ood').symlink_to(tmp_path / 'elsewhere')
    assert augs(classes)[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == ['augs-id', 'augs-ood', 'first', 'second']
    for name, same in (('first', 'augs-id'), ('second', 'augs-ood')):
        images = {file.name: file.read_bytes() for file in (folder / name).iterdir()}
        assert len(images) == 16 and images == {file.name: file.read_bytes() for file in (folder / same).iterdir()}
    assert (tmp_path / 'elsewhere' / 'é∕-1-1.png').exists()
    opt = util.defaults(dataset='path', data_folder='data', aug_root='augs', aug_output_name='o', aug_name_id='augs-id')
    assert len(main_ce.load_pictures(opt).id) == 16


def test_mixing_is_drawn(tmp_path):
    plot = [sys.executable, ROOT / 'scripts' / 'plot_mixing.py', '--dataset', 'digits', '--count', '3']
    result = shell([*plot, '--output', 'x.png'], tmp_path)
    assert result.returncode == 0 and (tmp_path / 'x.png').stat().st_size > 10_000, result.stderr
    result = shell([*plot, '--output', 'x.png/y.png'], tmp_path)
    assert result.returncode == 2 and 'x.png/y.png' in result.stderr and result.stderr.count('\n') == 1
