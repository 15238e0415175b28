"""Runs: their folder, log lines, TensorBoard and checkpoints, and how they stop and go on.

output/<output_name>/trial=<trial>/ holds options.json, log.txt, TensorBoard events, views.png, last.ckpt and
ckpt_epoch_<N>.ckpt. Of several processes only the first prints and writes.
"""
import contextlib
import io
import json
import math
import os
import reprlib
import signal
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

from networks.sync_bn import average_statistics
from util.checkpoints import (
    kept_checkpoints,
    load_checkpoint,
    load_optimizer,
    load_parameters,
    newest_whole_checkpoint,
    strip_wrappers,
    write_checkpoint,
)
from util.distributed import largest, rank
from util.metrics import AverageMeter
from util.options import UserError, printable

try:
    import fcntl
except ImportError:                                     # Windows
    fcntl = None


class Log:
    """Prints lines on stdout and keeps them in the run's log.txt; lines before the run has a folder go there first."""

    def __init__(self):
        self.file, self.waiting = None, []

    def __call__(self, line):
        if rank():
            return
        line = printable(line)                          # it may hold the name of a file or class
        tqdm.write(line, file=sys.stdout)               # above the progress bar, where there is one
        sys.stdout.flush()
        self.waiting.append(line)
        if self.file:
            self.open(self.file)

    def open(self, file):
        self.file = file
        with writing(file), open(file, 'a', encoding='utf-8', errors='backslashreplace') as stream:
            stream.writelines(line + '\n' for line in self.waiting)
        self.waiting.clear()


@contextlib.contextmanager
def writing(file):
    """A UserError where a file or folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f'{file}: cannot be written ({error})') from error


log = Log()

# The files by which this process holds the folders of its runs. A worker process must not: it may live a little longer.
LOCKS = set()
if fcntl:
    os.register_at_fork(after_in_child=lambda: [file.close() for file in LOCKS])

# Options that may differ when a run is resumed; the others decide what the run computes.
MAY_CHANGE = {'epochs', 'warm_epochs', 'num_workers', 'print_freq', 'save_freq', 'save_steps', 'keep_ckpts',
              'eval_freq', 'per_class', 'resume', 'force', 'overwrite', 'device', 'data_folder', 'aug_root',
              'cache_dir', 'loader_chosen', 'output_name', 'trial', 'debug', 'wandb', 'wandb_entity', 'wandb_project',
              'num_classes', 'evaluate', 'export'}


def plain(values):
    """A dict of options with lists for tuples, as a file gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def shortened(value):
    """A recorded option's value as a text that cannot be endless."""
    return value if isinstance(value, str) else reprlib.repr(value)


def progress(loader, description):
    """The loader with a progress bar and the time left, when stderr is a terminal."""
    return tqdm(loader, description, leave=False, dynamic_ncols=True, disable=True if rank() else None)


