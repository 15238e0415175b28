"""Cross-entropy training, the baseline of contrastive pretraining.

    python main_ce.py --batch_size 1024 --learning_rate 0.8 --cosine
    python main_ce.py --dataset path --data_folder ./pictures
    python main_ce.py --model timm/efficientnetv2_rw_m --mix mixup_cutmix --optim_kind Adam --learning_rate 0.001

Uses all GPUs in CUDA_VISIBLE_DEVICES, or the CPU; in several processes: torchrun --nproc_per_node 8 main_ce.py ...
Writes output/<run>/trial=<trial>/last.ckpt.
"""
if __name__ == '__main__':                      # the imports below take seconds, --help and Ctrl-C should not
    from util.options import answer_early
    answer_early('main_ce', __doc__)

import time

from torch import nn
from torch.nn import functional as F

import util
from datasets import classification_view, evaluation_view, load_pictures, make_loader
from datasets.mixing import mix
from networks.resnet_big import SupCEResNet
from util import AverageMeter, log


def parse_option(argv=None):
    opt = util.parse('main_ce', __doc__, argv)
    name = opt.output_name or (
        f'SupCE_{opt.dataset}_{opt.model}_lr_{opt.learning_rate}_decay_{opt.weight_decay}_bsz_{opt.batch_size}'
        f'_trial_{opt.trial}' + '_cosine' * opt.cosine + '_warm' * opt.warm
        + util.name_suffix('main_ce', opt, ('model',)))
    if opt.evaluate:
        last = util.run_folder(name, opt.trial) / 'last.ckpt'
        opt = util.parse_recorded('main_ce', __doc__, argv, last, util.load_checkpoint(last)['opt'], util.EVALUATION)
    opt.output_name = name
    if opt.method:
        log(f'--method {opt.method} is not used: this program trains with cross-entropy')
    return opt


def set_loader(opt, augment=True):
    """Training batches; batches for evaluation: 'val', and 'id' and 'ood' of augmentation folders; the classes.

    With augment=False the training pictures come as for evaluation, in their own order.
    """
    data = load_pictures(opt)
    train_loader = make_loader(data.train, classification_view(opt) if augment else evaluation_view(opt), opt,
                               train=augment)
    loaders = {name: make_loader(part, evaluation_view(opt), opt, train=False)
               for name, part in (('val', data.val), ('id', data.id), ('ood', data.ood)) if part}
    return train_loader, loaders, data.train.classes


def set_model(opt, classes):
    opt.num_classes = len(classes)
    if opt.model.startswith('timm/'):
        log(f'--model {opt.model}: starts from random weights')
    model = SupCEResNet(opt.model, len(classes), size=opt.size, stem=opt.stem, width=opt.width,
                        zero_init=opt.zero_init)
    return util.prepare(model, opt), nn.CrossEntropyLoss(label_smoothing=opt.label_smoothing, reduction='none')


def train(train_loader, model, criterion, optimizer, epoch, opt, run):
    """One epoch, or the rest of one that is resumed: -> averages for TensorBoard."""
    model.train()
    batch_time, data_time = AverageMeter(), AverageMeter()
    meters = run.meters('train_loss', 'train_acc')
    losses, top1 = meters.values()
    steps, before = len(train_loader), losses.count
    end = start = time.time()
    for idx, (images, labels) in enumerate(util.progress(train_loader, f'epoch {epoch}/{opt.epochs}'), run.step):
        data_time.update(time.time() - end)
        util.set_learning_rate(optimizer, util.learning_rate(opt, epoch, idx, steps))
        rng = util.seed_step(opt, epoch, idx)
        if opt.mix:
            images, labels = mix(images, F.one_hot(labels, opt.num_classes).float(), opt.mix, opt.mix_alpha, rng)

        output, backward = util.forward(model, images, opt)     # [bsz, num_classes]
        loss = util.mean(criterion(output.float(), labels))
        util.update(loss, optimizer, backward)

        losses.update(loss, train_loader.sizes[idx])            # pictures of all processes
        top1.update(util.accuracy(output, labels), train_loader.sizes[idx])
        batch_time.update(time.time() - end)
        end = time.time()
        if (idx + 1) % opt.print_freq == 0 or idx + 1 == steps:
            util.check_finite(losses, epoch, idx + 1)
            log(f'Train: [{epoch}][{idx + 1}/{steps}]\tBT {batch_time.val:.3f} ({batch_time.avg:.3f})\t'
                f'DT {data_time.val:.3f} ({data_time.avg:.3f})\tloss {losses.val:.3f} ({losses.avg:.3f})\t'
                f'Acc@1 {top1.val:.3f} ({top1.avg:.3f})')
        run.after_step(epoch, idx + 1, model, optimizer, meters)
    log(f'Train epoch {epoch}, total time {time.time() - start:.2f}, accuracy:{top1.avg:.2f}')
    return {'train_loss': losses.avg, 'train_acc': top1.avg,
            'pictures_per_second': (losses.count - before) / max(time.time() - start, 1e-9)}


