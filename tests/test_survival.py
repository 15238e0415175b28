"""Runs that are killed, stopped by signals, short of disk, started twice: what is on disk is whole, and they go on."""
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, close_log
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard_logger import tensorboard_logger
from tqdm import tqdm

import main_ce
import main_linear
import main_supcon
from datasets import loader
from util import checkpoints, errors, files, runs, training
from util.checkpoints import kept_checkpoints

pytestmark = pytest.mark.usefixtures('interruptible')

FOLDER = Path('output/a/trial=0')
RUN = [*TINY, '--output_name', 'a']


def forked(main, *arguments, before=lambda: None):
    """Start a program in a copy of this process, its lines in the files out and err: -> its number."""
    child = os.fork()
    if child:
        return child
    for stream, name in ((1, 'out'), (2, 'err')):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False)   # noqa: SIM115
    torch.set_num_threads(1)                            # the threads of the parent are not in its copy
    tqdm.set_lock(threading.RLock())                    # its own: a killed copy would keep a shared one
    code = 1
    try:
        close_log()
        before()
        errors.run(lambda: main([str(argument) for argument in arguments]))
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def same(one, other):
    """Whether two checkpoints, or parts of them, are the same to the bit."""
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def states(name='a'):
    checkpoint = checkpoints.load_checkpoint(f'output/{name}/trial=0/last.ckpt')
    return {key: checkpoint[key] for key in ('model', 'optimizer', 'scaler', 'epoch', 'step', 'best_acc')}


