"""Contrastive pretraining: SupCon, SimCLR and GenSCL.

    python main_supcon.py --batch_size 1024 --learning_rate 0.5 --temp 0.1 --cosine                     SupCon
    python main_supcon.py --batch_size 1024 --learning_rate 0.5 --temp 0.5 --cosine --method SimCLR     SimCLR
    python main_supcon.py --method GenSCL --mix mixup_cutmix --KD --teacher_path output/teacher/trial=0  GenSCL
    python main_supcon.py --dataset path --data_folder ./pictures                                       own pictures

Uses all GPUs in CUDA_VISIBLE_DEVICES, or the CPU; in several processes: torchrun --nproc_per_node 8 main_supcon.py ...
Writes output/<run>/trial=<trial>/last.ckpt for main_linear.py.
"""
if __name__ == '__main__':                      # the imports below take seconds, --help and Ctrl-C should not
    from util.options import answer_early
    answer_early('main_supcon', __doc__)

import math
import time

import torch
from torch.nn import functional as F

import util
from datasets import evaluation_view, load_pictures, make_loader, pretraining_view
from datasets.mixing import mix_views
from losses import GenSupConLoss, SupConLoss, contrastive_accuracy
from networks.moco import MomentumContrast
from networks.resnet_big import SupConResNet
from util import AverageMeter, log

N_VIEWS = 2


def parse_option(argv=None):
    opt = util.parse('main_supcon', __doc__, argv)
    if opt.method == 'GenSCL':
        name = (f'{opt.dataset}_bsz_{opt.batch_size}_' + 'cutout_' * opt.cutout
                + f'{opt.mix}_{opt.mix_alpha}_' * bool(opt.mix) + f'KD_{opt.KD_alpha}_' * opt.KD
                + f"{'LARS' if opt.LARS else opt.optim_kind}_lr_{opt.learning_rate}"
                + util.name_suffix('main_supcon', opt, ('mix',)))
    else:
        name = (f'{opt.method}_{opt.dataset}_{opt.model}_lr_{opt.learning_rate}_decay_{opt.weight_decay}_bsz_'
                f'{opt.batch_size}_temp_{opt.temp}_trial_{opt.trial}' + '_cosine' * opt.cosine + '_warm' * opt.warm
                + util.name_suffix('main_supcon', opt, ('model',)))
    opt.output_name = opt.output_name or name
    return opt


def set_loader(opt):
    """Training batches of two views, and both sets as they are for the kNN accuracy; also the classes."""
    data = load_pictures(opt)
    if opt.denominator_mode == 'only_negatives' and opt.method == 'SupCon' and len(data.train.classes) == 1:
        raise util.UserError('--denominator_mode only_negatives: pictures of one class have no negatives')
    train = data.train.join(data.ood) if opt.aug_mode == 'with_both' else data.train        # with hard negatives
    train_loader = make_loader(train, pretraining_view(opt), opt, N_VIEWS)
    memory_loader, val_loader = (make_loader(part, evaluation_view(opt), opt, train=False)
                                 for part in (data.train, data.val))
    return train_loader, memory_loader, val_loader, data.train.classes


def set_model(opt, classes, teacher_checkpoint=None):
    """The network, with its momentum copy if there is one, the loss, and the teacher of --KD or None."""
    opt.num_classes = len(classes)
    if opt.model.startswith('timm/'):
        log(f'--model {opt.model}: starts from random weights')
    model = SupConResNet(opt.model, opt.head, opt.feat_dim, num_classes=len(classes) if opt.ce_weight else 0,
                         head_bn=opt.head_bn, normalize_embedding=opt.normalize_embedding, size=opt.size, stem=opt.stem,
                         width=opt.width, zero_init=opt.zero_init)
    if opt.moco:
        model.moco = MomentumContrast(model, opt.moco_k, opt.moco_m)
    settings = {'temperature': opt.temp, 'contrast_mode': opt.contrast_mode, 'base_temperature': opt.base_temperature}
    if opt.method == 'GenSCL':
        criterion = GenSupConLoss(**settings)
    else:
        criterion = SupConLoss(**settings, summation_location=opt.summation_location,
                               denominator_mode=opt.denominator_mode, positives_cap=opt.positives_cap)
    teacher = util.load_teacher(teacher_checkpoint, opt, classes) if opt.KD else None
    return util.prepare(model, opt), criterion, teacher


