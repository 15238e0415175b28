"""Contrastive pretraining: SupCon and SimCLR.

    python main_supcon.py --batch_size 1024 --learning_rate 0.5 --temp 0.1 --cosine                     SupCon
    python main_supcon.py --batch_size 1024 --learning_rate 0.5 --temp 0.5 --cosine --method SimCLR     SimCLR
    python main_supcon.py --dataset path --data_folder ./pictures                                       own pictures

Uses all GPUs in CUDA_VISIBLE_DEVICES, or the CPU. Writes output/<run>/trial=<trial>/last.ckpt for main_linear.py.
"""
import time

import torch
from torch.nn import functional as F

import util
from datasets import evaluation_view, load_pictures, make_loader, pretraining_view
from losses import SupConLoss, contrastive_accuracy
from networks.resnet_big import SupConResNet
from util import AverageMeter, log

N_VIEWS = 2


def parse_option(argv=None):
    opt = util.parse('main_supcon', __doc__, argv)
    opt.warm = opt.warm or opt.batch_size > 256         # large batches need it
    opt.output_name = opt.output_name or (
        f'{opt.method}_{opt.dataset}_{opt.model}_lr_{opt.learning_rate}_decay_{opt.weight_decay}_bsz_{opt.batch_size}'
        f'_temp_{opt.temp}_trial_{opt.trial}' + '_cosine' * opt.cosine + '_warm' * opt.warm)
    return opt


def set_loader(opt):
    """Training batches of two views, and both sets as they are for the kNN accuracy; also the classes."""
    data = load_pictures(opt)
    train = data.train.join(data.ood) if opt.aug_mode == 'with_both' else data.train        # with hard negatives
    train_loader = make_loader(train, pretraining_view(opt), opt, N_VIEWS)
    memory_loader, val_loader = (make_loader(part, evaluation_view(opt), opt, train=False)
                                 for part in (data.train, data.val))
    return train_loader, memory_loader, val_loader, data.train.classes


def set_model(opt, classes):
    model = SupConResNet(opt.model, opt.head, opt.feat_dim, num_classes=len(classes) if opt.ce_weight else 0,
                         stem=opt.stem, width=opt.width, zero_init=opt.zero_init)
    return util.prepare(model, opt), SupConLoss(temperature=opt.temp)


def train(train_loader, model, criterion, optimizer, epoch, opt):
    """One epoch: -> averages for TensorBoard."""
    model.train()
    batch_time, data_time, losses, accuracies = (AverageMeter() for _ in range(4))
    positives = 'class' if opt.method == 'SupCon' else 'picture'
    steps, history = len(train_loader), []
    end = start = time.time()
    for idx, (images, labels) in enumerate(util.progress(train_loader, f'epoch {epoch}/{opt.epochs}')):
        data_time.update(time.time() - end)
        util.set_learning_rate(optimizer, util.learning_rate(opt, epoch, idx, steps))
        bsz = len(labels)                               # a label -(c + 1) is a hard negative made from class c

        with util.autocast(opt):
            output = model(images)                                          # [n_views * bsz, feat_dim]
        features, logits = output if opt.ce_weight else (output, None)
        features = features.view(N_VIEWS, bsz, -1).transpose(0, 1)          # [bsz, n_views, feat_dim]
        loss = contrastive = criterion(features, labels, positives=positives)
        if opt.ce_weight:
            targets = torch.where(labels >= 0, labels, -100).repeat(N_VIEWS)
            loss = loss + opt.ce_weight * F.cross_entropy(logits.float(), targets, ignore_index=-100)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        losses.update(loss, bsz)
        accuracies.update(contrastive_accuracy(features, labels, positives), bsz)
        collapsed = criterion(torch.ones_like(features[..., :1]).detach(), labels, positives=positives)
        history.append((contrastive.detach() - collapsed).abs() <= 1e-4 * collapsed)
        batch_time.update(time.time() - end)
        end = time.time()
        if (idx + 1) % opt.print_freq == 0 or idx + 1 == steps:
            util.check_finite(losses, epoch, idx + 1)
            log(f'Train: [{epoch}][{idx + 1}/{steps}]\tBT {batch_time.val:.3f} ({batch_time.avg:.3f})\t'
                f'DT {data_time.val:.3f} ({data_time.avg:.3f})\tloss {losses.val:.3f} ({losses.avg:.3f})')
    log(f'epoch {epoch}, total time {time.time() - start:.2f}')
    return {'loss': losses.avg, 'contrastive_acc': accuracies.avg,
            'collapsed': bool(torch.stack(history).all()),          # the loss that equal features would have
            'pictures_per_second': losses.count / (time.time() - start)}


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
    train_loader, memory_loader, val_loader, classes = set_loader(opt)
    model, criterion = set_model(opt, classes)
    optimizer = util.set_optimizer(opt, model)
    first_epoch, _ = run.restore(model, optimizer)
    run.start(classes)

    warned = False
    for epoch in range(first_epoch, opt.epochs + 1):
        train_loader.set_epoch(epoch)
        if epoch == 1:
            run.log_views(train_loader)
        averages = train(train_loader, model, criterion, optimizer, epoch, opt)
        if averages.pop('collapsed') and not warned:
            warned = True
            log(f"Warning: all through epoch {epoch} the loss was {averages['loss']:.3f}, its value when all features "
                'are the same: the network has collapsed and learns nothing. Start again with --warm or a lower '
                '--learning_rate.')
        if epoch == opt.epochs or opt.eval_freq and epoch % opt.eval_freq == 0:
            averages['knn_acc'] = validate(memory_loader, val_loader, model, opt)
            log(f" * contrastive accuracy {averages['contrastive_acc']:.2f}\tkNN accuracy {averages['knn_acc']:.2f}")
        run.log_values({'learning_rate': optimizer.param_groups[0]['lr'], **averages}, epoch)
        run.save(epoch, model, optimizer)


if __name__ == '__main__':
    util.run(main)
