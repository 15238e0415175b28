"""Make a table, and its figures, of the logs that its rows have left. Called by `finish` of rows.sh:

    python scripts/results/report.py <table> <folder> <file> NAME-SEED...

Reads <folder>/<table>/NAME-SEED.log of the rows that are named, but for those in the file, which could not be filled;
writes <folder>/<table>.md and figures beside it, and prints the table. Rows without a log are named below it; nothing
is filled in. The spread is the standard deviation over seeds.
"""
import re
import sys
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

METHODS = {
    'ce': 'cross-entropy', 'ce-sim': 'cross-entropy, views of SupCon',
    'ce-sim-2x': 'cross-entropy, views of SupCon, twice the epochs', 'simclr': 'SimCLR', 'supcon': 'SupCon',
    'supcon-ce': 'SupCon with cross-entropy', 'supcon-in': 'SupCon, `in` (Eq. 3)',
    'sincere': 'SINCERE', 'genscl-mix': 'GenSCL, mixup-cutmix', 'genscl-kd': 'GenSCL, mixup-cutmix, teacher',
}
EXPERIMENTS = {
    '1-real': '1 real images', '2-id': '2 + id images, both stages', '3-id-ood': '3 + ood images in pretraining',
}
LONG_TAIL = {
    'ce': 'cross-entropy', 'ce-la': 'logit-adjusted cross-entropy', 'supcon': 'SupCon',
    'supcon-la': 'SupCon, logit-adjusted linear evaluation', 'bcl': 'BCL',
    'bcl-la': 'BCL, logit-adjusted linear evaluation',
}
MOSAICS = {
    'supcon': 'SupCon', 'simclr': 'SimCLR', 'genscl': 'GenSCL: weighted by overlap', 'ce': 'binary cross-entropy',
    'supcon-crop': 'SupCon, crops from 20 %', 'simclr-crop': 'SimCLR, crops from 20 %',
    **{f'{method}-temp-{temp}': f'{name}, temperature {temp}' for method, name in (
        ('supcon', 'SupCon'), ('simclr', 'SimCLR')) for temp in ('0.05', '0.2')},
}
COLORS = {'ce': 'tab:gray', 'ce-sim': 'tab:green', 'simclr': 'tab:orange', 'supcon': 'tab:blue',
          'supcon-ce': 'tab:purple', 'sincere': 'tab:red', 'genscl-mix': 'tab:brown', 'genscl-kd': 'tab:pink'}
CORRUPTIONS = {'noise': 'Gaussian noise', 'blur': 'Gaussian blur', 'contrast': 'less contrast', 'jpeg': 'JPEG'}


def values_of(text):
    """The numbers of a log, of each kind the last, since a resumed run prints its result again; options of training."""
    found = {'top1': re.findall(r'^best accuracy: (\S+)$', text, re.MULTILINE),
             'knn': re.findall(r'kNN accuracy (\S+)$', text, re.MULTILINE),
             'map': re.findall(r'^best mAP: (\S+)$', text, re.MULTILINE),
             'knn_map': re.findall(r'kNN mAP (\S+)$', text, re.MULTILINE),
             'clean': re.findall(r'^top-1 (\S+)$', text, re.MULTILINE),
             'ece': re.findall(r'^ECE (\S+)$', text, re.MULTILINE),
             'recall': re.findall(r'^R@1 (\S+)$', text, re.MULTILINE),
             'retrieval': re.findall(r'^mAP@R (\S+)$', text, re.MULTILINE)}
    values = {name: float(numbers[-1]) for name, numbers in found.items() if numbers}
    on_gpu = ', no GPU\n' not in text
    cost = re.findall(r'^([\d.]+) minutes' if on_gpu else r'^CPU minutes: (\S+)$', text, re.MULTILINE)
    if cost and '--amp has no effect' not in text:          # float32 takes several times as long as the other rows
        values['minutes'], values['unit'] = sum(map(float, cost)), 'minutes' if on_gpu else 'CPU minutes'
    if 'diverged: ' in text:
        values = {'diverged': True}
    if ood := re.findall(r'^confidence id (\S+) ood (\S+) .* AUROC (\S+) FPR95 (\S+)$', text, re.MULTILINE):
        values.update(zip(('id', 'ood', 'auroc', 'fpr95'), map(float, ood[-1])))
    if groups := re.findall(r'^ \* Acc@1 over classes: (.*)$', text, re.MULTILINE):         # those that there are
        values.update((name, float(value)) for name, value in re.findall(r'(many|medium|few) (\S+)', groups[-1]))
    for kind in CORRUPTIONS:
        if line := re.findall(rf'^{kind} ([\d. ]+)$', text, re.MULTILINE):
            values[kind] = [float(number) for number in line[-1].split()]
    command = re.search(r'^\$ (.*)$', text, re.MULTILINE)[1]                    # the first: of training
    return {**dict(re.findall(r'--(\w+) ([^-\s]\S*)', command)), **values}


