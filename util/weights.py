"""Weights that a run starts from: files of these programs, of SupContrast, torchvision and timm, on the Hugging Face
Hub too. Nothing in a file is executed."""
import json
import os
import re
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError, safe_open

from util.checkpoints import (
    RECORDED,
    check_recorded,
    in_our_names,
    load_parameters,
    plain_values,
    read_checkpoint,
    strip_wrappers,
    whole_number,
)
from util.distributed import rank_zero_first
from util.errors import UserError
from util.log import log

INFO = ('model', 'stem', 'width', 'size', 'mean', 'std', 'classes')     # what --export writes beside the parameters


def start_from_weights(model, opt):
    """Load the encoder of --ckpt into a new model, and the projection head where it fits; report what was loaded.

    Raises UserError where the encoder does not fit.
    """
    if not opt.ckpt:
        if opt.model.startswith('timm/'):
            log(f"--model {opt.model}: starts from {'pretrained' if opt.timm_pretrained else 'random'} weights")
        return
    checkpoint = read_weights(opt.ckpt)
    for name in ('model', 'stem', 'width'):
        known = checkpoint['opt'].get(name, getattr(opt, name))
        if known != getattr(opt, name):
            raise UserError(f'--ckpt {opt.ckpt} holds an encoder with --{name} {known}, found --{name} '
                            f'{getattr(opt, name)}')
    parts = {}
    for name, value in in_our_names(checkpoint['model'], opt.model).items():
        part, _, rest = name.partition('.')
        parts.setdefault(part, {})[rest] = value
    source = f'--ckpt {opt.ckpt} (for --model {opt.model} --stem {opt.stem} --width {opt.width:g})'
    loaded = Counter({'encoder': load_parameters(model.encoder, parts.pop('encoder', {}), source)})
    head = getattr(model, 'head', None)
    if head and _shapes(head.state_dict()) == _shapes(parts.get('head', {})):
        loaded['head'] = load_parameters(head, parts.pop('head'), source)
    new = [name for name, _ in model.named_children() if name not in loaded]
    log(f"--ckpt {opt.ckpt}: loaded {', '.join(f'{part} ({count} tensors)' for part, count in loaded.items())}"
        + f"; starts from random weights: {', '.join(new)}" * bool(new)
        + f"; not used: {', '.join(parts)}" * bool(parts))


def _shapes(state):
    return {name: value.shape for name, value in state.items()}


def read_weights(file):
    """Parameters from a file, and what it records: a dict with `model`, their names without wrappers' prefixes, the
    options `opt` and, where it has them, `epoch` and `classes`.

    file: a checkpoint of these programs or of SupContrast, a file of --export, or a state dict, alone or under
    `state_dict` or `model`; also .safetensors; or hf://owner/name[/file] (default: model.safetensors). UserError where
    it is none.
    """
    path = fetch(str(file))
    if path.suffix == '.safetensors':
        checkpoint, state = read_safetensors(path)
    else:
        checkpoint, state = read_checkpoint(path, ['state_dict', 'model'], plain=True)
    if isinstance(checkpoint.get('model'), str):
        checkpoint = {'opt': {name: checkpoint[name] for name in RECORDED.keys() & checkpoint.keys()},
                      'classes': checkpoint.get('classes')}
    opt = check_recorded(checkpoint, path)
    try:
        epoch = {'epoch': whole_number(plain_values(checkpoint['epoch']), 'epoch')} if 'epoch' in checkpoint else {}
    except ValueError as error:
        raise UserError(f'{path} is no valid checkpoint of a run ({error})') from error
    return {**epoch, 'opt': opt, 'classes': checkpoint.get('classes'), 'model': state}


def read_safetensors(file):
    """What --export writes beside the parameters, as far as it is there, and the parameters by their names."""
    if not os.path.isfile(file):
        raise UserError(f'{file}: no such checkpoint')
    try:
        with safe_open(file, 'pt') as stream:
            state = strip_wrappers({name: stream.get_tensor(name) for name in stream.keys()})   # noqa: SIM118, no dict
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
        return Path(rank_zero_first(lambda: huggingface_hub.hf_hub_download(found[1], found[2] or 'model.safetensors')))
    except Exception as error:                          # of the connection, the hub, its names, the disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f'{name}: cannot be downloaded, and is not in the cache ({reason})') from error
