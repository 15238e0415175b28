"""Linear evaluation: a linear classifier on a frozen, pretrained encoder; with --finetune both are trained.

    python main_linear.py --batch_size 512 --learning_rate 5 --ckpt output/<run>/trial=0/last.ckpt
    python main_linear.py --batch_size 512 --learning_rate 1 --ckpt simclr.pth          a checkpoint of SupContrast
    python main_linear.py --pretrained cifar10_bsz_1024_mixup_cutmix_1.0_KD_1.0_SGD_lr_0.5           a GenSCL run
    python main_linear.py --finetune --learning_rate 0.1 --encoder_lr 0.01 --ckpt last.ckpt          all layers
    python main_linear.py --cache_features --ckpt last.ckpt              without augmentation, an epoch in a moment

Uses all GPUs in CUDA_VISIBLE_DEVICES, or the CPU; in several processes: torchrun --nproc_per_node 8 main_linear.py ...
Writes output/<run>/trial=<trial>/last.ckpt.
"""
if __name__ == '__main__':                      # --help and Ctrl-C need not wait for the imports below
    from util.options import answer_early
    answer_early('main_linear', __doc__)

import time

from datasets.loader import FeatureLoader
from main_ce import classification_loss, fit, set_loader
from networks.resnet_big import LinearProbe
from util import arguments, errors, training
from util.checkpoints import load_encoder
from util.log import log
from util.runs import Run


def parse_option(argv=None):
    """The options, and the checkpoint of the encoder."""
    opt, checkpoint = arguments.parse_with_encoder('main_linear', __doc__, argv)
    opt.output_name = opt.output_name or arguments.run_name('main_linear', opt)
    return opt, checkpoint


def set_model(opt, checkpoint):
    """The checkpoint's encoder, frozen unless with --finetune, with a new classifier, and the loss of each image."""
    encoder = load_encoder(checkpoint, opt, opt.ckpt)
    log(f"{opt.ckpt}: {opt.model} after {checkpoint.get('epoch', 'unknown')} epochs")
    return LinearProbe(encoder, opt.num_classes, opt.finetune, opt.freeze_bn), classification_loss(opt)


def cached_features(train_loader, loaders, model, opt):
    """The same loaders with the encoder's features [bsz, dim] instead of images, computed once.

    Another protocol than the usual one: the classifier sees each image in one view only.
    """
    def compute(loader):
        start = time.time()
        features, labels = training.forward_all(model.encoder, loader, opt)
        log(f'--cache_features: {len(labels)} images without augmentation in {time.time() - start:.2f} s')
        return features, labels
    return (FeatureLoader(train_loader, compute, opt, train=True),
            {name: FeatureLoader(loader, compute, opt, train=False) for name, loader in loaders.items()})


def main(argv=None):
    opt, checkpoint = parse_option(argv)
    run = Run(opt)
    training.set_device(opt)
    training.set_warmup(opt)
    train_loader, loaders, classes = set_loader(opt, augment=not opt.cache_features)
    model, criterion = set_model(opt, checkpoint)
    if opt.cache_features:
        train_loader, loaders = cached_features(train_loader, loaders, model, opt)
    fit(run, train_loader, loaders, model, criterion, classes, opt)


if __name__ == '__main__':
    errors.run(main)
