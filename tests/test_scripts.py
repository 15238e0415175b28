"""The scripts: launch scripts, quickstart, benchmarks and the plot, each through its own command line."""
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, shell

import main_ce
import main_linear
import main_supcon
from scripts import launch, plot_features, plot_mixing
from util import arguments, options
from util.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ['supcon_cifar10', 'supcon_cifar10_linear', 'simclr_cifar10', 'simclr_cifar10_linear', 'ce_cifar10',
          'simclr_path', 'genscl_cifar_teacher', 'genscl_cifar', 'genscl_cifar_linear']
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
    'genscl_cifar': 'main_supcon.py --method GenSCL --dataset cifar10 --mix mixup_cutmix --KD --KD-alpha 1 '
                    '--teacher-path',
    'genscl_cifar_linear': 'main_linear.py --dataset cifar10 --pretrained '
                           'cifar10_bsz_1024_mixup_cutmix_1.0_KD_1.0_SGD_lr_0.5 --augment-policy no --amp',
    'genscl_cifar_teacher': 'main_ce.py --dataset cifar10 --model timm/efficientnetv2_rw_m --mix mixup_cutmix',
}


def commands_of(script, tmp_path, *arguments):
    """The command lines that a launch script runs, without `python`, which is replaced to record its words."""
    python = tmp_path / 'bin' / 'python'
    python.parent.mkdir(exist_ok=True)
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {tmp_path}/words\n')
    python.chmod(0o755)
    result = shell(['bash', str(ROOT / 'scripts' / f'{script}.sh'), *arguments], tmp_path,
                   PATH=f'{python.parent}:{os.environ["PATH"]}')
    assert result.returncode == 0, result.stderr
    program, name, *words = (tmp_path / 'words').read_text().split('\0')[:-1]
    assert Path(program).samefile(ROOT / 'scripts' / 'launch.py')
    end = words.index('--')
    commands = launch.plan(name, words[:end], words[end + 1:])
    if len(commands) > 1:
        launch.check(commands)
    return commands


def command_of(script, tmp_path, *arguments):
    command, = commands_of(script, tmp_path, *arguments)
    return command


def test_every_launch_script_is_tested():
    scripts = {file.stem for file in (ROOT / 'scripts').glob('*.sh')}
    assert scripts == {*LAUNCH, *PAPER, HEAD, 'check_gpu', 'env', 'mvip_experiments', 'quickstart', 'slurm', 'test'}


@pytest.mark.parametrize('script', LAUNCH)
def test_launch_scripts_are_the_recipes(script, tmp_path):
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
@pytest.mark.parametrize('script', ['supcon_cifar10', 'simclr_cifar10', 'genscl_cifar'])
def test_linear_launch_scripts_find_the_pretraining_run(script, tmp_path, words):
    """The run that the same words would have trained; GenSCL's with the teacher of the same words."""
    arguments = command_of(f'{script}_linear', tmp_path, *words)
    trial = {0: '0', 2: '1', 3: 'a b'}[len(words)]
    if '--ckpt' in arguments:
        expected = f'output/{run_name(script, tmp_path, *words)}/trial={trial}/last.ckpt'
        assert arguments[arguments.index('--ckpt') + 1] == expected
    else:
        assert arguments[arguments.index('--pretrained') + 1] == run_name(script, tmp_path, *words)
        arguments = command_of(script, tmp_path, *words)
        teacher = main_ce.parse_option(command_of(f'{script}_teacher', tmp_path, *words)[1:])
        assert arguments[arguments.index('--teacher-path') + 1] == f'output/{teacher.output_name}/trial={trial}'
    for option in ('--ckpt', '--pretrained'):                   # another encoder replaces it
        arguments = command_of(f'{script}_linear', tmp_path, f'{option}=mine')
        assert [word for word in arguments if re.match('--(ckpt|pretrained)', word)] == [f'{option}=mine']


