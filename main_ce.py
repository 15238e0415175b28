"""Cross-entropy training, the baseline of contrastive pretraining.

    python main_ce.py --batch_size 1024 --learning_rate 0.8 --cosine
    python main_ce.py --dataset path --data_folder ./images
    python main_ce.py --model timm/efficientnetv2_rw_m --mix mixup_cutmix --optim_kind Adam --learning_rate 0.001

Uses all GPUs in CUDA_VISIBLE_DEVICES, or the CPU; in several processes: torchrun --nproc_per_node 8 main_ce.py ...
Writes output/<run>/trial=<trial>/last.ckpt.
"""
if __name__ == '__main__':                      # --help and Ctrl-C need not wait for the imports below
    from util.options import answer_early
    answer_early('main_ce', __doc__)

from torch import nn
from torch.nn import functional as F

from datasets import classification_view, evaluation_view, load_images, make_loader
from datasets.mixing import as_distributions, mix
from methods import log_frequencies
from networks.resnet_big import SupCEResNet
from util import arguments, errors, metrics, options, training
from util.checkpoints import load_checkpoint
from util.curves import confusion_image
from util.distributed import global_mean, rank
from util.export import Exporter
from util.log import log
from util.runs import Run, run_folder
from util.weights import read_start, start_from_weights


def parse_option(argv=None):
    opt = arguments.parse('main_ce', __doc__, argv)
    name = opt.output_name or arguments.run_name('main_ce', opt)
    if opt.evaluate:
        last = run_folder(name, opt.trial) / 'last.ckpt'
        recorded = load_checkpoint(last)['opt']
        opt = arguments.parse_recorded('main_ce', __doc__, argv, last, recorded, options.EVALUATION)
    opt.output_name = name
    if opt.method:
        log(f'--method {opt.method} is not used: this program trains with cross-entropy')
    return opt


def set_loader(opt, augment=True):
    """Training batches; batches for evaluation: 'val', and 'id' and 'ood' of augmentation folders; the classes.

    With augment=False the training images come as for evaluation, in their own order.
    """
    data = load_images(opt)
    opt.num_classes = len(data.train.classes)
    opt.class_sizes = data.train.class_sizes() if opt.imbalance or opt.logit_adjustment else None
    train_loader = make_loader(data.train, classification_view(opt) if augment else evaluation_view(opt), opt,
                               train=augment)
    loaders = {name: make_loader(part, evaluation_view(opt), opt, train=False)
               for name, part in (('val', data.val), ('id', data.id), ('ood', data.ood)) if part}
    return train_loader, loaders, data.train.classes


def set_model(opt, weights=None, new=True):
    """Encoder and classifier, and the loss of each image; a `new` run starts from the `weights` of --ckpt, or
    --timm_pretrained, if given."""
    model = SupCEResNet(opt.model, opt.num_classes, size=opt.size, stem=opt.stem, width=opt.width,
                        zero_init=opt.zero_init, pretrained=opt.timm_pretrained and new)
    if new:
        start_from_weights(model, opt, weights)
    return model, classification_loss(opt)


def classification_loss(opt):
    """The loss of each image, [bsz]: cross-entropy, with --logit_adjustment of adjusted logits (Menon et al., 2021,
    https://arxiv.org/abs/2007.07314); of several labels binary cross-entropy, its mean over classes."""
    if opt.multi_label:
        return lambda logits, labels: F.binary_cross_entropy_with_logits(logits, labels, reduction='none').mean(1)
    criterion = nn.CrossEntropyLoss(label_smoothing=opt.label_smoothing, reduction='none')
    if not opt.logit_adjustment:
        return criterion
    adjustment = opt.logit_adjustment * log_frequencies(opt)
    return lambda logits, labels: criterion(logits + adjustment, labels)


def train(train_loader, network, criterion, optimizer, scaler, epoch, run, opt):
    """One epoch, or the rest of one that is resumed: -> averages for TensorBoard."""
    network.model.train()
    for images, labels, rng in run.steps(train_loader, epoch):      # images [bsz, 3, size, size]
        if opt.mix:
            images, labels = mix(images, as_distributions(labels, opt.num_classes), opt.mix, opt.mix_alpha, rng)
        output = network(images)                                    # [bsz, num_classes]
        loss = global_mean(criterion(output.float(), labels))
        training.update(loss, optimizer, scaler)
        run.record(train_loss=loss, train_acc=metrics.accuracy(output, labels),
                   gradient_norm=training.gradient_norm(network.model, scaler))
        del images                                                  # its memory is needed for the next batch
    averages = run.averages()
    log(f"Train epoch {epoch}, total time {run.seconds:.2f}, accuracy:{averages['train_acc']:.2f}")
    return averages


