"""Time and peak memory of the losses against their dense reference implementation, forward and backward.

    python benchmarks/bench_loss.py [--views 16384] [--dim 128] [--classes 10] [--repeat 3]             SupConLoss
    python benchmarks/bench_loss.py --variant SINCERE DCL BCL                                           some of VARIANTS
    python benchmarks/bench_loss.py --variant all
    python benchmarks/bench_loss.py --soft --classes 100                                                GenSupConLoss
    python benchmarks/bench_loss.py --against old.py                                another version of losses.py as well

Every measurement is a process of its own, so that peak memory is what the loss alone adds to an idle process that
holds the features; the forms take turns and medians are shown. `products` is what no loss can do without that makes the
whole matrix: three bare matrix products of its size, one forward and two backward. Other libraries that have the loss
are forms too, if they are installed. On a GPU where there is one. The last line is the ratio of the times, with several
variants the smallest.
"""
import argparse
import importlib.util
import math
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FORMS = ('linear', 'dense', 'products')

# Name: settings of SupConLoss. What `inputs` makes for a name decides the positives.
VARIANTS = {
    'SupCon': {}, 'SimCLR': {}, 'Eq3': {'summation_location': 'in'},
    'SINCERE': {'denominator_mode': 'one_positive'},
    'SINCERE-in': {'denominator_mode': 'one_positive', 'summation_location': 'in'},
    'DCL': {'denominator_mode': 'only_negatives'},
    'DCL-in': {'denominator_mode': 'only_negatives', 'summation_location': 'in'},
    'positives_cap': {'positives_cap': 8}, 'contrast_mode': {'contrast_mode': 'one'}, 'mask': {}, 'keys': {},
    'hard_negatives': {'hard_negatives': True}, 'BCL': {}, 'GenSCL': {},
}
# Name: the variants that another library has
LIBRARIES = {'pytorch_metric_learning': ('SupCon', 'SimCLR'), 'lightly': ('SimCLR',)}


