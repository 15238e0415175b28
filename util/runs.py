"""Runs: their checkpoints and logs, what surrounds their training steps, and how they stop and resume.

output/<output_name>/trial=<trial>/ holds options.json, log.txt, TensorBoard events, views.png, confusion.png,
last.ckpt and ckpt_epoch_<N>.ckpt. Of several processes only rank 0 prints and writes.
"""
import json
import math
import reprlib
import signal
import time
from pathlib import Path

import torch

from networks.sync_bn import average_statistics
from util import checkpoints
from util.curves import Curves, grid_of_views
from util.distributed import all_max, all_sizes, rank, training_on
from util.errors import UserError
from util.files import FolderLock, check_locks, replace_file, writing
from util.log import log, progress
from util.metrics import AverageMeter
from util.options import EVALUATION, PROGRAMS, program_defaults
from util.signals import StopSignals
from util.training import learning_rate, seed_step, set_learning_rate

# Options that may differ when a run resumes; the others decide what the run computes.
RESUME_MAY_CHANGE = {
    'epochs', 'warm_epochs', 'num_workers', 'print_freq', 'save_freq', 'save_steps', 'keep_ckpts', 'eval_freq',
    'per_class', 'resume', 'force', 'overwrite', 'device', 'data_folder', 'aug_root', 'cache_dir', 'loader_chosen',
    'output_name', 'trial', 'debug', 'wandb', 'wandb_entity', 'wandb_project', 'num_classes',
    'class_sizes', 'evaluate', 'export'}

# Options that decide what the optimizer keeps, of which parameters.
OPTIMIZER = {'optim_kind', 'LARS', 'momentum', 'no_bias_decay', 'encoder_lr', 'finetune', 'freeze_bn'}

DEFAULTS = {name: value for program in PROGRAMS for name, value in program_defaults(program).items()}

DIVERGED = 'expected a finite number: try a lower --learning_rate or --warm'
CACHED_SECONDS = 10                     # at least, between two checkpoints with --cache_features


def plain(values):
    """A dict of options with lists for tuples, as a file gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def shortened(value):
    """A recorded option's value as a text that cannot be endless."""
    return value[:200] if isinstance(value, str) else reprlib.repr(value)


def run_folder(name, trial):
    """Where a run is written; `/` in a name is from --model timm/<name>."""
    return Path('output') / name.replace('/', '-') / f'trial={trial}'


