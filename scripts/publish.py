"""Write a trained classifier with a model card into a folder, and upload it to the Hugging Face Hub if asked to.

    python scripts/publish.py --run output/<run>/trial=0 --output published
    python scripts/publish.py --run output/<run>/trial=0 --output published --repo owner/name

--run is a run of main_ce.py or main_linear.py. The folder gets model.safetensors (encoder, classifier and how images
are prepared), README.md, the card with the command, the accuracy and how to load the file, and the run's log.txt.
--ckpt hf://owner/name starts a run from it. Logging in is left to the hub's own program: hf auth login.
"""
import argparse
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import DATASETS, DatasetInfo  # noqa: E402
from networks.resnet_big import LinearProbe, SupCEResNet, make_encoder  # noqa: E402
from util import checkpoints, errors, options  # noqa: E402
from util.errors import UserError, printable  # noqa: E402
from util.export import Exporter  # noqa: E402
from util.files import replace_file, writing  # noqa: E402
from util.options import Parser, as_text  # noqa: E402
from util.runs import RESUME_MAY_CHANGE, plain  # noqa: E402

CARD = '''---
library_name: pytorch
pipeline_tag: image-classification
tags: [supervised-contrastive-learning]
---
# {model}, {title} on {dataset}

Validation: {accuracy}.

Trained with

```bash
{command}
```

whose output is in `log.txt`. `model.safetensors` holds encoder and classifier under the parameter names of {names},
with the first layers of `--stem {stem}`; `info` in its metadata has the {n_classes} classes, and mean, std and size of
the images: {size} pixels, (values in 0..1 - mean) / std with mean {mean} and std {std}. The file holds tensors alone:
reading it executes nothing.

```python
import json
from safetensors import safe_open

with safe_open('model.safetensors', 'pt') as file:
    info = json.loads(file.metadata()['info'])
    state = {{name: file.get_tensor(name) for name in file.keys()}}
```
'''


def parse_option():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', required=True, metavar='FOLDER', help='of a run of main_ce.py or main_linear.py')
    parser.add_argument('--output', required=True, metavar='FOLDER', help='where to write')
    parser.add_argument('--repo', metavar='OWNER/NAME', help='upload it there; default: nowhere')
    return parser.parse_args()


def load_classifier(checkpoint, opt, classes, file):
    """The network of a checkpoint of main_ce.py or main_linear.py: -> the network, the name of the program."""
    if not {'classifier.fc.weight', 'fc.weight'} & checkpoint['model'].keys() or 'temp' in checkpoint['opt']:
        raise UserError(f'{file}: expected a checkpoint of main_ce.py or main_linear.py, which has a classifier')
    program = 'main_linear' if 'classifier.fc.weight' in checkpoint['model'] else 'main_ce'
    encoder = {'size': opt.size, 'stem': opt.stem, 'width': opt.width}
    model = (SupCEResNet(opt.model, len(classes), **encoder) if program == 'main_ce' else
             LinearProbe(make_encoder(opt.model, **encoder), len(classes)))
    checkpoints.load_parameters(model, checkpoint['model'], file)
    return model, program


# Options that no command needs: those that change no result, and the second name of a checkpoint.
NOT_NEEDED = RESUME_MAY_CHANGE | {'pretrained', 'pretrained_ckpt'}
NOT_NEEDED -= {'epochs', 'warm_epochs', 'data_folder', 'aug_root'}


def command_of(program, recorded):
    """The command line that gives these options, whatever the method of an encoder brings: those at their defaults, and
    those that change no result, left out."""
    datasets, words = {recorded['dataset']: DatasetInfo(load=None), **DATASETS}, {}     # a user's may have no row here
    info = datasets[recorded['dataset']]
    ignored = NOT_NEEDED | {name for name in ('mean', 'std', 'size') if recorded.get(name) == getattr(info, name, None)}
    ignored |= {'learning_rate'} if recorded.get('base_lr') else set()
    ignored |= set() if recorded.get('warm_epochs') else {'warm_epochs'}                # 0 of a run of one epoch
    ignored |= {name for name in recorded if options.without_effect(name, recorded, program, info)}
    while True:                                         # an option given may bring other defaults
        missing = {}
        for method in (None, *options.METHOD_DEFAULTS[program]):
            found = vars(options.parse(program, '', list(words.values()), datasets, method))
            for _, (flag, *_), settings in options.options_of(program):
                name = flag.removeprefix('--')
                value = recorded.get(name)
                if name in ignored or name in words or value is None or plain(found)[name] == value:
                    continue
                given = f'{flag}={as_text(value)}'
                if 'action' in settings:
                    given = flag if value else f'--no_{name}'
                missing[name] = given
        if not missing:
            break
        words.update(missing)
    return ' '.join(['python', f'{program}.py', *map(shlex.quote, words.values())])


def main():
    args = parse_option()
    run, folder = Path(args.run), Path(args.output)
    file = run / 'last.ckpt'
    checkpoint = checkpoints.load_checkpoint(file)
    recorded = checkpoint['opt']
    classes = checkpoints.plain_values(checkpoint.get('classes')) or []
    missing = [name for name in ('model', 'stem', 'width', 'size', 'mean', 'std', 'dataset') if not recorded.get(name)]
    if missing or not classes:
        raise UserError(f'{file} does not record its {(missing or ["classes"])[0]}, expected a run of these programs')
    if checkpoint.get('step') or checkpoint.get('epoch') != recorded.get('epochs'):
        raise UserError(f"{file}: {checkpoint.get('epoch')} of {recorded.get('epochs')} epochs, expected a finished "
                        'run, whose accuracy is the last in its log: continue it with --resume')
    opt = argparse.Namespace(**{'multi_label': False, 'split_seed': None, **recorded,
                                'export': str(folder / 'model.safetensors')})
    model, program = load_classifier(checkpoint, opt, classes, file)
    log = run / 'log.txt'
    lines = log.read_text(encoding='utf-8', errors='replace') if log.is_file() else ''
    accuracies = re.findall(r'^ \* (?!Acc@1 over classes)(.+)$', lines, re.MULTILINE)
    if not accuracies:
        raise UserError(f'{log}: no accuracy in it, expected the log of a run')
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    exporter = Exporter(model, opt, classes)
    title = {'main_ce': 'cross-entropy', 'main_linear': 'linear classifier'}[program]
    card = CARD.format(
        model=opt.model, title='fine-tuned' if recorded.get('finetune') else title, dataset=opt.dataset,
        accuracy=accuracies[-1].strip(), command=command_of(program, recorded), n_classes=len(classes),
        names="timm's model" if opt.model.startswith('timm/') else "torchvision's ResNets", size=opt.size,
        stem=opt.stem, mean=list(opt.mean), std=list(opt.std))
    exporter.write()
    with writing(folder):
        replace_file(folder / 'README.md', '\n'.join(map(printable, card.split('\n'))).encode())
        replace_file(folder / 'log.txt', lines.encode())
    print(f'{folder}: model.safetensors, README.md, log.txt')
    if args.repo:
        upload(folder, args.repo)


def upload(folder, repo):
    import huggingface_hub  # here: most have no use for it
    try:
        huggingface_hub.HfApi().create_repo(repo, exist_ok=True)
        address = huggingface_hub.upload_folder(repo_id=repo, folder_path=folder,
                                                allow_patterns=['model.safetensors', 'README.md', 'log.txt'])
    except Exception as error:                          # of the connection, the hub, its names, missing rights
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f'--repo {repo}: cannot be uploaded ({reason})') from error
    print(address)


if __name__ == '__main__':
    errors.run(main)
