"""Weights that a run starts from: files of these programs, of SupContrast, torchvision and timm, on the Hugging Face
Hub too. Nothing in a file is executed."""
import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from util import checkpoints
from util.errors import UserError
from util.log import log

# What --export writes beside the parameters, and reading needs.
INFO = ('model', 'stem', 'width', 'size', 'mean', 'std', 'dataset', 'split_seed', 'classes')


def read_start(opt):
    """What is in --ckpt, by read_weights, and `hold_out_same_images` its run; None without --ckpt."""
    if not opt.ckpt:
        return None
    weights = read_weights(opt.ckpt)
    hold_out_same_images(weights['opt'], opt, f'--ckpt {opt.ckpt}')
    return weights


def hold_out_same_images(recorded, opt, source):
    """Make opt.split_seed that of a checkpoint of the same dataset, with the options `recorded`: what is held out for
    validation must not be what its network has learnt. UserError where another checkpoint's run held out others."""
    split_seed = recorded.get('split_seed')
    if recorded.get('dataset') != opt.dataset or split_seed is None:
        return
    if opt.split_seed not in (None, split_seed):
        raise UserError(f'{source}: its run held out other images for validation (those of seed {split_seed}), '
                        f'expected those of seed {opt.split_seed}, as this run or its teacher')
    opt.split_seed = split_seed


def start_from_weights(model, opt, checkpoint):
    """Load the encoder of --ckpt, what read_start gave, into a new model, and the projection head where it fits; report
    what was loaded.

    Raises UserError where the encoder does not fit.
    """
    if not opt.ckpt:
        if opt.model.startswith('timm/'):
            log(f"--model {opt.model}: starts from {'pretrained' if opt.timm_pretrained else 'random'} weights")
        return
    for name in ('model', 'stem', 'width'):
        found = getattr(opt, name)
        recorded = checkpoint['opt'].get(name, found)
        if recorded != found:
            raise UserError(f'--ckpt {opt.ckpt} holds an encoder with --{name} {recorded}, found --{name} {found}')
    parts = {}
    for name, value in checkpoints.from_torchvision_names(checkpoint['model'], opt.model).items():
        part, _, rest = name.partition('.')
        parts.setdefault(part, {})[rest] = value
    source = f'--ckpt {opt.ckpt} (for --model {opt.model} --stem {opt.stem} --width {opt.width:g})'
    if opt.model.startswith('timm/') and opt.stem == 'cifar' and 'stem' not in checkpoint['opt']:
        log(f'--ckpt {opt.ckpt} records no stem: --stem cifar may change the stride of the first layers that these '
            'weights were trained with, --stem imagenet keeps it')
    loaded = {'encoder': checkpoints.load_parameters(model.encoder, parts.pop('encoder', {}), source)}
    head = getattr(model, 'head', None)
    if head and _shapes(head.state_dict()) == _shapes(parts.get('head', {})):
        loaded['head'] = checkpoints.load_parameters(head, parts.pop('head'), source)
    new = [name for name, _ in model.named_children() if name not in loaded]
    line = f"--ckpt {opt.ckpt}: loaded {', '.join(f'{part} ({count} tensors)' for part, count in loaded.items())}"
    for what, names in (('starts from random weights', new), ('not used', parts)):
        if names:
            line += f"; {what}: {', '.join(names)}"
    log(line)


def _shapes(state):
    return {name: value.shape for name, value in state.items()}


def read_weights(file):
    """What a file holds, a dict: `model`, parameters by their names, without wrappers' prefixes; the recorded options
    `opt`, a dict; `classes` or None; and `epoch`, where it has one.

    file: a checkpoint of these programs or of SupContrast, a file of --export, or a state dict, alone or under
    `state_dict` or `model`; also .safetensors; or hf://owner/name[/file] (default: model.safetensors). UserError where
    it is none.
    """
    path = fetch(str(file))
    if path.suffix == '.safetensors':
        checkpoint, state = read_safetensors(path)
    else:
        checkpoint, state = checkpoints.read_checkpoint(path, ['state_dict', 'model'], plain=True)
    if isinstance(checkpoint.get('model'), str):        # of --export: the network's name
        checkpoint = {'opt': {name: checkpoint[name] for name in checkpoints.RECORDED.keys() & checkpoint.keys()},
                      'classes': checkpoint.get('classes')}
    opt = checkpoints.check_recorded(checkpoint, path)
    weights = {'opt': opt, 'classes': checkpoint.get('classes'), 'model': state}
    try:
        if 'epoch' in checkpoint:
            weights['epoch'] = checkpoints.whole_number(checkpoints.plain_values(checkpoint['epoch']), 'epoch')
    except ValueError as error:
        raise UserError(f'{path} is no valid checkpoint of a run ({error})') from error
    return weights


def read_safetensors(file):
    """-> those entries of INFO that the file has; the parameters by their names."""
    if not os.path.isfile(file):
        raise UserError(f'{file}: no such checkpoint')
    try:
        with safe_open(file, 'pt') as stream:
            state = checkpoints.strip_wrappers({name: stream.get_tensor(name) for name in stream.keys()})   # noqa: SIM118, no dict
            info = json.loads((stream.metadata() or {}).get('info', '{}'))
        if not isinstance(info, dict):
            raise ValueError('its metadata is of another program')
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f'{file}: not a readable file of safetensors ({error!s:.200})') from error
    return {name: info[name] for name in INFO if name in info}, state


def fetch(name):
    """The path of a file; hf://owner/name[/file] is downloaded, once, into the cache of huggingface_hub."""
    if not name.startswith('hf://'):
        return Path(name)
    found = re.fullmatch(r'hf://([\w.-]+/[\w.-]+)(?:/(.+))?', name)
    if not found:
        raise UserError(f'{name}: expected hf://owner/name or hf://owner/name/file')
    import huggingface_hub  # here: most runs need none of it
    try:
        return Path(huggingface_hub.hf_hub_download(found[1], found[2] or 'model.safetensors'))     # under its own lock
    except Exception as error:                          # of the connection, the hub, its names, the disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f'{name}: cannot be downloaded, and is not in the cache ({reason})') from error
