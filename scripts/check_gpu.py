"""Whether everything works on this machine's GPUs, how fast, and what to set: bash scripts/check_gpu.sh

    python scripts/check_gpu.py [--only loss views ...]

Losses and their gradients are compared with float64 on the CPU, views with the CPU's; each method trains a ResNet-50
for three epochs of handwritten digits at 32 pixels, which takes as long as CIFAR's. One line for each check, then a
table; status 1 if one has failed, 2 without a GPU.
"""
import argparse
import os
import re
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from datasets import views  # noqa: E402
from datasets.views import View  # noqa: E402
from losses import GenSupConLoss, SupConLoss  # noqa: E402

SECONDS = 600                           # for all checks
LARGE = ['--model', 'resnet50', '--size', '32', '--epochs', '3']
SMALL = ['--model', 'resnet18', '--width', '0.0625', '--size', '8', '--epochs', '2', '--max_samples', '96']
STEP = re.compile(r'Train: \[\d+\]\[\d+/\d+\]\tBT ([\d.]+) \([\d.]+\)\tDT ([\d.]+)')


class Failed(Exception):
    """What a check has found."""


# The losses and views against the CPU

def loss_cases():
    """{name: function of features [bsz, 2, dim], labels [bsz] and keys [3 bsz, dim]}"""
    def key_labels(labels):
        return labels.repeat(3)

    def soft(labels):
        return F.one_hot(labels, 10).to(torch.float32) + 0.1
    return {
        'SupCon': lambda z, y, keys: SupConLoss(0.1, unit_length=True)(z, y),
        'SupCon of any length': lambda z, y, keys: SupConLoss(0.1)(z, y),
        'SimCLR': lambda z, y, keys: SupConLoss(0.1, unit_length=True)(z),
        'GenSCL': lambda z, y, keys: GenSupConLoss(0.1, unit_length=True)(z.unbind(1), (soft(y), soft(y))),
        'keys': lambda z, y, keys: SupConLoss(0.1)(z[:, :1], y, keys=keys, key_labels=key_labels(y)),
        'hard negatives': lambda z, y, keys: SupConLoss(0.1, hard_negatives=True)(
            z, torch.where(torch.arange(len(y), device=y.device) % 5 == 0, -y - 1, y)),
    }


