"""Meters and accuracies."""
import math

import torch
from torch.nn import functional as F

from util.distributed import all_reduce_sum, global_mean, local_slice
from util.errors import UserError


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


def check_finite(losses, epoch, step):
    """Stop with a clear error when a loss was not finite; losses is the epoch's AverageMeter."""
    if not math.isfinite(losses.avg):
        raise UserError(f'the loss is {losses.avg} on average up to epoch {epoch}, step {step}, expected a finite '
                        'number: try a lower --learning_rate or --warm')


def accuracy(output, target):
    """Top-1 accuracy (%) of logits [bsz, num_classes] for classes [bsz], over all processes: a scalar tensor.

    For label distributions [bsz, num_classes], the mean fraction (%) of the predicted class.
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
def feature_spread(features):
    """Mean squared distance of features [bsz, n_views, dim] of unit length from their mean: a scalar tensor.

    0 where all features are the same, 1 where they point in all directions; with several processes of this one's.
    """
    features = features.detach().flatten(0, 1).float()
    return (features - features.mean(0)).square().sum(1).mean()


def ood_metrics(val_logits, id_logits, ood_logits):
    """How a classifier's confidence, its largest softmax probability, separates ood images; logits [n, num_classes].

    Mean confidence on id and on ood images and their difference; and for telling validation images, which no one
    was trained on, from ood images: AUROC (%), and the fraction (%) of ood images that are taken for validation
    images at the threshold where 95 % of these are (Hendrycks and Gimpel, 2017, https://arxiv.org/abs/1610.02136).
    """
    from sklearn.metrics import roc_auc_score, roc_curve
    val, id, ood = (logits.softmax(1).amax(1).double().cpu() for logits in (val_logits, id_logits, ood_logits))
    truth, scores = torch.cat([torch.ones(len(val)), torch.zeros(len(ood))]), torch.cat([val, ood])
    false_positive_rate, true_positive_rate, _ = roc_curve(truth, scores, drop_intermediate=False)
    return {'confidence_id': id.mean().item(), 'confidence_ood': ood.mean().item(),
            'confidence_difference': (id.mean() - ood.mean()).item(),
            'auroc': 100 * float(roc_auc_score(truth, scores)),
            'fpr95': 100 * float(false_positive_rate[(true_positive_rate >= 0.95).argmax()])}


def ood_report(values):
    """The line for a dict of ood_metrics."""
    return (f"confidence id {values['confidence_id']:.3f} ood {values['confidence_ood']:.3f} difference "
            f"{values['confidence_difference']:.3f} AUROC {values['auroc']:.2f} FPR95 {values['fpr95']:.2f}")


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