class Run:
    """The output of one run.

        run = Run(opt)
        first_epoch = run.restore(model, optimizer)
        with run.start(classes):
            for epoch in range(first_epoch, opt.epochs + 1):
                ...                             run.step steps of the first are done; after each run.after_step(...)
                run.save(epoch, model, optimizer)

    Constructing it only looks; `start` makes the folder. So every mistake that can be found is found before anything
    is written. Raises UserError where the folder holds another run, without --resume or --overwrite.

    All random numbers of a step follow from --seed, epoch and step (`seed_step`, `Batches.generator`), so a checkpoint
    needs no random states, and a run may go on with another number of processes.
    """

    def __init__(self, opt):
        self.opt = opt
        opt.output_name = opt.output_name.replace('/', '-')             # of --model timm/<name>
        self.folder = Path('output') / opt.output_name / f'trial={opt.trial}'
        self.last = self.folder / 'last.ckpt'
        self.checkpoint, self.lock, self.signal, self.handlers = None, None, 0, {}
        self.step, self.best_acc, self.meters_so_far = 0, 0., {}
        self.seen = self._stamp()
        try:
            used = self.folder.exists() and any(self.folder.iterdir())
            if getattr(opt, 'evaluate', False):
                self.source = self.last
                self.checkpoint = load_checkpoint(self.last)
            elif opt.resume:
                self.checkpoint = self._checkpoint_to_resume(used)
            elif used and not opt.overwrite:
                raise UserError(f'{self.folder} holds another run, expected --resume to continue it, --overwrite to '
                                'begin anew, or another --trial or --output_name')
            if (self.folder / 'log.txt').exists() and not getattr(opt, 'evaluate', False):
                self._take()
                self._leave()
        except OSError as error:
            raise UserError(f'{self.folder}: not a folder of a run ({error})') from error

    def _stamp(self):
        """Tells whether last.ckpt has been written since."""
        try:
            status = self.last.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _checkpoint_to_resume(self, used):
        """What --resume names; None for `auto` in a folder that has no checkpoint yet."""
        self.source = self.last if self.opt.resume == 'auto' else Path(self.opt.resume)
        if self.opt.resume == 'auto' and not any(self.folder.glob('*.ckpt')):
            return None
        if used and self.source.resolve().parent != self.folder.resolve():
            raise UserError(f'--resume {self.source}: {self.folder} holds another run, expected a checkpoint of it, or '
                            'another --trial or --output_name')
        try:
            checkpoint = load_checkpoint(self.source)
            self.opt.loader_chosen = checkpoint['opt'].get('loader_chosen')     # it decides which views are drawn
            return checkpoint
        except UserError as error:
            whole = newest_whole_checkpoint(self.folder)
            raise UserError(f'--resume: {error}' + f'; the newest whole checkpoint is {whole}: continue with --resume '
                            f'{whole}' * bool(whole)) from error

    def _take(self):
        """Keep other processes from writing to the folder, as long as this one lives."""
        if rank() or fcntl is None:
            return
        self.lock = open(self.folder / 'log.txt', 'a')                  # noqa: SIM115, closed by _leave
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._leave()
            raise UserError(f'{self.folder}: another process is writing this run, expected it to end, or another '
                            '--trial or --output_name') from None
        except OSError:                                                 # a file system without locks
            pass
        LOCKS.add(self.lock)

    def _leave(self):
        if self.lock:
            LOCKS.discard(self.lock)
            self.lock.close()
            self.lock = None

    def restore(self, model, optimizer):
        """Load the checkpoint into model and optimizer, if the run resumes: -> the epoch to go on with."""
        epoch = 0
        if self.checkpoint is not None:
            changed = self._check_options('--resume')
            epoch = self._load(model, optimizer)
            if changed and self.step:                   # its steps may have other batches now
                log(f'--force: epoch {epoch + 1} begins again')
                self.step, self.meters_so_far = 0, {}
        if largest(epoch) != -largest(-epoch) or largest(self.step) != -largest(-self.step):
            raise UserError('--resume: the processes see different checkpoints, expected output/ on a file system that '
                            'all machines share')
        begun = epoch + (self.step > 0)
        if begun > self.opt.epochs:
            raise UserError(f'--resume: {self.source} has {begun} epochs, expected --epochs of at least that')
        return epoch + 1

    def _load(self, model, optimizer):
        try:
            epoch, self.step = int(self.checkpoint['epoch']), int(self.checkpoint.get('step', 0))
            self.best_acc = float(self.checkpoint['best_acc'])
            self.meters_so_far = {name: (float(total), int(count))
                                  for name, (total, count) in self.checkpoint.get('meters', {}).items()}
            if epoch < 0 or self.step < 0:
                raise ValueError(f'epoch {epoch}, step {self.step}')
            load_parameters(model, self.checkpoint['model'], f'--resume: {self.source}')
            load_optimizer(optimizer, self.checkpoint['optimizer'])
            if self.checkpoint.get('scaler'):
                optimizer.scaler.load_state_dict(self.checkpoint['scaler'])
        except UserError:
            raise
        except Exception as error:                      # what is missing or of another kind can raise anything
            raise UserError(f'--resume: {self.source} is no whole checkpoint of a run ({error!r})') from error
        del self.checkpoint['model'], self.checkpoint['optimizer']      # their memory is not needed twice
        return epoch

    def load(self, model, classes):
        """Load the parameters of last.ckpt into the model, to evaluate it with the options and classes of the run."""
        self._check_options('--evaluate')
        if self.checkpoint.get('classes', classes) != classes:
            raise UserError(f'--evaluate: {self.last} knows other classes than the pictures have')
        load_parameters(model, self.checkpoint['model'], str(self.last))

    def _check_options(self, why):
        before = plain(self.checkpoint['opt'])
        changed = [f'--{name} {value}, was {shortened(before.get(name, False))}'
                   for name, value in plain(vars(self.opt)).items()
                   if name not in MAY_CHANGE and before.get(name, False if value is True else value) != value]
        message = f"{why}: {self.source} was begun with other options: {'; '.join(changed)}"
        if changed and not getattr(self.opt, 'force', False):
            raise UserError(message + '; expected the same, or --force' * (why == '--resume'))
        if changed:
            log(message)
        return bool(changed)

    def start(self, classes):
        """Make the folder and what is in it: -> this run, as a context that signals end after the next step."""
        self.classes, self.events, self.wandb = classes, None, None
        if self.checkpoint and self.checkpoint.get('classes', classes) != classes:
            raise UserError(f'--resume: {self.source} knows other classes than the pictures have')
        if rank():
            return self
        self.wandb = self._start_wandb() if self.opt.wandb else None
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take()
            if self._stamp() != self.seen:
                raise UserError(f'{self.folder}: another process has written this run while this one was starting')
            overwritten = ('*.ckpt', 'events.out.tfevents.*', 'views.png') if self.checkpoint is None else ()
            for pattern in ('*.partial', *overwritten):                 # what a killed or an overwritten run left
                for file in self.folder.glob(pattern):
                    file.unlink()
            if self.checkpoint is None:
                (self.folder / 'log.txt').write_text('')
            values = {name: 'inf' if value == math.inf else value for name, value in plain(vars(self.opt)).items()}
            (self.folder / 'options.json').write_text(json.dumps(values, indent=2) + '\n')
            log.open(self.folder / 'log.txt')
            from tensorboard_logger import tensorboard_logger
            while any(self.folder.glob(f'events.out.tfevents.{int(time.time())}.*')):
                time.sleep(0.1)                                         # files are named by the second
            self.events = tensorboard_logger.Logger(str(self.folder), flush_secs=2)
        log(f'{self.folder}: tensorboard --logdir output')
        return self

    def __enter__(self):
        def remember(number, _):
            self.signal = number
            self._restore_signals()                                     # a second one ends the program at once

        with contextlib.suppress(ValueError):                           # not in the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:      # as for what a script runs in the background
                    self.handlers[number] = signal.signal(number, remember)
        return self

    def __exit__(self, *error):
        self._restore_signals()
        self._leave()

    def _restore_signals(self):
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def _start_wandb(self):
        import wandb
        before = (self.checkpoint or {}).get('wandb')
        try:
            return wandb.init(entity=self.opt.wandb_entity, project=self.opt.wandb_project, id=before,
                              name=f'{self.opt.output_name}, trial {self.opt.trial}', config=plain(vars(self.opt)),
                              resume='allow' if before else None)
        except (wandb.Error, TypeError, ValueError) as error:
            raise UserError(f'--wandb: {error}') from error

    def meters(self, *names):
        """An AverageMeter for each name, of an epoch that begins or, after --resume, goes on: {name: meter}."""
        so_far, self.meters_so_far = self.meters_so_far, {}
        return {name: AverageMeter(*so_far.get(name, ())) for name in names}

    def after_step(self, epoch, step, model, optimizer, meters):
        """Call after each step, 1 .. steps, of an epoch: saves every --save_steps, and ends the run after a signal."""
        stop = largest(self.signal)
        if stop or self.opt.save_steps and step % self.opt.save_steps == 0:
            self._write(['last.ckpt'], epoch - 1, step, model, optimizer, meters)
        self._stop(stop, epoch, f'step {step} of ')

    def save(self, epoch, model, optimizer):
        """Call after each epoch: write last.ckpt, and ckpt_epoch_<N>.ckpt every --save_freq epochs."""
        keep = epoch % self.opt.save_freq == 0
        self._write(['last.ckpt'] + [f'ckpt_epoch_{epoch}.ckpt'] * keep, epoch, 0, model, optimizer, {})
        self.step = 0
        self._stop(largest(self.signal), epoch)

    def _stop(self, signal_number, epoch, step=''):
        if signal_number:
            log(f'{signal.Signals(signal_number).name}: stopped after {step}epoch {epoch}, --resume goes on from there')
            raise SystemExit(128 + signal_number)

    def _write(self, names, epoch, step, model, optimizer, meters):
        """Checkpoints after `epoch` epochs and `step` steps of the next one."""
        average_statistics(model)
        if rank():
            return
        state = {'model': strip_wrappers(model.state_dict()), 'optimizer': optimizer.state_dict(),
                 'scaler': optimizer.scaler.state_dict(), 'epoch': epoch, 'step': step, 'best_acc': self.best_acc,
                 'meters': {name: meter.state for name, meter in meters.items()},
                 'opt': plain(vars(self.opt)), 'classes': self.classes,
                 'wandb': self.wandb.id if self.wandb else (self.checkpoint or {}).get('wandb')}
        for name in names:
            write_checkpoint(state, self.folder / name)
        if self.opt.keep_ckpts and len(names) > 1:
            with writing(self.folder):
                for file in kept_checkpoints(self.folder, up_to=epoch)[self.opt.keep_ckpts:]:
                    file.unlink()

    def log_values(self, values, step):
        """Send a dict of numbers to TensorBoard, and to W&B; None is left out."""
        if rank():
            return
        values = {tag: value for tag, value in values.items() if value is not None}
        with writing(self.folder):
            for tag, value in values.items():
                self.events.log_value(tag, value, step)
        if self.wandb:
            self.wandb.log(values, step=step, commit=True)

    def log_views(self, loader, count=16):
        """Show the first `count` pictures of a batch, a row for each of their views; features cannot be shown."""
        images, labels = next(iter(loader))
        if images.dim() != 4 or rank():
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
        with writing(self.folder):
            (self.folder / f'{tag}.png').write_bytes(buffer.getvalue())
        from tensorboard_logger import tensorboard_logger
        summary = tensorboard_logger.summary_pb2.Summary()
        image = summary.Image(encoded_image_string=buffer.getvalue(), height=picture.shape[0], width=picture.shape[1])
        summary.value.add(tag=tag, image=image)
        with writing(self.folder):
            self.events._log_summary(tag, summary, None, step)
        if self.wandb:
            import wandb
            self.wandb.log({tag: wandb.Image(picture)}, step=step, commit=True)
