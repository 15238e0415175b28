"""Teachers: frozen classifiers whose class probabilities a student learns from (--KD)."""
import os
from pathlib import Path

import torch
from torch import nn

from networks.precision import mixed_precision
from networks.resnet_big import LinearProbe, SupCEResNet, make_encoder
from util.checkpoints import check_parameters, check_recorded, load_parameters, read_checkpoint
from util.errors import UserError
from util.log import log
from util.training import compiled, data_parallel, forward_all, precision
from util.weights import hold_out_same_images


class Teacher(nn.Module):
    """A frozen classifier in eval mode: images [n, 3, size, size] -> logits [n, num_classes], without gradient.

    mean and std of the channels are those it was trained with, student_mean and student_std those of the images.
    Set `precision` to a dtype to compute in mixed precision.
    """

    def __init__(self, classifier, mean, std, student_mean, student_std):
        super().__init__()
        self.classifier, self.precision, self.num_classes = classifier.requires_grad_(False), None, 0
        mean, std, student_mean, student_std = (torch.tensor(values, dtype=torch.float32)[:, None, None]
                                                for values in (mean, std, student_mean, student_std))
        self.register_buffer('scale', student_std / std)
        self.register_buffer('offset', (student_mean - mean) / std)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, images):
        if len(images) == 0:                            # of a process without images; not every model takes it
            return images.new_zeros(0, self.num_classes)
        with mixed_precision(images, self.precision):
            images = images.contiguous(memory_format=torch.channels_last)       # as its parameters, in replicas too
            return self.classifier(images * self.scale + self.offset)


def read_teacher(opt):
    """The checkpoint in --teacher_path, checked as far as it can be alone; None without --KD.

    The student holds out the same images (`hold_out_same_images`). Raises UserError.
    """
    if not opt.KD:
        return None
    folder = Path(opt.teacher_path)
    names = [opt.teacher_ckpt] if opt.teacher_ckpt else ['ckpt_best.pth', 'last.ckpt']      # GenSCL's name, ours
    file = next((folder / name for name in names if os.path.isfile(folder / name)), None)
    if file is None:
        found = 'no such folder' if not os.path.isdir(folder) else f'no {" or ".join(names)} in it'
        raise UserError(f"--teacher_path {folder}: {found}, expected the folder of the teacher's checkpoint")
    checkpoint, state = read_checkpoint(file, ['model', 'state_dict'])
    if 'model' not in checkpoint:                       # another program's, of which only the classes matter
        checkpoint = {'classes': checkpoint.get('classes')}
    recorded = check_recorded(checkpoint, file)
    hold_out_same_images(recorded, opt, f'--teacher_path {folder}')
    return {'file': file, 'opt': recorded, 'model': state, 'classes': checkpoint.get('classes')}


def load_teacher(checkpoint, opt, classes, loader):
    """The teacher of read_teacher's checkpoint for images of these classes, on opt.device, spread over the GPUs; its
    accuracy on some views of the training loader is reported.

    Raises UserError as load_classifier.
    """
    size = checkpoint['opt'].get('size')
    if size not in (None, opt.size):
        raise UserError(f"{checkpoint['file']}: the teacher was trained on images of {size} pixels, found --size "
                        f'{opt.size}, expected the same')
    teacher = load_classifier(checkpoint, opt, classes)
    images, labels = next(iter(loader))
    n = min(len(labels), 256)
    logits, labels = forward_all(teacher, [(images[:n], labels[:n])], opt)
    accuracy = 100 * (logits.argmax(1) == labels).float().mean().item()
    log(f"{checkpoint['file']}: {teacher.kind} as teacher, right on {accuracy:.1f} % of {len(labels)} training views")
    if accuracy < 150 / max(3, len(classes)):           # its parameters fit a network of other strides too
        log('Warning: that is little better than chance: is it of other --stem, --size, --mean or --std, or of other '
            'classes?')
    # It learns nothing, so reduced precision costs only the rounding of its logits; a GPU is much faster with it.
    teacher.precision = precision(opt, opt.amp or opt.device == 'cuda' and torch.cuda.is_bf16_supported(False))
    return data_parallel(compiled(teacher, opt), opt)


