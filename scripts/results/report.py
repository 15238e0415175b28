"""Make a table, and its figures, of the logs that its rows have left.

    python scripts/results/report.py methods|hard_negatives|stability|labels scripts/results/cpu

Writes <folder>/<table>.md and figures beside it, from <folder>/<table>/NAME-SEED.log alone, and prints the table. What
has not been run is told, never filled in.
"""
import re
import sys
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

METHODS = {
    'ce': 'cross-entropy', 'simclr': 'SimCLR', 'supcon': 'SupCon', 'supcon-ce': 'SupCon with cross-entropy',
    'supcon-in': 'SupCon, `in` (Eq. 3)', 'genscl-mix': 'GenSCL, mixup-cutmix',
    'genscl-kd': 'GenSCL, mixup-cutmix, teacher',
}
EXPERIMENTS = {
    '1-real': '1 real pictures', '2-id': '2 + id pictures, both stages', '3-id-ood': '3 + ood pictures in pretraining',
    '2-id-steps': '2 again, with as many steps as 3',
}
SETS = {'digits': 'handwritten digits', 'cifar': 'CIFAR-10'}
COLOURS = {'ce': 'tab:gray', 'simclr': 'tab:orange', 'supcon': 'tab:blue'}
DAMAGES = {'noise': 'Gaussian noise', 'blur': 'Gaussian blur', 'contrast': 'less contrast', 'jpeg': 'JPEG'}


def values_of(text):
    """The numbers of a log: of each kind the last, since a resumed run prints its result again."""
    found = {'top1': re.findall(r'^best accuracy: (\S+)$', text, re.MULTILINE),
             'knn': re.findall(r'kNN accuracy (\S+)$', text, re.MULTILINE),
             'clean': re.findall(r'^top-1 (\S+)$', text, re.MULTILINE)}
    values = {name: float(numbers[-1]) for name, numbers in found.items() if numbers}
    ood = re.findall(r'^confidence id (\S+) ood (\S+) .* AUROC (\S+) FPR95 (\S+)$', text, re.MULTILINE)
    if ood:
        values.update(zip(('id', 'ood', 'auroc', 'fpr95'), map(float, ood[-1])))
    command = text.partition('\n$ ')[2].partition('\n')[0]                 # the first: of training
    values.update({option: float(value) for option, value in re.findall(r'--(\w+) ([\d.]+)(?= |$)', command)})
    for kind in DAMAGES:
        if line := re.findall(rf'^{kind} ([\d. ]+)$', text, re.MULTILINE):
            values[kind] = [float(number) for number in line[-1].split()]
    return values


def read(folder):
    """All logs of a table: -> {name: {seed: values}}, and the machines that they begin with."""
    rows, machines = {}, set()
    for file in sorted(folder.glob('*.log')):
        name, _, seed = file.stem.rpartition('-')
        text = file.read_text()
        rows.setdefault(name, {})[int(seed)] = values_of(text)
        machines.add(text.partition('\n')[0] + re.search(r', PyTorch [\d.]+', text)[0])
    return rows, sorted(machines)


def spread(row, name, digits=2):
    """Mean and standard deviation over the seeds, as text."""
    values = [values[name] for values in (row or {}).values() if name in values]
    if not values:
        return 'not run'
    return f'{mean(values):.{digits}f}' + (f' ± {stdev(values):.{digits}f}' if len(values) > 1 else '')


def seeds(row, name):
    return ', '.join(f'{values[name]:.2f}' for _, values in sorted((row or {}).items()) if name in values)


def of_seeds(rows):
    numbers = sorted({seed for row in rows.values() for seed in row})
    return f'seeds {", ".join(map(str, numbers))}' if len(numbers) > 1 else 'one seed'


def save(fig, file):
    fig.savefig(file, dpi=120)
    plt.close(fig)
    print(file)


def methods(rows, folder):
    lines = []
    for name, title in SETS.items():
        part = {method: rows.get(f'{name}-{method}') for method in METHODS}
        if any(part.values()):
            lines += ['', f'| {title} | top-1 % | kNN % | top-1 of {of_seeds({m: r for m, r in part.items() if r})} |',
                      '|---|---|---|---|']
            lines += [f"| {METHODS[m]} | {spread(row, 'top1')} | {spread(row, 'knn')} | {seeds(row, 'top1')} |"
                      for m, row in part.items()]
    damaged = {method: row for method in COLOURS if (row := rows.get(f'cifar-{method}-damaged'))}
    if damaged:
        lines += ['', '| CIFAR-10, top-1 % | clean | ' + ' | '.join(DAMAGES.values()) + ' |', '|---|---|' + '---|' * 4]
        for method, row in damaged.items():
            average = {seed: {'clean': values['clean'], **{kind: mean(values[kind]) for kind in DAMAGES}}
                       for seed, values in row.items()}
            lines.append(f'| {METHODS[method]} | '
                         + ' | '.join(spread(average, kind) for kind in ('clean', *DAMAGES)) + ' |')
        draw_damages(damaged, folder / 'corruptions.png')
    return lines