def read(folder, names):
    """The logs of a table: {name: {seed: values}}, the machines that they begin with, and the names without one."""
    rows, machines, missing = {}, set(), []
    for name in names:
        file = folder / f'{name}.log'
        if not file.is_file():
            missing.append(name)
            continue
        row, _, seed = name.rpartition('-')
        text = file.read_text(errors='replace')
        try:
            rows.setdefault(row, {})[int(seed)] = values_of(text)
            machines.add(text.partition('\n')[0] + re.search(r', PyTorch [\d.]+', text)[0])
        except (TypeError, ValueError):
            sys.exit(f'report.py: error: {file}: not the log of a row, expected: delete it, and the row is run again')
    return rows, sorted(machines), missing


def data_of(row):
    """What a row was trained on, in words."""
    options = next(iter(row.values()))
    names = {'path': 'JPEG copies of CIFAR-10', 'cifar10': 'CIFAR-10', 'digits': 'handwritten digits'}
    limit = options.get('samples_per_class')
    return names[options['dataset']] + (f', {limit} of each class' if limit else '')


def average(row, name):
    return mean(values[name] for values in row.values() if name in values)


def spread(row, name, digits=2):
    """Mean and standard deviation over the seeds, as text."""
    values = [values[name] for values in row.values() if name in values]
    if not values:
        return 'diverged' if any('diverged' in values for values in row.values()) else ''
    text = f'{mean(values):.{digits}f}' + (f' ± {stdev(values):.{digits}f}' if len(values) > 1 else '')
    return text + (f' ({len(values)} of {len(row)} runs)' if len(values) < len(row) else '')


def of_seeds(rows):
    numbers = sorted({seed for row in rows.values() for seed in row})
    return f"seed{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def save(fig, file):
    fig.savefig(file, dpi=120)
    plt.close(fig)
    print(file)


def methods(rows, folder):
    lines = []
    for name in ('digits', 'cifar'):
        part = {method: rows[f'{name}-{method}'] for method in METHODS if f'{name}-{method}' in rows}
        if part:
            lines += ['', f'| {data_of(next(iter(part.values())))} | top-1 % | kNN % | top-1 of {of_seeds(part)} |',
                      '|---|---|---|---|']
            lines += [f"| {METHODS[method]} | {spread(row, 'top1')} | {spread(row, 'knn')} | "
                      + ', '.join(f"{values['top1']:.2f}" if 'top1' in values else 'diverged'
                                  for _, values in sorted(row.items())) + ' |' for method, row in part.items()]
    corrupted = {method: rows[f'cifar-{method}-corrupted'] for method in COLORS if f'cifar-{method}-corrupted' in rows}
    if corrupted:
        lines += ['', '| top-1 %, mean of five strengths | clean | ' + ' | '.join(CORRUPTIONS.values()) + ' |',
                  '|---|---|' + '---|' * 4]
        for method, row in corrupted.items():
            average = {seed: values if 'diverged' in values else
                       {'clean': values['clean'], **{kind: mean(values[kind]) for kind in CORRUPTIONS}}
                       for seed, values in row.items()}
            lines.append(f'| {METHODS[method]} | '
                         + ' | '.join(spread(average, kind) for kind in ('clean', *CORRUPTIONS)) + ' |')
        plot_corruptions(corrupted, folder / 'corruptions.png')
    return lines