def load_classifier(checkpoint, opt, classes):
    """A frozen classifier for images of these classes, on opt.device.

    checkpoint: {'file': its name, 'opt': the options of its run or {}, 'model': its parameters, 'classes': their names
    or None}. One of main_ce.py, main_linear.py or main_supcon.py with --ce_weight records its network; any other must
    hold the parameters of timm's --teacher_kind, with the stem of --stem, trained on images with the statistics of this
    run. Raises UserError where it does not fit.
    """
    file, recorded, state = checkpoint['file'], checkpoint['opt'], checkpoint['model']
    if recorded:                                        # main_supcon.py's hold what its classifier does not need
        state = {name: value for name, value in state.items() if not name.startswith(('head.', 'moco.'))}
    if recorded and opt.teacher_kind:
        raise UserError(f'--teacher_kind {opt.teacher_kind}: {file} records its network, {recorded.get("model")}')
    def build():
        return _ours(recorded, state, len(classes), opt) if recorded else _timm(len(classes), opt)
    with torch.device('meta'):                          # takes no memory, however large the recorded network
        kind, classifier, fc = build()
    if fc and fc not in state:
        raise UserError(f'{file} holds no classifier of {kind}: {fc} is missing')
    known = state[fc].shape[0] if fc and state[fc].dim() else 0
    if fc and known != len(classes):
        raise UserError(f'{file}: the teacher knows {known} classes, the images have {len(classes)}')
    if checkpoint['classes'] and checkpoint['classes'] != list(classes):
        raise UserError(f'{file}: the teacher knows other classes, or in another order: '
                        f"{_names(checkpoint['classes'])}, expected {_names(classes)}")
    check_parameters(classifier, state, file)
    _, classifier, _ = build()
    load_parameters(classifier, state, file)
    teacher = Teacher(classifier, recorded.get('mean') or opt.mean, recorded.get('std') or opt.std, opt.mean, opt.std)
    _check_output(teacher, opt, len(classes), f'{file}: the teacher {kind}')
    teacher.kind, teacher.num_classes = kind, len(classes)
    return teacher.to(opt.device, memory_format=torch.channels_last)


def _ours(recorded, state, num_classes, opt):
    """The classifier in a checkpoint of these programs, with the names of its network and of its last weights."""
    name = recorded.get('model', 'resnet50')
    settings = {'size': opt.size, 'stem': recorded.get('stem', 'cifar'), 'width': recorded.get('width', 1.)}
    if 'classifier.fc.weight' in state:
        return name, LinearProbe(make_encoder(name, **settings), num_classes), 'classifier.fc.weight'
    return name, SupCEResNet(name, num_classes, **settings), 'fc.weight'


def _timm(num_classes, opt):
    from networks.timm_encoder import timm_model  # here, since timm takes seconds to import
    kind = opt.teacher_kind or 'efficientnetv2_rw_m'
    classifier = timm_model(kind, num_classes, opt.stem, opt.size)
    fc = f"{classifier.default_cfg.get('classifier')}.weight"
    return f'timm/{kind}', classifier, fc if fc in classifier.state_dict() else None        # a few have several


@torch.no_grad()
def _check_output(teacher, opt, num_classes, name):
    try:
        logits = teacher(torch.zeros(1, 3, opt.size, opt.size))
    except Exception as error:                                  # models raise anything for a wrong size
        raise UserError(f'{name} takes no images of {opt.size} pixels ({error})') from error
    if not torch.is_tensor(logits) or logits.shape != (1, num_classes) or not logits.isfinite().all():
        raise UserError(f'{name} does not give {num_classes} finite logits')


def _names(classes):
    return ', '.join([f'{name:.99}' for name in classes[:5]] + (['...'] if len(classes) > 5 else []))
