"""Who may know whom: imports go down only, so that every file can be read after those below it."""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    {'util', 'util.errors', 'util.distributed', 'util.options', 'util.files', 'util.log', 'util.memory',
     'util.signals'},
    {'datasets', 'losses', 'networks'},
    {'methods', 'util'},
    {'main_supcon', 'main_ce', 'main_linear', 'scripts', 'benchmarks'}]
PACKAGES = ('util', 'datasets', 'networks', 'scripts', 'benchmarks')


def modules():
    """{name: file} of the repository's programs and packages."""
    files = [*ROOT.glob('*.py'), *(file for name in PACKAGES for file in (ROOT / name).rglob('*.py'))]
    return {'.'.join(file.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): file for file in files}


def imports(file, known):
    """The modules of the repository that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f'{node.module}.{alias.name}' for alias in node.names}
            found |= inside & known or {node.module}            # the modules it names, not their package
    return found & known


def floor(name):
    """The number of the floor of a module; the modules of util that are not on the first are on the third."""
    for number, names in enumerate(FLOORS):
        if name in names or number and name.split('.')[0] in names:
            return number
    raise AssertionError(f'{name} is on no floor')


def test_imports_go_down_only():
    files = modules()
    graph = {name: imports(file, files.keys()) for name, file in files.items()}
    assert len(graph) > 40 and 'util.training' in graph['main_ce']
    wrong = [(name, other) for name, others in graph.items() for other in others if floor(other) > floor(name)]
    assert not wrong, wrong
    while graph:                                        # take away what needs nothing else, until nothing is left
        free = [name for name, others in graph.items() if not others & graph.keys() - {name}]
        assert free, f'a circle among {sorted(graph)}'
        for name in free:
            del graph[name]