def allow_tf32(allowed):
    """Whether matrix products of float32 may have the precision of TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, 'fp32_precision'):               # PyTorch 2.9 and newer
        matmul.fp32_precision = 'tf32' if allowed else 'ieee'
    else:
        matmul.allow_tf32 = allowed


def check_losses(device, bsz):
    """The largest relative error of losses and gradients, with TF32 forbidden and allowed."""
    rng, worst = torch.Generator().manual_seed(0), 0.
    z = F.normalize(torch.randn(bsz, 2, 128, generator=rng, dtype=torch.float64), dim=2)
    keys = F.normalize(torch.randn(3 * bsz, 128, generator=rng, dtype=torch.float64), dim=1)
    labels = torch.randint(10, (bsz,), generator=rng)
    for allowed in (False, True):
        allow_tf32(allowed)
        for name, loss in loss_cases().items():
            expected, found = z.clone().requires_grad_(), z.to(device, torch.float32).requires_grad_()
            values = loss(expected, labels, keys), loss(found, labels.to(device), keys.to(device, torch.float32))
            for value in values:
                value.backward()
            for what, one, other in (('loss', *values), ('gradient', expected.grad, found.grad)):
                error = ((one - other.cpu()).norm() / one.norm()).item()
                worst = max(worst, error)
                if not error < 1e-4:
                    raise Failed(f'{name}: {what} is wrong by {error:.1e}' + ' where TF32 is allowed' * allowed
                                 + ', expected less than 1e-4')
    allow_tf32(False)
    return f'error at most {worst:.0e}'


def check_views(device, bsz):
    """The largest difference of normalized pixels, on a GPU with and without torch.compile."""
    view = View(32, (0.5,) * 3, (0.2,) * 3, crop=(0.2, 1.), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2,
                blur=0.5, rotation=15., cutout=(1, 8))
    images = torch.randint(256, (bsz, 3, 40, 40), dtype=torch.uint8)
    params = views.sample_params(view, *torch.full((2, 2 * bsz), 40), torch.Generator().manual_seed(0), device)
    expected, worst = views.apply(view, images, params), 0.
    for operations in [views.OPERATIONS] + [views.compiled_operations(device)] * (device.type == 'cuda'):
        error = (views.apply(view, images.to(device), params, operations).cpu() - expected).abs()
        worst = max(worst, error.max().item())
        if not error.quantile(0.999) < 1e-3:
            raise Failed(f'pixels differ by {worst:.1e}, expected less than 1e-3')
    return f'difference at most {worst:.0e}'


# The programs

def run_program(name, *argv, float16=False):
    """Run a program in this process and print its largest memory on the GPU, for `program` to read."""
    if float16:
        torch.cuda.is_bf16_supported = lambda including_emulation=True: False
    sys.argv = [f'{name}.py', *argv]
    try:
        runpy.run_path(str(ROOT / f'{name}.py'), run_name='__main__')
    finally:
        if torch.cuda.is_available():
            print(f'peak memory {torch.cuda.max_memory_allocated()}', flush=True)


def start(options, gpus=1, processes=0, float16=False):
    """A program as a process: options of a command line whose first word is its name, on so many GPUs."""
    command = [sys.executable]
    if processes:
        command += ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)]
    command += [str(Path(__file__).resolve()), *['--float16'] * float16, '--program', *options]
    visible = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(torch.cuda.device_count()))))
    environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': ','.join(visible.split(',')[:gpus])}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True)


def finished(job, seconds):
    """What a process has printed; Failed where it fails or takes too long."""
    try:
        output, _ = job.communicate(timeout=max(1, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
        raise Failed(f'not done after {seconds:.0f} seconds') from None
    if job.returncode:
        errors = [line for line in output.splitlines() if 'rror' in line] or ['no error was printed']
        raise Failed(f'status {job.returncode}: {errors[0]:.300}')
    return output


def figures(output, batch_size):
    """Images per second, fraction of time in the loader (medians of the steps after the first epoch), memory."""
    steps = [tuple(map(float, step)) for step in STEP.findall(output)]
    steps = steps[len(steps) // 2:]
    if not steps:
        raise Failed('no step was printed')
    seconds, loading = (statistics.median(column) for column in zip(*steps))
    loading /= max(1e-9, seconds)
    memory = max(map(int, re.findall(r'^peak memory (\d+)$', output, re.MULTILINE)), default=0)
    return [f'{batch_size / max(seconds, 1e-3):.0f}', f'{100 * loading:.1f} %', f'{memory / 2**30:.1f} GB']


def check_resuming(options, deadline):
    """A run that is killed and resumes ends as one that is not."""
    for name in ('whole', 'killed'):
        job = start([*options, '--deterministic', '--output_name', name, '--save_steps', '1'])
        if name == 'killed':
            last = Path('output/killed/trial=0/last.ckpt')
            while not last.exists() and job.poll() is None and time.time() < deadline:
                time.sleep(0.01)
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
            job = start([*options, '--deterministic', '--output_name', name, '--save_steps', '1', '--resume'])
        finished(job, deadline - time.time())
    whole, killed = (torch.load(f'output/{name}/trial=0/last.ckpt', weights_only=True, map_location='cpu')['model']
                     for name in ('whole', 'killed'))
    same = all(torch.equal(value, killed[name]) for name, value in whole.items())
    largest = max((value.double() - killed[name].double()).abs().max().item() for name, value in whole.items())
    if not largest < 0.1:
        raise Failed(f'parameters differ by {largest:.1e}')
    return 'the same bits' if same else f'parameters differ by {largest:.0e}'


def program_checks(options, gpus):
    """{name: (options, settings of `start`)}"""
    supcon = ['main_supcon', *options]
    checks = {
        'SupCon': (supcon, {}),
        'amp': ([*supcon, '--amp'], {}),
        'amp in float16': ([*supcon, '--amp'], {'float16': True}),
        'amp and compile': ([*supcon, '--amp', '--compile'], {}),
        'accum_steps': ([*supcon, '--amp', '--accum_steps', '2'], {}),
        'SimCLR': ([*supcon, '--amp', '--method', 'SimCLR'], {}),
        'GenSCL': ([*supcon, '--amp', '--method', 'GenSCL', '--mix', 'mixup_cutmix'], {}),
        'moco': ([*supcon, '--amp', '--moco', '--moco_k', '1024'], {}),
        'cross-entropy': (['main_ce', *options, '--amp'], {}),
        'loader workers': ([*supcon, '--amp', '--loader', 'workers'], {}),
        'torchrun, one process': ([*supcon, '--amp'], {'processes': 1}),
    }
    if gpus > 1:
        checks[f'DataParallel on {gpus} GPUs'] = [*supcon, '--amp'], {'gpus': gpus}
        checks[f'torchrun on {gpus} GPUs'] = [*supcon, '--amp'], {'gpus': gpus, 'processes': gpus}
        checks['the same with --syncBN'] = [*supcon, '--amp', '--syncBN'], {'gpus': gpus, 'processes': gpus}
    return checks


def advice(rows):
    """Lines on what to set, from the rows {name: [works, images/s, loader, memory]} of programs."""
    rows = {name: row for name, row in rows.items() if len(row) == 4}
    rates = {name: float(row[1]) for name, row in rows.items()
             if name == 'SupCon' or name.startswith(('amp', 'torchrun', 'DataParallel', 'the same'))}
    if 'SupCon' in rates:
        best = max(rates, key=rates.get)
        yield f"Fastest: {best}, {rates[best] / rates['SupCon']:.1f} times SupCon in float32 on one GPU"
    slow = [name for name, row in rows.items() if float(row[2].split()[0]) > 5]
    if slow:
        yield f'The loader takes more than 5 % of the time: {", ".join(slow)}; more --num_workers where files are read'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', metavar='NAME', help='only the checks of these names')
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'), help=argparse.SUPPRESS)
    parser.add_argument('--float16', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--program', nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program:
        return run_program(*args.program, float16=args.float16)
    gpu = args.device == 'cuda'
    if gpu and not torch.cuda.is_available():
        print('check_gpu: error: no GPU found that this PyTorch can use', file=sys.stderr)
        sys.exit(2)
    gpus = torch.cuda.device_count() if gpu else 0
    if gpu:
        print(f'{gpus} x {torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}')
    large = gpu and torch.cuda.get_device_properties(0).total_memory > 15 * 2**30
    batch_size = 256 if large else 64 if gpu else 32
    options = ['--dataset', 'digits', '--batch_size', str(batch_size), '--print_freq', '1', '--eval_freq', '0',
               *(LARGE if gpu else SMALL)]
    deadline, device, bsz = time.time() + SECONDS, torch.device(args.device), 512 if gpu else 32

    def trained(name, words, settings):
        job = start([*words, '--output_name', re.sub(r'\W+', '-', name)], **settings)
        return figures(finished(job, deadline - time.time()), batch_size)
    checks = {'loss': lambda: [check_losses(device, 5 * bsz)], 'views': lambda: [check_views(device, bsz)],
              **{name: lambda name=name, check=check: trained(name, *check)
                 for name, check in program_checks(options, gpus).items()},
              'kill and resume': lambda: [check_resuming(['main_supcon', *options], deadline)]}
    unknown = set(args.only or ()) - checks.keys()
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: expected of {', '.join(checks)}")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)                                # where the runs are written
        for name in args.only or checks:
            began = time.time()
            try:
                rows[name] = ['works', *checks[name]()]
            except (Failed, RuntimeError, AssertionError) as error:
                rows[name] = [f'FAILS: {" ".join(str(error).split()):.300}']
            print(f'{name}: {", ".join(rows[name])} ({time.time() - began:.0f} s)', flush=True)
        os.chdir(ROOT)
    print(f'\n| check, batches of {batch_size} images | | images/s | in the loader | largest memory |')
    print('|---|---|---|---|---|')
    for name, row in rows.items():
        cells = row if len(row) == 4 else [', '.join(row), '', '', '']
        print(f'| {name} | {" | ".join(cells)} |')
    print('', *advice(rows), sep='\n')
    sys.exit(any(row[0] != 'works' for row in rows.values()))


if __name__ == '__main__':
    main()
