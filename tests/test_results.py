"""The tables of scripts/results: rows that run once, resume and reject; their numbers; corrupted images."""
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, shell
from scipy.ndimage import gaussian_filter  # comes with scikit-learn

import main_ce
import main_linear
import main_supcon
from scripts import evaluate
from util import arguments
from util.checkpoints import load_checkpoint
from util.errors import UserError

RESULTS = ROOT / 'scripts' / 'results'
TABLES = sorted(file.stem for file in RESULTS.glob('*.sh') if file.stem != 'rows')
PROGRAMS = {'main_supcon.py': main_supcon, 'main_ce.py': main_ce, 'main_linear.py': main_linear}

# Stands in for every program: it counts its runs, and prints and writes what they would.
FAKE = '''
import sys
from pathlib import Path
words = sys.argv[1:]
with open('ran', 'a') as file:
    print(' '.join([sys.argv[0], *words]), file=file)
if 'broken' in words:
    sys.exit('it broke')
lines = ['confidence id 0.668 ood 0.525 difference 0.143 AUROC 61.80 FPR95 91.09', ' * kNN accuracy 41.25',
         ' * contrastive accuracy 60.00\\tkNN mAP 42.50']
if not 'main_supcon' in sys.argv[0]:
    lines.append(' * Acc@1 over classes: many 60.500 medium 40.250 few 20.000')
    lines += [f"best {score}: {40 + len(' '.join(words)) % 7}.50" for score in ('accuracy', 'mAP')]
if 'evaluate' in sys.argv[0]:
    lines = ['top-1 47.00', 'kNN accuracy 43.75', 'ECE 3.10', 'R@1 41.00', 'mAP@R 22.00']
    lines += [f'{kind} 5 4 3 2 1' for kind in ('noise', 'blur', 'contrast', 'jpeg') if '--corruptions' in words]
for option in {'--ckpt', '--teacher_path'}.intersection(words):
    path = Path(words[words.index(option) + 1])
    if not (path.parent if option == '--ckpt' else path).is_dir():
        sys.exit(f'{path} is not there')
if '--output_name' in words:
    trial = words[words.index('--trial') + 1] if '--trial' in words else '0'
    folder = Path('output', words[words.index('--output_name') + 1], 'trial=' + trial)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'log.txt').write_text('\\n'.join(lines) + '\\n')
if '--output' in words:
    Path(words[words.index('--output') + 1]).write_bytes(b'image')
if '--aug_root' in words:
    Path(words[words.index('--aug_root') + 1], words[words.index('--aug_output_name') + 1]).mkdir(
        parents=True, exist_ok=True)
print('\\n'.join(lines))
'''


ASKS_FOR_GPU = 'import sys, torch; sys.exit(not torch.cuda.is_available())'       # in rows.sh


@pytest.fixture
def fake(copy):  # noqa: F811
    """A copy of the repository without results, whose programs are all FAKE, with a folder of images."""
    for name in (*PROGRAMS, 'scripts/evaluate.py', 'scripts/plot_features.py', 'scripts/make_augs.py',
                 'scripts/make_mosaics.py'):
        (copy / name).write_text(FAKE)
    for budget in ('cpu', 'gpu'):
        shutil.rmtree(copy / 'scripts' / 'results' / budget, ignore_errors=True)
    for part in ('train', 'test'):
        (copy / 'data' / 'cifar10_jpeg' / part / 'airplane').mkdir(parents=True)
    return copy


def fill(folder, table, *arguments, budget='cpu'):
    done = shell(['bash', f'scripts/results/{table}.sh', '--budget', budget, *arguments], folder)
    ran = (folder / 'ran').read_text().splitlines() if (folder / 'ran').exists() else []
    (folder / 'ran').unlink(missing_ok=True)
    return done, ran


def commands_in(log):
    return re.findall(r'^\$ python (.*)$', log.read_text(), re.MULTILINE)


