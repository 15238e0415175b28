"""Print the best accuracies of runs, from their logs: python scripts/accuracies.py TITLE FOLDER [TITLE FOLDER ...]

A FOLDER is that of a run, such as output/quickstart-ce/trial=0. Where the runs measured out-of-distribution detection,
a table has these numbers too.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util import errors  # noqa: E402
from util.errors import UserError  # noqa: E402
from util.files import open_regular  # noqa: E402

LARGEST_LOG = 2**30                                     # bytes
COLUMNS = ('experiment', 'best top-1', 'conf.id', 'conf.ood', 'difference', 'AUROC', 'FPR95')


def main():
    titles, folders = sys.argv[1::2], sys.argv[2::2]
    if len(titles) != len(folders):
        raise UserError(f'{titles[-1]}: its folder is missing, expected TITLE FOLDER [TITLE FOLDER ...]')
    rows = [(title, *results(folder)) for title, folder in zip(titles, folders)]
    if any(len(row) > 2 for row in rows):
        for title, *numbers in (COLUMNS, *rows):
            print(f'{title:40}' + ''.join(f' {number:>10}' for number in numbers))
    else:
        for row in rows:
            print(*row)


def results(folder):
    """The last results in the log of a run, as text: [top-1] or [top-1, the numbers of metrics.ood_report]."""
    file = Path(folder) / 'log.txt'
    try:
        with open_regular(file, LARGEST_LOG) as stream:
            lines = stream.read().decode().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f'{file}: not a readable log ({error})') from error
    best = [line.split()[-1] for line in lines if line.startswith('best accuracy: ')]
    ood = [line.split()[2::2] for line in lines if re.match('confidence id .* ood ', line)]
    if not best:
        raise UserError(f'{file}: it has no line "best accuracy"')
    return [best[-1], *(ood[-1] if ood else [])]


if __name__ == '__main__':
    errors.run(main)
