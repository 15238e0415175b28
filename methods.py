"""What each method of contrastive pretraining computes from a batch.

A method is called with the network, a batch and random numbers, and returns the features, the loss to minimize and the
contrastive accuracy of the batch:

    features, loss, accuracy = method(network, images, labels, rng)

- images: [n_views * bsz, 3, size, size], view after view; with --local_crops a tuple of these and of the small crops.
- labels: [bsz] classes, where -(c + 1) marks a hard negative, a near-out-of-distribution image made from class c; or
  [bsz, C] of 0 and 1, where images have several labels.
- rng: a NumPy generator in the same state in all processes.
- features: [bsz, n_views, feat_dim], the small crops among the views. loss, accuracy (%): scalars.

A new method is a class here and its row in METHODS, and its name a choice of --method in util/options.py.
"""
import math

import torch
from torch.nn import functional as F

from datasets.mixing import as_distributions, mix_views
from losses import BalancedSupConLoss, GenSupConLoss, SupConLoss, contrastive_accuracy
from util.distributed import all_to_all_rows, gather, global_mean, local_slice, slice_sizes, to_device
from util.errors import UserError
from util.training import in_micro_batches


class SupCon:
    """The positives of a view are the other views of its class (Khosla et al., 2020,
    https://arxiv.org/abs/2004.11362), with --positives image only those of its image."""

    def __init__(self, opt, teacher=None):
        self.opt, self.n_views = opt, opt.n_views + opt.local_crops
        self.hard_negatives = opt.aug_mode == 'with_both'
        self.criterion = SupConLoss(opt.temp, opt.contrast_mode, opt.base_temperature, opt.summation_location,
                                    opt.denominator_mode, opt.positives_cap, self.hard_negatives, unit_length=True)

    def __call__(self, network, images, labels, rng):
        opt = self.opt
        features, logits = features_and_logits(network, images, self.n_views)
        classes = None if opt.multi_label else labels       # several labels: with --positives image alone
        sizes = slice_sizes(len(labels))
        loss = self.criterion(features, classes, positives=opt.positives, sizes=sizes)
        if logits is not None:
            loss = loss + opt.ce_weight * classifier_loss(logits, torch.cat([labels] * self.n_views), opt)
        return features, loss, contrastive_accuracy(features, classes, opt.positives, self.hard_negatives, sizes)


class SimCLR(SupCon):
    """The positives of a view are the other views of its image: SupCon with --positives image (Chen et al., 2020,
    https://arxiv.org/abs/2002.05709)."""


class SINCERE(SupCon):
    """A positive is compared with the negatives, not with the other positives: SupCon with --denominator_mode
    one_positive (Feeney and Hughes, 2023, https://arxiv.org/abs/2309.14277)."""


class DCL(SupCon):
    """The denominator holds the negatives alone: SupCon with --denominator_mode only_negatives; the published method
    has --positives image too (Yeh et al., 2021, https://arxiv.org/abs/2110.06848)."""


class MultiLabelSupCon(SupCon):
    """SupCon of images with several labels: the positive j of an anchor i weighs exp(cos(y_i, y_j) / temperature), y
    being the 0-1 vectors of the labels (the X-sample contrastive loss of label vectors; Sobal et al., 2024,
    https://arxiv.org/abs/2407.18134).

    With the temperature of the similarities, the loss is lowest where the features' cosines are those of the labels.
    Weights that are proportional to the overlap are nearly uniform where most images share a label: then it hardly
    matters how many they share.
    """

    def __call__(self, network, images, labels, rng):
        opt, sizes = self.opt, slice_sizes(len(labels))
        features, logits = features_and_logits(network, images, self.n_views)
        weights = label_weights(labels, gather(labels, sizes), opt.temp)
        loss = self.criterion(features, mask=weights, sizes=sizes)
        if logits is not None:
            loss = loss + opt.ce_weight * classifier_loss(logits, labels.repeat(self.n_views, 1), opt)
        return features, loss, contrastive_accuracy(features, labels[:, None].expand(-1, self.n_views, -1), sizes=sizes)