def soft_labels(images, labels, teacher, opt, rng):
    """GenSCL: mix each view of a batch on its own and ask the teacher, if there is one, about the mixed views.

    images [n_views * bsz, 3, size, size], labels [bsz] -> mixed images, and what to learn from: a list of
    (weight, label distributions [n_views, bsz, num_classes]).
    """
    mixed = F.one_hot(labels, opt.num_classes).float()
    if opt.mix:
        images, mixed = mix_views(images, mixed, N_VIEWS, opt.mix, opt.mix_alpha, rng)
    else:
        mixed = mixed.repeat(N_VIEWS, 1)
    targets = [(1., mixed)]
    if teacher is not None:
        pieces = [piece for piece in images.tensor_split(opt.accum_steps) if len(piece)]
        logits = torch.cat([teacher(piece) for piece in pieces]) if pieces else images.new_zeros(0, opt.num_classes)
        taught = (logits.float() / opt.KD_temp).softmax(1)
        targets = [(1., taught)] if opt.KD_alpha == math.inf else [*targets, (opt.KD_alpha, taught)]
    return images, [(weight, soft.unflatten(0, (N_VIEWS, len(labels)))) for weight, soft in targets]


def momentum_keys(images, labels, model, opt, rng):
    """Keys of the second views by the moved momentum copy, with those of the queue: what SupConLoss takes.

    images [bsz, 3, size, size], labels [bsz]; -> also the keys [bsz, feat_dim] of these pictures. The pictures of all
    processes are shuffled, so that a batch norm of a piece, of a GPU or of a process does not tell which keys and
    anchors belong together (He et al., 2020, section 3.3).
    """
    model.moco.update(model)
    sizes = util.sizes_of(len(images))
    order = torch.from_numpy(rng.permutation(sum(sizes)))
    shuffled = util.exchanged(images, order, sizes)
    with util.autocast(opt, images):
        keys = torch.cat([model.moco(piece.flatten(0, 1)) for piece in util.pieces_of(shuffled, opt)])
    keys = util.gather(keys, sizes)[util.moved(order.argsort(), keys.device)]
    labels = util.gather(labels, sizes)
    contrasts, contrast_labels = model.moco.contrasts(keys, labels)
    model.moco.enqueue(keys, labels)
    return {'keys': contrasts, 'key_labels': contrast_labels}, keys[util.share(sum(sizes))]


def contrastive_loss(criterion, features, targets):
    """The loss of features [bsz, n_views, feat_dim] for what SupConLoss takes with them, or what soft_labels gives."""
    if isinstance(targets, dict):
        return criterion(features, **targets)
    return sum(weight * criterion(features.unbind(1), soft.unbind(0)) for weight, soft in targets)


def classifier_loss(logits, labels, n_views):
    """Cross-entropy of logits [n_views * bsz, C] for labels [bsz] or distributions [bsz, n_views, C]; ood pictures do
    not count."""
    if labels.dim() == 3:
        return util.mean(F.cross_entropy(logits, labels.transpose(0, 1).flatten(0, 1), reduction='none'))
    labels = labels.repeat(n_views)
    return util.mean(F.cross_entropy(logits, labels.clamp(min=0), reduction='none'), labels >= 0)


def collapsed_loss(criterion, features, targets):
    """The loss if all features were the same."""
    if isinstance(targets, dict) and 'keys' in targets:
        targets = {**targets, 'keys': torch.ones_like(targets['keys'][:, :1])}
    return contrastive_loss(criterion, torch.ones_like(features[..., :1]).detach(), targets)


