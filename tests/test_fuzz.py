"""Option fuzzing: whatever a command line says, it is rejected in one line or it is a run that starts."""
import contextlib
import io
import os
import shutil

import pytest
from conftest import TINY, close_log
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main_ce
import main_linear
import main_supcon
from util import errors, runs, training
from util.options import OPTIONS, PROGRAMS, Switch

MAINS = dict(zip(PROGRAMS, (main_supcon, main_ce, main_linear)))
ODD = ['', ' ', '-1', '-0.5', '0', '-0', '1', '2', '3', '0.5', '1e-9', '1e-320', '1e6', '1e400', '9' * 20, 'nan',
       'inf', '-inf', 'NaN', '0x10', '1_0', '٣', '1,5', '5,1', '1,,2', '(0.1, 0.2, 0.3)', '(0, 0, 0)', '[1, 2', 'None',
       'True', 'x', '..', '../x', '/', 'a b', 'a\nb', '\x1b[2J', '\udcff', "__import__('os').system('touch hacked')",
       '$(touch hacked)', 'resnet18', 'resnet19', 'timm/resnet18', 'timm/', 'mlp', '8,8', 'cifar', 'digits', 'no', 'é',
       '🙂']
FREE = {'--data_folder', '--cache_dir', '--export', '--ckpt', '--pretrained', '--wandb', '--resume', '--teacher_path',
        '--output_name', '--trial', '--aug_root', '--mvip_super_class'}     # name files, or change every example


def rows(program):
    return [(row[0].split(), row[1]) for group in OPTIONS.values() for row in group
            if program in (row[2] if len(row) > 2 else PROGRAMS)]


def words(program):
    """A strategy: a few options with values that suit them, or any others."""
    def option(row):
        flags, known = row
        flag = st.sampled_from(flags)
        if known.get('action') == Switch:
            return st.tuples(st.sampled_from([*flags, *(f'--no_{name[2:]}' for name in flags)])).map(list)
        if 'action' in known:
            return st.tuples(flag).map(list)
        suitable = st.sampled_from(known.get('choices') or ['1', '2', '4', '16', '0.5', '0.9'])
        values = suitable | suitable | st.sampled_from(ODD) | st.integers(0, 40).map(str)
        pair = st.tuples(flag, values)
        return pair.map(list) | pair.map(lambda pair: ['='.join(pair)])
    options = [option(row) for row in rows(program) if row[0][0] not in FREE for _ in range(4)]
    unknown = st.sampled_from([['--unknown'], ['--unknown', '3'], ['extra'], ['--'], ['-x'], ['---'], ['--=']])
    return st.lists(st.one_of(*options, unknown), min_size=1, max_size=4).map(lambda parts: sum(parts, []))


def small(opt):
    """Whether a run of these options is small enough to be started here."""
    network = opt.model == 'resnet18' and opt.width <= 0.125 and opt.stem is not None
    sizes = [opt.size or 16, getattr(opt, 'feat_dim', 1) // 16, getattr(opt, 'moco_k', 0) // 100 if getattr(
        opt, 'moco', False) else 0, opt.batch_size // 8, opt.accum_steps // 8, *(
            value for value in [getattr(opt, 'head', 0)] if isinstance(value, list) for value in value)]
    return network and max(sizes) <= 48 and opt.dataset == 'digits' and not opt.compile and opt.num_workers < 3


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with a pretrained encoder, in which the examples run."""
    folder, before = tmp_path_factory.mktemp('fuzz'), os.getcwd()
    os.chdir(folder)
    main_supcon.main([*TINY, '--epochs', '1', '--output_name', 'encoder'])
    shutil.move('output/encoder/trial=0/last.ckpt', 'encoder.ckpt')
    yield folder
    os.chdir(before)


def status_of(function, *args):
    """Exit status, and what was written to stderr."""
    close_log()
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            errors.run(lambda: function(*args))
            return 0, err.getvalue()
        except SystemExit as stop:
            return stop.code, err.getvalue()


def check(program, extra, folder):
    """One line and status 2, with nothing written; or a run that starts, if it is a small one: -> what came of it."""
    main = MAINS[program]
    base = [*TINY, '--debug', '--max_samples', '24', '--output_name', 'x']
    if program == 'main_linear':
        base = ['--dataset', 'digits', '--size', '8', '--num_workers', '0', *base[-5:], '--ckpt', 'encoder.ckpt']
    shutil.rmtree('output', ignore_errors=True)
    found = []

    def parse():
        opt = main.parse_option([*base, *extra])
        found.append(opt[0] if program == 'main_linear' else opt)
        runs.Run(found[0])
    status, err = status_of(parse)
    if status == 0:
        training.set_warmup(found[0])
        assert training.learning_rate(found[0], 1) >= 0
        if not small(found[0]):
            return 'parsed'
        status, err = status_of(main.main, [*base, *extra])
    assert status in (0, 2), err
    if status == 2:
        assert err.count('\n') == 1 and err.endswith('\n') and err[:-1].isprintable(), err
        assert 'error: ' in err and len(err) < 1500
    else:
        assert not [line for line in err.splitlines() if 'Warning' not in line and not line.startswith(' ')], err
    assert not (folder / 'hacked').exists()
    return 'ran' if status == 0 else 'rejected'


@pytest.mark.parametrize('program', PROGRAMS)
def test_any_options_are_refused_in_a_line_or_start(folder, program):
    counts = dict.fromkeys(('rejected', 'parsed', 'ran'), 0)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(extra=words(program))
    def fuzz(extra):
        counts[check(program, extra, folder)] += 1
    fuzz()
    assert counts['rejected'] > 30 and counts['ran'] > 5, counts


@pytest.mark.parametrize('program', PROGRAMS)
def test_every_option_refuses_every_odd_value_or_takes_it(folder, program):
    """All options of the table with all odd values, parsed alone."""
    main = MAINS[program]
    base = [*TINY, '--output_name', 'x'] if program != 'main_linear' else [
        '--dataset', 'digits', '--output_name', 'x', '--ckpt', 'encoder.ckpt']
    count = 0
    for flags, known in rows(program):
        if 'action' in known or flags[0] in FREE:
            continue
        for value in ODD[count % 3::3]:                 # each option with a third of them
            status, err = status_of(main.parse_option, [*base, f'{flags[0]}={value}'])
            assert status in (0, 2), (flags, value, err)
            one_line = err.count('\n') == 1 and err[:-1].isprintable() and flags[0] in err
            assert status == 0 or one_line, (flags, value, err)
        count += 1
    assert count > 40