def plot_corruptions(corrupted, file):
    fig, axes = plt.subplots(1, len(CORRUPTIONS), figsize=(12, 3.2), sharey=True, layout='constrained')
    for ax, (kind, title) in zip(axes, CORRUPTIONS.items()):
        for method, row in corrupted.items():
            curves = list(zip(*([values['clean'], *values[kind]] for values in row.values() if 'clean' in values)))
            x = range(len(curves))                                      # 0 where all runs have diverged
            ax.plot(x, [mean(values) for values in curves], 'o-', ms=4, color=COLORS[method], label=METHODS[method])
            ax.fill_between(x, list(map(min, curves)), list(map(max, curves)), color=COLORS[method], alpha=0.2, lw=0)
        ax.set(title=title, xlabel='strength (0: clean)', xticks=range(6))
    axes[0].set_ylabel('top-1 %')
    axes[0].legend(frameon=False, fontsize='small')
    save(fig, file)


def hard_negatives(rows, folder):
    lines = []
    for prefix in ('', 'all-'):                                         # few images, all images
        part = {title: rows[prefix + name] for name, title in EXPERIMENTS.items() if prefix + name in rows}
        if part:
            title = f'{data_of(next(iter(part.values())))}, {of_seeds(part)}'
            lines += ['', f'| {title} | top-1 % | confidence id | ood | AUROC | FPR95 |', '|---|---|---|---|---|---|']
            lines += [f"| {title} | {spread(row, 'top1')} | {spread(row, 'id', 3)} | {spread(row, 'ood', 3)} | "
                      f"{spread(row, 'auroc')} | {spread(row, 'fpr95')} |" for title, row in part.items()]
    return lines


def curves_of(rows, variable, option):
    """Of the rows METHOD and METHOD-VARIABLE-...: {method: {value of the option: row}}, by value."""
    curves = {}
    for name, row in rows.items():
        method, _, varied = name.partition('-')
        options = next(iter(row.values()))
        if varied.partition('-')[0] in ('', variable) and option in options:
            curves.setdefault(method, {})[float(options[option])] = row
    return {method: dict(sorted(points.items())) for method, points in curves.items()}


def draw_curves(ax, curves, label):
    for method, points in curves.items():
        known = {value: accuracies for value, row in points.items()
                 if (accuracies := [values['top1'] for values in row.values() if 'top1' in values])}
        ax.plot(known.keys(), list(map(mean, known.values())), 'o-', ms=4, color=COLORS[method], label=METHODS[method])
        ax.fill_between(known.keys(), list(map(min, known.values())), list(map(max, known.values())),
                        color=COLORS[method], alpha=0.2, lw=0)
    ticks = sorted({value for points in curves.values() for value in points})
    ax.set_xscale('log')
    ax.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel(label)


def curve_table(curves, label, distance=False):
    """A table with the values as columns; with distance also that of the best from the worst."""
    ticks = sorted({value for points in curves.values() for value in points})
    columns = [*(f'{tick:g}' for tick in ticks), *['best - worst'] * distance]
    lines = ['', f'| top-1 % by {label} | ' + ' | '.join(columns) + ' |', '|---|' + '---|' * len(columns)]
    for method, points in curves.items():
        cells = [spread(points[tick], 'top1') if tick in points else '' for tick in ticks]
        if distance:
            means = [mean(values['top1'] for values in row.values()) for row in points.values()
                     if not any('diverged' in values for values in row.values())]
            cells.append(f'{max(means) - min(means):.2f}' if len(means) == len(points) else 'diverged')
        lines.append(f'| {METHODS[method]} | ' + ' | '.join(cells) + ' |')
    return lines


def stability(rows, folder):
    variables = {'temperature': curves_of(rows, 'temp', 'temp'), 'batch size': curves_of(rows, 'batch', 'batch_size'),
                 'learning rate': curves_of(rows, 'lr', 'lr')}
    fig, axes = plt.subplots(1, len(variables), figsize=(3.6 * len(variables), 3.2), sharey=True, layout='constrained')
    lines = ['', f'{data_of(next(iter(rows.values())))}, {of_seeds(rows)}']
    for ax, (label, curves) in zip(axes, variables.items()):
        draw_curves(ax, curves, label)
        lines += curve_table(curves, label, distance=True)
    axes[0].set_ylabel('top-1 %')
    axes[-1].legend(frameon=False, fontsize='small')
    save(fig, folder / 'stability.png')
    return lines


