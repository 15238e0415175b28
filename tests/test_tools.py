"""The environment that env.sh makes, synthetic images of make_augs.py, files of figures."""
import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import shell
from PIL import Image

import main_ce
from scripts import accuracies, figures, make_augs, plot_features
from util import arguments
from util.errors import UserError


def executable(file, script):
    """A shell script that can be started."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'#!/bin/sh\n{script}\n')
    file.chmod(0o755)
    return file


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


def test_environment_is_made_once_and_errors_are_reported(copy, python):
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
def augs(call, monkeypatch, image_folder, tmp_path):
    """augs(classes, *arguments): run make_augs.py on a folder with these classes."""
    def augs(classes, *arguments):
        if not (tmp_path / 'data').exists():
            image_folder('data', dict.fromkeys(classes, 4))
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
def test_synthetic_images_that_cannot_be_written_are_rejected(augs, tmp_path, classes, words, expected):
    status, _, err = augs(classes.split(','), *words.split())
    assert status == 2 and expected in err and err.count('\n') == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ['data'] and len(list(tmp_path.rglob('*.png'))) == 8


def test_synthetic_images_beside_a_root_that_is_not_there_yet(augs):
    status, out, err = augs(['a', 'b'], '--aug_output_name', '..')
    assert status == 0, err
    assert 'augs/../augs-id: 8 images' in out


def test_synthetic_images_in_the_place_of_a_link_to_itself(augs, tmp_path):
    (tmp_path / 'augs' / 'o').mkdir(parents=True)
    (tmp_path / 'augs' / 'o' / 'augs-id').symlink_to('augs-id')
    status, _, err = augs(['a', 'b'])
    assert status == 2 and 'cannot be written' in err and err.count('\n') == 1
    assert [file.name for file in (tmp_path / 'augs' / 'o').iterdir()] == ['augs-id']


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir, lambda file: file.symlink_to('/dev/zero'),
                                  lambda file: file.write_bytes(b'best accuracy: \xff'), lambda file: file.touch()])
def test_a_log_without_results_is_named(call, monkeypatch, tmp_path, make):
    make(tmp_path / 'log.txt')
    monkeypatch.setattr(sys, 'argv', ['accuracies.py', 'a', str(tmp_path)])
    status, _, err = call(lambda argv: accuracies.main())
    assert status == 2 and f'{tmp_path}/log.txt: not a readable log' in err and err.count('\n') == 1


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
    opt = arguments.defaults(dataset='path', data_folder='data', aug_root='augs', aug_output_name='o',
                             aug_name_id='augs-id')
    assert len(main_ce.load_images(opt).id) == 16


def test_a_slurm_job_is_queued_again_until_its_run_is_finished(tmp_path):
    """With programs that stand in for SLURM's and for Python; how runs stop and resume: test_survival.py."""
    executable(tmp_path / 'scontrol', 'echo "$@" >> asked; printf "host1\\nhost2\\n"')
    executable(tmp_path / 'srun', 'shift; SLURM_PROCID=3 SLURM_LOCALID=1 exec "$@"')
    executable(tmp_path / 'python', 'echo "$@" $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR >> ran\n'
                                    'exit $(cat status)')
    environment = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_SUBMIT_DIR': str(tmp_path), 'SLURM_JOB_ID': '7',
                   'SLURM_JOB_NODELIST': 'host[1-2]', 'SLURM_NTASKS': '4', 'SLURM_NTASKS_PER_NODE': '2'}
    script = Path(__file__).resolve().parent.parent / 'scripts' / 'slurm.sh'
    for status, asked in ((143, 'requeue 7\n'), (0, ''), (2, '')):
        (tmp_path / 'status').write_text(str(status))
        result = subprocess.run(['bash', script, 'main_ce.py', '--output_name', "it's"], cwd=tmp_path, env=environment)
        assert result.returncode == status
        assert (tmp_path / 'asked').read_text() == f'show hostnames host[1-2]\n{asked}'
        assert (tmp_path / 'ran').read_text() == "main_ce.py --output_name it's --resume 3 1 4 2 host1\n"
        for name in ('asked', 'ran'):
            (tmp_path / name).unlink()