@pytest.mark.parametrize('table', TABLES)
def test_a_table_runs_once_and_fills_the_row_that_is_deleted(fake, table):
    done, ran = fill(fake, table)
    assert done.returncode == 0, done.stderr
    folder = fake / 'scripts' / 'results' / 'cpu'
    logs = sorted((folder / table).glob('*.log'))
    text = (folder / f'{table}.md').read_text()
    assert logs and 'Not run' not in text and text.strip() in done.stdout
    shutil.rmtree(fake / 'output')                                      # as in a fresh clone
    names = {'methods': ['cifar-genscl-kd-1', 'digits-features-0', 'cifar-simclr-corrupted-2'],
             'epochs': ['genscl-kd-32-0', 'supcon-new-0']}              # those that need runs of other rows
    deleted = [folder / table / f'{name}.log' for name in names.get(table, [logs[0].stem])]
    commands = [command for log in deleted for command in commands_in(log)]
    for log in deleted:
        log.unlink()
    done, again = fill(fake, table)
    assert done.returncode == 0 and [command for log in deleted for command in commands_in(log)] == commands
    assert sorted(line for line in again if 'make_augs' not in line) == sorted(commands)
    assert (folder / f'{table}.md').read_text() == text
    # Every command is one that the programs take, and each row names its seed.
    for command in {command for log in logs for command in commands_in(log)}:
        program, *words = shlex.split(command)
        if program in PROGRAMS:
            opt = arguments.parse(program.removesuffix('.py'), '', words)
            assert str(opt.seed) == opt.trial and opt.output_name.startswith('results-cpu-') and opt.resume
            assert opt.eval_freq == 0                                   # the accuracy is that of the last epoch