def labels(rows, folder):
    curves = curves_of(rows, 'labels', 'samples_per_class')
    fig, ax = plt.subplots(figsize=(4.6, 3.4), layout='constrained')
    draw_curves(ax, curves, 'labeled images of each class')
    ax.set_ylabel('top-1 %')
    ax.legend(frameon=False)
    save(fig, folder / 'labels.png')
    return curve_table(curves, f'images of each class, {of_seeds(rows)}')


def trials(rows):
    """Tables of the rows trial-METHOD and trial-METHOD-WHAT_IS_TRIED."""
    options = {'lr': 'learning rate', 'weight_decay': 'weight decay', 'batch_size': 'batch size', 'temp': 'temperature'}
    lines = []
    for method, title in METHODS.items():
        of_method = re.compile(f'trial-{method}(-(lr|wd|batch|temp)-.*)?')
        tried = [row for name, row in rows.items() if of_method.fullmatch(name)]
        if tried:
            lines += ['', f"| trials of {title} | {' | '.join(options.values())} | top-1 % | kNN % |", '|---' * 7 + '|']
        for row in tried:
            settings = next(iter(row.values()))
            cells = [settings.get(option, '') for option in options]
            lines.append(f"| | {' | '.join(cells)} | {spread(row, 'top1')} | {spread(row, 'knn')} |")
    return lines


def epochs(rows, folder):
    """Rows METHOD-E have E epochs of two views, or 2 E epochs of one."""
    curves = {}
    for name, row in rows.items():
        method, _, number = name.rpartition('-')
        if method in METHODS and number.isdigit():
            curves.setdefault(method, {})[int(number)] = row
    if not curves:
        return trials(rows)
    curves = {method: dict(sorted(curves[method].items())) for method in METHODS if method in curves}
    ticks = sorted({number for points in curves.values() for number in points})
    columns = [f'{tick / 10:g}' for tick in ticks]
    unit = next((values['unit'] for row in rows.values() for values in row.values() if 'unit' in values), 'minutes')
    lines = [f"| top-1 % by million views seen | {' | '.join(columns)} | {unit} of the last | its kNN % |",
             '|---' * (len(ticks) + 3) + '|']
    for method, points in curves.items():
        last = points[max(points)]
        cells = [METHODS[method], *(spread(points[tick], 'top1') if tick in points else '' for tick in ticks),
                 spread(last, 'minutes', 0 if unit == 'CPU minutes' else 1), spread(last, 'knn')]
        lines.append(f"| {' | '.join(cells)} |")
    fig, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout='constrained')
    for method, points in curves.items():
        shown = {number: row for number, row in points.items() if all('top1' in values for values in row.values())}
        timed = [row for row in shown.values() if any('minutes' in values for values in row.values())]
        style = {'marker': 'o', 'ms': 4, 'color': COLORS[method], 'label': METHODS[method]}
        axes[0].plot([number / 10 for number in shown], [average(row, 'top1') for row in shown.values()], **style)
        axes[1].plot([average(row, 'minutes') for row in timed], [average(row, 'top1') for row in timed], **style)
    for ax, label in zip(axes, ('million views seen', f'{unit}, with the linear evaluation')):
        ax.set_xscale('log', base=2)
        ax.xaxis.set_major_formatter('{x:g}')
        ax.set_xlabel(label)
    axes[0].set_xticks([tick / 10 for tick in ticks], [f'{tick / 10:g}' for tick in ticks])
    axes[0].minorticks_off()
    axes[0].set_ylabel('top-1 %')
    fig.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False)
    save(fig, folder / 'epochs.png')
    return lines + properties(rows, folder) + trials(rows)


# What networks are good for beside accuracy: title -> the end of a row's name, what is read from it.
PROPERTIES = {
    'top-1 %, 2,000 images': ('corrupted', 'clean'),
    **{f'top-1 %, {title}': ('corrupted', kind) for kind, title in CORRUPTIONS.items()},
    'expected calibration error %': ('corrupted', 'ece'),
    'retrieval: R@1 %': ('corrupted', 'recall'), 'retrieval: mAP@R %': ('corrupted', 'retrieval'),
    'handwritten digits: linear, top-1 %': ('digits', 'top1'), 'handwritten digits: kNN %': ('digits', 'knn'),
    'five new classes: linear, top-1 %': ('new', 'top1'), 'five new classes: kNN %': ('new', 'knn'),
    'five new classes: R@1 %': ('new', 'recall'),
    'all labels right, 16 epochs: top-1 %': ('16', 'top1'), '20 % of labels wrong: top-1 %': ('noise-0.2', 'top1'),
    '40 % of labels wrong: top-1 %': ('noise-0.4', 'top1'),
    '1 % of labels: top-1 %': ('few-50', 'top1'), '10 % of labels: top-1 %': ('few-500', 'top1'),
}