def validate(loaders, model, opt):
    """-> loss, accuracy (%) and, with ood pictures, how they are told apart; and the accuracy of each class."""
    logits, labels = util.forward_all(model, loaders['val'], opt)
    correct = (logits.argmax(1) == labels).float()
    values = {'val_loss': F.cross_entropy(logits, labels).item(), 'val_acc': 100 * correct.mean().item()}
    if logits.shape[1] > 5:
        values['val_acc5'] = 100 * (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    log(f" * Acc@1 {values['val_acc']:.3f}" + (f" Acc@5 {values['val_acc5']:.3f}" if 'val_acc5' in values else ''))
    if 'ood' in loaders:
        id_logits = util.forward_all(model, loaders['id'], opt)[0] if 'id' in loaders else logits
        values.update(util.ood_metrics(logits, id_logits, util.forward_all(model, loaders['ood'], opt)[0]))
    return values, {c: 100 * correct[labels == c].mean().item() for c in labels.unique().tolist()}


def fit(run, train_loader, loaders, model, criterion, optimizer, classes, opt):
    """All epochs, with validation, TensorBoard and checkpoints; prints the best accuracy last."""
    exporter = util.Exporter(model, opt, classes) if opt.export and util.rank() == 0 else None
    if opt.evaluate:
        for name in ('resume', 'overwrite', 'wandb'):
            if getattr(opt, name):
                log(f'--{name} has no effect with --evaluate, which writes nothing')
        run.load(model, classes)
        validation, per_class = validate(loaders, model, opt)
        report(loaders, validation, per_class, classes, opt)
        if exporter:
            exporter.write()
        return
    first_epoch = run.restore(model, optimizer)
    with run.start(classes):
        for epoch in range(first_epoch, opt.epochs + 1):
            train_loader.set_epoch(epoch, run.step)
            if epoch == 1 and not run.step:
                run.log_views(train_loader)
            values = train(train_loader, model, criterion, optimizer, epoch, opt, run)
            if epoch == opt.epochs or opt.eval_freq and epoch % opt.eval_freq == 0:
                validation, per_class = validate(loaders, model, opt)
                run.best_acc = max(run.best_acc, validation['val_acc'])
                values.update(validation)
            run.log_values({'learning_rate': optimizer.param_groups[0]['lr'], **values}, epoch)
            run.save(epoch, model, optimizer)
        if first_epoch > opt.epochs:                            # a finished run, resumed
            validation, per_class = validate(loaders, model, opt)
        report(loaders, validation, per_class, classes, opt)
        if exporter:
            exporter.write()
        log(f'best accuracy: {run.best_acc:.2f}')


def report(loaders, validation, per_class, classes, opt):
    """What the last validation has beside the accuracy."""
    if opt.per_class:
        for number, value in per_class.items():
            log(f'accuracy of {classes[number]}: {value:.2f}')
    if 'ood' in loaders:
        log(util.ood_report(validation))


def main(argv=None):
    opt = parse_option(argv)
    run = util.Run(opt)
    util.set_device(opt)
    util.set_warmup(opt)
    train_loader, loaders, classes = set_loader(opt)
    model, criterion = set_model(opt, classes)
    optimizer = util.set_optimizer(opt, model)
    fit(run, train_loader, loaders, model, criterion, optimizer, classes, opt)


if __name__ == '__main__':
    util.run(main)
