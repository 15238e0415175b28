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
    load_scaler,
    newest_whole_checkpoint,
    plain_values,
    strip_wrappers,
    whole_number,
    write_checkpoint,
)
from util.distributed import largest, rank
from util.metrics import AverageMeter
from util.options import EVALUATION, UserError, printable, silence

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
        with writing(file), open(file, 'a', encoding='utf-8', errors='backslashreplace') as stream:
            stream.writelines(line + '\n' for line in self.waiting)
        self.waiting.clear()


@contextlib.contextmanager
def writing(file):
    """A UserError where a file or folder cannot be written, or this process no longer holds the run's folder."""
    check_locks()
    try:
        yield
    except OSError as error:
        raise UserError(f'{file}: cannot be written ({error})') from error


def replace_file(file, content):
    """Write a file under its name without touching what a link under that name leads to."""
    partial = file.with_name(f'{file.name}.partial')
    partial.unlink(missing_ok=True)
    partial.write_bytes(content)
    os.replace(partial, file)


log = Log()

# The files .lock by which this process holds the folders of its runs. A worker process must not: it may live a little
# longer.
LOCKS = set()
if fcntl:
    os.register_at_fork(after_in_child=lambda: [LOCKS.pop().close() for _ in list(LOCKS)])


def check_locks():
    """UserError where a run's folder, or its lock, was removed or replaced: another process may be writing there."""
    for lock in LOCKS:
        try:
            held = os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
        except OSError:
            held = False
        if not held:
            raise UserError(f'{lock.name}: removed or replaced during the run, expected its folder to be left alone')


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


