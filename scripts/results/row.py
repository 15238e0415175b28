"""Fill one row of a table: run its commands, unless its log is there, and write the log when all have succeeded.

    python scripts/results/row.py <file>.log 'main_supcon.py --output_name a --trial 0 ...' 'main_linear.py ...'

A log holds machine, versions and date, the runs that were there before, and of each command the words, what its run has
printed, also before it was stopped and resumed, and its CPU time. A run whose loss is not finite is a result too: its
row ends with `diverged`. Nothing is run where the log is there; a log, or an unfinished run, of other commands is
rejected.
"""
import datetime
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

STOPPED = {code for number in (signal.SIGINT, signal.SIGTERM) for code in (-number, 128 + number)}


class Failure(Exception):
    """Why a row is not filled, in one line."""


def machine():
    """Two lines: date, processor and GPU; versions."""
    info, gpu, commit = Path('/proc/cpuinfo'), 'no GPU', 'unknown'
    names = re.findall(r'model name\s*: (.*)', info.read_text()) if info.exists() else []
    if os.environ.get('CUDA_VISIBLE_DEVICES') != '' and shutil.which('nvidia-smi'):
        import torch  # here, since it takes seconds
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else gpu
    if shutil.which('git'):
        git = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True, text=True)
        commit = git.stdout.strip() or commit
    return [f'{datetime.date.today()}, {os.cpu_count()} cores of {(names or [platform.machine()])[0]}, {gpu}',
            f'Python {platform.python_version()}, PyTorch {version("torch")}, torchvision {version("torchvision")}, '
            f'commit {commit}']


def folder_of(command):
    """The folder of a command's run, or None for a script that has none."""
    words = shlex.split(command)
    if '--output_name' not in words:
        return None
    name, trial = (words[words.index(option) + 1] for option in ('--output_name', '--trial'))
    return Path('output', name, f'trial={trial}')


def claim(command):
    """Make the folder of a command's run, with the command in it; whether it was there. Another command is rejected.

    At any moment the file `command` is complete or not there, and nothing else is in the folder before it.
    """
    folder = folder_of(command)
    if folder is None:
        return False
    file, partial = folder / 'command', folder / 'command.partial'
    folder.mkdir(parents=True, exist_ok=True)
    if file.exists() and file.read_text() == command:
        return True
    if any(other != partial for other in folder.iterdir()):             # the folder itself may be of a killed row
        raise Failure(f'{folder} is of another command, expected: delete it, or choose another folder with --into')
    partial.write_text(command)
    os.replace(partial, file)
    return False


def cpu_seconds():
    """CPU time of the commands that have ended: of all their threads, and whatever else the machine did."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def output_of(command, errors):
    """Run a command: what it has printed, of a resumed run from its beginning, with its CPU time; whether its loss was
    finite; and its seconds of wall clock, those of all its parts.

    errors: the file that keeps the errors of a command that fails.
    """
    before, start = cpu_seconds(), time.time()
    done = subprocess.run([sys.executable, *shlex.split(command)], capture_output=True, text=True)
    spent, folder = [cpu_seconds() - before, time.time() - start], folder_of(command)
    if folder:                                          # a stopped run is resumed
        with open(folder / 'seconds', 'a') as file:
            print(*(f'{seconds:.1f}' for seconds in spent), file=file)
        parts = [map(float, line.split()) for line in (folder / 'seconds').read_text().splitlines()]
        spent = [sum(column) for column in zip(*parts)]
    if done.returncode in STOPPED:
        raise Failure('stopped; the same command resumes')
    output = (folder / 'log.txt').read_text() if folder and (folder / 'log.txt').exists() else done.stdout
    if not done.returncode:
        return f'{output}CPU minutes: {spent[0] / 60:.2f}\n', True, spent[1]
    reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
    if 'expected a finite' in reason:
        return f'{output}diverged: {reason}\n', False, spent[1]
    errors.parent.mkdir(parents=True, exist_ok=True)
    errors.write_text(f'$ python {command}\n{done.stderr}')
    raise Failure(f'{errors}: exit status {done.returncode}: {reason}')


def main():
    if len(sys.argv) < 3:
        raise Failure('expected a log and the commands of its row')
    log, commands = Path(sys.argv[1]), sys.argv[2:]
    if log.exists():
        if not log.is_file():                           # to read a named pipe would wait
            raise Failure(f'{log} is no file, expected a log')
        if re.findall(r'^\$ python (.*)$', log.read_text(), re.MULTILINE) != commands:
            raise Failure(f'{log} is of other commands, expected: delete it, or choose another folder with --into')
        return
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):              # the program stops by itself, with a checkpoint
        signal.signal(number, lambda *_: stopped.append(True))
    header, seconds, errors = machine(), 0., log.with_suffix('.err')
    print(f'{log.stem}: begins', flush=True)
    earlier = [str(folder_of(command)) for command in commands if claim(command)]
    parts = []
    for command in commands:
        if stopped:
            raise Failure('stopped; the same command resumes')
        output, finite, wall_clock = output_of(command, errors)
        seconds += wall_clock
        parts.append(f'$ python {command}\n{output}')
        if not finite:
            parts += [f'$ python {command}\nnot run\n' for command in commands[len(parts):]]
            break
    minutes = f'{seconds / 60:.1f} minutes'
    earlier_runs = f", started or finished before: {', '.join(earlier)}" if earlier else ''
    errors.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    partial = log.with_suffix('.partial')
    partial.write_text('\n'.join([*header, minutes + earlier_runs, '', *parts]))
    os.replace(partial, log)
    print(f'{log.stem}: done in {minutes}', flush=True)


if __name__ == '__main__':
    try:
        main()
    except (Failure, OSError, ValueError) as failure:       # ValueError: a command's quotes do not end
        sys.exit(f'row.py: error: {failure}')