class Run:
    """One run: what it has written, and what it writes while it trains.

        run = Run(opt)
        first_epoch = run.restore(model, optimizer, scaler)
        with run.start(classes):
            for epoch in range(first_epoch, opt.epochs + 1):
                for images, labels, rng in run.steps(loader, epoch):
                    ...
                    run.record(loss=loss)
                run.finish_epoch(epoch, run.averages())

    Constructing it only looks; `start` makes the folder. So every mistake that can be found is found before anything is
    written. Raises UserError where the folder holds another run, without --resume or --overwrite.

    All random numbers of a step follow from --seed, epoch and step (`seed_step`, `Batches.generator`), so a checkpoint
    needs no random states, and a run may resume with another number of processes.
    """

    def __init__(self, opt):
        self.opt = opt
        self.folder = run_folder(opt.output_name, opt.trial)
        self.last = self.folder / 'last.ckpt'
        self.lock, self.signals, self.writer = FolderLock(self.folder), StopSignals(), checkpoints.Writer()
        self.curves = self.checkpoint = None            # made by `start`; the one to resume or evaluate
        self.step, self.saved_meters = 0, {}            # where in its epoch a run resumes, and the averages until there
        self.best_acc, self.collapsed = 0., False
        self.last_write = -math.inf                     # seconds
        self.stamp = self._stamp_of_last()
        try:
            used = self.folder.exists() and any(file.name != '.lock' for file in self.folder.iterdir())
            if getattr(opt, 'evaluate', False):
                self.source = self.last
                self.checkpoint = checkpoints.load_checkpoint(self.last)
            elif opt.resume:
                self.checkpoint = self._checkpoint_to_resume(used)
            elif used and not opt.overwrite:
                raise UserError(f'{self.folder} holds another run, expected --resume to continue it, --overwrite to '
                                'restart, or another --trial or --output_name')
            if (self.folder / '.lock').exists() and not getattr(opt, 'evaluate', False):
                self.lock.acquire()
                self.lock.release()
        except OSError as error:
            raise UserError(f'{self.folder}: not a folder of a run ({error})') from error
        if self.checkpoint and self.checkpoint['opt'].get('dataset') == opt.dataset:
            opt.split_seed = self.checkpoint['opt'].get('split_seed', opt.split_seed)   # it holds out the same images

    def _stamp_of_last(self):
        """What changes when last.ckpt is written: its inode and time; None where there is none."""
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
            checkpoint = checkpoints.load_checkpoint(self.source)
        except UserError as error:
            valid = checkpoints.newest_valid_checkpoint(self.folder)
            advice = f'; the newest valid checkpoint is {valid}: continue with --resume {valid}' if valid else ''
            raise UserError(f'--resume: {error}{advice}') from error
        self.opt.loader_chosen = checkpoint['opt'].get('loader_chosen')         # it decides how views are sampled
        return checkpoint

    def restore(self, model, optimizer, scaler):
        """Load the checkpoint into model, optimizer and scaler, if the run resumes: -> the epoch to continue with."""
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        epoch = 0
        if self.checkpoint is not None:
            changed = self._changed_options(vars(self.opt).keys() - RESUME_MAY_CHANGE)
            if changed:
                message = f"--resume: {self.source} was started with other options: {'; '.join(changed)}"
                if not self.opt.force:
                    raise UserError(f'{message}; expected the same, or --force')
                log(message)
            before = self.checkpoint['opt'].get('epochs')
            if self.opt.cosine and before not in (None, self.opt.epochs):
                log(f'--epochs {self.opt.epochs}, was {before}: the learning rate goes on with the cosine of '
                    f'{self.opt.epochs} epochs')
            epoch = self._load_state()
            self._keep_warmup(epoch)
            if changed and self.step:                   # its steps may have other batches now
                log(f'--force: epoch {epoch + 1} begins again')
                self.step, self.saved_meters = 0, {}
        if len(set(all_sizes(epoch))) > 1 or len(set(all_sizes(self.step))) > 1:
            raise UserError('--resume: the processes see different checkpoints, expected output/ on a file system that '
                            'all machines share')
        started = epoch + (self.step > 0)
        if started > self.opt.epochs:
            raise UserError(f'--resume: {self.source} has {started} epochs, expected --epochs of at least that')
        return epoch + 1

    def _check_encoder(self, encoder):
        """UserError where the checkpoint was trained on another encoder than this frozen one, which it replaces."""
        if self.checkpoint['opt'].get('finetune'):      # with --force
            return
        for name, value in checkpoints.strip_wrappers(encoder.state_dict()).items():
            saved = self.checkpoint['model'].get(f'encoder.{name}')
            # What does not fit at all, `_load_state` reports.
            fits = torch.is_tensor(saved) and saved.shape == value.shape
            if fits and not torch.equal(saved, value.to(saved.device, saved.dtype)):
                raise UserError(f'--resume: {self.source} was trained on another encoder than that of '
                                f'{self.opt.ckpt}, expected the same, --overwrite to restart, or another --trial')

    def _keep_warmup(self, epoch):
        """A run of more epochs, whose warm-up would be longer, does not warm up again."""
        recorded, now = self.checkpoint['opt'], self.opt.warm_epochs
        before = recorded.get('warm_epochs')
        if recorded.get('warm') and self.opt.warm and isinstance(before, int) and before != now:
            ended = epoch >= before
            log(f'--warm_epochs {now}, was {before}: the warm-up '
                + ('has ended' if ended else f'goes on as one of {now} epochs'))
            self.opt.warm_epochs = before if ended else now

    def _load_state(self):
        try:
            saved = {name: checkpoints.plain_values(self.checkpoint[name], tensors=name == 'optimizer')
                     for name in ('epoch', 'step', 'best_acc', 'meters', 'optimizer', 'scaler', 'wandb')
                     if name in self.checkpoint}
            epoch = checkpoints.whole_number(saved['epoch'], 'epoch')
            self.step = checkpoints.whole_number(saved.get('step', 0), 'step')
            self.best_acc = float(saved['best_acc'])
            self.saved_meters = {name: (float(total), checkpoints.whole_number(count, name))
                                 for name, (total, count) in saved.get('meters', {}).items()}
            totals = [total for total, _ in self.saved_meters.values()]
            if not 0 <= self.best_acc <= 100 or not all(map(math.isfinite, totals)):
                raise ValueError(f'best_acc {self.best_acc}, meters {totals}')
            if not isinstance(saved.get('wandb'), (str, type(None))) or not self.checkpoint['opt']:
                raise TypeError('wandb is no text, or the options are missing')
            needed = ['loss', 'contrastive_acc'] if hasattr(self.opt, 'temp') else ['train_loss', 'train_acc']
            if self.step and list(self.saved_meters)[:2] != needed:     # as `record` gets them
                raise ValueError(f'the averages of its {self.step} steps are {reprlib.repr(list(self.saved_meters))}, '
                                 f'expected first {needed}')
            if not isinstance(saved['optimizer'], dict):
                raise TypeError('the optimizer has no state')
            if not getattr(self.model, 'finetune', True):
                self._check_encoder(self.model.encoder)
            checkpoints.load_parameters(self.model, self.checkpoint['model'], f'--resume: {self.source}')
            scaler = saved.get('scaler') or {}
            checkpoints.load_scaler(self.scaler, scaler)
            # The first steps of float16 may all have been skipped; not every parameter of timm's has gradients.
            started = bool((epoch or self.step) and (saved['optimizer']['state'] or not scaler))
            optional = {parameter for name, parameter in self.model.named_parameters() if 'backbone.' in name}
            try:
                checkpoints.load_optimizer(self.optimizer, saved['optimizer'], started, optional)
            except Exception as error:
                if changed := self._changed_options(OPTIMIZER):
                    raise UserError(f'--force: the optimizer of {self.source} cannot continue with '
                                    f"{'; '.join(changed)} ({error!s:.200}), expected the same") from error
                raise
        except UserError:
            raise
        except Exception as error:                      # what is missing or of another kind can raise anything
            raise UserError(f'--resume: {self.source} is no valid checkpoint of a run ({error!r:.300})') from error
        del self.checkpoint['model'], self.checkpoint['optimizer']      # their memory is not needed twice
        return epoch

    def load(self, model, classes):
        """Load the parameters of last.ckpt into the model, to evaluate it on images of these classes."""
        if changed := self._changed_options(EVALUATION):
            log(f"--evaluate: not as in {self.last}: {'; '.join(changed)}")
        if self.checkpoint.get('classes', classes) != classes:
            raise UserError(f'--evaluate: {self.last} has other classes than the images')
        checkpoints.load_parameters(model, self.checkpoint['model'], str(self.last))

    def _changed_options(self, names):
        """Those of the options `names` that are not as in the checkpoint. One that it lacks, since it is older than the
        option, was at its default."""
        before, now = {**DEFAULTS, **plain(self.checkpoint['opt'])}, plain(vars(self.opt))
        return [f'--{name} {now[name]}, was {shortened(before.get(name))}' for name in now
                if name in names and (before.get(name) or None) != (now[name] or None)]

    def start(self, classes):
        """Make the folder and what is in it: -> this run, as a context that signals end after the next step."""
        self.classes = classes
        if self.checkpoint and self.checkpoint.get('classes', classes) != classes:
            raise UserError(f'--resume: {self.source} has other classes than the images')
        if rank() == 0:
            try:
                self._make_folder()
            except BaseException:
                self.lock.release()
                raise
            log(f'{self.folder}: tensorboard --logdir output')
        return self

    def _make_folder(self):
        options = {name: 'inf' if value == math.inf else value for name, value in plain(vars(self.opt)).items()}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            if self._stamp_of_last() != self.stamp:
                raise UserError(f'{self.folder}: another process has written this run while this one was starting')
            overwritten = ('*.ckpt', 'events.out.tfevents.*', '*.png', 'log.txt') if self.checkpoint is None else ()
            for pattern in ('*.partial', *overwritten):                 # what a killed or an overwritten run left
                for file in self.folder.glob(pattern):
                    file.unlink()
            lines = self.folder / 'log.txt'
            replace_file(lines, lines.read_bytes() if lines.is_file() else b'')
            replace_file(self.folder / 'options.json', (json.dumps(options, indent=2) + '\n').encode())
            log.open(lines)
        self.curves = Curves(self.folder, self.opt, plain(vars(self.opt)), (self.checkpoint or {}).get('wandb'))

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, *error):
        try:
            self.writer.finish()
        except UserError:
            if error[0] is None:                        # else there is an earlier one
                raise
        finally:
            self.signals.__exit__(*error)
            self.lock.release()

    def steps(self, loader, epoch):
        """The batches of an epoch, or the rest of one that is resumed, with all that surrounds a training step: yields
        (images, labels, rng), rng a NumPy generator in the same state in all processes.

        Before each step: its learning rate and random numbers. After each: every --print_freq steps a line with what
        `record` got; last.ckpt every --save_steps; the end after a signal. Raises UserError where the loss is not
        finite.
        """
        opt, steps = self.opt, len(loader)
        loader.set_epoch(epoch, self.step)
        if epoch == 1 and not self.step and self.curves:
            self._log_views(loader)
        self.meters = {name: AverageMeter(*saved) for name, saved in self.saved_meters.items()}
        self.saved_meters = {}
        self.images = sum(loader.batch_sizes[self.step:])
        batch_time, data_time = AverageMeter(), AverageMeter()
        self.waited, self.started, end = 0., time.time(), time.time()
        batches = iter(loader)
        for step in progress(range(self.step, steps), f'epoch {epoch}/{opt.epochs}'):
            batch = next(batches)
            data_time.update(time.time() - end)
            self.waited += data_time.val
            set_learning_rate(self.optimizer, learning_rate(opt, epoch, step, steps))
            self.batch_size = loader.batch_sizes[step]
            with training_on(self.batch_size):          # not in what the loader computes in between
                yield *batch, seed_step(opt, epoch, step)
            del batch                                   # its memory is needed for the next one
            batch_time.update(time.time() - end)
            end = time.time()
            if (step + 1) % opt.print_freq == 0 or step + 1 == steps:
                self._print_step(epoch, step + 1, steps, batch_time, data_time)
            self._after_step(epoch, step + 1)
        next(batches, None)                             # the loader's own end

    def record(self, **values):
        """Average values of a step, weighted with the images of its batch; the first is the loss. None is left out."""
        for name, value in values.items():
            if value is None:
                continue
            self.meters.setdefault(name, AverageMeter()).update(value, self.batch_size)

    def averages(self):
        """The averages of an epoch, {name: number}, with images_per_second and loader_fraction, the fraction of time in
        which the loop waited for the loader."""
        averages = {name: meter.avg for name, meter in self.meters.items()}
        self.seconds = time.time() - self.started
        return {**averages, 'images_per_second': self.images / max(self.seconds, 1e-9),
                'loader_fraction': self.waited / max(self.seconds, 1e-9)}

    def warn_if_collapsed(self, epoch, averages):
        """Log a warning, once, where the averages of an epoch say that all features are the same."""
        # A checkpoint of an earlier version, resumed at the end of an epoch, has no feature_spread.
        if averages.get('feature_spread', 1.) < 1e-4 and not self.collapsed:
            self.collapsed = True
            log(f"Warning: in epoch {epoch} the loss was {averages['loss']:.3f}, its value when all features are the "
                'same: the network has collapsed and learns nothing. Start again with --warm or a lower '
                '--learning_rate.')

    def _print_step(self, epoch, step, steps, batch_time, data_time):
        self._check_finite(epoch, step)
        losses = next(iter(self.meters.values()))
        line = (f'Train: [{epoch}][{step}/{steps}]\tBT {batch_time.val:.3f} ({batch_time.avg:.3f})\t'
                f'DT {data_time.val:.3f} ({data_time.avg:.3f})\tloss {losses.val:.3f} ({losses.avg:.3f})')
        if 'train_acc' in self.meters:
            line += f"\tAcc@1 {self.meters['train_acc'].val:.3f} ({self.meters['train_acc'].avg:.3f})"
        log(line)

    def _check_finite(self, epoch, step):
        """UserError where the loss, the first value recorded, was not finite in this epoch."""
        average = next(iter(self.meters.values())).avg
        if not math.isfinite(average):
            raise UserError(f'the loss is {average} on average up to epoch {epoch}, step {step}, {DIVERGED}')

    def _after_step(self, epoch, step):
        """Save every --save_steps, and end the run after a signal."""
        stop = all_max(self.signals.number)
        if stop or self.opt.save_steps and step % self.opt.save_steps == 0:
            self._check_finite(epoch, step)
            self._write(['last.ckpt'], epoch - 1, step, self.meters)
        self._stop(stop, epoch, f'step {step} of ')

    def finish_epoch(self, epoch, values):
        """Send a dict of numbers to TensorBoard; write last.ckpt, and ckpt_epoch_<N>.ckpt every --save_freq epochs."""
        if self.curves:
            self.curves.log_values({'learning_rate': self.optimizer.param_groups[0]['lr'], **values}, epoch)
        # The kept one first: a run that is killed between the two writes it again when it resumes.
        kept = [f'ckpt_epoch_{epoch}.ckpt'] if epoch % self.opt.save_freq == 0 else []
        self.step, stop = 0, all_max(self.signals.number)
        # With cached features an epoch takes less time than to write the encoder, which does not change.
        recent = getattr(self.opt, 'cache_features', False) and time.time() - self.last_write < CACHED_SECONDS
        if kept or stop or epoch == self.opt.epochs or not recent:
            self._write([*kept, 'last.ckpt'], epoch, 0, {})
        if epoch == self.opt.epochs:
            self.writer.finish()
        self._stop(stop, epoch)

    def _stop(self, signal_number, epoch, step=''):
        if signal_number:
            self.writer.finish()
            name = signal.Signals(signal_number).name
            log(f'{name}: stopped after {step}epoch {epoch}, --resume continues from there')
            raise SystemExit(128 + signal_number)

    def _write(self, names, epoch, step, meters):
        """Checkpoints after `epoch` epochs and `step` steps of the next one, written while training continues."""
        average_statistics(self.model)
        self.last_write = time.time()
        if rank():
            return
        wandb = self.curves.wandb.id if self.curves.wandb else (self.checkpoint or {}).get('wandb')
        state = {'model': checkpoints.strip_wrappers(self.model.state_dict()), 'optimizer': self.optimizer.state_dict(),
                 'scaler': self.scaler.state_dict(), 'epoch': epoch, 'step': step, 'best_acc': self.best_acc,
                 'meters': {name: meter.state for name, meter in meters.items()}, 'opt': plain(vars(self.opt)),
                 'classes': self.classes, 'wandb': wandb}
        self.writer.submit(self._write_files, checkpoints.copy_on_host(state), names, epoch)

    def _write_files(self, state, names, epoch):
        for name, value in state['model'].items():      # the network may diverge before its loss
            if not value.isfinite().all():
                raise UserError(f'{name} is not finite in epoch {epoch + (state["step"] > 0)}, {DIVERGED}')
        for name in names:
            check_locks()
            checkpoints.write_checkpoint(state, self.folder / name)
        if self.opt.keep_ckpts and len(names) > 1:
            with writing(self.folder):
                for file in checkpoints.kept_checkpoints(self.folder, up_to=epoch)[self.opt.keep_ckpts:]:
                    file.unlink()

    def log_image(self, tag, array):
        """Send a uint8 image [h, w, 3] of the end of the run, and write it to <tag>.png."""
        if self.curves:
            self.curves.log_image(tag, array, self.opt.epochs)

    def _log_views(self, loader):
        """Show some images of the first batch, not the small crops."""
        images, labels = next(iter(loader))
        images = images[0] if isinstance(images, tuple) else images
        if images.dim() == 4:                                           # no cached features
            self.curves.log_image('views', grid_of_views(images, len(labels), self.opt), 0)
