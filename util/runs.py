"""Runs: their folder, log lines, TensorBoard and checkpoints.

output/<output_name>/trial=<trial>/ holds options.json, log.txt, TensorBoard events, views.png, last.ckpt and
ckpt_epoch_<N>.ckpt.
"""
import argparse
import codecs
import io
import json
import math
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

from networks.resnet_big import make_encoder
from util.options import POSITIVE, UserError, channels, network, number, stem


class Log:
    """Prints lines on stdout and keeps them in the run's log.txt; lines before the run has a folder go there first."""

    def __init__(self):
        self.file, self.waiting = None, []

    def __call__(self, line):
        tqdm.write(line, file=sys.stdout)               # above the progress bar, where there is one
        sys.stdout.flush()
        self.waiting.append(line)
        if self.file:
            self.open(self.file)

    def open(self, file):
        self.file = file
        try:
            with open(file, 'a', encoding='utf-8', errors='backslashreplace') as stream:
                stream.writelines(line + '\n' for line in self.waiting)
        except OSError as error:
            raise UserError(f'{file}: cannot be written ({error})') from error
        self.waiting.clear()


log = Log()

# Options that may differ when a run is resumed; the others decide what the run computes.
MAY_CHANGE = {'epochs', 'warm_epochs', 'num_workers', 'print_freq', 'save_freq', 'eval_freq', 'per_class', 'resume',
              'overwrite', 'device', 'data_folder', 'aug_root', 'cache_dir', 'debug', 'wandb', 'wandb_entity',
              'wandb_project', 'num_classes', 'evaluate', 'export'}


