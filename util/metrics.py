"""Meters and accuracies."""
from statistics import mean

import torch
from torch.nn import functional as F

from util.distributed import all_reduce_sum, global_mean, local_slice


class AverageMeter:
    """A value and its average. Values may be tensors, which stay on their device until `val` or `avg` is read."""

    def __init__(self, total=0., count=0):
        self._val, self._sum, self.count = 0., total, count

    def update(self, val, n=1):
        self._val = val.detach().double() if torch.is_tensor(val) else val
        self._sum = self._sum + self._val * n
        self.count += n

    @property
    def val(self):
        return float(self._val)

    @property
    def avg(self):
        return float(self._sum) / max(self.count, 1)

    @property
    def state(self):
        """The arguments with which the constructor resumes from here."""
        return float(self._sum), self.count


def accuracy(output, target):
    """Top-1 accuracy (%) of logits [bsz, num_classes] for classes [bsz], over all processes: a scalar tensor.

    For label distributions [bsz, num_classes], the mean fraction (%) of the predicted class; of several labels, how
    often it is one of them.
    """
    predicted = output.argmax(1)
    right = predicted == target if target.dim() == 1 else target.gather(1, predicted[:, None])
    return 100 * global_mean(right.flatten().float())


def accuracy_by_class_size(correct, labels, sizes):
    """Accuracy (%) over the images of classes with many (more than 100), medium (20 to 100) and few (fewer than 20)
    training images (Liu et al., 2019, https://arxiv.org/abs/1904.05160): {group: accuracy} of those there are.

    correct [n] 1 or 0, labels [n], sizes: training images of each class.
    """
    sizes = torch.tensor(sizes, device=labels.device)[labels]
    groups = {'many': sizes > 100, 'medium': (sizes >= 20) & (sizes <= 100), 'few': sizes < 20}
    return {name: 100 * correct[group].mean().item() for name, group in groups.items() if group.any()}


