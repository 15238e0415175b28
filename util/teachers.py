"""Teachers: frozen classifiers whose class probabilities a student learns from (--KD)."""
import argparse
from pathlib import Path

import torch
from torch import nn

from networks.resnet_big import LinearProbe, SupCEResNet, make_encoder, mixed_precision
from util.options import UserError
from util.runs import check_recorded, load_parameters, log, read_checkpoint
from util.training import precision, spread


class Teacher(nn.Module):
    """A frozen classifier in eval mode: pictures [n, 3, size, size] -> logits [n, num_classes], without gradient.

    mean and std of the channels are those it was trained with, student_mean and student_std those of the pictures.
    Set `precision` to a dtype to compute in mixed precision.
    """

    def __init__(self, classifier, mean, std, student_mean, student_std):
        super().__init__()
        self.classifier, self.precision = classifier.requires_grad_(False), None
        mean, std, student_mean, student_std = (torch.tensor(values, dtype=torch.float32)[:, None, None]
                                                for values in (mean, std, student_mean, student_std))
        self.register_buffer('scale', student_std / std)
        self.register_buffer('offset', (student_mean - mean) / std)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, images):
        with mixed_precision(images, self.precision):
            return self.classifier(images * self.scale + self.offset)


def load_teacher(opt, classes):
    """The teacher of --teacher_path for pictures of these classes, on opt.device, spread over the GPUs.

    A checkpoint of main_ce.py or main_linear.py tells what network it holds; any other must hold the parameters of
    timm's --teacher_kind under 'state_dict', with the stem of --stem, trained on pictures with the statistics of this
    run. Raises UserError where it does not fit.
    """
    file = _find(opt)
    checkpoint, state = read_checkpoint(file, ['model', 'state_dict'])
    recorded = checkpoint.get('opt') or {}
    recorded = vars(recorded) if isinstance(recorded, argparse.Namespace) else recorded
    if 'model' in checkpoint and recorded:
        recorded = check_recorded(recorded, file)
        kind, classifier, fc = _ours(recorded, state, len(classes), opt)
    else:
        from networks.timm_encoder import timm_model  # here, since timm takes seconds to import
        recorded, kind = {}, f'timm/{opt.teacher_kind}'
        classifier = timm_model(opt.teacher_kind, len(classes), opt.stem, opt.size)
        fc = f"{classifier.default_cfg.get('classifier')}.weight"
        if fc not in classifier.state_dict():               # a few models have several classifiers
            fc = None
    if fc and fc not in state:
        raise UserError(f'{file} holds no classifier of {kind}: {fc} is missing')
    if fc and len(state[fc]) != len(classes):
        raise UserError(f'{file}: the teacher knows {len(state[fc])} classes, the pictures have {len(classes)}')
    if list(checkpoint.get('classes') or classes) != list(classes):
        raise UserError(f'{file}: the teacher knows other classes, or in another order: '
                        f"{_names(checkpoint['classes'])}, expected {_names(classes)}")
    load_parameters(classifier, state, file)
    log(f"{file}: {kind} as teacher")
    teacher = Teacher(classifier, recorded.get('mean') or opt.mean, recorded.get('std') or opt.std, opt.mean, opt.std)
    # It learns nothing, so reduced precision costs only the rounding of its logits; a GPU is much faster with it.
    teacher.precision = precision(opt, opt.amp or opt.device == 'cuda')
    return spread(teacher.to(opt.device), opt)


def _find(opt):
    folder = Path(opt.teacher_path)
    names = [opt.teacher_ckpt] if opt.teacher_ckpt else ['ckpt_best.pth', 'last.ckpt']      # GenSCL's name, ours
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = 'no such folder' if not folder.is_dir() else f'no {" or ".join(names)} in it'
    raise UserError(f"--teacher_path {folder}: {found}, expected the folder of the teacher's checkpoint")


def _ours(recorded, state, num_classes, opt):
    """The network of a checkpoint of main_ce.py or main_linear.py, with the names of it and of its last weights."""
    name = recorded.get('model', 'resnet50')
    settings = {'size': opt.size, 'stem': recorded.get('stem', 'cifar'), 'width': recorded.get('width', 1.)}
    if 'classifier.fc.weight' in state:
        return name, LinearProbe(make_encoder(name, **settings), num_classes), 'classifier.fc.weight'
    return name, SupCEResNet(name, num_classes, **settings), 'fc.weight'


def _names(classes):
    return ', '.join(map(str, classes[:5])) + ', ...' * (len(classes) > 5)
