"""What each method of contrastive pretraining computes from a batch: SupCon, SimCLR, their momentum form, GenSCL.

A method is called with the network, a batch and random numbers, and returns the features, the loss to minimize and the
contrastive accuracy of the batch:

    features, loss, accuracy = method(network, images, labels, rng)

images [n_views * bsz, 3, size, size], view after view; labels [bsz], of which -(c + 1) marks a near-out-of-distribution
image made from class c, a hard negative, or [bsz, C] of 0 and 1, where images have several; rng, a NumPy generator in
the same state in all processes -> features [bsz, n_views, feat_dim], loss and accuracy (%) scalars.

A new method is a class here and its row in METHODS.
"""
import math

import torch
from torch.nn import functional as F

from datasets.mixing import as_distributions, mix_views
from losses import GenSupConLoss, SupConLoss, contrastive_accuracy
from util.distributed import all_sizes, all_to_all_rows, gather, global_mean, local_slice, to_device
from util.training import in_micro_batches

N_VIEWS = 2


class SupCon:
    """The positives of a view are the other views of its class (Khosla et al., 2020,
    https://arxiv.org/abs/2004.11362)."""
    positives = 'class'

    def __init__(self, opt, num_classes, teacher=None):
        self.opt, self.hard_negatives = opt, opt.aug_mode == 'with_both'
        self.criterion = SupConLoss(opt.temp, opt.contrast_mode, opt.base_temperature, opt.summation_location,
                                    opt.denominator_mode, opt.positives_cap, self.hard_negatives)

    def __call__(self, network, images, labels, rng):
        features, logits = features_and_logits(network, images, N_VIEWS)
        classes = None if self.opt.multi_label else labels              # SimCLR alone is called with several labels
        loss = self.criterion(features, classes, positives=self.positives)
        if logits is not None:
            loss = loss + self.opt.ce_weight * classifier_loss(logits, torch.cat([labels] * N_VIEWS), self.opt)
        return features, loss, contrastive_accuracy(features, classes, self.positives, self.hard_negatives)


class SimCLR(SupCon):
    """The positive of a view is the other view of its image (Chen et al., 2020, https://arxiv.org/abs/2002.05709)."""
    positives = 'image'


class Momentum(SupCon):
    """SupCon or SimCLR with momentum contrast (--moco; He et al., 2020, https://arxiv.org/abs/1911.05722).

    The first views are the anchors. Their contrasts are keys: those of the second views, by a momentum copy of the
    model, and a queue of earlier ones with their labels.
    """

    def __init__(self, opt, num_classes, teacher=None):
        super().__init__(opt, num_classes)
        self.positives = METHODS[opt.method].positives

    def __call__(self, network, images, labels, rng):
        moco, (images, others) = network.model.moco, images.chunk(N_VIEWS)
        moco.update(network.model)
        keys, all_labels = momentum_keys(moco, others, labels, self.opt, rng)
        contrasts, contrast_labels = moco.contrasts(keys, all_labels)
        moco.enqueue(keys, all_labels)

        features, logits = features_and_logits(network, images, 1)
        loss = self.criterion(features, labels, positives=self.positives, keys=contrasts, key_labels=contrast_labels)
        if logits is not None:
            loss = loss + self.opt.ce_weight * classifier_loss(logits, labels, self.opt)
        features = torch.stack([features[:, 0], keys[local_slice(len(keys))]], 1)     # the keys are the other views
        return features, loss, contrastive_accuracy(features, labels, self.positives, self.hard_negatives)


class GenSCL:
    """Views are mixed on their own, and positives weigh as much as their label distributions are alike; the class
    probabilities of a teacher (--KD) are further labels (Kim et al., 2022, https://arxiv.org/abs/2206.00384)."""

    def __init__(self, opt, num_classes, teacher=None):
        self.criterion = GenSupConLoss(opt.temp, opt.contrast_mode, opt.base_temperature)
        self.opt, self.num_classes, self.teacher = opt, num_classes, teacher

    def __call__(self, network, images, labels, rng):
        opt, labels = self.opt, as_distributions(labels, self.num_classes)
        if opt.mix:
            images, labels = mix_views(images, labels, N_VIEWS, opt.mix, opt.mix_alpha, rng)
        else:
            labels = labels.repeat(N_VIEWS, 1)
        targets = [(1., labels)]                                                # (weight, [n_views * bsz, num_classes])
        if self.teacher is not None:
            probabilities = (in_micro_batches(self.teacher, images, opt).float() / opt.KD_temp).softmax(1)
            targets = [(1., probabilities)] if opt.KD_alpha == math.inf else [*targets, (opt.KD_alpha, probabilities)]

        features, logits = features_and_logits(network, images, N_VIEWS)
        loss = sum(weight * self.criterion(features.unbind(1), soft.chunk(N_VIEWS)) for weight, soft in targets)
        learned = targets[0][1]
        if logits is not None:
            loss = loss + opt.ce_weight * classifier_loss(logits, learned, opt)
        return features, loss, contrastive_accuracy(features, by_image(learned, N_VIEWS))


METHODS = {'SupCon': SupCon, 'SimCLR': SimCLR, 'GenSCL': GenSCL}


def make_method(opt, num_classes, teacher=None):
    """The method of --method and --moco.

    SupCon of images with several labels is GenSCL's loss on these labels: a positive weighs as much as its labels and
    the anchor's overlap, by cosine similarity.
    """
    if opt.moco:
        return Momentum(opt, num_classes)
    name = 'GenSCL' if opt.multi_label and opt.method == 'SupCon' else opt.method
    return METHODS[name](opt, num_classes, teacher)


def features_and_logits(network, images, n_views):
    """Features [bsz, n_views, feat_dim] of images [n_views * bsz, ...], and logits [n_views * bsz, num_classes] float32
    where the model has a classifier (--ce_weight), else None."""
    output = network(images, n_views)
    features, logits = output if isinstance(output, tuple) else (output, None)
    return by_image(features, n_views), None if logits is None else logits.float()


def by_image(x, n_views):
    """[n_views * bsz, ...] -> [bsz, n_views, ...]"""
    return x.unflatten(0, (n_views, -1)).transpose(0, 1)


def classifier_loss(logits, labels, opt):
    """Cross-entropy of logits [n, C] for labels [n], of which negative ones do not count, or distributions [n, C]; for
    images with several labels binary cross-entropy, the mean over the classes."""
    if opt.multi_label:
        return global_mean(F.binary_cross_entropy_with_logits(logits, labels, reduction='none').mean(1))
    if labels.dim() == 2:
        return global_mean(F.cross_entropy(logits, labels, reduction='none'))
    return global_mean(F.cross_entropy(logits, labels.clamp(min=0), reduction='none'), labels >= 0)


def momentum_keys(moco, images, labels, opt, rng):
    """Keys [n, feat_dim] and labels [n] of the images [bsz, 3, size, size] of all processes, in the order of the batch.

    The images of all processes are shuffled, so that batch norm, which normalizes a micro-batch, a GPU's or a process's
    part, does not show which keys and anchors belong together (He et al., 2020, section 3.3).
    """
    sizes = all_sizes(len(images))
    order = torch.from_numpy(rng.permutation(sum(sizes)))
    keys = in_micro_batches(moco, all_to_all_rows(images, order, sizes), opt)
    return gather(keys, sizes)[to_device(order.argsort(), keys.device)], gather(labels, sizes)