def test_rows_of_other_commands_and_failures_are_reported(fake):
    assert fill(fake, 'labels')[0].returncode == 0
    folder = fake / 'scripts' / 'results' / 'cpu'
    done, ran = fill(fake, 'labels', '--with', '--width 0.5')
    assert done.returncode == 1 and ran == [] and 'is of other commands' in done.stderr
    assert 'no logs of this table' in done.stderr
    for log in (folder / 'labels').glob('supcon*'):
        log.unlink()
    done, ran = fill(fake, 'labels', '--with', '--width 0.5')           # what has begun resumes only as it began
    assert done.returncode == 1 and ran == [] and 'is of another command' in done.stderr
    (folder / 'labels' / 'ce-labels-25-0.log').unlink()
    shutil.rmtree(fake / 'output')
    (fake / 'main_supcon.py').write_text('import sys; sys.exit("it broke")')
    done, ran = fill(fake, 'labels')
    text = (folder / 'labels.md').read_text()
    assert done.returncode == 1 and len(ran) == 2 and 'labels-25' in ran[0] and '| SupCon |' not in text
    assert 'Not run: supcon-labels-10-0, supcon-labels-100-0' in text
    assert 'labels/supcon-labels-10-0.err: exit status 1: it broke\n' in done.stderr
    (fake / 'main_supcon.py').write_text(FAKE)
    done, ran = fill(fake, 'labels', '--with', 'broken', '--into', 'broken')
    assert done.returncode == 1 and 'it broke' in done.stderr and 'not filled: ce-labels-10-0 ' in done.stderr
    assert not list(fake.glob('broken/labels/*.log')) and 'results-broken-' in ran[0]
    done, ran = fill(fake, 'labels', '--into', 'else/where', '--only', 'supcon-*-0')
    assert done.returncode == 0 and all('results-else-where-supcon' in line for line in ran)        # everything anew
    assert '| SupCon |' in (fake / 'else' / 'where' / 'labels.md').read_text() and len(ran) == 2 * 5


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_table_that_is_stopped_waits_for_checkpoints_and_resumes(fake, number):
    """As `timeout` and Ctrl-C stop it: with a signal to the whole process group."""
    waits = '''
import signal, sys, time
from pathlib import Path
def save(number, frame):
    time.sleep(0.5)
    Path('saved').touch()
    sys.exit(128 + number)
if not Path('saved').exists():
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, save)
    Path('waits').touch()
    time.sleep(60)
'''
    (fake / 'main_ce.py').write_text(waits + FAKE)
    command = ['bash', 'scripts/results/labels.sh', '--budget', 'cpu', '--only', 'ce-labels-10-0']
    environment = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    process = subprocess.Popen(command, cwd=fake, env=environment, start_new_session=True, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # ignored under nohup
    while not (fake / 'waits').exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number and (fake / 'saved').exists() and b'the same command resumes' in said
    assert not list(fake.glob('scripts/results/cpu/labels/*'))
    assert shell(command, fake).returncode == 0
    assert [file.name for file in fake.glob('scripts/results/cpu/labels/*')] == ['ce-labels-10-0.log']


@pytest.mark.parametrize('arguments, words', [
    ([], "--budget ''"), (['--budget', 'tpu'], 'cpu or gpu'), (['--budget'], '--budget: no value'),
    (['--seed', '1'], '--seed: unknown'), (['--budget', 'cpu', '--data', 'nowhere'], '--data nowhere'),
    (['--budget', 'cpu', '--into', 'else where'], '--into else where'), (['--budget', 'gpu'], 'no GPU'),
    (['--budget', 'cpu', '--into', "it's"], "--into it's"), (['--budget', 'cpu', '--data', '/'], "--data '/'"),
    (['--budget', 'cpu', '--with', '--trial 1'], '--with --trial 1'), (['--budget', 'cpu', '--with=x'], 'no value'),
    (['--budget', 'cpu', '--with', '--width 1', '--with', '--seed=3'], '--with --width 1 --seed=3'),
    (['--budget', 'cpu', '--only', 'nothing'], '--only nothing')])
def test_wrong_options_of_tables(fake, arguments, words):
    done = shell(['bash', 'scripts/results/methods.sh', *arguments], fake)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1
    assert not (fake / 'ran').exists()


def test_the_experiments_table_is_of_their_trial(fake):
    """Of the runs of this call, and of a run that was resumed the last result."""
    (fake / 'main_linear.py').write_text(FAKE + """
if 'trial=1' in str(folder):
    with open(folder / 'log.txt', 'a') as file:
        file.write('best accuracy: 77.77\\nconfidence id 1 ood 2 difference 3 AUROC 4 FPR95 5\\n')
""")
    for words, expected in (([], '61.80'), (['--trial', '1', '--resume'], '77.77 1 2 3 4 5')):
        done = shell(['bash', 'scripts/mvip_experiments.sh', '--dataset', 'digits', *words], fake)
        assert done.returncode == 0, done.stderr
        rows = [' '.join(line.split()) for line in done.stdout.splitlines()[-3:]]
        assert all(expected in row for row in rows), rows
        assert [row.split()[0] for row in rows] == ['1', '2', '3']


@pytest.mark.parametrize('left', [[], ['command.partial']])
def test_a_row_that_was_killed_before_it_began_begins(tmp_path, monkeypatch, left):
    """Between making the folder of its run and writing the command in it; a folder of something else stays rejected."""
    monkeypatch.chdir(tmp_path)
    row = runpy.run_path(str(RESULTS / 'row.py'))
    folder = tmp_path / 'output' / 'a' / 'trial=0'
    folder.mkdir(parents=True)
    for name in left:
        (folder / name).write_text('main_ce')
    command = 'main_ce.py --output_name a --trial 0 --resume'
    assert not row['claim'](command) and row['claim'](command)
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [('command', command)]
    with pytest.raises(row['Failure'], match='another command'):
        row['claim'](command + ' --epochs 3')
    (folder / 'command').rename(folder / 'log.txt')
    with pytest.raises(row['Failure'], match='another command'):
        row['claim'](command)


def test_the_minutes_of_a_row_are_those_of_all_its_parts(tmp_path):
    folder, command = tmp_path / 'output' / 'a' / 'trial=0', 'main_ce.py --output_name a --trial 0'
    folder.mkdir(parents=True)
    (folder / 'command').write_text(command)
    (folder / 'seconds').write_text('240.0 120.0\n')           # of a core and of wall clock, until it was stopped
    (tmp_path / 'main_ce.py').touch()
    assert shell([sys.executable, RESULTS / 'row.py', 'a.log', command], tmp_path).returncode == 0
    text = (tmp_path / 'a.log').read_text()
    assert re.search(r'^2\.0 minutes, started', text, re.MULTILINE) and 'CPU minutes: 4.0' in text


def test_minutes_without_bfloat16_are_not_compared():
    report = runpy.run_path(str(RESULTS / 'report.py'))
    text = '2026-12-01, 2 cores of a CPU, no GPU\n$ python main_ce.py\n{}best accuracy: 9\nCPU minutes: 4.00\n'
    assert report['values_of'](text.format('')) == {'top1': 9, 'minutes': 4, 'unit': 'CPU minutes'}
    assert report['values_of'](text.format('--amp has no effect: this CPU\n')) == {'top1': 9}


def test_a_row_with_a_wrong_command_is_reported_in_one_line(tmp_path):
    for words, expected in ((['a.log'], 'expected a log'), (['a.log', "main_ce.py 'x"], 'quotation')):
        done = shell([sys.executable, RESULTS / 'row.py', *words], tmp_path, CUDA_VISIBLE_DEVICES='')
        assert done.returncode == 1 and expected in done.stderr and done.stderr.count('\n') == 1, done.stderr


def test_a_row_whose_log_is_no_file_is_rejected(tmp_path):
    """A named pipe, which would be waited for, a folder, a device."""
    os.mkfifo(tmp_path / 'a.log')
    (tmp_path / 'b.log').mkdir()
    for log in ('a.log', 'b.log', '/dev/null'):
        done = subprocess.run([sys.executable, RESULTS / 'row.py', log, 'main_ce.py'], cwd=tmp_path, timeout=30,
                              capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr == f'row.py: error: {log} is no file, expected a log\n'


def test_corrupted_images_of_a_run_that_has_diverged(tmp_path):
    report = runpy.run_path(str(RESULTS / 'report.py'))
    values = {'clean': 50., **{kind: [5., 4., 3., 2., 1.] for kind in evaluate.STRENGTHS}}
    rows = {'cifar-ce-corrupted': {0: values, 1: {'diverged': True}}, 'cifar-simclr-corrupted': {0: {'diverged': True}}}
    *_, first, second = report['methods'](rows, tmp_path)
    assert first.startswith('| cross-entropy | 50.00 (1 of 2 runs) | 3.00 (1 of 2 runs) |')
    assert second == '| SimCLR |' + ' diverged |' * 5 and (tmp_path / 'corruptions.png').exists()


def test_a_log_that_is_none_is_named(tmp_path):
    report = runpy.run_path(str(RESULTS / 'report.py'))
    (tmp_path / 'a-0.log').write_bytes(b'\xff half')
    with pytest.raises(SystemExit, match='a-0.log: not the log of a row'):
        report['read'](tmp_path, ['a-0'])
    (tmp_path / 'b-0.log').mkdir()
    os.mkfifo(tmp_path / 'c-0.log')
    assert report['read'](tmp_path, ['b-0', 'c-0'])[2] == ['b-0', 'c-0']


def test_a_loss_that_is_not_finite_is_a_result(fake):
    (fake / 'main_ce.py').write_text(FAKE + "\nif '--lr 1 ' in ' '.join(words):\n    sys.exit('the loss is nan, "
                                     "expected a finite number')\n")
    assert fill(fake, 'stability')[0].returncode == 0
    text = (fake / 'scripts' / 'results' / 'cpu' / 'stability.md').read_text()
    assert re.search(r'^\| cross-entropy \| .* \| diverged \| diverged \|$', text, re.MULTILINE), text
    assert 'Not run' not in text


def test_groups_of_classes_that_there_are():
    report = runpy.run_path(str(RESULTS / 'report.py'))
    text = '$ python main_ce.py\n * Acc@1 over classes: many 80.000 medium 50.000\n'     # no class has few images
    assert report['values_of'](text) == {'many': 80, 'medium': 50}


def test_five_classes_are_those_of_the_data(fake):
    for name, first in (('one', 0), ('two', 0), ('three', 3)):
        for part in ('train', 'test'):
            for number in range(first, 10):
                (fake / name / part / f'{number}').mkdir(parents=True)
        done, _ = fill(fake, 'epochs', '--data', name, '--into', f'into-{name}', '--only', 'supcon-known-0')
        known = fake / 'data' / 'cifar10_known' / 'train'
        assert {link.name: link.resolve() for link in known.iterdir()} == {
            f'{number}': fake / name / 'train' / f'{number}' for number in range(first, first + 5)}, done.stderr


def test_spread_over_seeds():
    report = runpy.run_path(str(RESULTS / 'report.py'))
    row = {0: {'top1': 40.}, 1: {'top1': 43.}, 2: {'top1': 41.5}}
    assert report['spread'](row, 'top1') == '41.50 ± 1.50'
    assert report['spread']({**row, 3: {'diverged': True}}, 'top1') == '41.50 ± 1.50 (3 of 4 runs)'
    assert report['spread']({0: {'top1': 40.}}, 'top1', 1) == '40.0'


def test_commands_for_a_gpu_are_taken(fake):
    """As far as they can be tested without one: the programs know the options."""
    for table in TABLES:
        script = fake / 'scripts' / 'results' / 'rows.sh'
        script.write_text(script.read_text().replace(ASKS_FOR_GPU, 'pass'))
        (fake / 'scripts' / 'results' / 'row.py').write_text(
            "import sys\nwith open('ran', 'a') as file:\n    file.write('\\n'.join(sys.argv[2:]) + '\\n')\n")
        _, ran = fill(fake, table, budget='gpu')            # that makes no logs, and so no table
        assert ran, table
        for program, *words in map(shlex.split, ran):
            if program in PROGRAMS:
                assert arguments.parse(program.removesuffix('.py'), '', words).output_name.startswith('results-gpu-')


@pytest.mark.parametrize('table', TABLES)
def test_tables_in_the_repository_are_those_of_its_logs_and_commands(fake, table):
    """The page shows the tables that the logs give; the logs are of the commands that the scripts would run now."""
    folder, page = RESULTS / 'cpu', (ROOT / 'docs' / 'results.md').read_text()
    text = (folder / f'{table}.md').read_text()
    for line in text.splitlines():
        assert not line.startswith('|') or line in page, line
    results = fake / 'scripts' / 'results'
    shutil.copytree(folder, results / 'cpu')
    (results / 'cpu' / f'{table}.md').unlink()
    names, missing = {log.stem for log in (folder / table).glob('*.log')}, 'Not run' in text
    done, ran = fill(fake, table, *(['--jobs', '0'] if missing else []))        # rows that have not been run are named
    assert done.returncode == missing and ran == [], done.stderr
    assert (results / 'cpu' / f'{table}.md').read_text() == text
    (results / 'report.py').write_text("import sys\nopen('rows', 'w').write(' '.join(sys.argv[4:]))\n")
    if missing:
        done, ran = fill(fake, table, '--only', f"@({'|'.join(names)})")
        assert done.returncode == 0 and ran == [], done.stderr
    assert fill(fake, table, '--jobs', '0')[0].returncode == 0
    rows = set((fake / 'rows').read_text().split())
    assert names <= rows and (names == rows or missing)


@pytest.mark.parametrize('table', sorted(file.stem for file in (RESULTS / 'gpu').glob('*.md')))
def test_tables_of_a_gpu_are_those_of_its_logs(tmp_path, table):
    """Their minutes are of the clock: a GPU's time is not the process's."""
    folder = shutil.copytree(RESULTS / 'gpu', tmp_path / 'gpu')
    names, expected = sorted(log.stem for log in (folder / table).glob('*.log')), (folder / f'{table}.md').read_text()
    (folder / f'{table}.md').unlink()
    (tmp_path / 'failures').touch()
    done = shell([sys.executable, RESULTS / 'report.py', table, folder, tmp_path / 'failures', *names], tmp_path)
    assert done.returncode == 0 and (folder / f'{table}.md').read_text() == expected, done.stderr


def test_figures_of_the_results_are_shown():
    page = (ROOT / 'docs' / 'results.md').read_text()
    for name in ('cifar-features', 'corruptions', 'labels', 'stability'):
        assert f'](../scripts/results/cpu/{name}.png)' in page, name


def test_a_row_with_the_real_programs(copy):  # noqa: F811
    """Pretraining, linear evaluation and corrupted images; finished runs are not trained again."""
    run = '--seed 1 --trial 1 --eval_freq 0 --resume --epochs 1'
    commands = [f"main_supcon.py {' '.join(TINY)} {run} --samples_per_class 5 --output_name a",
                f"main_linear.py {' '.join([*TINY[:2], *TINY[6:]])} {run} --ckpt output/a/trial=1/last.ckpt "
                '--output_name b',
                'scripts/evaluate.py --ckpt output/b/trial=1/last.ckpt --corruptions --max_pictures 40']
    row = [sys.executable, 'scripts/results/row.py', 'logs/a b-1.log', *commands]
    done = shell(row, copy)
    assert done.returncode == 0, done.stderr
    text = (copy / 'logs' / 'a b-1.log').read_text()
    assert 'PyTorch' in text and commands_in(copy / 'logs' / 'a b-1.log') == commands
    minutes = [float(number) for number in re.findall(r'^CPU minutes: (\S+)$', text, re.MULTILINE)]
    assert len(minutes) == 3 and all(0 < number < 10 for number in minutes)
    for line in (r' \* contrastive accuracy .*kNN accuracy [\d.]+', r'best accuracy: [\d.]+', r'top-1 [\d.]+',
                 r'noise( [\d.]+){5}', r'jpeg( [\d.]+){5}'):
        assert re.search(f'^{line}$', text, re.MULTILINE), line
    accuracy = re.search('best accuracy: (.*)', text)[1]
    (copy / 'logs' / 'a b-1.log').unlink()
    assert shell(row, copy).returncode == 0
    again = (copy / 'logs' / 'a b-1.log').read_text()
    assert 'before' not in text and 'before: output/a/trial=1, output/b/trial=1\n' in again
    assert again.count('Train: ') == text.count('Train: ') and f'best accuracy: {accuracy}' in again


def classifier(call):
    assert call(main_ce.main, *TINY, '--epochs', 1, '--output_name', 'a', '--samples_per_class', 4)[0] == 0
    return 'output/a/trial=0/last.ckpt'


def test_evaluation_is_that_of_the_run(call, monkeypatch):
    """Top-1 as validation has it, kNN as the plain function on the images of the run, clean without corruptions."""
    ckpt = classifier(call)
    out = call(main_ce.main, *TINY, '--output_name', 'a', '--samples_per_class', 4, '--evaluate')[1]
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', '--ckpt', ckpt])
    status, found, err = call(lambda argv: evaluate.main())
    assert status == 0, err
    assert float(re.search(r'^top-1 (.*)$', found, re.MULTILINE)[1]) == pytest.approx(
        float(re.search(r'Acc@1 (\S+)', out)[1]), abs=0.006)
    assert 'noise' not in found and re.search(r'^kNN accuracy \d+\.\d\d$', found, re.MULTILINE)
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', '--ckpt', 'nowhere.ckpt'])
    status, _, err = call(lambda argv: evaluate.main())
    assert status == 2 and err.count('\n') == 1 and 'nowhere.ckpt' in err


@pytest.mark.parametrize('extra', [[], ['--moco', '--moco_k', '32'], ['--method', 'BCL', '--no_warm']])
def test_the_classifier_beside_a_projection_head_is_evaluated(call, monkeypatch, extra):
    """main_supcon.py --ce_weight; without it there is none, which is reported."""
    words = [*TINY, '--epochs', 1, '--output_name', 'a']
    assert call(main_supcon.main, *words, '--ce_weight', 1, *extra)[0] == 0
    checkpoint = load_checkpoint('output/a/trial=0/last.ckpt')
    opt = main_supcon.parse_option([*map(str, words), '--ce_weight', '1', *extra])
    opt.device = 'cpu'
    *_, val_loader, classes = main_supcon.set_loader(opt)
    model = main_supcon.set_model(opt)
    model.load_state_dict(checkpoint['model'])
    with torch.no_grad():
        right = [model.eval()(images)[1].argmax(1) == labels for images, labels in val_loader]
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', '--ckpt', 'output/a/trial=0/last.ckpt'])
    status, out, err = call(lambda argv: evaluate.main())
    assert status == 0, err
    assert f'top-1 {100 * torch.cat(right).float().mean():.2f}\n' in out and 'kNN accuracy' in out
    if not extra:
        assert call(main_supcon.main, *words, '--overwrite')[0] == 0
        status, _, err = call(lambda argv: evaluate.main())
        assert status == 2 and 'holds no classifier of resnet18: fc.weight is missing' in err


RECORDED = {'dataset': 'digits', 'model': 'resnet18', 'width': 0.0625, 'size': 8, 'mean': [0.3] * 3, 'std': [0.2] * 3}


@pytest.mark.parametrize('name, value', [
    ('seed', -1), ('seed', 'abc'), ('seed', 2**40), ('max_samples', 'abc'), ('max_samples', 0), ('dataset', 'nope'),
    ('samples_per_class', 2.5), ('dataset', ''), ('size', 10**9), ('mean', 'x'), ('std', [0, 0, 0]), ('width', 1e9),
    ('model', 'resnet9'), ('split_seed', -1), ('aug_mode', 'evil'), ('aug_mode', 'with_id'), ('aug_ex_id', 'x'),
    ('mvip_num_classes', 0), ('seed', {'a': [1]}), ('dataset', 'path')])
def test_options_of_a_checkpoint_are_checked(tmp_path, name, value):
    torch.save({'model': {}, 'opt': {**RECORDED, name: value}}, tmp_path / 'x.ckpt')
    with pytest.raises(UserError, match='x.ckpt: its recorded options') as error:
        arguments.evaluation_options(load_checkpoint(tmp_path / 'x.ckpt'), tmp_path / 'x.ckpt')
    assert len(str(error.value)) < 1000


def test_a_checkpoint_does_not_tell_where_to_write(tmp_path, monkeypatch):
    """Of its options come those that say which images and which network; a download goes where it usually does."""
    monkeypatch.chdir(tmp_path)
    unused = {'cache_dir': 'evil', 'export': 'evil', 'num_workers': 'x', 'batch_size': 'x', 'loader': 'x',
              'compile': True, 'device': 'cuda:9', 'teacher_kind': 'x', 'wandb': True, 'epochs': 'x'}

    def options(recorded, **given):
        recorded = {**RECORDED, **unused, 'aug_output_name': 'o', **recorded}
        return arguments.evaluation_options({'opt': recorded}, 'x.ckpt', **given)
    opt = options({'max_samples': 50, 'seed': 3, 'split_seed': 5})
    assert (opt.cache_dir, opt.export, opt.compile, opt.wandb, opt.num_workers) == (None, None, False, False, 0)
    assert (opt.seed, opt.split_seed, opt.max_samples, opt.size, opt.aug_output_name) == (3, 5, 50, 8, 'o')
    (tmp_path / 'mine').mkdir()
    for dataset, folder in (('cifar10', 'cifar-10-batches-py'), ('cifar100', 'cifar-100-python')):
        recorded = {'dataset': dataset, 'data_folder': 'mine'}
        assert options(recorded).data_folder == './data'
        assert options(recorded, data_folder='there').data_folder == 'there'
        (tmp_path / 'mine' / folder).mkdir()
        assert options(recorded).data_folder == 'mine'
    opt = options({'dataset': 'path', 'data_folder': 'mine', 'split_seed': 5}, dataset='digits')
    assert (opt.data_folder, opt.aug_output_name, opt.split_seed) == ('./data', None, None)
    assert (opt.model, opt.width, opt.size, opt.mean) == ('resnet18', 0.0625, 8, [0.3] * 3)    # of the network


def test_damages_of_the_smallest_images():
    for size in ((1, 1), (2, 3), (5, 1)):
        image = np.random.default_rng(0).uniform(0, 255, (*size, 3))
        for strength in evaluate.STRENGTHS['blur']:
            blurred = evaluate.blur(image, strength, None)
            assert blurred.shape == image.shape and np.isfinite(blurred).all()


def corrupted(images, kind, strength):
    source = [evaluate.Corrupted(images, i, kind, strength) for i in range(len(images))]
    return replace(images, source=source, cache_dir=None, _decoded={})


def test_damages_are_what_they_say(real_images):
    images = real_images.sample(20, 0)
    clean = np.stack([np.asarray(images.load(i)) for i in range(20)]).astype(float)
    for kind, strengths in evaluate.STRENGTHS.items():
        changes = []
        for strength in strengths:
            part = corrupted(images, kind, strength)
            values = np.stack([np.asarray(part.load(i)) for i in range(20)]).astype(float)
            assert np.array_equal(values[3], np.asarray(corrupted(images, kind, strength).load(3)))     # every time
            changes.append(np.abs(values - clean).mean())
            if kind == 'noise':
                inner = (clean > 80) & (clean < 175)            # nothing is cut off there
                assert (values - clean)[inner].std() == pytest.approx(255 * strength, rel=0.05)
            elif kind == 'contrast':
                mean = clean.mean((1, 2), keepdims=True)
                assert np.abs(values - (mean + strength * (clean - mean))).max() <= 0.51
            elif kind == 'blur':
                theirs = gaussian_filter(clean, (0, strength, strength, 0), mode='mirror')
                assert np.abs(values - theirs).max() < 1
        assert changes == sorted(changes) and changes[0] > 0.5, kind


def test_samples_per_class(call):
    def load(**changes):
        return main_ce.load_images(arguments.defaults(dataset='digits', **changes))
    data, whole = load(samples_per_class=7), load()
    assert data.train.labels.bincount().tolist() == [7] * 10 and len(data.val) == len(whole.val)
    assert torch.equal(data.train.labels, load(samples_per_class=7).train.labels)
    assert not np.array_equal(data.train.source, load(samples_per_class=7, seed=1).train.source)
    assert len(load(samples_per_class=10**6).train) == len(whole.train)
    data = load(samples_per_class=7, max_samples=20)
    assert data.train.labels.bincount().tolist() == [2] * 10 and len(data.val) == 20