def train(train_loader, model, criterion, optimizer, epoch, opt, run, teacher=None):
    """One epoch, or the rest of one that is resumed: -> averages for TensorBoard."""
    model.train()
    batch_time, data_time = AverageMeter(), AverageMeter()
    meters = run.meters('loss', 'contrastive_acc', 'collapsed')
    losses, accuracies, collapsed = meters.values()
    steps, before = len(train_loader), losses.count
    end = start = time.time()
    for idx, (images, labels) in enumerate(util.progress(train_loader, f'epoch {epoch}/{opt.epochs}'), run.step):
        data_time.update(time.time() - end)
        util.set_learning_rate(optimizer, util.learning_rate(opt, epoch, idx, steps))
        rng = util.seed_step(opt, epoch, idx)
        bsz, n_views = len(labels), N_VIEWS             # a label -(c + 1) is a hard negative made from class c
        pictures = train_loader.sizes[idx]              # of all processes
        positives = 'picture' if opt.method == 'SimCLR' else 'class'

        if opt.method == 'GenSCL':
            images, targets = soft_labels(images, labels, teacher, opt, rng)
            labels = targets[0][1].transpose(0, 1)      # [bsz, n_views, num_classes]
        else:
            targets = {'labels': labels, 'positives': positives}
        if opt.moco:
            contrasts, keys = momentum_keys(images[bsz:], labels, model, opt, rng)
            targets.update(contrasts)
            images, n_views = images[:bsz], 1

        output, backward = util.forward(model, images, opt, n_views)        # [n_views * bsz, feat_dim]
        features, logits = output if opt.ce_weight else (output, None)
        features = features.unflatten(0, (n_views, bsz)).transpose(0, 1)    # [bsz, n_views, feat_dim]
        loss = contrastive = contrastive_loss(criterion, features, targets)
        if opt.ce_weight:
            loss = loss + opt.ce_weight * classifier_loss(logits.float(), labels, n_views)
        util.update(loss, optimizer, backward)

        losses.update(loss, pictures)
        if opt.moco:                                    # the keys of the same pictures are their other views
            features = torch.stack([features[:, 0], keys], 1)
        accuracies.update(contrastive_accuracy(features, labels, positives), pictures)
        batch_time.update(time.time() - end)
        end = time.time()
        if (idx + 1) % opt.print_freq == 0 or idx + 1 == steps:
            util.check_finite(losses, epoch, idx + 1)
            if_collapsed = collapsed_loss(criterion, features[:, :n_views], targets)
            collapsed.update(((contrastive.detach() - if_collapsed).abs() <= 1e-4 * if_collapsed.abs()).float())
            log(f'Train: [{epoch}][{idx + 1}/{steps}]\tBT {batch_time.val:.3f} ({batch_time.avg:.3f})\t'
                f'DT {data_time.val:.3f} ({data_time.avg:.3f})\tloss {losses.val:.3f} ({losses.avg:.3f})')
        run.after_step(epoch, idx + 1, model, optimizer, meters)
    log(f'epoch {epoch}, total time {time.time() - start:.2f}')
    return {'loss': losses.avg, 'contrastive_acc': accuracies.avg,
            'collapsed': collapsed.avg == 1,                # always the loss that equal features would have
            'pictures_per_second': (losses.count - before) / max(time.time() - start, 1e-9)}


def validate(memory_loader, val_loader, model, opt):
    """Accuracy (%) of a kNN classifier on the encoder's features: whether pretraining learns, without a classifier."""
    memory, memory_labels = util.forward_all(model.encoder, memory_loader, opt)
    features, labels = util.forward_all(model.encoder, val_loader, opt)
    return util.knn_accuracy(memory, memory_labels, features, labels)


def main(argv=None):
    opt = parse_option(argv)
    run = util.Run(opt)
    util.set_device(opt)
    util.set_warmup(opt)
    teacher_checkpoint = util.read_teacher(opt)
    train_loader, memory_loader, val_loader, classes = set_loader(opt)
    model, criterion, teacher = set_model(opt, classes, teacher_checkpoint)
    optimizer = util.set_optimizer(opt, model)
    first_epoch, warned = run.restore(model, optimizer), False
    with run.start(classes):
        for epoch in range(first_epoch, opt.epochs + 1):
            train_loader.set_epoch(epoch, run.step)
            if epoch == 1 and not run.step:
                run.log_views(train_loader)
            averages = train(train_loader, model, criterion, optimizer, epoch, opt, run, teacher)
            if averages.pop('collapsed') and not warned:
                warned = True
                log(f"Warning: in all printed steps of epoch {epoch} the loss was {averages['loss']:.3f}, its value "
                    'when all features are the same: the network has collapsed and learns nothing. Start again with '
                    '--warm or a lower --learning_rate.')
            if epoch == opt.epochs or opt.eval_freq and epoch % opt.eval_freq == 0:
                averages['knn_acc'] = validate(memory_loader, val_loader, model, opt)
                log(f" * contrastive accuracy {averages['contrastive_acc']:.2f}\t"
                    f"kNN accuracy {averages['knn_acc']:.2f}")
            run.log_values({'learning_rate': optimizer.param_groups[0]['lr'], **averages}, epoch)
            run.save(epoch, model, optimizer)
        if first_epoch > opt.epochs:                            # a finished run, resumed
            log(f' * kNN accuracy {validate(memory_loader, val_loader, model, opt):.2f}')


if __name__ == '__main__':
    util.run(main)