@torch.no_grad()
def feature_statistics(features, limit=1024):
    """How the features [bsz, n_views, dim] of a batch, of unit length, lie on the sphere: a dict of scalar tensors.

    feature_spread: mean squared distance from their mean; 0 where all are the same, 1 where they point in all
    directions. Of the first images, with `limit` views in all (Wang and Isola, 2020, https://arxiv.org/abs/2005.10242):
    alignment, the mean squared distance of the first two views of an image; uniformity, log of the mean of
    exp(-2 squared distance) over all pairs of views, lower for features that are spread out. Of several processes, each
    computes those of its slice of the batch.
    """
    features = features.detach().float()
    spread = (features.flatten(0, 1) - features.flatten(0, 1).mean(0)).square().sum(1).mean()
    views = features[:max(1, limit // features.shape[1])]
    alignment = (views[:, 0] - views[:, 1]).square().sum(1).mean()
    distances = torch.pdist(views.flatten(0, 1)).square()
    uniformity = (-2 * distances).exp().mean().log()
    return {'feature_spread': spread, 'alignment': alignment, 'uniformity': uniformity}


def confusion_matrix(predicted, labels, num_classes):
    """How many images of each class, the row, were predicted as each class, the column: [num_classes, num_classes]."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def accuracy_by_class(confusion):
    """Accuracy (%) over the images of each class, of a confusion_matrix: {class: accuracy} of those with images."""
    sizes, correct = confusion.sum(1).tolist(), confusion.diag().tolist()
    return {c: 100 * correct[c] / size for c, size in enumerate(sizes) if size}


def calibration(logits, labels, bins=15):
    """The expected calibration error (%) of logits [n, C], and confidence (0..1), accuracy (0..1) and number of images
    of each of `bins` equal intervals of confidence, [bins, 3] (Guo et al., 2017, https://arxiv.org/abs/1706.04599)."""
    confidence, predicted = logits.double().softmax(1).max(1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1                # intervals (a, b]
    counts = torch.bincount(index, minlength=bins)
    sums = [torch.bincount(index, values, bins) for values in (confidence, (predicted == labels).double())]
    means = torch.stack([*(total / counts.clamp(min=1) for total in sums), counts.double()], 1)
    return 100 * float(((means[:, 0] - means[:, 1]).abs() * counts).sum() / len(labels)), means


def retrieval(features, labels):
    """R@1 and mAP@R (%) of features [n, dim] by cosine similarity: each image is looked for among all others.

    R@1: how often the most similar image has its class. mAP@R (Musgrave et al., 2020,
    https://arxiv.org/abs/2003.08505): of an image with R others of its class, the precisions at those of the first R
    places that have it, divided by R. Images without others of their class do not count.
    """
    features, counts = F.normalize(features, dim=1), torch.bincount(labels)[labels] - 1
    first, total = [], []
    for start in range(0, len(features), 1024):
        rows = torch.arange(start, min(start + 1024, len(features)), device=features.device)
        similarity = features[rows] @ features.T
        similarity[torch.arange(len(rows), device=features.device), rows] = -torch.inf
        places = similarity.topk(max(1, min(int(counts.max()), len(features) - 1)), dim=1).indices
        hits = (labels[places] == labels[rows, None]).double()
        place = torch.arange(1, hits.shape[1] + 1, device=features.device)
        within = place <= counts[rows, None]
        first.append(hits[:, 0])
        total.append((hits * within * hits.cumsum(1) / place).sum(1) / counts[rows].clamp(min=1))
    counted = counts > 0
    return [100 * float(torch.cat(values)[counted].mean()) for values in (first, total)]


def ood_metrics(val_logits, id_logits, ood_logits):
    """How a classifier's confidence, its largest softmax probability, separates ood images; logits [n, num_classes].

    Mean confidence on id and on ood images and their difference; and for telling validation images, which no one
    was trained on, from ood images: AUROC (%), and the fraction (%) of ood images that are taken for validation
    images at the threshold where 95 % of these are (Hendrycks and Gimpel, 2017, https://arxiv.org/abs/1610.02136).
    Without ood images, None, the confidence on id images alone.
    """
    val, id, ood = (None if logits is None else logits.double().softmax(1).amax(1).cpu()
                    for logits in (val_logits, id_logits, ood_logits))
    if ood is None:
        return {'confidence_id': id.mean().item()}
    from sklearn.metrics import roc_auc_score, roc_curve  # here, since it takes a second
    truth, scores = torch.cat([torch.ones(len(val)), torch.zeros(len(ood))]), torch.cat([val, ood])
    false_positive_rate, true_positive_rate, _ = roc_curve(truth, scores, drop_intermediate=False)
    return {'confidence_id': id.mean().item(), 'confidence_ood': ood.mean().item(),
            'confidence_difference': (id.mean() - ood.mean()).item(),
            'auroc': 100 * float(roc_auc_score(truth, scores)),
            'fpr95': 100 * float(false_positive_rate[(true_positive_rate >= 0.95).argmax()])}


def ood_report(values):
    """The line for a dict of ood_metrics."""
    line = f"confidence id {values['confidence_id']:.3f}"
    return line if 'auroc' not in values else (
        f"{line} ood {values['confidence_ood']:.3f} difference {values['confidence_difference']:.3f} "
        f"AUROC {values['auroc']:.2f} FPR95 {values['fpr95']:.2f}")


@torch.no_grad()
def knn_accuracy(memory, memory_labels, features, labels, k=200, temperature=0.1):
    """Top-1 accuracy (%) of the weighted k-nearest-neighbor classifier.

    Each of the k most cosine-similar of memory [n, dim] votes for its class with exp(similarity / temperature)
    (Wu et al., 2018, https://arxiv.org/abs/1805.01978). Of several processes, which all have all features,
    each classifies a slice.
    """
    mine = local_slice(len(labels))
    n_total, features, labels = len(labels), features[mine], labels[mine]
    memory, features = F.normalize(memory, dim=1), F.normalize(features, dim=1)
    num_classes = int(memory_labels.max()) + 1
    correct = torch.zeros((), dtype=torch.long, device=features.device)
    for part, target in zip(features.split(1024), labels.split(1024)):
        similarity, nearest = (part @ memory.T).topk(min(k, len(memory)), dim=1)
        votes = torch.zeros(len(part), num_classes, device=part.device)
        votes.scatter_add_(1, memory_labels[nearest], (similarity / temperature).exp())
        correct += (votes.argmax(1) == target).sum()
    return 100 * int(all_reduce_sum(correct)) / n_total


@torch.no_grad()
def knn_map(memory, memory_labels, features, labels, k=200, temperature=0.1):
    """mAP (%) of the weighted k-nearest-neighbor classifier for images with several labels [n, C], all in each process.

    The score of a class is the weight of the neighbors that have it, divided by that of all; else as knn_accuracy.
    """
    memory, scores = F.normalize(memory, dim=1), []
    for part in F.normalize(features, dim=1).split(256):
        similarity, nearest = (part @ memory.T).topk(min(k, len(memory)), dim=1)
        weights = (similarity / temperature).softmax(1)
        scores.append((weights[..., None] * memory_labels[nearest]).sum(1))
    return mean(average_precisions(torch.cat(scores), labels).values())


def average_precisions(scores, labels):
    """{class: its average precision, %} of scores [n, C] that rank all images for each class, and labels [n, C] of 0
    and 1; a class without images has none."""
    from sklearn.metrics import average_precision_score
    scores, labels = scores.double().cpu().numpy(), labels.cpu().numpy() > 0
    return {c: 100 * float(average_precision_score(labels[:, c], scores[:, c]))
            for c in range(labels.shape[1]) if labels[:, c].any()}


def multi_label_scores(logits, labels):
    """How logits [n, C] find labels [n, C] of 0 and 1, %: {'mAP', 'F1_micro', 'F1_macro'} and {class: AP}.

    mAP is the mean of average_precisions. F1 is of what has a probability above 0.5: of the labels of all classes
    together, and the mean over classes.
    """
    from sklearn.metrics import f1_score
    precisions = average_precisions(logits, labels)
    predicted, truth = logits.cpu().numpy() > 0, labels.cpu().numpy() > 0
    f1 = {f'F1_{kind}': 100 * float(f1_score(truth, predicted, average=kind, zero_division=0))
          for kind in ('micro', 'macro')}
    return {'mAP': mean(precisions.values()), **f1}, precisions