def plain(values):
    """A dict of options with lists for tuples, as a file gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def progress(loader, description):
    """The loader with a progress bar and the time left, when stderr is a terminal."""
    return tqdm(loader, description, leave=False, dynamic_ncols=True, disable=None)


class Run:
    """The output of one run.

    Constructing it only looks; `start` makes the folder. So every mistake that can be found is found before anything
    is written. Raises UserError where the folder holds another run, without --resume or --overwrite.
    """

    def __init__(self, opt):
        self.opt = opt
        opt.output_name = opt.output_name.replace('/', '-')             # of --model timm/<name>
        self.folder = Path('output') / opt.output_name / f'trial={opt.trial}'
        self.last = self.folder / 'last.ckpt'
        self.checkpoint = None
        try:
            if getattr(opt, 'evaluate', False) or opt.resume and self.last.exists():
                self.checkpoint = load_checkpoint(self.last)
            elif opt.resume and any(self.folder.glob('*.ckpt')):
                raise UserError(f'--resume: {self.folder} has checkpoints but no last.ckpt, expected the one to '
                                'continue from under that name')
            elif self.folder.exists() and any(self.folder.iterdir()) and not (opt.overwrite or opt.resume):
                raise UserError(f'{self.folder} holds another run, expected --resume to continue it, --overwrite to '
                                'begin anew, or another --trial or --output_name')
        except OSError as error:
            raise UserError(f'{self.folder}: not a folder of a run ({error})') from error

    def restore(self, model, optimizer):
        """Load last.ckpt into model and optimizer, if the run resumes: -> (first epoch, best accuracy)."""
        if self.checkpoint is None:
            return 1, 0.
        self._check_options('--resume')
        try:
            epoch, best_acc = int(self.checkpoint['epoch']), float(self.checkpoint['best_acc'])
            load_parameters(model, self.checkpoint['model'], f'--resume: {self.last}')
            fused = [group.get('fused') for group in optimizer.param_groups]        # depends on the device
            optimizer.load_state_dict(self.checkpoint['optimizer'])
            for group, value in zip(optimizer.param_groups, fused):
                if value is not None:
                    group['fused'] = value
            if self.checkpoint.get('scaler'):
                optimizer.scaler.load_state_dict(self.checkpoint['scaler'])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f'--resume: {self.last} is no whole checkpoint of a run ({error!r})') from error
        if epoch >= self.opt.epochs:
            raise UserError(f'--resume: {self.last} has all {epoch} epochs, expected --epochs above')
        return epoch + 1, best_acc

    def load(self, model, classes):
        """Load the parameters of last.ckpt into the model, to evaluate it with the options and classes of the run."""
        self._check_options('--evaluate')
        if self.checkpoint.get('classes', classes) != classes:
            raise UserError(f'--evaluate: {self.last} knows other classes than the pictures have')
        load_parameters(model, self.checkpoint['model'], str(self.last))

    def _check_options(self, why):
        before = plain(self.checkpoint['opt'])
        changed = [f'--{name} {value}, was {before.get(name, False)}' for name, value in plain(vars(self.opt)).items()
                   if name not in MAY_CHANGE and before.get(name, False if value is True else value) != value]
        if changed:
            raise UserError(f"{why}: {self.last} was begun with other options: {'; '.join(changed)}")

    def start(self, classes):
        self.classes = classes
        self.wandb = self._start_wandb() if self.opt.wandb else None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.checkpoint is None:                                 # what an overwritten run left
                for pattern in ('*.ckpt', 'events.out.tfevents.*', 'log.txt', 'views.png'):
                    for file in self.folder.glob(pattern):
                        file.unlink()
            values = {name: 'inf' if value == math.inf else value for name, value in plain(vars(self.opt)).items()}
            (self.folder / 'options.json').write_text(json.dumps(values, indent=2) + '\n')
            log.open(self.folder / 'log.txt')
            from tensorboard_logger import tensorboard_logger
            self.events = tensorboard_logger.Logger(str(self.folder), flush_secs=2)
        except OSError as error:
            raise UserError(f'{self.folder}: cannot be written ({error})') from error
        log(f'{self.folder}: tensorboard --logdir output')

    def _start_wandb(self):
        import wandb
        before = (self.checkpoint or {}).get('wandb')
        try:
            return wandb.init(entity=self.opt.wandb_entity, project=self.opt.wandb_project, id=before,
                              name=f'{self.opt.output_name}, trial {self.opt.trial}', config=plain(vars(self.opt)),
                              resume='allow' if before else None)
        except (wandb.Error, TypeError, ValueError) as error:
            raise UserError(f'--wandb: {error}') from error

    def log_values(self, values, step):
        """Send a dict of numbers to TensorBoard, and to W&B; None is left out."""
        values = {tag: value for tag, value in values.items() if value is not None}
        for tag, value in values.items():
            self.events.log_value(tag, value, step)
        if self.wandb:
            self.wandb.log(values, step=step, commit=True)

    def log_views(self, loader, count=16):
        """Show the first `count` pictures of a batch, a row for each of their views; features cannot be shown."""
        images, labels = next(iter(loader))
        if images.dim() != 4:
            return
        images = images.view(-1, len(labels), *images.shape[1:])[:, :count].flatten(0, 1).float().cpu()
        images = images * torch.tensor(self.opt.std)[:, None, None] + torch.tensor(self.opt.mean)[:, None, None]
        images = images.repeat_interleave(max(1, 64 // self.opt.size), 2)
        images = images.repeat_interleave(max(1, 64 // self.opt.size), 3)
        grid = make_grid(images.clamp(0, 1), nrow=min(count, len(labels)))
        self.log_picture('views', (grid * 255).round().byte().permute(1, 2, 0).numpy(), 0)

    def log_picture(self, tag, picture, step):
        """Send a uint8 array [h, w, 3] to TensorBoard, and to W&B, and write it to <tag>.png."""
        # The package's own log_images needs functions that SciPy no longer has.
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format='png')
        (self.folder / f'{tag}.png').write_bytes(buffer.getvalue())
        from tensorboard_logger import tensorboard_logger
        summary = tensorboard_logger.summary_pb2.Summary()
        image = summary.Image(encoded_image_string=buffer.getvalue(), height=picture.shape[0], width=picture.shape[1])
        summary.value.add(tag=tag, image=image)
        self.events._log_summary(tag, summary, None, step)
        if self.wandb:
            import wandb
            self.wandb.log({tag: wandb.Image(picture)}, step=step, commit=True)

    def save(self, epoch, model, optimizer, best_acc=0.):
        """Write last.ckpt, and ckpt_epoch_<N>.ckpt every --save_freq epochs: plain tensors, numbers and texts."""
        state = {'model': strip_wrappers(model.state_dict()), 'optimizer': optimizer.state_dict(),
                 'scaler': optimizer.scaler.state_dict(), 'epoch': epoch, 'best_acc': best_acc,
                 'opt': plain(vars(self.opt)), 'classes': self.classes,
                 'wandb': self.wandb.id if self.wandb else (self.checkpoint or {}).get('wandb')}
        names = ['last.ckpt'] + [f'ckpt_epoch_{epoch}.ckpt'] * (epoch % self.opt.save_freq == 0)
        for name in names:
            partial = self.folder / f'{name}.partial'
            try:
                torch.save(state, partial)
                os.replace(partial, self.folder / name)                 # at any moment the file is whole
            except (OSError, RuntimeError) as error:
                partial.unlink(missing_ok=True)
                raise UserError(f'{self.folder / name}: cannot be written ({error})') from error


def strip_wrappers(state):
    """Parameter names without the prefix of DataParallel."""
    return {name.replace('module.', ''): value for name, value in state.items()}


def load_parameters(model, state, source):
    """Load a state dict without wrappers' prefixes into a model, wrapped or not; UserError where they do not fit."""
    names = {name.replace('module.', ''): name for name in model.state_dict()}
    wrong = sorted(names.keys() ^ state.keys()) or [
        name for name in names if model.state_dict()[names[name]].shape != state[name].shape]
    if wrong:
        found, expected = (f'{list(tensors[name].shape)}' if name in tensors else 'none' for tensors, name in (
            (state, wrong[0]), (strip_wrappers(model.state_dict()), wrong[0])))
        raise UserError(f'{source} holds another network: {len(wrong)} parameters differ, {wrong[0]} is {found} there, '
                        f'expected {expected}')
    model.load_state_dict({names[name]: value for name, value in state.items()})