class Momentum(SupCon):
    """SupCon, SimCLR, SINCERE or DCL with momentum contrast (--moco; He et al., 2020, https://arxiv.org/abs/1911.05722).

    All views but the last of each image are anchors. Their contrasts are keys, which a momentum copy of the model
    computes from the last views: those of this batch, and a queue of earlier ones with their labels.
    """

    def __call__(self, network, images, labels, rng):
        opt, moco = self.opt, network.model.moco
        images, last_views = images[:-len(labels)], images[-len(labels):]
        moco.update(network.model)
        keys, all_labels = momentum_keys(moco, last_views, labels, opt, rng)
        contrasts, contrast_labels = moco.contrasts(keys, all_labels)
        moco.enqueue(keys, all_labels)

        features, logits = features_and_logits(network, images, opt.n_views - 1)
        sizes = slice_sizes(len(labels))
        loss = self.criterion(features, labels, positives=opt.positives, keys=contrasts, key_labels=contrast_labels,
                              sizes=sizes)
        if logits is not None:
            loss = loss + opt.ce_weight * classifier_loss(logits, labels.repeat(opt.n_views - 1), opt)
        features = torch.cat([features, keys[local_slice(len(keys))][:, None]], 1)      # the keys are the last views
        return features, loss, contrastive_accuracy(features, labels, opt.positives, self.hard_negatives, sizes)


class BCL:
    """Balanced contrastive learning for long tails: each class weighs the same in the denominator, and has a prototype
    among the contrasts; plus --ce_weight times the cross-entropy of adjusted logits (Zhu et al., 2022,
    https://arxiv.org/abs/2207.09052).

    The prototypes are the projection head's outputs for the classifier's weights, a vector of the encoder's dimension
    for each class.
    """
    weight = 0.6                                                                # as published

    def __init__(self, opt, teacher=None):
        self.criterion = BalancedSupConLoss(opt.temp, opt.contrast_mode, opt.base_temperature)
        self.opt, self.n_views = opt, opt.n_views + opt.local_crops
        self.adjustment = log_frequencies(opt)

    def __call__(self, network, images, labels, rng):
        features, logits = features_and_logits(network, images, self.n_views)
        prototypes = network.model.project(network.model.fc.weight)             # [num_classes, feat_dim]
        sizes = slice_sizes(len(labels))
        loss = (self.weight * self.criterion(features, labels, prototypes, sizes)
                + self.opt.ce_weight * classifier_loss(logits + self.adjustment, labels.repeat(self.n_views), self.opt))
        return features, loss, contrastive_accuracy(features, labels, sizes=sizes)


