"""The notebook: its code runs, in a process of its own, and shows what it promises."""
import json
import sys

from conftest import ROOT, shell

# Programs are forked from a process that has imported what they need, which takes most of their time.
FORKED = '''
import os, runpy, subprocess, sys, tempfile
sys.path.insert(0, '..')
import main_linear, main_supcon
from scripts import evaluate, plot_features

def forked(words, **settings):
    sys.stdout.flush()
    with tempfile.TemporaryFile('w+') as out:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            sys.argv, code = words[1:], 1
            try:
                runpy.run_path(words[1], run_name='__main__')
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        return subprocess.CompletedProcess(words, code, out.read(), '')
subprocess.run = forked
'''


def test_the_notebook_runs(copy):
    notebook = json.loads((ROOT / 'examples' / 'quickstart.ipynb').read_text())
    cells = [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']
    text = '\n'.join(cells)
    for full, small in (('epochs = 15\n', 'epochs = 1\n'), ('0.25', "0.0625, '--size', 8, '--max_samples', 96")):
        assert full in text
        text = text.replace(full, small)
    (copy / 'examples' / 'cells.py').write_text(FORKED + text)
    result = shell([sys.executable, 'cells.py'], copy / 'examples', MPLBACKEND='Agg')
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'kNN accuracy' in result.stdout and 'best accuracy' in result.stdout
    output = copy / 'output'
    for file in ('notebook/trial=0/views.png', 'notebook/features.png', 'notebook/neighbors.png',
                 'notebook-linear/trial=0/confusion.png'):
        assert (output / file).exists(), file
