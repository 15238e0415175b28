"""How cost grows: seconds and memory of the loss over the number of views, seconds of an epoch over the images.

    python benchmarks/plot_cost.py [--output cost.png] [--largest 17] [--images 256 512 1024 2048]

The linear form is measured up to 2^17 views, the dense one as long as its matrices take less than half of the free
memory. The last line is the slope of the linear form's time between 2^14 views and the largest, in a log-log plot: 2
where the time grows with N^2.
"""
import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from util.memory import available_memory  # noqa: E402

DENSE_BYTES = 26                        # that bench_loss.dense takes for each pair of views, as measured


def output_of(script, *arguments):
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('cost.png'))
    parser.add_argument('--largest', type=int, default=17, help='power of 2 of the most views, at least 11')
    parser.add_argument('--images', type=int, nargs='+', default=[256, 512, 1024, 2048])
    args = parser.parse_args()
    import torch
    memory = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else available_memory()
    costs = {'linear': {}, 'dense': {}}
    for power in range(10, args.largest + 1):
        for form, rows in costs.items():
            if form == 'linear' or DENSE_BYTES * 4**power < memory / 2:
                output = output_of('bench_loss.py', '--views', 2**power, '--form', form)
                seconds, megabytes = rows[2**power] = [float(text) for text in output.split()[:2]]
                print(f'loss, {form}: {2**power} views {seconds:.3f} s, {megabytes:.0f} MB', flush=True)
    epochs = {}
    for count in args.images:
        epochs[count] = json.loads(output_of('bench_epoch.py', '--images', count, '--form', 'ours'))['seconds']
        print(f'epoch: {count} images {epochs[count]:.2f} s', flush=True)
    plot(costs, epochs, args.output)
    sizes = 2**max(10, min(14, args.largest - 1)), 2**args.largest
    low, high = (costs['linear'][size][0] for size in sizes)
    print(f'ratio {math.log(high / low) / math.log(sizes[1] / sizes[0]):.2f}')


def plot(costs, epochs, file):
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    figure, (time_axis, memory_axis, epoch_axis) = plt.subplots(1, 3, figsize=(12, 3.6), layout='constrained')
    for form, color in (('linear', 'tab:blue'), ('dense', 'tab:red')):
        sizes = list(costs[form])
        for axis, column in ((time_axis, 0), (memory_axis, 1)):
            axis.plot(sizes, [costs[form][size][column] for size in sizes], 'o-', color=color,
                      label={'linear': 'losses.py', 'dense': 'dense form'}[form])
    sizes = list(costs['linear'])
    last = costs['linear'][sizes[-1]]
    time_axis.plot(sizes, [last[0] * (size / sizes[-1])**2 for size in sizes], ':', color='gray', label='N²')
    memory_axis.plot(sizes, [last[1] * size / sizes[-1] for size in sizes], ':', color='gray', label='N')
    epoch_axis.plot(list(epochs), list(epochs.values()), 'o-', color='tab:blue', label='resnet18, SupCon, --amp')
    largest = max(epochs)
    epoch_axis.plot(list(epochs), [epochs[largest] * n / largest for n in epochs], ':', color='gray', label='linear')
    for axis, title, label in ((time_axis, 'loss, forward and backward, seconds', 'views N'),
                               (memory_axis, 'memory of the loss, MB', 'views N'),
                               (epoch_axis, 'epoch, seconds', 'images')):
        axis.set(title=title, xlabel=label, xscale='log', yscale='log')
        axis.set_xscale('log', base=2)
        axis.legend()
        axis.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


if __name__ == '__main__':
    main()