# What a pickled NumPy float64 is made of, under the names of NumPy 2 and NumPy 1.
NUMPY_NUMBERS = [np.dtype, np.dtypes.Float64DType, codecs.encode] + [
    (np.float64(0).__reduce__()[0], f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')]


def read_checkpoint(file, keys):
    """A checkpoint as a dict, of which one of `keys` holds parameters: -> (the dict, the parameters by their names).

    Nothing in the file is executed. Raises UserError where the file is missing or no checkpoint.
    """
    if not Path(file).is_file():
        raise UserError(f'{file}: no such checkpoint')
    try:
        # The original programs keep a Namespace in `opt`, and a NumPy number as learning rate after its first decay.
        with torch.serialization.safe_globals([argparse.Namespace, *NUMPY_NUMBERS]), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            checkpoint = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:          # a damaged file can raise anything; PyTorch's advice is not ours
        raise UserError(f'{file}: not a readable checkpoint ({type(error).__name__})') from error
    model = next((checkpoint[key] for key in keys if key in checkpoint), None) if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict) or not all(
            isinstance(name, str) and torch.is_tensor(value) and value.layout is torch.strided
            and not value.is_complex() for name, value in model.items()):
        raise UserError(f"{file}: not a checkpoint of these programs, expected the parameters under "
                        f"{' or '.join(map(repr, keys))}")
    return checkpoint, strip_wrappers(model)


def load_checkpoint(file):
    """A checkpoint of ours or of the original programs as a dict with `model`, `epoch` and the options `opt`, a dict.

    Raises UserError as read_checkpoint.
    """
    checkpoint, model = read_checkpoint(file, ['model'])
    return {**checkpoint, 'opt': check_recorded(checkpoint, file), 'model': model}


def check_recorded(checkpoint, file):
    """The options `opt` of a checkpoint; those that decide method, network and pictures as if parsed again."""
    opt, classes = ({} if checkpoint.get('opt') is None else checkpoint['opt']), checkpoint.get('classes', [])
    opt = vars(opt) if isinstance(opt, argparse.Namespace) else opt
    if not isinstance(opt, dict) or not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise UserError(f'{file}: its recorded options are damaged')
    types = {'model': network, 'stem': stem, 'method': str, 'width': number(float, 1 / 64, 16),
             'size': number(int, 8, 4096), 'mean': channels(number(float, -math.inf)), 'std': channels(POSITIVE),
             'dataset': str, 'split_seed': number(int, 0, 2**31)}
    try:
        return {**opt, **{name: parse(str(opt[name])) for name, parse in types.items() if opt.get(name) is not None}}
    except (argparse.ArgumentTypeError, AttributeError, TypeError) as error:
        raise UserError(f'{file}: its recorded options are damaged ({error})') from error


def load_encoder(checkpoint, opt, source):
    """The encoder of a checkpoint, built as opt.model, stem, width and size say; `source` names it in errors."""
    encoder = make_encoder(opt.model, size=opt.size, stem=opt.stem, width=opt.width)
    prefix = 'encoder.'
    state = {name[len(prefix):]: value for name, value in checkpoint['model'].items() if name.startswith(prefix)}
    load_parameters(encoder, state, source)
    return encoder
