"""Run all benchmarks and write what they print, with machine and versions, and the plot of cost against size.

    python benchmarks/run_all.py [--only views loss ...] [--output benchmarks/results]

Writes <output>/<date>_<device>.json, a table of it as .md and, with `cost`, a plot beside them. With --only the other
rows of the same day stay. About 35 minutes on two CPU cores; the part `gpu` is measured where there is a GPU and stays
empty elsewhere.
"""
import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Name: (what the ratio is of, the goal, the command and its arguments)
BENCHMARKS = {
    'views': ('compiled batched views / transforms in workers', 24, ['bench_views.py', '--images', '50000']),
    'auto views': ('the same with AutoAugment', 15, ['bench_views.py', '--images', '50000', '--policy', 'auto']),
    'rand views': ('the same with RandAugment, 2 operations', 15,
                   ['bench_views.py', '--images', '50000', '--policy', 'rand']),
    'large auto views': ('the same with AutoAugment, 224 pixels', 3,
                         ['bench_views.py', '--images', '1024', '--size', '224', '--batch_size', '128', '--policy',
                          'auto']),
    'peers': ('two views / fastest other library', None, ['peers.py']),
    'step': ('--amp step / original step', 2.5, ['bench_step.py', '--batch_size', '128', '--steps', '3']),
    'thin step': ('the same, quarter-width ResNet-18 at 16 pixels', 4.1,
                  ['bench_step.py', '--width', '0.25', '--size', '16', '--batch_size', '512', '--forms', 'original',
                   'float32', 'amp, conv2d', 'amp']),
    'linear': ('epoch of images / of --cache_features', 50, ['bench_linear.py']),
    'loss': ('dense / linear, 16,384 views', 4, ['bench_loss.py']),
    'soft loss': ('dense / linear, 100 soft classes', None, ['bench_loss.py', '--soft', '--classes', '100']),
    'start': ('start without cache / second with --cache_dir', 10, ['bench_start.py']),
    'first step': ('5 s / start to first step, digits', 1, ['bench_start.py', '--program', 'first_step']),
    'end': ('1 s / last step to prompt, digits', 1, ['bench_start.py', '--program', 'end']),
    'mvip': ('epoch with workers / batched, evaluation view', 20, ['bench_mvip.py']),
    'folder': ('ImageFolder / our workers, blur', None, ['bench_folder.py']),
    'epoch': ('original epoch / ours', None, ['bench_epoch.py']),
    'cost': ('slope of the loss time over views, log-log', None, ['plot_cost.py']),
    'gpu resnet50': ('original epoch / ours, 50,000 images', 4, ['bench_epoch.py', '--model', 'resnet50']),
    'gpu resnet50 compiled': ('the same, ours with --compile', 4,
                              ['bench_epoch.py', '--model', 'resnet50', '--compile']),
    'gpu loss': ('dense / linear, 16,384 views', 1, ['bench_loss.py', '--views', '16384']),
    'gpu large loss': ('dense / linear, 65,536 views', 1, ['bench_loss.py', '--views', '65536', '--repeat', '1']),
    'gpu compiled loss': ('compiled dense / ours, 16,384 views', 1, ['bench_blocks.py']),
    'gpu profile': ('fraction of the time that kernels run', 0.9, ['bench_profile.py']),
}


def machine():
    """Lines about the machine and the versions."""
    import torch
    import torchvision
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    cpu = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        names = re.findall(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
        cpu = names[0] if names else cpu
    return [f'{datetime.date.today()}, {os.cpu_count()} cores of {cpu}, {gpu}',
            f'Python {platform.python_version()}, PyTorch {torch.__version__}, torchvision {torchvision.__version__}']


def measured(script, arguments):
    """A row: the ratio on the last line of a benchmark, all that it prints, the minutes it took."""
    start = time.time()
    done = subprocess.run([sys.executable, str(HERE / script), *arguments], stdout=subprocess.PIPE, text=True)
    ratio = re.findall(r'^ratio (\S+)$', done.stdout, re.MULTILINE)
    command = ' '.join(['python benchmarks/' + script, *arguments]).replace(f'{HERE.parent}/', '')
    return {'ratio': ratio[-1] if ratio and not done.returncode else 'failed', 'command': command,
            'minutes': round((time.time() - start) / 60, 1), 'output': done.stdout.strip()}


def table_of(rows, gpu):
    """The rows as lines of Markdown, then what each command printed."""
    lines, details = ['| benchmark | ratio of | ratio | goal | minutes |', '|---|---|---|---|---|'], []
    for name, (what, goal, _) in BENCHMARKS.items():
        goal = goal or ''
        if name in rows:
            lines.append(f"| {name} | {what} | {rows[name]['ratio']} | {goal} | {rows[name]['minutes']} |")
            details += ['', f"`{rows[name]['command']}`", '```', rows[name]['output'], '```']
        else:
            reason = 'no GPU' if name.startswith('gpu') and not gpu else 'not yet'
            lines.append(f'| {name} | {what} | not measured: {reason} | {goal} | |')
    return lines, details


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=BENCHMARKS, default=list(BENCHMARKS), metavar='NAME')
    parser.add_argument('--output', type=Path, default=HERE / 'results')
    args = parser.parse_args()
    import torch
    gpu = torch.cuda.is_available()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"{datetime.date.today()}_{'gpu' if gpu else 'cpu'}.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    for name in args.only:
        if gpu or not name.startswith('gpu'):
            script, *arguments = BENCHMARKS[name][2]
            plot = ['--output', str(file.with_suffix('.png'))] if name == 'cost' else []
            rows[name] = measured(script, arguments + plot)
            print(f"{rows[name]['command']}\n{rows[name]['output']}\n", flush=True)
            file.write_text(json.dumps(rows, indent=2) + '\n')
        lines, details = table_of(rows, gpu)
        text = [f'# {machine()[0]}', '', machine()[1], '', *lines, *details, '']
        file.with_suffix('.md').write_text('\n'.join(text))
    print(*lines, sep='\n')
    sys.exit(any(rows[name]['ratio'] == 'failed' for name in args.only if name in rows))


if __name__ == '__main__':
    main()