@pytest.mark.parametrize('program, extra', [(main_supcon, ['--moco', '--moco_k', '64']), (main_ce, ['--warm'])])
def test_killed_at_random_moments_it_ends_with_the_same_bits(monkeypatch, tmp_path, program, extra):
    """kill -9 eight times, anywhere from its first line on: every checkpoint is readable at any moment."""
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, *extra, '--save_steps', 1, '--save_freq', 2, '--keep_ckpts', 2, '--cosine', '--epochs', 40]
    assert ended(forked(program.main, *arguments, '--output_name', 'whole')) == 0
    rng, kills = np.random.default_rng(0), 0
    while kills < 8:
        child = forked(program.main, *arguments, '--output_name', 'a', '--resume')
        time.sleep(rng.uniform(0.02, 0.4))
        os.kill(child, signal.SIGKILL)
        if ended(child) == 0:                           # too late: once more from a moment before the end
            shutil.copy(min(kept_checkpoints(FOLDER)), FOLDER / 'last.ckpt')
            continue
        kills += 1
        for file in FOLDER.glob('*.ckpt'):
            checkpoints.load_checkpoint(file)
    assert ended(forked(program.main, *arguments, '--output_name', 'a', '--resume')) == 0
    assert same(states(), states('whole'))
    assert [file.name for file in kept_checkpoints(FOLDER)] == ['ckpt_epoch_40.ckpt', 'ckpt_epoch_38.ckpt']
    assert not list(FOLDER.glob('*.partial'))


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step, number): send this process a signal during a step, counted from 1 over all epochs."""
    def stop_at(step, number):
        update, count = training.update, 0

        def counting(*args):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), number)
            return update(*args)
        monkeypatch.setattr(training, 'update', counting)
    return stop_at


def scalars(name, tag):
    accumulator = EventAccumulator(f'output/{name}/trial=0')
    accumulator.Reload()
    return {event.step: event.value for event in accumulator.Scalars(tag)}


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize('program, extra, step', [
    (main_supcon, ['--accum_steps', '2'], 5), (main_supcon, [], 3), (main_ce, [], 3),
    (main_supcon, ['--method', 'GenSCL', '--mix', 'mixup_cutmix'], 7),
    (main_supcon, ['--moco', '--moco_k', '64', '--amp'], 6),
    (main_ce, ['--loader', 'per_sample', '--num_workers', '2'], 4),
    (main_ce, ['--loader', 'workers', '--optim_kind', 'AdamW', '--mix', 'cutmix'], 8)])
def test_a_signal_stops_after_the_step_and_resuming_is_the_same_run(call, stop_at, program, extra, step, number,
                                                                    status):
    arguments = [*TINY, *extra, '--epochs', 3, '--eval_freq', 1, '--print_freq', 1]
    assert call(program.main, *arguments, '--output_name', 'whole')[0] == 0
    stop_at(step, number)
    code, out, err = call(program.main, *arguments, '--output_name', 'a')
    assert code == status and not err
    epoch, done = (step - 1) // 3 + 1, (step - 1) % 3 + 1
    assert f'{signal.Signals(number).name}: stopped after step {done} of epoch {epoch}, --resume' in out
    assert (states()['epoch'], states()['step']) == (epoch - 1, done)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    code, out, err = call(program.main, *arguments, '--output_name', 'a', '--resume')
    assert code == 0, err
    assert f'Train: [{epoch}][{done}/3]' not in out and f'Train: [{epoch}]' in out or done == 3
    assert same(states(), states('whole'))
    tags = ('loss', 'contrastive_acc', 'knn_acc') if program is main_supcon else ('train_loss', 'train_acc', 'val_acc')
    for tag in ('learning_rate', *tags):
        assert scalars('a', tag) == pytest.approx(scalars('whole', tag))        # of whole epochs


def test_linear_evaluation_resumes_inside_an_epoch(call, stop_at):
    assert call(main_supcon.main, *TINY, '--epochs', 1, '--output_name', 'encoder')[0] == 0
    arguments = ['--dataset', 'digits', '--size', 8, '--max_samples', 96, '--batch_size', 32, '--epochs', 3, '--ckpt',
                 'output/encoder/trial=0/last.ckpt', '--cache_features', '--num_workers', 0]
    assert call(main_linear.main, *arguments, '--output_name', 'whole')[0] == 0
    stop_at(5, signal.SIGTERM)
    assert call(main_linear.main, *arguments, '--output_name', 'a')[0] == 143
    assert call(main_linear.main, *arguments, '--output_name', 'a', '--resume')[0] == 0
    assert same(states(), states('whole'))


def test_linear_evaluation_resumes_with_its_own_encoder_alone(call, rejected):
    """The checkpoint holds the encoder that its classifier was trained on, which would be evaluated."""
    assert call(main_supcon.main, *TINY, '--epochs', 1, '--output_name', 'encoder')[0] == 0
    arguments = ['--dataset', 'digits', '--max_samples', 96, '--batch_size', 32, '--ckpt',
                 'output/encoder/trial=0/last.ckpt', '--cache_features', '--num_workers', 0, '--output_name', 'a']
    assert call(main_linear.main, *arguments, '--epochs', 1)[0] == 0
    assert call(main_linear.main, *arguments, '--epochs', 2, '--resume')[0] == 0
    assert call(main_supcon.main, *TINY, '--epochs', 2, '--output_name', 'encoder', '--resume')[0] == 0
    rejected(main_linear.main, *arguments, '--epochs', 3, '--resume',
             words=[f'{FOLDER}/last.ckpt', 'another encoder than that of output/encoder', '--overwrite'])
    tuned = [*(word for word in arguments if word != '--cache_features'), '--output_name', 'tuned', '--epochs', 2]
    assert call(main_linear.main, *tuned, '--finetune')[0] == 0
    rejected(main_linear.main, *tuned, '--resume', words=['--finetune False, was True'])


def test_warm_up_of_a_run_that_is_continued_for_longer(call):
    run = [*RUN, '--warm', '--learning_rate', 0.5, '--print_freq', 1]
    assert call(main_ce.main, *run, '--epochs', 4)[0] == 0          # two epochs of warm-up
    status, out, err = call(main_ce.main, *run, '--epochs', 12, '--resume')
    assert status == 0 and '--warm_epochs 6, was 2: the warm-up has ended' in out, err
    events = EventAccumulator(f'{FOLDER}')
    events.Reload()
    assert [event.value for event in events.Scalars('learning_rate')][2:] == pytest.approx([0.5] * 10)


def test_a_second_signal_ends_at_once(call, monkeypatch):
    update = training.update

    def twice(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return update(*args)
    monkeypatch.setattr(training, 'update', twice)
    assert call(main_ce.main, *RUN, '--epochs', 3)[0] == 130
    assert not (FOLDER / 'last.ckpt').exists()


def test_a_signal_during_evaluation_stops_after_the_epoch(call, monkeypatch):
    validate = main_ce.validate
    monkeypatch.setattr(main_ce, 'validate', lambda *args: os.kill(os.getpid(), signal.SIGTERM) or validate(*args))
    code, out, _ = call(main_ce.main, *RUN, '--epochs', 3)
    assert code == 143 and 'stopped after epoch 1' in out
    assert (states()['epoch'], states()['step']) == (1, 0)


def test_workers_leave_signals_to_the_program(monkeypatch, tmp_path):
    """SIGTERM to all processes of the job, as schedulers send it: the checkpoint is written and no worker is left."""
    monkeypatch.chdir(tmp_path)
    child = forked(main_ce.main, *RUN[:-4], '--num_workers', 2, '--output_name', 'a', '--loader', 'per_sample',
                   '--epochs', 10000, '--eval_freq', 0, before=lambda: os.setpgid(0, 0))
    while not (FOLDER / 'last.ckpt').exists():
        time.sleep(0.05)
    os.killpg(child, signal.SIGTERM)
    assert ended(child) == 143, Path('err').read_text()
    assert 'SIGTERM: stopped after' in Path('out').read_text() and not Path('err').read_text()
    states()
    with contextlib.suppress(ProcessLookupError):
        for _ in range(100):
            os.killpg(child, 0)
            time.sleep(0.1)
        raise AssertionError('workers are left')


def test_a_run_whose_workers_outlive_it_for_a_moment_can_be_resumed_at_once(call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [*RUN[:-4], '--num_workers', 2, '--output_name', 'a', '--loader', 'per_sample', '--eval_freq', 0]
    child = forked(main_ce.main, *arguments, '--epochs', 10000, before=lambda: os.setpgid(0, 0))
    while not (FOLDER / 'last.ckpt').exists():
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    ended(child)
    os.killpg(child, signal.SIGSTOP)                    # the workers are still there
    try:
        status, _, err = call(main_ce.main, *arguments, '--epochs', states()['epoch'] + 1, '--resume')
        assert status == 0, err
    finally:
        os.killpg(child, signal.SIGKILL)


def test_every_random_number_of_a_step_is_the_same_after_resuming(call, stop_at, monkeypatch):
    """Also what an edited program might draw from Python, NumPy or PyTorch."""
    drawn = {}

    def record(name):
        update = training.update

        def recording(*args):
            drawn.setdefault(name, []).append((random.random(), np.random.rand(), torch.rand(1).item()))
            return update(*args)
        monkeypatch.setattr(training, 'update', recording)
    before = training.update
    for name, arguments in (('whole', []), ('first', []), ('second', ['--resume'])):
        monkeypatch.setattr(training, 'update', before)
        if name == 'first':
            stop_at(4, signal.SIGTERM)
        record(name)
        call(main_supcon.main, *TINY, '--epochs', 2, '--output_name', 'whole' if name == 'whole' else 'a', *arguments)
    assert len(set(drawn['whole'])) == 6
    assert drawn['first'] + drawn['second'] == drawn['whole']


def test_only_the_newest_checkpoints_are_kept(call):
    assert call(main_ce.main, *RUN, '--epochs', 5, '--save_freq', 1, '--keep_ckpts', 2)[0] == 0
    assert {file.name for file in FOLDER.glob('*.ckpt')} == {'ckpt_epoch_4.ckpt', 'ckpt_epoch_5.ckpt', 'last.ckpt'}


def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_stays(monkeypatch, tmp_path):
    """Files can grow no more from the second epoch on."""
    monkeypatch.chdir(tmp_path)
    epochs = runs.Run.finish_epoch

    def save(run, epoch, *rest):
        if epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return epochs(run, epoch, *rest)

    def limit():
        runs.Run.finish_epoch = save
    assert ended(forked(main_ce.main, *RUN, '--epochs', 3, before=limit)) == 2
    line, = Path('err').read_text().splitlines()
    assert str(FOLDER) in line and 'cannot be written' in line and 'File too large' in line
    assert states()['epoch'] == 1
    assert not list(FOLDER.glob('*.partial'))
    assert ended(forked(main_ce.main, *RUN, '--epochs', 3, '--resume')) == 0


def test_a_full_disk_stops_curves_and_log_too(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert ended(forked(main_ce.main, *RUN, '--epochs', 3, before=limit)) == 2
    line, = Path('err').read_text().splitlines()
    assert 'cannot be written' in line


def test_a_file_on_a_full_disk_leaves_no_part_of_it(monkeypatch, tmp_path):
    def full(partial, content):
        partial.touch()
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='No space'):
        files.replace_file(tmp_path / 'x.pth', b'network')
    assert not list(tmp_path.iterdir())


def test_curves_that_cannot_be_closed_either_are_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def full():
        sys.unraisablehook = sys.__unraisablehook__     # pytest has its own
        tensorboard_logger.open = lambda file, mode: open('/dev/full', mode)        # noqa: SIM115
    assert ended(forked(main_ce.main, *RUN, '--epochs', 3, before=full)) == 2
    line, = Path('err').read_text().splitlines()
    assert 'cannot be written' in line and 'No space left' in line


def test_a_truncated_checkpoint_is_named_and_a_whole_one_offered(call, rejected, stop_at):
    arguments = [*RUN, '--epochs', 5, '--save_freq', 1]
    assert call(main_ce.main, *arguments)[0] == 0
    whole = states()
    for name in ('last', 'ckpt_epoch_5', 'ckpt_epoch_4'):
        file = FOLDER / f'{name}.ckpt'
        file.write_bytes(file.read_bytes()[:-1000])
    rejected(main_ce.main, *arguments, '--resume', words=[
        f'{FOLDER}/last.ckpt: not a readable checkpoint', f'--resume {FOLDER}/ckpt_epoch_3.ckpt'])
    assert call(main_ce.main, *arguments, '--resume', FOLDER / 'ckpt_epoch_3.ckpt')[0] == 0
    assert same(states(), whole)

    (FOLDER / 'last.ckpt').unlink()
    rejected(main_ce.main, *arguments, '--resume', words=['last.ckpt: no such checkpoint', 'ckpt_epoch_5.ckpt'])
    rejected(main_ce.main, *arguments, '--resume', 'nowhere.ckpt', words=['nowhere.ckpt', 'holds another run'])
    rejected(main_ce.main, *TINY, '--output_name', 'b', '--resume', 'nowhere.ckpt', words=['nowhere.ckpt: no such'])
    for file in FOLDER.glob('*.ckpt'):
        file.write_bytes(b'')
    rejected(main_ce.main, *arguments, '--resume', FOLDER / 'ckpt_epoch_3.ckpt',
             words=['ckpt_epoch_3.ckpt: not a read'])


def test_a_run_that_resumes_from_an_earlier_epoch_keeps_its_own_checkpoints(call):
    assert call(main_ce.main, *RUN, '--epochs', 5, '--save_freq', 1)[0] == 0
    assert call(main_ce.main, *RUN, '--epochs', 4, '--save_freq', 1, '--keep_ckpts', 1, '--resume',
                FOLDER / 'ckpt_epoch_2.ckpt')[0] == 0
    assert [file.name for file in kept_checkpoints(FOLDER)] == ['ckpt_epoch_5.ckpt', 'ckpt_epoch_4.ckpt']


def test_another_process_that_was_faster_is_not_overwritten(call, monkeypatch):
    set_model = main_ce.set_model

    def slow(*args, **settings):
        FOLDER.mkdir(parents=True)
        (FOLDER / 'last.ckpt').write_bytes(b'of the other')
        return set_model(*args, **settings)
    monkeypatch.setattr(main_ce, 'set_model', slow)
    status, _, err = call(main_ce.main, *RUN, '--epochs', 1)
    assert status == 2 and err.count('\n') == 1 and 'another process has written' in err
    assert (FOLDER / 'last.ckpt').read_bytes() == b'of the other'


def test_a_run_resumes_with_the_loader_it_began_with(call, stop_at, monkeypatch):
    """Whatever memory is free then: another loader draws other views."""
    arguments = [*TINY, '--epochs', 2]
    assert call(main_ce.main, *arguments, '--output_name', 'whole')[0] == 0
    stop_at(2, signal.SIGTERM)
    assert call(main_ce.main, *arguments, '--output_name', 'a')[0] == 143
    monkeypatch.setattr(loader, 'available_memory', lambda: 1000)
    assert call(main_ce.main, *arguments, '--output_name', 'a', '--resume')[0] == 0
    assert same(states(), states('whole'))
    assert checkpoints.load_checkpoint(FOLDER / 'last.ckpt')['opt']['loader_chosen'] == 'batched'


def test_forced_options_begin_the_epoch_again(call, rejected, stop_at):
    stop_at(5, signal.SIGTERM)
    assert call(main_ce.main, *RUN, '--epochs', 2)[0] == 143
    rejected(main_ce.main, *RUN, '--epochs', 1, '--resume', words=['has 2 epochs', '--epochs'])      # one and a part
    forced = '--resume', '--force', '--batch_size', 48, '--print_freq', 1
    status, out, err = call(main_ce.main, *RUN, '--epochs', 2, *forced)
    assert status == 0, err
    assert '--force: epoch 2 begins again' in out and 'Train: [2][1/2]' in out


def test_a_run_resumes_in_another_folder(call):
    assert call(main_ce.main, *RUN, '--epochs', 2)[0] == 0
    assert call(main_ce.main, *TINY, '--epochs', 3, '--output_name', 'b', '--resume', FOLDER / 'last.ckpt')[0] == 0
    assert states('b')['epoch'] == 3 and states()['epoch'] == 2


def test_other_options_are_listed_and_forced(call, rejected):
    assert call(main_ce.main, *RUN, '--epochs', 1)[0] == 0
    other = [*RUN, '--epochs', 2, '--resume', '--weight_decay', 0.5, '--momentum', 0.5]
    rejected(main_ce.main, *other, words=['--weight_decay 0.5, was 0.0001', '--momentum 0.5, was 0.9', '--force'])
    status, out, err = call(main_ce.main, *other, '--force', '--print_freq', 1, '--save_freq', 1)
    assert status == 0, err
    assert '--weight_decay 0.5, was 0.0001' in out and '--print_freq' not in out
    group, = states()['optimizer']['param_groups']
    assert (group['weight_decay'], group['momentum']) == (0.5, 0.5)
    rejected(main_ce.main, *RUN, '--resume', '--force', '--width', 0.125, words=['holds another network'])
    rejected(main_ce.main, *RUN, '--force', words=['--force', '--resume is missing'])
    rejected(main_ce.main, *RUN, '--resume', '--force', '--epochs', 1, words=['has 2 epochs', '--epochs of at least'])


@pytest.mark.parametrize('before, after, words', [
    ([], ['--encoder_lr', 0.01], '--encoder_lr 0.01, was None'),
    (['--encoder_lr', 0.01], [], '--encoder_lr None, was 0.01'),
    ([], ['--no_bias_decay'], '--no_bias_decay True, was False'),
    ([], ['--optim_kind', 'Adam'], '--optim_kind Adam, was SGD')])
def test_options_that_the_optimizer_cannot_continue_with_are_named(call, rejected, before, after, words):
    assert call(main_ce.main, *RUN, '--epochs', 1, *before)[0] == 0
    rejected(main_ce.main, *RUN, '--epochs', 2, '--resume', '--force', *after,
             words=[f'--force: the optimizer of {FOLDER}/last.ckpt cannot continue with {words} ('])
    assert call(main_ce.main, *RUN, '--epochs', 2, '--resume', '--force', *before, '--weight_decay', 0.5)[0] == 0


def test_a_finished_run_resumed_reports_its_result_and_exports(call, tmp_path):
    _, out, _ = call(main_ce.main, *RUN, '--epochs', 2)
    status, again, err = call(main_ce.main, *RUN, '--epochs', 2, '--resume', '--export', 'x.pth')
    assert status == 0, err
    assert again.splitlines()[-1] == out.splitlines()[-1] and 'Train:' not in again and (tmp_path / 'x.pth').exists()
    assert call(main_supcon.main, *TINY, '--epochs', 1, '--output_name', 'b')[0] == 0
    status, out, err = call(main_supcon.main, *TINY, '--epochs', 1, '--output_name', 'b', '--resume')
    assert status == 0 and re.search(r'kNN accuracy \d+\.\d\d', out), err


def test_two_processes_do_not_write_one_run(monkeypatch, rejected, tmp_path):
    monkeypatch.chdir(tmp_path)
    child = forked(main_ce.main, *RUN, '--epochs', 100000, '--save_freq', 1000000)
    try:
        while not (FOLDER / 'last.ckpt').exists():
            time.sleep(0.05)
        os.kill(child, signal.SIGSTOP)                  # it still has the folder
        os.waitpid(child, os.WUNTRACED)
        for how in ('--resume', '--overwrite'):
            rejected(main_ce.main, *RUN, '--epochs', 5, how, words=[FOLDER, 'another process is writing'])
        rejected(main_ce.main, *RUN, words=[FOLDER, 'holds another run'])
    finally:
        os.kill(child, signal.SIGKILL)
        ended(child)
    assert ended(forked(main_ce.main, *RUN, '--epochs', 100000, '--save_freq', 1000000, '--resume',
                        before=lambda: signal.alarm(0) or stop_soon())) == 143


def stop_soon():
    update = training.update
    training.update = lambda *args: os.kill(os.getpid(), signal.SIGTERM) or update(*args)


def test_a_corrupted_state_is_no_whole_checkpoint(call, rejected):
    """A checkpoint that can be read, of which something is missing or of another kind."""
    assert call(main_ce.main, *RUN, '--epochs', 1)[0] == 0
    whole = torch.load(FOLDER / 'last.ckpt', weights_only=True)
    optimizer = whole['optimizer']
    moved = {**optimizer['state'], 0: {'momentum_buffer': torch.zeros(2, 2)}}
    for changed in ({'epoch': None}, {'epoch': -5}, {'epoch': 'x'}, {'step': -1}, {'best_acc': []}, {'meters': [1]},
                    {'meters': {'train_loss': 1}}, {'optimizer': None}, {'optimizer': {}}, {'optimizer': 3},
                    {'optimizer': {**optimizer, 'param_groups': []}}, {'optimizer': {**optimizer, 'param_groups': 1}},
                    {'optimizer': {**optimizer, 'param_groups': [{**optimizer['param_groups'][0], 'lr': 'x'}]}},
                    {'optimizer': {**optimizer, 'state': {0: 5}}}, {'optimizer': {**optimizer, 'state': moved}},
                    {'scaler': {'scale': 'x'}}, {'step': 'x'}):
        torch.save({**whole, **changed}, FOLDER / 'last.ckpt')
        rejected(main_ce.main, *RUN, '--epochs', 2, '--resume', words=[FOLDER / 'last.ckpt', 'no valid checkpoint'])
    torch.save({**whole, 'classes': ['a'] * 10}, FOLDER / 'last.ckpt')
    rejected(main_ce.main, *RUN, '--epochs', 2, '--resume', words=['other classes'])


def test_a_thousand_steps_take_no_more_memory(monkeypatch, tmp_path):
    """Resident memory after the last as after the 200th."""
    monkeypatch.chdir(tmp_path)

    def watch():
        update, count = training.update, 0

        def watching(*args):
            nonlocal count
            count += 1
            if count in (200, 1000):
                status = Path('/proc/self/status').read_text()
                with open('memory', 'a') as file:
                    file.write(re.search(r'VmRSS:\s+(\d+)', status)[1] + '\n')
            return update(*args)
        training.update = watching
    arguments = [*TINY, '--batch_size', 4, '--max_samples', 160, '--epochs', 25, '--eval_freq', 5, '--print_freq', 40]
    assert ended(forked(main_supcon.main, *arguments, '--output_name', 'a', before=watch)) == 0
    before, after = map(int, Path('memory').read_text().split())
    assert after <= 1.01 * before


@pytest.mark.parametrize('program, extra', [
    (main_supcon, ['--method', 'GenSCL', '--mix', 'mixup_cutmix', '--cutout', '--cutout_length', 4]),
    (main_supcon, ['--loader', 'per_sample', '--num_workers', 2, '--deterministic']),
    (main_ce, ['--loader', 'workers', '--num_workers', 2, '--augment_policy', 'rand']), (main_ce, ['--deterministic'])])
@pytest.mark.usefixtures('two_threads')
def test_the_same_seed_gives_the_same_bits(call, program, extra):
    for name in 'ab':
        assert call(program.main, *TINY, *extra, '--epochs', 2, '--output_name', name)[0] == 0
    assert same(states('a'), states('b'))
    assert torch.are_deterministic_algorithms_enabled() == ('--deterministic' in extra)


def test_a_kept_checkpoint_is_there_before_the_last_one(call, monkeypatch):
    """A program that dies between the two writes the kept one again when it resumes."""
    write, written = checkpoints.write_checkpoint, []

    def dies(state, file):
        if written:
            raise KeyboardInterrupt
        written.append(file.name)
        write(state, file)
    monkeypatch.setattr(checkpoints, 'write_checkpoint', dies)
    assert call(main_ce.main, *RUN, '--epochs', 2, '--save_freq', 1)[0] == 130
    monkeypatch.setattr(checkpoints, 'write_checkpoint', write)
    assert call(main_ce.main, *RUN, '--epochs', 2, '--save_freq', 1, '--resume', '--overwrite')[0] == 2
    assert call(main_ce.main, *RUN, '--epochs', 2, '--save_freq', 1, '--overwrite')[0] == 0
    assert written == ['ckpt_epoch_1.ckpt']
    assert {file.name for file in FOLDER.glob('*.ckpt')} == {'ckpt_epoch_1.ckpt', 'ckpt_epoch_2.ckpt', 'last.ckpt'}


@pytest.mark.parametrize('rotate', [lambda file: file.unlink(), lambda file: file.rename(file.with_name('old.txt'))])
def test_a_run_is_held_without_its_log(monkeypatch, rejected, tmp_path, rotate):
    """log.txt removed or rotated while the run is written."""
    monkeypatch.chdir(tmp_path)
    child = forked(main_ce.main, *RUN, '--epochs', 100000, '--save_freq', 1000000)
    try:
        while not (FOLDER / 'last.ckpt').exists():
            time.sleep(0.05)
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)                 # a write that had begun may end after the signal
        rotate(FOLDER / 'log.txt')
        rejected(main_ce.main, *RUN, '--epochs', 100000, '--resume', words=[FOLDER, 'another process is writing'])
    finally:
        os.kill(child, signal.SIGKILL)
        ended(child)


@pytest.mark.parametrize('take', [
    lambda: (FOLDER / '.lock').unlink(), lambda: shutil.rmtree('output'),
    lambda: (FOLDER.parent.rename('output/moved'), FOLDER.mkdir(parents=True), (FOLDER / '.lock').write_text(''))])
def test_a_run_whose_folder_is_taken_writes_no_more(call, monkeypatch, take):
    save = runs.Run.finish_epoch

    def taken(run, epoch, *rest):
        if epoch == 2:
            take()
        return save(run, epoch, *rest)
    monkeypatch.setattr(runs.Run, 'finish_epoch', taken)
    status, _, err = call(main_ce.main, *RUN, '--epochs', 3, '--save_freq', 1)
    assert status == 2 and err.count('\n') == 1 and 'removed or replaced during the run' in err
    assert not (FOLDER / 'ckpt_epoch_2.ckpt').exists()


@pytest.mark.parametrize('how', ['--overwrite', '--resume'])
@pytest.mark.parametrize('link', [os.link, os.symlink])
def test_links_in_the_folder_of_a_run_are_replaced(call, tmp_path, how, link):
    """A backup of hard links, or links to other places, keep what they have."""
    assert call(main_ce.main, *RUN, '--epochs', 1)[0] == 0
    backup = tmp_path / 'backup'
    backup.mkdir()
    for file in FOLDER.iterdir():
        if file.name != '.lock':
            shutil.copy(file, backup)
            file.unlink()
            link(backup / file.name, file)
    before = {file: file.read_bytes() for file in backup.iterdir()}
    assert call(main_ce.main, *RUN, '--epochs', 2, how)[0] == 0
    assert {file: file.read_bytes() for file in backup.iterdir()} == before
    assert ('epoch 1,' in (FOLDER / 'log.txt').read_text()) and 'epoch 2,' in (FOLDER / 'log.txt').read_text()


@pytest.mark.parametrize('make', [os.mkfifo, lambda file: os.symlink('../../elsewhere', file)])
def test_a_lock_that_is_none_of_a_run(rejected, tmp_path, make):
    """A pipe, for which opening would wait, or a link, through which a file would be made elsewhere."""
    (tmp_path / FOLDER).mkdir(parents=True)
    make(tmp_path / FOLDER / '.lock')
    rejected(main_ce.main, *RUN, '--epochs', 1, words=['.lock'])


@pytest.mark.parametrize('name', ['log.txt', 'last.ckpt.partial'])
@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir, lambda file: os.symlink('../../elsewhere', file)])
def test_what_is_put_in_a_run_s_folder_while_it_is_written(call, monkeypatch, tmp_path, name, make):
    """Neither waited for nor written through: the run ends in one line, or replaces it."""
    save = runs.Run.finish_epoch

    def put(*arguments):
        (FOLDER / name).unlink(missing_ok=True)
        make(FOLDER / name)
        return save(*arguments)
    monkeypatch.setattr(runs.Run, 'finish_epoch', put)
    status, _, err = call(main_ce.main, *RUN, '--epochs', 1)
    ends = name == 'log.txt' or make == os.mkdir
    assert status == 2 * ends and err.count('\n') == ends and ('cannot be written' in err) == ends, err
    assert not (tmp_path / 'output' / 'elsewhere').exists()


def test_a_clock_that_stands_still(call, monkeypatch):
    for program in (main_supcon, main_ce):
        monkeypatch.setattr(runs.time, 'time', lambda: 1e9)
        assert call(program.main, *TINY, '--epochs', 1, '--output_name', program.__name__)[0] == 0


@pytest.mark.parametrize('error', [MemoryError(), np.zeros, RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_is_not_enough_is_one_line(call, monkeypatch, error):
    def fails(*args, **settings):
        if error is np.zeros:
            np.zeros(2**50)
        raise error
    monkeypatch.setattr(main_ce, 'set_model', fails)
    status, _, err = call(main_ce.main, *RUN)
    assert status == 2 and err.count('\n') == 1 and 'out of memory: try --accum_steps' in err


@pytest.fixture
def shell(tmp_path):
    """shell(command, ...): run a program's command line in bash, in an empty folder -> (exit status, stderr)."""
    root = Path(main_ce.__file__).parent

    def shell(command, **environment):
        program = f'{sys.executable} {root}/main_ce.py {" ".join(map(str, RUN))} --epochs 2 --print_freq 1'
        run = subprocess.run(['bash', '-c', f'set -o pipefail; {command.format(program)}'], cwd=tmp_path, text=True,
                             capture_output=True, env={**os.environ, **environment})
        return run.returncode, run.stderr
    return shell


