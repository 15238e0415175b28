"""What the scripts that draw share: the file of a figure, and text in it."""
import argparse
import contextlib
import os
import uuid
import warnings
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from PIL import Image

from util.errors import UserError, printable


def figure_file(text):
    """A type: a file that Matplotlib can write, by the suffix of its name; .png where it has none."""
    known = FigureCanvasBase.get_supported_filetypes()
    file = Path(text) if Path(text).suffix else Path(f'{text}.png')
    if not os.path.basename(text).strip('.') or os.path.isdir(text) or os.path.isdir(file):
        raise argparse.ArgumentTypeError(f'found {text!r}, expected a file, not a folder')
    if file.suffix[1:].lower() not in known:
        raise argparse.ArgumentTypeError(f'found {text!r}, expected a name that ends in .{", .".join(sorted(known))}')
    return file


def plain_text(name):
    """A name as a text of Matplotlib: without control characters, and no dollar begins a formula."""
    return printable(name).replace('$', r'\$')


def save(fig, file, dpi):
    """Write a figure and print its file's name; the file is the old one until the new one is complete.

    Raises UserError where it cannot be written.
    """
    def write(partial):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')             # a letter that the font lacks is a box
            fig.savefig(partial, dpi=dpi, format=file.suffix[1:])
    _replace(file, write)


def save_image(array, file):
    """As save, for a uint8 array [h, w, 3]."""
    _replace(file, lambda partial: Image.fromarray(array).save(partial, file.suffix[1:]))


def _replace(file, write):
    partial = file.with_name(f'{uuid.uuid4().hex}.partial')
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, file)
    except (OSError, ValueError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f'{file}: cannot be written ({error})') from error
    print(file)
