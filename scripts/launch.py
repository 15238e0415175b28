"""Run the stages of a launch script one after the other: python scripts/launch.py SCRIPT STAGE... -- OPTION...

SCRIPT is the launch script, a STAGE one text: a program and its options. An OPTION, as given to the script, is added to
each stage whose program has it. One that no program has is an error, as is one by which a stage would not use what the
one before it has trained. Each launch script has these too:

    --mode train|eval|train_then_eval   all stages; the last one alone with --evaluate; or both in turn
    --use_labels True|False             False: SupCon becomes SimCLR
    --help                              the comment at its head

In a stage {name} is --output_name (default: the name of SCRIPT), {trial} is --trial and {dataset} is --dataset.
Environment variables: LAUNCH starts the programs instead of python, such as "torchrun --nproc_per_node 8"; PRETRAIN and
LINEAR are options of main_supcon.py or main_linear.py alone, where a script has several stages.
"""
import os
import re
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from util import errors, options  # noqa: E402
from util.errors import UserError  # noqa: E402

ENVIRONMENT = {'main_supcon': 'PRETRAIN', 'main_linear': 'LINEAR'}  # variables with options of one program


def main():
    if '--' not in sys.argv:
        print(__doc__.strip())
        return
    end = sys.argv.index('--')
    script, stages, words = sys.argv[1], sys.argv[2:end], sys.argv[end + 1:]
    sys.argv[0] = script                                        # the name that errors begin with
    os.chdir(ROOT)
    if {'-h', '--help'} & set(words):
        print(help_text(script, stages))
        return
    commands = plan(script, stages, words)
    if len(commands) > 1:                                       # a single program checks its options itself
        check(commands)
    for command in commands:
        if status := run(command):
            sys.exit(status)


def help_text(script, stages):
    """The comment at the head of a script, and where its further options are described."""
    lines = Path('scripts', Path(script).name).read_text(encoding='utf-8').splitlines()
    comment = [line[2:] for line in takewhile(lambda line: line.startswith('#'), lines[1:])]
    files = sorted({stage.split()[0] for stage in stages})
    more = [f'Options: python {file} --help' for file in files if program_of(file) in options.PROGRAMS]
    return '\n'.join([*comment, *more, 'Of all launch scripts: python scripts/launch.py'])


def program_of(file):
    """main_ce.py -> main_ce"""
    return file.removesuffix('.py')


def plan(script, stages, words):
    """The command lines of a script's stages, each a list of words without `python`.

    Raises UserError for a value that --mode or --use_labels does not have, and for what would part the stages.
    """
    stages = [split(stage, 'stage') for stage in stages]
    programs = {program_of(file) for file, *_ in stages} & set(options.PROGRAMS)
    words = [options.underscores(word) for word in words]
    mode, words = take(words, '--mode', default='train', type=options.one_of('train', 'eval', 'train_then_eval'))
    use_labels, words = take(words, '--use_labels', type=options.one_of('True', 'False', 'true', 'false'))
    if use_labels:
        words += ['--method', 'SupCon' if use_labels.lower() == 'true' else 'SimCLR']
    name, unnamed = take(words, '--output_name', '--desc', default=Path(script).stem)
    values = {'name': name, 'trial': take(words, '--trial', default='0')[0],
              'dataset': take(words, '--dataset', default=options.program_defaults('main_supcon')['dataset'])[0]}
    if len(stages) > 1:
        words = unnamed
        check_links(words, stages)
    elif {'--ckpt', '--pretrained'} & flags_of(words):          # another encoder replaces the script's
        for flag in ('--ckpt', '--pretrained'):
            stages[0] = take(stages[0], flag)[1]
    commands = []
    for file, *own in stages:
        command = [file, *(re.sub(r'\{(name|trial|dataset)\}', lambda found: values[found[1]], word) for word in own)]
        if program_of(file) in programs:
            command += options.filter_args(program_of(file), words, programs)
            command += words_of_one(program_of(file), stages)
        commands.append(command)
    if mode != 'train':
        if program_of(commands[-1][0]) not in ('main_ce', 'main_linear'):
            raise UserError(f'--mode {mode}: {commands[-1][0]} has no --evaluate, expected train')
        commands.append([*commands[-1], '--evaluate'])
    return commands[-1:] if mode == 'eval' else commands


def split(text, name):
    """The words of a text, as a shell splits it; nothing in them is executed or replaced."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f'{name}: {error}, found {text!r}') from None


def take(words, *flags, **settings):
    """Take an option out of words: -> its value, the last one given, or its default; the other words."""
    parser = options.Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(*flags, dest='value', **settings)
    found, rest = parser.parse_known_args(words)
    return found.value, rest


def flags_of(words):
    """The options in words, without their values."""
    return {word.partition('=')[0] for word in words}


def words_of_one(program, stages):
    """The options that the environment has for a program alone."""
    name = ENVIRONMENT.get(program)
    if len(stages) == 1 or not os.environ.get(name or ''):
        return []
    words = [options.underscores(word) for word in split(os.environ[name], name)]
    for flag in sorted({'--trial', '--output_name', '--desc'} & flags_of(words)):
        raise UserError(f'{name}: {flag} is for all stages, expected after the name of the script')
    check_links(take(words, '--ckpt')[1] if program == 'main_supcon' else words, stages)      # its own start
    return words


def check_links(words, stages):
    """UserError for options by which a stage would not use what the one before it has trained."""
    flags = flags_of(words)
    for flag in sorted({'--ckpt', '--pretrained', '--pretrained_ckpt', '--evaluate'} & flags):
        raise UserError(f'{flag}: the encoder is the one that this script trains, for another: main_linear.py')
    if '--aug_mode' in flags and any('--aug_mode' in stage for stage in stages):
        raise UserError('--aug_mode: each experiment of this script has its own')
    if take(words, '--resume', nargs='?', const='auto')[0] not in (None, 'auto'):
        raise UserError('--resume: a file is given, expected --resume alone: each stage finds its own')


def check(commands):
    """UserError where an option of a command is wrong. It imports PyTorch, which takes seconds."""
    from util import arguments
    for file, *words in commands:
        if program_of(file) in options.PROGRAMS:
            try:
                arguments.parse(program_of(file), '', words)
            except UserError as error:
                raise UserError(f'{file}: {error}') from None


def run(command):
    """Print a command and run it to its end: -> its exit status.

    Ctrl-C reaches the program as well, which first saves a checkpoint: it is waited for.
    """
    launch = os.environ.get('LAUNCH') if program_of(command[0]) in options.PROGRAMS else None
    command = [*split(launch or 'python', 'LAUNCH'), *command]
    try:
        print(errors.printable(shlex.join(command)), flush=True)
    except OSError:                                             # its reader has gone, which does not end a run
        errors.silence(sys.stdout)
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise UserError(f'{command[0]} cannot be started ({error})') from error
    interrupted = False
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            interrupted = True
    if process.returncode < 0:                                  # ended by a signal
        return 128 - process.returncode
    return process.returncode or 130 * interrupted


if __name__ == '__main__':
    errors.run(main)