def run_folder(name, trial):
    """Where a run is written; `/` in a name is from --model timm/<name>."""
    return Path('output') / name.replace('/', '-') / f'trial={trial}'


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
        self.folder = run_folder(opt.output_name, opt.trial)
        opt.output_name = self.folder.parent.name
        self.last = self.folder / 'last.ckpt'
        self.checkpoint, self.lock, self.signal, self.handlers = None, None, 0, {}
        self.step, self.best_acc, self.meters_so_far = 0, 0., {}
        self.seen = self._stamp()
        try:
            used = self.folder.exists() and any(file.name != '.lock' for file in self.folder.iterdir())
            if getattr(opt, 'evaluate', False):
                self.source = self.last
                self.checkpoint = load_checkpoint(self.last)
            elif opt.resume:
                self.checkpoint = self._checkpoint_to_resume(used)
            elif used and not opt.overwrite:
                raise UserError(f'{self.folder} holds another run, expected --resume to continue it, --overwrite to '
                                'begin anew, or another --trial or --output_name')
            if (self.folder / '.lock').exists() and not getattr(opt, 'evaluate', False):
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
        if used and self.source.parent.resolve() != self.folder.resolve():
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
        self.lock = open(self.folder / '.lock', 'a')                    # noqa: SIM115, closed by _leave
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
            changed = self._changed_options(vars(self.opt).keys() - MAY_CHANGE)
            if changed:
                message = f"--resume: {self.source} was begun with other options: {'; '.join(changed)}"
                if not self.opt.force:
                    raise UserError(f'{message}; expected the same, or --force')
                log(message)
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
            saved = {name: plain_values(self.checkpoint[name], tensors=name == 'optimizer')
                     for name in ('epoch', 'step', 'best_acc', 'meters', 'optimizer', 'scaler', 'wandb')
                     if name in self.checkpoint}
            epoch, self.step = whole_number(saved['epoch'], 'epoch'), whole_number(saved.get('step', 0), 'step')
            self.best_acc = float(saved['best_acc'])
            self.meters_so_far = {name: (float(total), whole_number(count, name))
                                  for name, (total, count) in saved.get('meters', {}).items()}
            totals = [total for total, _ in self.meters_so_far.values()]
            if not 0 <= self.best_acc <= 100 or not all(map(math.isfinite, totals)):
                raise ValueError(f'best_acc {self.best_acc}, meters {totals}')
            if not isinstance(saved.get('wandb'), (str, type(None))) or not self.checkpoint['opt']:
                raise TypeError('wandb is no text, or the options are missing')
            load_parameters(model, self.checkpoint['model'], f'--resume: {self.source}')
            scaler = saved.get('scaler') or {}
            load_scaler(optimizer.scaler, scaler)
            # The first steps of float16 may all have been skipped; not every parameter of timm's has gradients.
            begun = bool((epoch or self.step) and (saved['optimizer']['state'] or not scaler))
            optional = {parameter for name, parameter in model.named_parameters() if 'backbone.' in name}
            load_optimizer(optimizer, saved['optimizer'], begun, optional)
        except UserError:
            raise
        except Exception as error:                      # what is missing or of another kind can raise anything
            raise UserError(f'--resume: {self.source} is no whole checkpoint of a run ({error!r:.300})') from error
        del self.checkpoint['model'], self.checkpoint['optimizer']      # their memory is not needed twice
        return epoch

    def load(self, model, classes):
        """Load the parameters of last.ckpt into the model, to evaluate it with the options and classes of the run."""
        if changed := self._changed_options(EVALUATION):
            log(f"--evaluate: not as in {self.last}: {'; '.join(changed)}")
        if self.checkpoint.get('classes', classes) != classes:
            raise UserError(f'--evaluate: {self.last} knows other classes than the pictures have')
        load_parameters(model, self.checkpoint['model'], str(self.last))

    def _changed_options(self, names):
        before, now = plain(self.checkpoint['opt']), plain(vars(self.opt))
        return [f'--{name} {now[name]}, was {shortened(before.get(name, False))}' for name in now
                if name in names and before.get(name, False if now[name] is True else now[name]) != now[name]]

    def start(self, classes):
        """Make the folder and what is in it: -> this run, as a context that signals end after the next step."""
        self.classes, self.events, self.wandb = classes, None, None
        if self.checkpoint and self.checkpoint.get('classes', classes) != classes:
            raise UserError(f'--resume: {self.source} knows other classes than the pictures have')
        if rank():
            return self
        self.wandb = self._start_wandb() if self.opt.wandb else None
        try:
            self._make_folder()
        except BaseException:
            self._leave()
            raise
        log(f'{self.folder}: tensorboard --logdir output')
        return self

    def _make_folder(self):
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take()
            if self._stamp() != self.seen:
                raise UserError(f'{self.folder}: another process has written this run while this one was starting')
            overwritten = ('*.ckpt', 'events.out.tfevents.*', 'views.png', 'log.txt') if self.checkpoint is None else ()
            for pattern in ('*.partial', *overwritten):                 # what a killed or an overwritten run left
                for file in self.folder.glob(pattern):
                    file.unlink()
            lines = self.folder / 'log.txt'
            replace_file(lines, lines.read_bytes() if lines.is_file() else b'')
            values = {name: 'inf' if value == math.inf else value for name, value in plain(vars(self.opt)).items()}
            replace_file(self.folder / 'options.json', (json.dumps(values, indent=2) + '\n').encode())
            log.open(lines)
            from tensorboard_logger import tensorboard_logger
            for _ in range(20):                                         # files are named by the second
                if any(self.folder.glob(f'events.out.tfevents.{int(time.time())}.*')):
                    time.sleep(0.1)
            self.events = tensorboard_logger.Logger(str(self.folder), flush_secs=2)

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
        # The kept one first: a run that is killed between the two writes it again when it resumes.
        kept = [f'ckpt_epoch_{epoch}.ckpt'] if epoch % self.opt.save_freq == 0 else []
        self._write([*kept, 'last.ckpt'], epoch, 0, model, optimizer, {})
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
            check_locks()
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
            replace_file(self.folder / f'{tag}.png', buffer.getvalue())
        from tensorboard_logger import tensorboard_logger
        summary = tensorboard_logger.summary_pb2.Summary()
        image = summary.Image(encoded_image_string=buffer.getvalue(), height=picture.shape[0], width=picture.shape[1])
        summary.value.add(tag=tag, image=image)
        with writing(self.folder):
            self.events._log_summary(tag, summary, None, step)
        if self.wandb:
            import wandb
            self.wandb.log({tag: wandb.Image(picture)}, step=step, commit=True)