def properties(rows, folder):
    """A table and a figure of PROPERTIES, of the methods that have rows of them."""
    compared = [method for method in METHODS if f'{method}-corrupted' in rows]
    values = {}
    for title, (kind, name) in PROPERTIES.items():
        for method in compared:
            for found in rows.get(f'{method}-{kind}', {}).values():         # one seed
                if name in found:
                    number = found[name]
                    values.setdefault(title, {})[method] = mean(number) if isinstance(number, list) else number
    if not values:
        return []
    lines = ['', f"| | {' | '.join(METHODS[method] for method in compared)} |", '|---' * (1 + len(compared)) + '|']
    for title, row in values.items():
        cells = [f'{row[method]:.2f}' if method in row else '' for method in compared]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    columns = min(6, len(values))
    fig, axes = plt.subplots(-(-len(values) // columns), columns, figsize=(2.2 * columns, 5.4), layout='constrained',
                             squeeze=False)
    for ax in axes.flat:
        ax.axis('off')
    for ax, (title, row) in zip(axes.flat, values.items()):
        ax.axis('on')
        for method, number in row.items():
            x = compared.index(method)
            ax.plot(x, number, 'o', color=COLORS[method])
            ax.annotate(f'{number:.1f}', (x, number), (0, 5), ha='center', textcoords='offset points',
                        fontsize='x-small')
        ax.set_title(title.replace(': ', ':\n').replace(', ', ',\n'), fontsize='small')
        ax.set(xticks=[], xlim=(-0.6, len(compared) - 0.4))
        ax.margins(y=0.25)
    fig.legend([plt.Line2D([], [], marker='o', linestyle='', color=COLORS[method]) for method in compared],
               [METHODS[method] for method in compared], loc='outside lower center', ncols=len(compared), frameon=False)
    save(fig, folder / 'properties.png')
    return lines


def longtail(rows, folder):
    columns = {'top1': 'top-1 %', 'many': 'many', 'medium': 'medium', 'few': 'few images'}
    first = next(iter(rows.values()))
    title = f"{data_of(first)}, imbalance {next(iter(first.values()))['imbalance']}, {of_seeds(rows)}"
    lines = [f'| {title} | ' + ' | '.join(columns.values()) + ' |', '|---|' + '---|' * len(columns)]
    return lines + [f'| {method} | ' + ' | '.join(spread(rows[f'longtail-{name}'], column) for column in columns) + ' |'
                    for name, method in LONG_TAIL.items() if f'longtail-{name}' in rows]


def mosaics(rows, folder):
    lines = [f'| mosaics of CIFAR-10 images | mAP % | kNN mAP % | mAP of {of_seeds(rows)} |', '|---|---|---|---|']
    return lines + [f"| {title} | {spread(rows[name], 'map')} | {spread(rows[name], 'knn_map')} | "
                    + ', '.join(f"{values['map']:.2f}" if 'map' in values else 'diverged'
                                for _, values in sorted(rows[name].items())) + ' |'
                    for method, title in MOSAICS.items() if (name := f'mosaics-{method}') in rows]


def main():
    table, folder, failures = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]).read_text().split()
    rows, machines, missing = read(folder / table, [name for name in sys.argv[4:] if name not in failures])
    missing += failures
    if not rows:
        sys.exit(f'report.py: error: {folder / table}: no logs of this table in it')
    lines = [f'`bash scripts/results/{table}.sh`', '', *machines, '', *TABLES[table](rows, folder)]
    if missing:
        lines += ['', f"Not run: {', '.join(missing)}"]
    text = '\n'.join(lines).replace('\n\n\n', '\n\n')
    (folder / f'{table}.md').write_text(text + '\n')
    print(text)
    sys.exit(bool(missing))


TABLES = {'methods': methods, 'hard_negatives': hard_negatives, 'stability': stability, 'labels': labels,
          'epochs': epochs, 'longtail': longtail, 'mosaics': mosaics}

if __name__ == '__main__':
    main()