def test_launch_scripts_run(call, image_folder, tmp_path):
    """Each to its end, with a small network and little data added to its command; later ones find earlier runs."""
    image_folder('path', {'a': 6, 'b': 6})
    programs = {'main_supcon.py': main_supcon, 'main_ce.py': main_ce, 'main_linear.py': main_linear}
    for script in sorted(LAUNCH, key=lambda name: (not name.endswith('_teacher'), name.endswith('_linear'))):
        small = [*(TINY[2:] if script == 'simclr_path' else TINY), '--epochs', '1', '--overwrite']
        if script.endswith('_linear'):
            small = [*TINY[:2], *TINY[6:], '--epochs', '1', '--output_name', 'linear', '--overwrite']
        elif not script.endswith('_teacher'):
            small += ['--output_name', run_name(script, tmp_path, *([] if script == 'simclr_path' else TINY[:2]))]
        program, *arguments = command_of(script, tmp_path, *small)
        status, _, err = call(programs[program].main, *arguments)
        assert status == 0, (script, err)


PROGRAMS = {'main_supcon.py': main_supcon, 'main_ce.py': main_ce, 'main_linear.py': main_linear}
# batch, epochs, rate for 256 images, optimizer, weight decay of pretraining (or cross-entropy), then of linear.
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
    for (program, *words), row in zip(commands_of(script, tmp_path, '--mode=train'), TABLE[script], strict=True):
        opt = arguments.parse(program.removesuffix('.py'), '', words)
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
    for program, *words in commands:
        status, out, err = call(PROGRAMS[program].main, *words)
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
    for words, expected in ((['--mode=test'], 'train_then_eval'), (['--mode'], '--mode: expected one'),
                            (['--use_labels', 'no'], 'True or False')):
        result = shell(['bash', 'scripts/simclr_cifar10_resnet50.sh', *words], copy)
        assert result.returncode == 2 and expected in result.stderr and result.stderr.count('\n') == 1
    result = shell(['bash', 'scripts/simclr_cifar10_resnet50.sh', '--no_such_option', '3'], copy)
    assert result.returncode == 2 and '--no_such_option' in result.stderr and not result.stdout   # nothing was started


def test_without_labels_supcon_is_simclr(tmp_path):
    for words, script, method in ((['--use_labels=False'], 'supcon', 'SimCLR'),
                                  (['--use_labels', 'False'], 'supcon', 'SimCLR'),
                                  (['--use-labels=True'], 'simclr', 'SupCon')):
        commands = commands_of(f'{script}_cifar10_resnet50', tmp_path, *words, '--mode=train')
        assert arguments.parse('main_supcon', '', commands[0][1:]).method == method


@pytest.mark.parametrize('script, words, environment, expected', [
    ('supcon_cifar10_resnet50', ['--ckpt=x'], {}, '--ckpt: the encoder is the one'),
    ('supcon_cifar10_resnet50', ['--pretrained-ckpt', 'x'], {}, '--pretrained_ckpt: the encoder is the one'),
    ('supcon_cifar10_resnet50', ['--evaluate'], {}, '--evaluate: the encoder is the one'),
    ('supcon_cifar10_resnet50', ['--resume', 'last.ckpt'], {}, 'expected --resume alone'),
    ('supcon_cifar10_resnet50', [], {'PRETRAIN': '--trial 3'}, 'PRETRAIN: --trial is for all stages'),
    ('supcon_cifar10_resnet50', [], {'LINEAR': '--output-name=x'}, 'LINEAR: --output_name is for all stages'),
    ('supcon_cifar10_resnet50', [], {'LINEAR': '--ckpt x'}, '--ckpt: the encoder is the one'),
    ('supcon_cifar10_resnet50', [], {'LINEAR': "--epochs '3"}, 'LINEAR: No closing quotation'),
    ('supcon_cifar10_resnet50', [], {'LINEAR': '--temp 0.1'}, 'main_linear.py: unrecognized arguments: --temp'),
    ('supcon_cifar10_resnet50', ['--tem', '1'], {}, 'did you mean --temp?'),
    ('supcon_cifar10_resnet50', ['--output_name', '../x'], {}, "found '../x'"),
    ('supcon_cifar10_resnet50', ['--trial', '$(touch hacked)'], {}, "found '$(touch hacked)'"),
    ('cross_entropy_cifar10_resnet50', ['--temp', '1'], {}, 'unrecognized arguments: --temp 1'),
    ('supcon_cifar10', ['--mode', 'eval'], {}, 'main_supcon.py has no --evaluate'),
    ('mvip_experiments', ['--aug-mode', 'with_id'], {}, '--aug_mode: each experiment'),
    ('mvip_experiments', [], {'PRETRAIN': '--aug_mode=with_id'}, '--aug_mode: each experiment'),
    ('mvip_experiments', ['--mode=eval'], {}, 'accuracies.py has no --evaluate'),
])
def test_launch_scripts_reject_what_parts_their_stages(tmp_path, monkeypatch, script, words, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(expected)):
        commands_of(script, tmp_path, *words)