def validate(loaders, model, opt):
    """-> loss, accuracy (%) and, with id or ood images, confidences on these; the accuracy of each class; the confusion
    matrix. Of images with several labels: loss, mAP and F1 (%); the average precision of each class; None."""
    logits, labels = training.forward_all(model, loaders['val'], opt)
    if opt.multi_label:
        values, per_class = metrics.multi_label_scores(logits, labels)
        log(' * ' + ' '.join(f'{name} {value:.3f}' for name, value in values.items()))
        values = {f'val_{name}': value for name, value in values.items()}
        return {'val_loss': F.binary_cross_entropy_with_logits(logits, labels).item(), **values}, per_class, None
    confusion = metrics.confusion_matrix(logits.argmax(1), labels, opt.num_classes)
    correct = (logits.argmax(1) == labels).float()
    values = {'val_loss': F.cross_entropy(logits, labels).item(), 'val_acc': 100 * correct.mean().item()}
    if logits.shape[1] > 5:
        values['val_acc5'] = 100 * (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    log(f" * Acc@1 {values['val_acc']:.3f}" + (f" Acc@5 {values['val_acc5']:.3f}" if 'val_acc5' in values else ''))
    if opt.imbalance:
        groups = metrics.accuracy_by_class_size(correct, labels, opt.class_sizes)
        values.update({f'val_acc_{name}': value for name, value in groups.items()})
        log(' * Acc@1 over classes: ' + ' '.join(f'{name} {value:.3f}' for name, value in groups.items()))
    others = {name: training.forward_all(model, loaders[name], opt)[0] for name in ('id', 'ood') if name in loaders}
    if others:
        values.update(metrics.ood_metrics(logits, others.get('id', logits), others.get('ood')))
    return values, metrics.accuracy_by_class(confusion), confusion


def fit(run, train_loader, loaders, model, criterion, classes, opt):
    """All epochs, with validation, TensorBoard and checkpoints; prints the best accuracy last."""
    network = training.Network(model, opt)
    exporter = Exporter(model, opt, classes) if opt.export and rank() == 0 else None
    if opt.evaluate:
        evaluate(run, loaders, model, exporter, classes, opt)
        return
    optimizer = training.set_optimizer(opt, model)
    scaler = training.set_scaler(opt)
    first_epoch = run.restore(model, optimizer, scaler)
    with run.start(classes):
        for epoch in range(first_epoch, opt.epochs + 1):
            values = train(train_loader, network, criterion, optimizer, scaler, epoch, run, opt)
            if epoch == opt.epochs or opt.eval_freq and epoch % opt.eval_freq == 0:
                validation, per_class, confusion = validate(loaders, model, opt)
                run.best_acc = max(run.best_acc, validation['val_mAP' if opt.multi_label else 'val_acc'])
                values.update(validation)
            run.finish_epoch(epoch, values)
        if first_epoch > opt.epochs:                            # a finished run, resumed
            validation, per_class, confusion = validate(loaders, model, opt)
        report(validation, per_class, classes, opt)
        if confusion is not None:
            run.log_image('confusion', confusion_image(confusion.cpu(), classes))
        if exporter:
            exporter.write()
        log(f"best {'mAP' if opt.multi_label else 'accuracy'}: {run.best_acc:.2f}")


def evaluate(run, loaders, model, exporter, classes, opt):
    """--evaluate: what the run's last.ckpt gives, without training."""
    for name in ('resume', 'overwrite', 'wandb'):
        if getattr(opt, name):
            log(f'--{name} has no effect with --evaluate, which writes nothing')
    run.load(model, classes)
    validation, per_class, _ = validate(loaders, model, opt)
    report(validation, per_class, classes, opt)
    if exporter:
        exporter.write()


def report(validation, per_class, classes, opt):
    """Log what the last validation found, besides the accuracy."""
    if opt.per_class:
        for number, value in per_class.items():
            log(f"{'AP' if opt.multi_label else 'accuracy'} of {classes[number]}: {value:.2f}")
    if 'confidence_id' in validation:
        log(metrics.ood_report(validation))


def main(argv=None):
    opt = parse_option(argv)
    run = Run(opt)
    training.set_device(opt)
    training.set_warmup(opt)
    new = run.checkpoint is None
    weights = read_start(opt) if new else None
    train_loader, loaders, classes = set_loader(opt)
    model, criterion = set_model(opt, weights, new)
    fit(run, train_loader, loaders, model, criterion, classes, opt)


if __name__ == '__main__':
    errors.run(main)