def inputs(variant, views, dim, classes):
    """Features [views / 2, 2, dim] and the further arguments of the loss."""
    import torch
    from torch.nn import functional as F
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(views // 2, 2, dim, generator=generator), dim=2)
    labels = torch.randint(classes, (views // 2,), generator=generator)
    if variant == 'SimCLR':
        return features, {}
    if variant == 'GenSCL':                 # each view mixed with another image
        labels = F.one_hot(torch.randint(classes, (2, views // 2, 2), generator=generator), classes).float()
        return features, {'labels': 0.7 * labels[0] + 0.3 * labels[1]}
    if variant == 'mask':
        return features, {'mask': labels[:, None] == labels}
    if variant == 'keys':
        keys = F.normalize(torch.randn(views, dim, generator=generator), dim=1)
        return features, {'labels': labels, 'keys': keys, 'key_labels': labels.repeat(2)}
    if variant == 'BCL':
        return features, {'labels': labels, 'prototypes': F.normalize(torch.randn(classes, dim, generator=generator))}
    if variant == 'hard_negatives':
        labels[::4] = -labels[::4] - 1
    return features, {'labels': labels}


def linear(variant, features, **targets):
    """The loss of losses.py."""
    import losses
    on_gpu = {'unit_length': True} if features.is_cuda else {}          # no difference on a CPU
    if variant == 'GenSCL':
        return losses.GenSupConLoss(**on_gpu)(features.unbind(1), targets['labels'].unbind(1))
    loss = losses.BalancedSupConLoss() if variant == 'BCL' else losses.SupConLoss(**VARIANTS[variant], **on_gpu)
    return loss(features, **targets)


def dense(variant, features, labels=None, mask=None, keys=None, key_labels=None, prototypes=None):
    """The same by reference_loss."""
    import torch

    from losses import reference_loss
    bsz, n_views = features.shape[:2]
    settings = dict(VARIANTS[variant])
    n_anchors = bsz if settings.pop('contrast_mode', 'all') == 'one' else n_views * bsz
    cap, hard_negatives = settings.pop('positives_cap', -1), settings.pop('hard_negatives', False)
    contrasts = torch.cat(features.unbind(1))
    anchors = contrasts[:n_anchors]
    if variant == 'GenSCL':
        u = torch.nn.functional.normalize(torch.cat(labels.unbind(1)), dim=1)
        allowed = ~torch.eye(len(u), dtype=torch.bool, device=u.device)
        return reference_loss(anchors, contrasts, u @ u.T * allowed, allowed).mean()

    classes = (torch.arange(bsz, device=features.device) if labels is None else labels).repeat(n_views)
    y = classes[:n_anchors, None]
    if keys is not None:
        contrasts, classes = keys, key_labels
    if prototypes is not None:
        contrasts = torch.cat([contrasts, prototypes])
        classes = torch.cat([classes, torch.arange(len(prototypes), device=features.device)])
    allowed = torch.ones(n_anchors, len(contrasts), dtype=torch.bool, device=features.device)
    if keys is None:
        allowed.fill_diagonal_(False)
    weights = (y == classes if mask is None else mask.repeat(n_views, n_views)) & allowed
    if hard_negatives:
        weights &= classes >= 0
        allowed &= (classes >= 0) | (-classes - 1 == y)
    if cap >= 0:
        images = torch.arange(bsz, device=features.device).repeat(n_views)
        others = weights & (images != images[:, None])
        rank = others[:, :bsz].cumsum(1, dtype=torch.int32)
        beyond = others & (rank > cap // n_views).repeat(1, n_views)
        weights, allowed = weights & ~beyond, allowed & ~beyond
    if prototypes is not None:
        settings['log_weights'] = -(classes.bincount()[classes] - weights.float()).log()
    losses = reference_loss(anchors, contrasts, weights, allowed, **settings)
    return losses[y[:, 0] >= 0].mean()


def pytorch_metric_learning(variant, features, labels=None):
    """Its SupConLoss; for SimCLR each image is a class, since its NTXentLoss holds each positive x each negative."""
    import torch
    from pytorch_metric_learning.losses import SupConLoss
    if labels is None:
        labels = torch.arange(len(features), device=features.device)
    return SupConLoss(temperature=0.07)(torch.cat(features.unbind(1)), labels.repeat(features.shape[1]))


def lightly(variant, features):
    from lightly.loss import NTXentLoss
    return NTXentLoss(temperature=0.07)(*features.unbind(1))


def products(features):
    """Seconds of the three products, into memory that is there."""
    import torch
    z = torch.cat(features.detach().unbind(1))
    matrix = torch.ones(len(z), len(z), device=z.device)
    result = torch.ones_like(z)
    synchronize()
    start = time.perf_counter()
    torch.mm(z, z.T, out=matrix)
    torch.mm(matrix, z, out=result)
    torch.mm(matrix.T, z, out=result)
    synchronize()
    return time.perf_counter() - start


def synchronize():
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(form, variant, views, dim, classes, against):
    """Print seconds, added peak memory in MB and the loss of one forward and backward pass."""
    import torch
    if form == 'against':
        spec = importlib.util.spec_from_file_location('losses', against)
        sys.modules['losses'] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules['losses'])
        form = 'linear'
    device = 'cuda' if torch.cuda.is_available() else 'cpu'

    def step(views):
        features, targets = inputs(variant, views, dim, classes)
        features = features.to(device).requires_grad_()
        targets = {name: target.to(device) for name, target in targets.items()}
        if 'prototypes' in targets:
            targets['prototypes'].requires_grad_()
        if form == 'products':
            return products(features), math.nan, math.nan
        synchronize()
        reset_peak_memory()
        start_memory = peak_memory()
        start = time.perf_counter()
        loss = globals()[form](variant, features, **targets)
        loss.backward()
        synchronize()
        return time.perf_counter() - start, peak_memory() - start_memory, loss.item()

    step(64)                                # threads and libraries start here, not in the measurement
    if device == 'cuda':
        step(views)
    print(*step(views))


def reset_peak_memory():
    """Forget the largest memory so far: what the imports took for a moment."""
    import torch
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path('/proc/self/clear_refs').exists():
        Path('/proc/self/clear_refs').write_text('5')


def peak_memory():
    """Largest memory since then in MB, of the GPU or of this process (elsewhere than on Linux, since it started)."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if Path('/proc/self/status').exists():
        return int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20           # bytes on macOS


def compare(variant, args):
    """Print a table of all forms of a variant; -> dense / linear of the times."""
    libraries = [name for name, variants in LIBRARIES.items() if variant in variants]
    installed = [name for name in libraries if importlib.util.find_spec(name)]
    mine = ('linear', 'against') if args.against else ('linear',)
    results = {form: [] for form in (*mine, *FORMS[1:], *installed)}
    for _ in range(args.repeat):
        for form, rows in results.items():
            command = [sys.executable, __file__, '--form', form, '--variant', variant, '--views', str(args.views),
                       '--dim', str(args.dim), '--classes', str(args.classes), '--against', args.against]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append([float(value) for value in output.splitlines()[-1].split()])
    medians = {form: [statistics.median(column) for column in zip(*rows)] for form, rows in results.items()}
    for form in (*mine, *installed):
        if not math.isclose(medians[form][2], medians['dense'][2], rel_tol=1e-4):
            sys.exit(f'{variant}: {form} gives {medians[form][2]}, dense {medians["dense"][2]}: not the same loss')
    print(f'{variant}: {args.views} views, {args.dim} dimensions, {args.classes} classes, forward and backward, '
          f'median of {args.repeat}')
    print(f'{"form":24}{"seconds":>10}{"peak MB":>10}{"loss":>14}')
    for form in (*mine, *FORMS[1:], *libraries):
        if form in medians:
            seconds, memory, loss = medians[form]
            print(f'{form:24}{seconds:10.4g}{memory:10.0f}{loss:14.7f}')
        else:
            print(f'{form:24}{"not installed":>20}')
    if args.against:
        ratios = [new[0] / old[0] for new, old in zip(results['linear'], results['against'])]
        print(f'time: linear / against, median of each turn {statistics.median(ratios):.3f}')
    ratio = medians['dense'][0] / medians['linear'][0]
    print(f'memory: dense / linear {medians["dense"][1] / max(medians["linear"][1], 1):.1f}; time: linear / products '
          f'{medians["linear"][0] / medians["products"][0]:.2f}, dense / linear {ratio:.1f}', flush=True)
    return ratio


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--views', type=int, default=16384)
    parser.add_argument('--dim', type=int, default=128)
    parser.add_argument('--classes', type=int, default=10)
    parser.add_argument('--variant', nargs='+', choices=(*VARIANTS, 'all'), default=['SupCon'])
    parser.add_argument('--soft', action='store_true', help='label distributions, as --variant GenSCL')
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--against', metavar='FILE', default='', help='another version of losses.py')
    parser.add_argument('--form', choices=(*FORMS, 'against', *LIBRARIES), help='measure it once, in this process')
    args = parser.parse_args()
    variants = ['GenSCL'] if args.soft else VARIANTS if 'all' in args.variant else args.variant
    if args.form:
        for variant in variants:
            measure(args.form, variant, args.views, args.dim, args.classes, args.against)
        return
    ratios = [compare(variant, args) for variant in variants]
    print(f'ratio {min(ratios):.1f}')


if __name__ == '__main__':
    main()
