"""Fill one row of a table: run its commands, unless its log is there, and write the log when all have succeeded.

    python scripts/results/row.py <file>.log 'main_supcon.py --output_name a --trial 0 ...' 'main_linear.py ...'

A log holds machine, versions and date, the runs that were there before, and of each command the words and what its run
has printed, also before it was stopped and resumed. Nothing is run where the log is there; one of other commands is
refused.
"""
import datetime
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path


class Failure(Exception):
    """Why a row is not filled, in one line."""


def machine():
    """Two lines: date, processor and GPU; versions."""
    info = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*: (.*)', info.read_text()) if info.exists() else []
    gpu = 'no GPU'
    if os.environ.get('CUDA_VISIBLE_DEVICES') != '' and shutil.which('nvidia-smi'):
        import torch  # here, since it takes seconds
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else gpu
    git = subprocess.run(['git', 'describe', '--always', '--dirty'], capture_output=True, text=True)
    return [f'{datetime.date.today()}, {os.cpu_count()} cores of {(names or [platform.machine()])[0]}, {gpu}',
            f'Python {platform.python_version()}, PyTorch {version("torch")}, '
            f'torchvision {version("torchvision")}, commit {git.stdout.strip() or "unknown"}']


def folder_of(command):
    """The folder of a command's run, or None for a script that has none."""
    words = shlex.split(command)
    if '--output_name' not in words:
        return None
    name, trial = (words[words.index(option) + 1] for option in ('--output_name', '--trial'))
    return Path('output', name, f'trial={trial}')


def output_of(command):
    """Run a command; what it has printed, of a resumed run from its beginning."""
    done = subprocess.run([sys.executable, *shlex.split(command)], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        raise Failure(f"{''.join(said)} (exit status {done.returncode} of: python {command})")
    folder = folder_of(command)
    return (folder / 'log.txt').read_text() if folder else done.stdout


def main():
    log, commands = Path(sys.argv[1]), sys.argv[2:]
    if log.exists():
        if re.findall(r'^\$ python (.*)$', log.read_text(), re.MULTILINE) != commands:
            raise Failure(f'{log} is of other commands, expected: delete it, or choose another folder with --into')
        return
    start = time.time()
    print(f'{log.stem}: begins', flush=True)
    earlier = [str(folder) for folder in map(folder_of, commands) if folder and folder.exists()]
    parts = [f'$ python {command}\n{output_of(command)}' for command in commands]
    minutes = f'{(time.time() - start) / 60:.1f} minutes'
    begun = f", begun or finished before: {', '.join(earlier)}" if earlier else ''
    log.parent.mkdir(parents=True, exist_ok=True)
    partial = log.with_suffix('.partial')
    partial.write_text('\n'.join([*machine(), minutes + begun, '', *parts]))
    os.replace(partial, log)
    print(f'{log.stem}: done in {minutes}', flush=True)


if __name__ == '__main__':
    try:
        main()
    except (Failure, OSError) as failure:
        sys.exit(f'row.py: error: {failure}')