@pytest.mark.parametrize('command', ['{} | head -1', '{} >&-', '{} > /dev/full'])
def test_a_reader_that_leaves_does_not_end_a_run(shell, tmp_path, command):
    assert shell(command) == (0, '')
    assert 'best accuracy' in (tmp_path / FOLDER / 'log.txt').read_text()


@pytest.mark.parametrize('seconds', [0.3, 1.0])
def test_ctrl_c_while_the_program_is_imported(tmp_path, seconds):
    program = subprocess.Popen([sys.executable, main_ce.__file__, *map(str, RUN)], cwd=tmp_path, text=True,
                               stderr=subprocess.PIPE)
    time.sleep(seconds)
    program.send_signal(signal.SIGINT)
    assert program.communicate()[1] == '' and program.returncode in (-signal.SIGINT, 130)
    assert not (tmp_path / 'output').exists()


def test_compile_that_does_not_work_is_rejected(rejected, monkeypatch):
    def no_compiler(*args, **settings):
        raise RuntimeError("backend='inductor' raised:\nNo working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")
    monkeypatch.setattr(torch, 'compile', no_compiler)
    rejected(main_ce.main, *RUN, '--compile',
             words=["--compile: torch.compile does not work here (backend='inductor' raised: No working C++ comp"])


def test_a_compiler_cache_that_cannot_be_made(shell, tmp_path):
    (tmp_path / 'file').write_text('')
    status, err = shell('{}', TORCHINDUCTOR_CACHE_DIR=f'{tmp_path}/file/x')
    assert status == 2 and err.count('\n') == 1 and 'TORCHINDUCTOR_CACHE_DIR cannot be made' in err
    assert not (tmp_path / 'output').exists()