def test_a_later_stage_resumes_and_has_its_own_options(tmp_path, monkeypatch):
    monkeypatch.setenv('PRETRAIN', '--epochs 7')
    monkeypatch.setenv('LINEAR', '--data_folder "my data"')
    pretraining, linear = commands_of('supcon_cifar10_resnet50', tmp_path, '--mode=train', '--epochs=5', '--resume')
    assert pretraining[-4:] == ['--epochs=5', '--resume', '--epochs', '7']
    assert linear[-4:] == ['--epochs=5', '--resume', '--data_folder', 'my data']


def test_help_of_a_launch_script_is_its_comment(tmp_path):
    done = shell(['bash', str(ROOT / 'scripts/supcon_imagenet_resnet50.sh'), '--epochs', '3', '--help'], tmp_path)
    assert done.returncode == 0 and done.stdout.startswith('SupCon on ImageNet (./data/imagenet), ResNet-50. Published')
    assert 'python main_linear.py --help' in done.stdout and not done.stderr


def test_a_launch_script_ends_with_the_stage_that_fails(tmp_path):
    """From any folder, whatever CDPATH is."""
    bash = ['bash', str(ROOT / 'scripts/supcon_cifar10_resnet50.sh')]
    stage = tmp_path / 'stage'
    stage.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/started\n[ "$1" != main_linear.py ] || exit 7\n')
    stage.chmod(0o755)
    done = shell([*bash, '--dataset', 'digits'], tmp_path, LAUNCH=str(stage), CDPATH='/')
    assert done.returncode == 7 and (tmp_path / 'started').read_text().split() == ['main_supcon.py', 'main_linear.py']
    done = shell([*bash, '--mode=eval'], tmp_path, LAUNCH='no-such-program --n 2')
    assert done.returncode == 2 and 'no-such-program cannot be started' in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.usefixtures('interruptible')
def test_ctrl_c_waits_for_the_program_and_starts_no_other(tmp_path):
    stage = tmp_path / 'stage'
    stage.write_text(f"#!/bin/sh\ntrap 'sleep 0.5; echo saved >> {tmp_path}/log; exit' INT\n"
                     f'echo "$1" >> {tmp_path}/log\nwhile :; do sleep 0.1; done\n')
    stage.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, ROOT / 'scripts/launch.py', 'x.sh', 'main_ce.py', '--', '--mode=train', '--epochs=3'],
        cwd=ROOT, env={**os.environ, 'LAUNCH': str(stage)}, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (tmp_path / 'log').exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 130 and (tmp_path / 'log').read_text().split() == ['main_ce.py', 'saved']


def test_words_that_a_program_knows():
    words = ['--temp', '0.1', '--epochs', '3', '--cosine', '--no-warm', '--temp=2', '--zero-init', '--data-folder', 'x',
             '--unknown', '5', '--per_class', '--moco']
    assert options.filter_args('main_linear', words) == [
        '--epochs', '3', '--cosine', '--no-warm', '--data-folder', 'x', '--unknown', '5', '--per_class']
    assert options.filter_args('main_supcon', words) == [word for word in words if word != '--per_class']


