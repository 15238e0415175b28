"""Contrastive pretraining: SupCon, SimCLR, SINCERE, DCL, BCL and GenSCL.

    python main_supcon.py --batch_size 1024 --learning_rate 0.5 --temp 0.1 --cosine                     SupCon
    python main_supcon.py --batch_size 1024 --learning_rate 0.5 --temp 0.5 --cosine --method SimCLR     SimCLR
    python main_supcon.py --method GenSCL --mix mixup_cutmix --KD --teacher_path output/teacher/trial=0  GenSCL
    python main_supcon.py --dataset path --data_folder ./images                                          own images

Uses all GPUs in CUDA_VISIBLE_DEVICES, or the CPU; in several processes: torchrun --nproc_per_node 8 main_supcon.py ...
Writes output/<run>/trial=<trial>/last.ckpt for main_linear.py.
"""
if __name__ == '__main__':                      # --help and Ctrl-C need not wait for the imports below
    from util.options import answer_early
    answer_early('main_supcon', __doc__)

from datasets import evaluation_view, load_images, local_view, make_loader, pretraining_view
from datasets.loader import LOCAL_CROPS, MultiCrop
from methods import make_method
from networks.moco import MomentumContrast
from networks.resnet_big import SupConResNet
from util import arguments, errors, training
from util.log import log
from util.metrics import feature_statistics, knn_accuracy, knn_map
from util.runs import Run
from util.teachers import load_teacher, read_teacher
from util.weights import read_start, start_from_weights


def parse_option(argv=None):
    opt = arguments.parse('main_supcon', __doc__, argv)
    opt.output_name = opt.output_name or arguments.run_name('main_supcon', opt)
    return opt


def set_loader(opt):
    """Training batches: --n_views views of each image and --local_crops small ones; batches of training and validation
    images without augmentation, for the kNN accuracy; the names of the classes."""
    data = load_images(opt)
    opt.num_classes = len(data.train.classes)
    opt.class_sizes = data.train.class_sizes() if opt.method == 'BCL' else None
    train = data.train.join(data.ood) if opt.aug_mode == 'with_both' else data.train        # ood: hard negatives
    view = pretraining_view(opt)
    train_loader = make_loader(train, view, opt, opt.n_views)
    if opt.local_crops:
        local_loader = make_loader(train, local_view(view, opt), opt, opt.local_crops, stream=(LOCAL_CROPS,))
        train_loader = MultiCrop(train_loader, local_loader)
    memory_loader, val_loader = (make_loader(part, evaluation_view(opt), opt, train=False)
                                 for part in (data.train, data.val))
    return train_loader, memory_loader, val_loader, data.train.classes


def set_model(opt, weights=None, new=True):
    """Encoder and projection head, with a classifier for --ce_weight and a momentum copy for --moco; a `new` run starts
    from the `weights` of --ckpt, or --timm_pretrained, if given."""
    model = SupConResNet(opt.model, opt.head, opt.feat_dim, num_classes=opt.num_classes if opt.ce_weight else 0,
                         head_bn=opt.head_bn, normalize_embedding=opt.normalize_embedding, size=opt.size, stem=opt.stem,
                         width=opt.width, zero_init=opt.zero_init, pretrained=opt.timm_pretrained and new)
    if new:
        start_from_weights(model, opt, weights)
    if opt.moco:
        model.moco = MomentumContrast(model, opt.moco_k, opt.moco_m)
    return model


def train(train_loader, network, method, optimizer, scaler, epoch, run):
    """One epoch, or the rest of one that is resumed: -> averages for TensorBoard."""
    network.model.train()
    for images, labels, rng in run.steps(train_loader, epoch):      # [n_views * bsz, 3, size, size], [bsz]
        features, loss, accuracy = method(network, images, labels, rng)                     # see methods.py
        training.update(loss, optimizer, scaler)
        run.record(loss=loss, contrastive_acc=accuracy, **feature_statistics(features),
                   gradient_norm=training.gradient_norm(network.model, scaler))
        del images                                                  # its memory is needed for the next batch
    averages = run.averages()
    log(f'epoch {epoch}, total time {run.seconds:.2f}')
    run.warn_if_collapsed(epoch, averages)
    return averages


def validate(memory_loader, val_loader, model, opt):
    """Accuracy (%) of a kNN classifier on the encoder's features: whether pretraining learns, without a classifier.
    Where images have several labels, its mAP (%)."""
    memory, memory_labels = training.forward_all(model.encoder, memory_loader, opt)
    features, labels = training.forward_all(model.encoder, val_loader, opt)
    score = knn_map if opt.multi_label else knn_accuracy
    return score(memory, memory_labels, features, labels)


def main(argv=None):
    opt = parse_option(argv)
    run = Run(opt)
    training.set_device(opt)
    training.set_warmup(opt)
    teacher_checkpoint = read_teacher(opt)
    new = run.checkpoint is None
    weights = read_start(opt) if new else None
    train_loader, memory_loader, val_loader, classes = set_loader(opt)
    model = set_model(opt, weights, new)
    teacher = load_teacher(teacher_checkpoint, opt, classes, train_loader) if opt.KD else None
    method = make_method(opt, teacher)
    network = training.Network(model, opt)
    optimizer = training.set_optimizer(opt, model)
    scaler = training.set_scaler(opt)
    first_epoch = run.restore(model, optimizer, scaler)
    score = 'kNN mAP' if opt.multi_label else 'kNN accuracy'
    with run.start(classes):
        for epoch in range(first_epoch, opt.epochs + 1):
            averages = train(train_loader, network, method, optimizer, scaler, epoch, run)
            if epoch == opt.epochs or opt.eval_freq and epoch % opt.eval_freq == 0:
                averages['knn_acc'] = validate(memory_loader, val_loader, model, opt)
                log(f" * contrastive accuracy {averages['contrastive_acc']:.2f}\t"
                    f"{score} {averages['knn_acc']:.2f}")
            run.finish_epoch(epoch, averages)
        if first_epoch > opt.epochs:                            # a finished run, resumed
            log(f' * {score} {validate(memory_loader, val_loader, model, opt):.2f}')


if __name__ == '__main__':
    errors.run(main)
