"""Lines on stdout that a run's log.txt keeps, and progress bars."""
import sys

from tqdm import tqdm

from util.distributed import rank
from util.errors import printable, silence
from util.files import open_no_follow, writing


class Log:
    """Prints lines on stdout and keeps them in the run's log.txt; lines before the run has a folder go there first."""

    def __init__(self):
        self.file, self.waiting = None, []

    def __call__(self, line):
        if rank():
            return
        line = printable(line)                          # it may hold the name of a file or class
        try:
            tqdm.write(line, file=sys.stdout)           # above the progress bar, where there is one
            sys.stdout.flush()
        except OSError:                                 # a reader that leaves, as `| head -5`, does not end a run
            silence(sys.stdout)
        self.waiting.append(line)
        if self.file:
            self.open(self.file)

    def open(self, file):
        self.file = file
        with writing(file), open(file, 'a', encoding='utf-8', errors='backslashreplace',
                                 opener=open_no_follow) as stream:
            stream.writelines(line + '\n' for line in self.waiting)
        self.waiting.clear()


log = Log()


def progress(loader, description):
    """The loader with a progress bar and the time left, when stderr is a terminal."""
    return tqdm(loader, description, leave=False, dynamic_ncols=True, disable=True if rank() else None)