def test_quickstart_in_miniature(copy):
    """From its command line to its last three lines, the image included, in an environment that is there already."""
    venv = copy / '.venv'
    (venv / 'bin').mkdir(parents=True)
    (venv / 'bin' / 'activate').write_text(f'export PATH="{venv}/bin:$PATH"\n')
    (venv / 'bin' / 'python').symlink_to(os.path.realpath(sys.executable))
    (venv / 'lib').symlink_to(Path(sys.prefix, 'lib'))                  # the packages of this environment
    (venv / 'pyvenv.cfg').write_text(f'home = {os.path.dirname(os.path.realpath(sys.executable))}\n')
    shutil.copy(copy / 'requirements.txt', venv / 'requirements.txt')
    result = shell(['bash', 'scripts/quickstart.sh', '--epochs', '1', '--max_samples', '60'], copy)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()[-3:]
    for line, name in zip(lines, ('SupCon', 'SimCLR', 'cross-entropy')):
        assert re.fullmatch(rf'{name} \d+\.\d\d', line), result.stdout
    assert (copy / 'output' / 'quickstart.png').stat().st_size > 10_000
    assert 'Installing' not in result.stdout


def test_the_three_experiments_in_miniature(copy):
    python = [sys.executable, 'scripts/make_augs.py', '--dataset', 'digits', '--aug_output_name', 'mvip-test-dafusion',
              '--per_class', '2', '--variants', '1', '--patches', '2']
    assert shell(python, copy).returncode == 0
    result = shell(['bash', 'scripts/mvip_experiments.sh', *TINY, '--image_size', '8', '--epochs', '1'], copy,
                   PRETRAIN='--lr 0.1 --temp 0.1', LINEAR='--lr 1')
    assert result.returncode == 0, result.stderr
    head, *rows = result.stdout.splitlines()[-4:]
    assert head.split() == ['experiment', 'best', 'top-1', 'conf.id', 'conf.ood', 'difference', 'AUROC', 'FPR95']
    for row, title in zip(rows, ('1 real images', '2 + id images, both stages', '3 + ood images in pretraining')):
        assert re.fullmatch(rf'{re.escape(title)} +\d+\.\d\d( +-?\d+\.\d+){{5}}', row), row
    modes = [json.loads((copy / 'output' / f'mvip-{name}' / 'trial=0' / 'options.json').read_text())['aug_mode']
             for name in ('1-real-pre', '1-real-lin', '2-id-pre', '2-id-lin', '3-id-ood-pre', '3-id-ood-lin')]
    assert modes == ['none', 'none', 'with_id', 'with_id', 'with_both', 'with_id']
    image = [sys.executable, 'scripts/plot_features.py', '--ckpt', 'output/mvip-3-id-ood-pre/trial=0/last.ckpt']
    assert shell(image, copy).returncode == 0 and (copy / 'features.png').exists()


def test_plot_refuses_in_one_line(rejected, monkeypatch, tmp_path):
    (tmp_path / 'x.ckpt').write_bytes(b'nothing')
    for ckpt, words in (('nowhere.ckpt', 'no such checkpoint'), ('x.ckpt', 'not a readable checkpoint')):
        monkeypatch.setattr(sys, 'argv', ['plot_features.py', '--ckpt', ckpt])
        rejected(lambda _: plot_features.main(), words=[words])


@pytest.mark.parametrize('kind', [[], ['--soft'], ['--variant', 'BCL']])
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