class GenSCL:
    """A positive weighs as much as its label distribution and the anchor's are similar: those of mixed images (--mix,
    each view on its own), and the class probabilities of a teacher (--KD; Kim et al., 2022,
    https://arxiv.org/abs/2206.00384).

    The loss takes two groups of views: the first half of each image's views, and the second.
    """

    def __init__(self, opt, teacher=None):
        self.criterion = GenSupConLoss(opt.temp, opt.contrast_mode, opt.base_temperature, unit_length=True)
        self.opt, self.teacher = opt, teacher

    def __call__(self, network, images, labels, rng):
        opt, n_views, sizes = self.opt, self.opt.n_views, slice_sizes(len(labels))
        labels = as_distributions(labels, opt.num_classes)
        if opt.mix:
            images, labels = mix_views(images, labels, n_views, opt.mix, opt.mix_alpha, rng)
        else:
            labels = labels.repeat(n_views, 1)
        probabilities = None
        if self.teacher is not None:                                            # [n_views * bsz, num_classes]
            probabilities = (in_micro_batches(self.teacher, images, opt, n_views).float() / opt.KD_temp).softmax(1)
            if opt.KD_alpha == math.inf:
                labels, probabilities = probabilities, None

        features, logits = features_and_logits(network, images, n_views)
        halves = features.transpose(0, 1).flatten(0, 1).chunk(2)                # each [n_views / 2 * bsz, feat_dim]
        of_teacher = None if probabilities is None else probabilities.chunk(2)
        loss = self.criterion(halves, labels.chunk(2), of_teacher, opt.KD_alpha, [n_views // 2 * n for n in sizes])
        if logits is not None:
            loss = loss + opt.ce_weight * classifier_loss(logits, labels, opt)
        return features, loss, contrastive_accuracy(features, by_image(labels, n_views), sizes=sizes)


METHODS = {'SupCon': SupCon, 'SimCLR': SimCLR, 'SINCERE': SINCERE, 'DCL': DCL, 'BCL': BCL, 'GenSCL': GenSCL}


def make_method(opt, teacher=None):
    """The method of --method and --moco."""
    if opt.denominator_mode == 'only_negatives' and opt.positives == 'class' and opt.num_classes == 1:
        raise UserError('--denominator_mode only_negatives: images of one class have no negatives')
    if opt.moco:
        return Momentum(opt)
    if opt.multi_label and opt.method == 'SupCon' and opt.positives == 'class':
        return MultiLabelSupCon(opt)
    return METHODS[opt.method](opt, teacher)


def features_and_logits(network, images, n_views):
    """Features [bsz, n_views, feat_dim] of images [n_views * bsz, ...], and logits [n_views * bsz, num_classes] float32
    where the model has a classifier (--ce_weight), else None."""
    output = network(images, n_views)
    features, logits = output if isinstance(output, tuple) else (output, None)
    return by_image(features, n_views), None if logits is None else logits.float()


def by_image(x, n_views):
    """[n_views * bsz, ...] -> [bsz, n_views, ...]"""
    return x.unflatten(0, (n_views, -1)).transpose(0, 1)


def label_weights(labels, all_labels, temperature):
    """exp((cos(y_i, y_j) - 1) / temperature) of labels [n, C] and [m, C] of 0 and 1: [n, m]."""
    y, all_y = (F.normalize(part.double(), dim=1) for part in (labels, all_labels))    # since a GPU may use TF32
    return ((y @ all_y.T - 1) / temperature).exp().to(labels.dtype)


def classifier_loss(logits, labels, opt):
    """Cross-entropy of logits [n, C] for labels [n], of which negative ones do not count, or distributions [n, C]; for
    images with several labels binary cross-entropy, the mean over the classes."""
    if opt.multi_label:
        return global_mean(F.binary_cross_entropy_with_logits(logits, labels, reduction='none').mean(1))
    if labels.dim() == 2:
        return global_mean(F.cross_entropy(logits, labels, reduction='none'))
    return global_mean(F.cross_entropy(logits, labels.clamp(min=0), reduction='none'), labels >= 0)


def log_frequencies(opt):
    """Log of the fraction of the training images that each class has: [num_classes]."""
    sizes = torch.tensor(opt.class_sizes, device=opt.device, dtype=torch.float).clamp(min=1)
    return (sizes / sizes.sum()).log()


def momentum_keys(moco, images, labels, opt, rng):
    """Keys [n, feat_dim] and labels [n] of the images [bsz, 3, size, size] of all processes, in the order of the batch.

    The images of all processes are shuffled before they are split into micro-batches, GPUs and processes: otherwise the
    statistics of batch norm would reveal which keys and anchors belong together (He et al., 2020, section 3.3).
    """
    sizes = slice_sizes(len(images))
    order = torch.from_numpy(rng.permutation(sum(sizes)))
    keys = in_micro_batches(moco, all_to_all_rows(images, order, sizes), opt)
    return gather(keys, sizes)[to_device(order.argsort(), keys.device)], gather(labels, sizes)