def draw_damages(damaged, file):
    fig, axes = plt.subplots(1, len(DAMAGES), figsize=(12, 3.2), sharey=True, layout='constrained')
    for ax, (kind, title) in zip(axes, DAMAGES.items()):
        for method, row in damaged.items():
            curves = list(zip(*([values['clean'], *values[kind]] for values in row.values())))
            x = range(len(curves))
            ax.plot(x, [mean(values) for values in curves], 'o-', ms=4, color=COLOURS[method], label=METHODS[method])
            ax.fill_between(x, list(map(min, curves)), list(map(max, curves)), color=COLOURS[method], alpha=0.2, lw=0)
        ax.set(title=title, xlabel='strength (0: clean)', xticks=list(x))
    axes[0].set_ylabel('top-1 %')
    axes[0].legend(frameon=False, fontsize='small')
    save(fig, file)


def hard_negatives(rows, folder):
    lines = [f'| CIFAR-10, {of_seeds(rows)} | top-1 % | confidence id | ood | AUROC | FPR95 |', '|---|' + '---|' * 5]
    return lines + [f"| {title} | {spread(row, 'top1')} | {spread(row, 'id', 3)} | {spread(row, 'ood', 3)} | "
                    f"{spread(row, 'auroc')} | {spread(row, 'fpr95')} |"
                    for name, title in EXPERIMENTS.items() for row in [rows.get(name)]]


def curves_of(rows, variable, option):
    """Of the rows METHOD and METHOD-VARIABLE-...: {method: [(value of the option, [top-1 of each seed])]}."""
    curves = {}
    for name, row in rows.items():
        method, _, varied = name.partition('-')
        points = [values for values in row.values() if option in values and 'top1' in values]
        if varied.partition('-')[0] in ('', variable) and points:
            curves.setdefault(method, []).append((points[0][option], [values['top1'] for values in points]))
    return {method: sorted(curves[method]) for method in ('ce', 'supcon') if method in curves}


def draw_curves(ax, curves, label):
    for method, points in curves.items():
        x, y = zip(*points)
        ax.plot(x, list(map(mean, y)), 'o-', ms=4, color=COLOURS[method], label=METHODS[method])
        ax.fill_between(x, list(map(min, y)), list(map(max, y)), color=COLOURS[method], alpha=0.2, lw=0)
    ticks = sorted({value for points in curves.values() for value, _ in points})
    ax.set_xscale('log')
    ax.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel(label)


def curve_table(curves, label, distance=False):
    """A table with the values as columns; with distance also of the best from the worst."""
    ticks = sorted({value for points in curves.values() for value, _ in points})
    lines = ['', f'| {label} | ' + ' | '.join([*(f'{tick:g}' for tick in ticks), *['best - worst'] * distance]) + ' |',
             '|---|' + '---|' * (len(ticks) + distance)]
    for method, points in curves.items():
        means = {value: mean(numbers) for value, numbers in points}
        cells = [f'{means[tick]:.2f}' if tick in means else 'not run' for tick in ticks]
        cells += [f'{max(means.values()) - min(means.values()):.2f}'] * distance
        lines.append(f'| {METHODS[method]} | ' + ' | '.join(cells) + ' |')
    return lines


def stability(rows, folder):
    variables = {'temperature': curves_of(rows, 'temp', 'temp'), 'batch size': curves_of(rows, 'batch', 'batch_size'),
                 'learning rate': curves_of(rows, 'lr', 'lr')}
    fig, axes = plt.subplots(1, len(variables), figsize=(3.6 * len(variables), 3.2), sharey=True, layout='constrained',
                             squeeze=False)
    for ax, (label, curves) in zip(axes[0], variables.items()):
        draw_curves(ax, curves, label)
    axes[0, 0].set_ylabel('top-1 %')
    axes[0, -1].legend(frameon=False, fontsize='small')
    save(fig, folder / 'stability.png')
    return [line for label, curves in variables.items()
            for line in curve_table(curves, f'top-1 %, {label}', distance=True)]


def labels(rows, folder):
    curves = curves_of(rows, 'labels', 'samples_per_class')
    fig, ax = plt.subplots(figsize=(4.6, 3.4), layout='constrained')
    draw_curves(ax, curves, 'labelled pictures of each class')
    ax.set_ylabel('top-1 %')
    ax.legend(frameon=False)
    save(fig, folder / 'labels.png')
    return curve_table(curves, f'top-1 % ({of_seeds(rows)}), pictures of each class')


def main():
    table, folder = sys.argv[1], Path(sys.argv[2])
    rows, machines = read(folder / table)
    if not rows:
        sys.exit(f'report.py: error: {folder / table}: no logs in it')
    lines = TABLES[table](rows, folder)
    text = '\n'.join([f'`bash scripts/results/{table}.sh`', '', *machines, '', *lines]).replace('\n' * 3, '\n' * 2)
    (folder / f'{table}.md').write_text(text + '\n')
    print(text)


TABLES = {'methods': methods, 'hard_negatives': hard_negatives, 'stability': stability, 'labels': labels}

if __name__ == '__main__':
    main()