BENCHMARKS = ['bench_mvip.py --images 8 --size 16',
              'bench_folder.py --images 70 --size 16 --repeat 1 --policies sim auto',
              'bench_views.py --images 300 --size 16 --batch_size 100 --repeat 1',
              'peers.py --images 1000 --size 16 --batch_size 100 --num_workers 0 --repeat 1 --loss_views 0',
              'bench_step.py --batch_size 4 --size 8 --steps 1 --repeat 1 --forms original amp',
              'bench_linear.py --images 64 --batch_size 32 --repeat 1', 'bench_start.py --images 60 --repeat 1',
              'bench_epoch.py --images 16 --batch_size 8', 'bench_blocks.py --views 64 --sides 16 --backend eager',
              'bench_profile.py --model resnet18 --batch_size 4 --steps 2', 'plot_cost.py --largest 11 --images 16']


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
    assert 'PyTorch' in text and '| not measured: no GPU |' in text


def test_mixing_is_drawn(rejected, monkeypatch, tmp_path):
    plot = [str(ROOT / 'scripts' / 'plot_mixing.py'), '--dataset', 'digits', '--count', '3', '--output']
    result = shell([sys.executable, *plot, 'x.png'], tmp_path)
    assert result.returncode == 0 and (tmp_path / 'x.png').stat().st_size > 10_000, result.stderr
    monkeypatch.setattr(sys, 'argv', [*plot, 'x.png/y.png'])
    rejected(lambda _: plot_mixing.main(), words=['x.png/y.png'])


@pytest.fixture
def check_gpu():
    """What scripts/check_gpu.py defines."""
    return runpy.run_path(str(ROOT / 'scripts' / 'check_gpu.py'))


def test_check_gpu_without_a_gpu(check_gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['check_gpu.py'])
    with pytest.raises(SystemExit) as stop:
        check_gpu['main']()
    assert stop.value.code == 2
    assert capsys.readouterr() == ('', 'check_gpu: error: no GPU found that this PyTorch can use\n')


def test_check_gpu_on_a_cpu_in_miniature(check_gpu, monkeypatch, capsys):
    """What it compares, starts, kills and reads."""
    monkeypatch.setattr(sys, 'argv', ['x', '--device', 'cpu', '--only', 'loss', 'views', 'kill and resume'])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        check_gpu['main']()
    out = capsys.readouterr().out
    assert not stop.value.code, out
    assert '| loss | works, error at most' in out and '| views | works, difference at most' in out
    assert '| kill and resume | works, the same bits |' in out


def test_check_gpu_finds_a_wrong_loss(check_gpu, monkeypatch):
    check = check_gpu['check_losses']
    def wrong(features, labels):
        return sum(part.square().sum() * (1 + 1e-3 * (part.dtype == torch.float32)) for part in features)
    monkeypatch.setitem(check.__globals__, 'GenSupConLoss', lambda temperature, unit_length: wrong)
    with pytest.raises(check_gpu['Failed'], match='GenSCL: loss is wrong by 1.0e-03'):
        check(torch.device('cpu'), 16)


def test_what_check_gpu_makes_of_a_run(check_gpu):
    steps = ('1][1', 9, 5), ('1][2', 0.5, 0), ('2][1', 0.2, 0.01), ('2][2', 0.2, 0.03)
    lines = ''.join(f'Train: [{step}/2]\tBT {bt:.3f} (9.0)\tDT {dt:.3f} (9.0)\n' for step, bt, dt in steps)
    row = check_gpu['figures'](lines + f'peak memory {3 * 2**29}\n', 256)
    assert row == ['1280', '10.0 %', '1.5 GB']
    rows = {'loss': ['works', 'error'], 'SupCon': ['works', '640', '1.0 %', '1 GB'], 'amp': ['works', *row]}
    fastest, slow = check_gpu['advice'](rows)
    assert fastest.startswith('Fastest: amp, 2.0 times') and 'more than 5 % of the time: amp;' in slow
    with pytest.raises(check_gpu['Failed'], match='no step'):
        check_gpu['figures']('', 256)
    job = check_gpu['start'](['main_supcon', '--epochs', 'x'])
    with pytest.raises(check_gpu['Failed'], match='status 2: main_supcon.py: error: argument --epochs'):
        check_gpu['finished'](job, 100)
