"""Supervised contrastive losses in memory linear in the number of views. The file needs only torch: copy it anywhere.

For anchors z_i, contrasts z_j, similarities s_ij = z_i . z_j / temperature, allowed contrasts A(i) (never z_i itself),
positives P(i) and negatives N(i) = A(i) without P(i):

    L_i  = logsumexp_{j in A(i)} s_ij  -  mean_{p in P(i)} s_ip
    loss = temperature / base_temperature * mean_i L_i

- SupCon: P(i) holds the other views of all images with i's label
  (Khosla et al., 2020, https://arxiv.org/abs/2004.11362, Eq. 2).
- SimCLR: P(i) holds the other views of the same image
  (Chen et al., 2020, https://arxiv.org/abs/2002.05709, Eq. 1).
- SupCon's Eq. 3: L_i = logsumexp_{j in A(i)} s_ij  -  logsumexp_{p in P(i)} s_ip  +  log |P(i)|.
- SINCERE: L_i = mean_{p in P(i)} [log(exp(s_ip) + sum_{j in N(i)} exp(s_ij)) - s_ip]
  (Feeney and Hughes, 2023, https://arxiv.org/abs/2309.14277).
- DCL: L_i = logsumexp_{j in N(i)} s_ij  -  mean_{p in P(i)} s_ip
  (Yeh et al., 2021, https://arxiv.org/abs/2110.06848).
- BCL: SupCon with exp(s_ij) / (number of contrasts of j's class) in the first term and a prototype of each class
  among the contrasts (Zhu et al., 2022, https://arxiv.org/abs/2207.09052).
- GenSCL: labels are distributions y_i over the classes, and the mean is weighted with w_ij = cos(y_i, y_j)
  (Kim et al., 2022, https://arxiv.org/abs/2206.00384).
- Hard negatives: near-out-of-distribution images made from class c carry the label -(c + 1). They are no anchors,
  nobody's positives, and in A(i) only for anchors of class c.
- Several processes (torch.distributed): each has a slice of the batch. Its views are anchors, the views of all
  processes are contrasts, and each gets the loss of the whole batch.

`reference_loss` is the formula with N x N matrices. The losses need none: they compute blocks of rows, and each block
again in the backward pass. Where the second term is a plain mean, class sums are enough for it: mean_{p in P(i)} s_ip =
z_i . (class sum - z_i) / (count - 1) / temperature, and for GenSCL with unit vectors u_i = y_i / |y_i| the weighted sum
is z_i . M u_i / temperature, M = sum_j z_j u_j^T [dim, C].
"""
import contextlib
import functools
import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

# ----------------------------------------------------- The losses -----------------------------------------------------


class _ContrastiveLoss(nn.Module):
    """The settings of all losses."""

    def __init__(self, temperature: float = 0.07, contrast_mode: str = 'all', base_temperature: float = 0.07):
        super().__init__()
        _check('contrast_mode', contrast_mode, ('all', 'one'))
        for name, value in (('temperature', temperature), ('base_temperature', base_temperature)):
            if not (isinstance(value, numbers.Real) and 0 < value < math.inf):
                raise ValueError(f'{name} is {value!r}, expected a number above 0')
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature


def _check(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, allowed))}")


def _check_shapes(features, labels):
    if features.dim() < 3:
        raise ValueError(f'features are {list(features.shape)}, expected [bsz, n_views, ...]')
    bsz = len(features)
    if labels is not None and labels.shape not in ((bsz,), (bsz, 1)):
        raise ValueError(f'labels are {list(labels.shape)}, expected [{bsz}] for features '
                         f'{list(features.flatten(2).shape)}')


class SupConLoss(_ContrastiveLoss):
    """Supervised contrastive loss (SupCon), and without labels the SimCLR loss.

        criterion = SupConLoss(temperature=0.1)
        loss = criterion(features, labels)                          # SupCon
        loss = criterion(features)                                  # SimCLR

        criterion = SupConLoss(temperature=0.1, denominator_mode='one_positive')
        loss = criterion(features, labels)                          # SINCERE

        criterion = SupConLoss(temperature=0.1, denominator_mode='only_negatives')
        loss = criterion(features)                                  # DCL; with labels its supervised form

        criterion = SupConLoss(temperature=0.1, hard_negatives=True)
        loss = criterion(features, labels)                          # SupCon, hard negatives among the labels
        loss = criterion(features, labels, positives='image')       # SimCLR, hard negatives among the labels

    Args:
        temperature: divides the similarities; a number. To learn the temperature t, pass features / sqrt(t), and 1
            here.
        contrast_mode: 'all': every view is an anchor; 'one': only the first view of each image is.
            The contrasts are all views of all images in both modes.
        base_temperature: the loss is multiplied by temperature / base_temperature; 1 multiplies by the temperature.
        summation_location: 'out': mean over the positives of log(exp(s_ip) / D_ip), Eq. 2 of the paper; 'in': the log
            of that mean, Eq. 3.
        denominator_mode: what D_ip sums exp(s_ij) over: 'all' of A(i); 'one_positive': the negatives (A(i) without
            P(i)) and p; 'only_negatives': the negatives.
        positives_cap: at most this many positives of other images, a multiple of the number of views, of which a key is
            one: those that come first in the batch, with all their views. The other ones leave A(i) too. -1: all.
        hard_negatives: whether negative labels -(c + 1) mark hard negatives of class c; if not, they are an error.
        unit_length: whether all features have unit length, as F.normalize makes them. With more than 4,096 views a GPU
            then computes half of the symmetric matrix of similarities. A CPU does so where it finds the features short
            enough; finding out would make the host wait for a GPU.
    """

    def __init__(self, temperature: float = 0.07, contrast_mode: str = 'all', base_temperature: float = 0.07,
                 summation_location: str = 'out', denominator_mode: str = 'all', positives_cap: int = -1,
                 hard_negatives: bool = False, unit_length: bool = False):
        super().__init__(temperature, contrast_mode, base_temperature)
        _check('summation_location', summation_location, ('out', 'in'))
        _check('denominator_mode', denominator_mode, ('all', 'one_positive', 'only_negatives'))
        if positives_cap < -1:
            raise ValueError(f'positives_cap is {positives_cap}, expected -1 or more')
        self.summation_location = summation_location
        self.denominator_mode = denominator_mode
        self.positives_cap = positives_cap
        self.hard_negatives = hard_negatives
        self.unit_length = unit_length

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None,
                positives: str = 'class', keys: Tensor | None = None, key_labels: Tensor | None = None,
                sizes: list[int] | None = None) -> Tensor:
        """Compute the loss of one batch; float16 and bfloat16 features are computed in float32.

        Where torch.distributed has several processes, all of them call this, each with its slice of the batch, which
        may be empty. Each gets the loss of the whole; averaged over them, as DistributedDataParallel does, the
        gradients are those of one process with the whole batch.

        Args:
            features: [bsz, n_views, ...], normally of unit length; dimensions after the second are flattened.
            labels: [bsz] class of each image; with hard_negatives, -(c + 1) for one made from class c.
            mask: [bsz, bsz] weights >= 0 instead of labels: mask[i, j] is how much image j is a positive of
                image i. May be asymmetric; gets no gradient. With several processes [bsz, images of all].
            positives: 'class': the views of an anchor's class are its positives; 'image': only those of its image, as
                without labels, and labels only decide which hard negatives an anchor sees.
            keys: [n_keys, dim] contrasts instead of the features, as of a momentum encoder: the first bsz belong to the
                images of the batch, the others to earlier ones (He et al., 2020, https://arxiv.org/abs/1911.05722).
                All processes have the same, of the whole batch.
            key_labels: [n_keys] their labels, needed with labels. -(c + 1), always allowed here, shows a key to anchors
                of class c alone.
            sizes: how many images each process has, where that is known; None: gathered from all processes.

        Returns:
            A scalar. An anchor without positives (with 'only_negatives', also one without negatives) adds 0 and still
            counts in the mean.

        Raises:
            ValueError: wrong shapes (both are named) or sizes, labels and mask together, unknown positives, or negative
                labels without hard_negatives. On a GPU, which is not waited for, the last is a failed device-side
                assertion, and so are longer features with unit_length.
        """
        _check_shapes(features, labels)
        sizes = _all_sizes(len(features), sizes)
        self._check_arguments(features, labels, mask, positives, keys, key_labels, n_total=sum(sizes))
        features = _at_least_float32(features.flatten(2))
        anchors, contrasts, self_index = _views(features, labels, sizes, self.contrast_mode, self.hard_negatives)
        if keys is not None:
            contrasts = _views_of_keys(keys.to(features.dtype), key_labels)
            self_index = None                                           # no anchor is among them
        source_class = None
        if self.hard_negatives or key_labels is not None:
            source_class = _source_class(contrasts.labels)
        eq_2 = (self.summation_location, self.denominator_mode, self.positives_cap) == ('out', 'all', -1)

        with _full_precision(features.device):
            if eq_2 and mask is None:
                log_denominator = _log_sum_exp(anchors.z, contrasts.z, self.temperature, self_index, self.unit_length,
                                               anchors.labels, source_class)
                mean_positive, has_positives = _mean_positive(anchors, contrasts, positives, self_index)
                losses = torch.where(has_positives, log_denominator - mean_positive / self.temperature, 0)
            else:
                pairs = _Pairs(anchors, contrasts, self_index, positives, source_class, self.positives_cap)
                losses = _RowLosses.apply(anchors.z, contrasts.z, mask, pairs, self.temperature,
                                          self.summation_location, self.denominator_mode)
            loss = _global_mean(losses, anchors.labels >= 0)
        return loss * (self.temperature / self.base_temperature)

    def _check_arguments(self, features, labels, mask, positives, keys, key_labels, n_total):
        _check('positives', positives, ('class', 'image'))
        bsz, n_views, dim = features.flatten(2).shape
        of_features = f'for features {list(features.shape)}'
        if mask is not None and (labels is not None or keys is not None):
            raise ValueError(f"{'labels' if keys is None else 'keys'} and mask are both given, expected at most one")
        if mask is not None and mask.shape != (bsz, n_total):
            raise ValueError(f'mask is {list(mask.shape)}, expected [{bsz}, {n_total}] {of_features}')
        if keys is not None and (keys.dim() != 2 or len(keys) < n_total or keys.shape[1] != dim):
            raise ValueError(f'keys are {list(keys.shape)}, expected [{n_total} or more, {dim}] {of_features}')
        if keys is not None and (labels is None) != (key_labels is None) or (
                key_labels is not None and key_labels.shape != keys.shape[:1]):
            raise ValueError('key_labels are expected with keys and labels, one for each key')
        if keys is None and self.positives_cap > 0 and self.positives_cap % n_views:
            raise ValueError(f'positives_cap is {self.positives_cap}, expected a multiple of {n_views}, the views')


class BalancedSupConLoss(_ContrastiveLoss):
    """Balanced contrastive loss (BCL) for classes of unequal sizes.

        criterion = BalancedSupConLoss(temperature=0.1, base_temperature=0.1)
        loss = criterion(features, labels, prototypes)

    SupCon whose denominator is sum_{j in A(i)} exp(s_ij) / n_ij: n_ij is how many contrasts have j's class, the anchor
    itself not counted, so that each class adds the mean of its exponentials. The contrasts are the views and a
    prototype of each class, a positive of its class (Zhu et al., 2022, https://arxiv.org/abs/2207.09052).

    Args:
        temperature, contrast_mode, base_temperature: as for SupConLoss; 0.1 and 0.1 is the published form.
    """

    def forward(self, features: Tensor, labels: Tensor, prototypes: Tensor | None = None,
                sizes: list[int] | None = None) -> Tensor:
        """Compute the loss of one batch; float16 and bfloat16 features are computed in float32.

        Args:
            features, labels, sizes: as for SupConLoss.
            prototypes: [C, dim], row c is of class c, normally of unit length; they get gradients. All processes have
                the same, which count once. None: the contrasts are the views alone.

        Returns:
            A scalar. An anchor without positives adds 0 and still counts in the mean.

        Raises:
            ValueError: wrong shapes or sizes, or labels that are negative or have no prototype; on a GPU, which is not
                waited for, the last two are a failed device-side assertion.
        """
        _check_shapes(features, labels)
        sizes = _all_sizes(len(features), sizes)
        features = _at_least_float32(features.flatten(2))
        anchors, contrasts, self_index = _views(features, labels, sizes, self.contrast_mode, False)
        if prototypes is not None:
            if prototypes.dim() != 2 or prototypes.shape[1] != features.shape[2]:
                raise ValueError(f'prototypes are {list(prototypes.shape)}, expected [C, {features.shape[2]}] for '
                                 f'features {list(features.shape)}')
            _check_labels(contrasts.labels, contrasts.labels < len(prototypes),
                          f'labels are too large, expected less than {len(prototypes)}, the prototypes')
            classes = torch.arange(len(prototypes), device=features.device)
            contrasts = contrasts._replace(z=torch.cat([contrasts.z, prototypes.to(features.dtype)]),
                                           labels=torch.cat([contrasts.labels, classes]))
        numbers = _numbered(contrasts.labels)
        ones = torch.ones_like(contrasts.z[:, 0])
        class_sizes = torch.zeros_like(ones).index_add(0, numbers, ones)[numbers]
        with _full_precision(features.device):
            pairs = _Pairs(anchors, contrasts, self_index, class_sizes=class_sizes)
            losses = _RowLosses.apply(anchors.z, contrasts.z, None, pairs, self.temperature)
            loss = _global_mean(losses)
        return loss * (self.temperature / self.base_temperature)


class GenSupConLoss(_ContrastiveLoss):
    """Generalized supervised contrastive loss (GenSCL): the labels are distributions over the classes.

        criterion = GenSupConLoss(temperature=0.1)
        loss = criterion((features_1, features_2), (labels_1, labels_2))

    A positive weighs as much as the cosine similarity of its label distribution with the anchor's; for one-hot labels
    this is SupConLoss (Kim et al., 2022, https://arxiv.org/abs/2206.00384).

    Args:
        temperature, base_temperature, unit_length: as for SupConLoss.
        contrast_mode: 'all': the views of both groups are anchors and contrasts, none is its own contrast; 'one': the
            first group are the anchors and the second the contrasts.
    """

    def __init__(self, temperature: float = 0.07, contrast_mode: str = 'all', base_temperature: float = 0.07,
                 unit_length: bool = False):
        super().__init__(temperature, contrast_mode, base_temperature)
        self.unit_length = unit_length

    def forward(self, features: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor],
                teacher: tuple[Tensor, Tensor] | None = None, alpha: float = 1.,
                sizes: list[int] | None = None) -> Tensor:
        """Compute the loss of one batch; float16 and bfloat16 features are computed in float32.

        Args:
            features: two groups of views, each [N, dim], normally of unit length.
            labels: their label distributions, each [N, C] of numbers >= 0. Integers are allowed; only the direction of
                a row counts.
            teacher: label distributions too, those of a teacher; alpha times their loss is added. The log-sum-exp, the
                same in both, is computed once.
            sizes: as for SupConLoss, the N of each process.

        Returns:
            A scalar. An anchor whose positives weigh 0 in sum (less than 1e-9) adds 0 and still counts in the mean.

        Raises:
            ValueError: wrong shapes (all are named) or sizes. On a GPU longer features with unit_length are a failed
                device-side assertion.
        """
        targets = [(1., labels)] if teacher is None else [(1., labels), (alpha, teacher)]
        for _, target in targets:
            self._check_shapes(features, target)
        features = [_at_least_float32(part) for part in features]
        sizes = _all_sizes(len(features[0]), sizes)
        anchors, contrasts, self_index = self._split(features, sizes)
        with _full_precision(anchors.device):
            log_denominator = _log_sum_exp(anchors, contrasts, self.temperature, self_index, self.unit_length)
            exact = anchors.double(), contrasts.double()
            loss = 0.
            for weight, target in targets:
                u, v, _ = self._split([F.normalize(part.double(), dim=1) for part in target], sizes)
                sum_positive, has_positives = self._sum_positive(*exact, u, v)
                sum_of_losses = torch.where(has_positives, log_denominator, 0).sum() - sum_positive / self.temperature
                loss = loss + weight * sum_of_losses
            loss = _all_reduce_sum(loss) / max(1, len(contrasts))               # as many as all processes' anchors
        return loss.to(anchors.dtype) * (self.temperature / self.base_temperature)

    @staticmethod
    def _check_shapes(features, labels):
        shapes = [list(tensor.shape) for tensor in (*features, *labels)]
        of_labels = [shapes[0][0], shapes[-1][-1]]
        if any(len(shape) != 2 for shape in shapes) or shapes != [shapes[0], shapes[0], of_labels, of_labels]:
            raise ValueError(f'features are {shapes[:len(features)]} and labels {shapes[len(features):]}, expected two '
                             'of the same [N, dim] and two of the same [N, C]')

    def _split(self, groups, sizes):
        """Two groups [N, ...] -> anchors [n, ...], contrasts [m, ...], which contrast each anchor is ([n], or None)."""
        if self.contrast_mode == 'all':
            return _anchors_and_contrasts(torch.stack(groups, 1), sizes)
        return groups[0], _gather(groups[1], sizes), None

    def _sum_positive(self, anchors, contrasts, u, v):
        """sum_i sum_j w_ij z_i . z_j / sum_j w_ij, a scalar, and whether sum_j w_ij > 0: [n]; w_ij = u_i . v_j.

        In float64, since what an anchor adds to its own sums is subtracted again: the rest may be small.
        """
        w_self = u.square().sum(1) if self.contrast_mode == 'all' else torch.zeros_like(u[:, 0])
        w_sum = u @ v.sum(0) - w_self
        has_positives = w_sum > 1e-9
        scale = torch.where(has_positives, 1 / w_sum, 0)
        m_contrasts = contrasts.T @ v                                           # [dim, C]
        m_anchors = anchors.T @ (scale[:, None] * u)                            # [dim, C]
        of_self = (scale * w_self) @ anchors.square().sum(1)
        return (m_contrasts * m_anchors).sum() - of_self, has_positives


@torch.no_grad()
def contrastive_accuracy(features: Tensor, labels: Tensor | None = None, positives: str = 'class',
                         hard_negatives: bool = False, sizes: list[int] | None = None) -> Tensor:
    """Percentage of anchors whose most similar other view in the batch is a positive; a scalar.

    features [bsz, n_views, dim], labels [bsz], positives, hard_negatives and sizes as for SupConLoss; or label
    distributions [bsz, n_views, C], then the mean weight (%) of the most similar view. It rises from chance as
    pretraining learns.
    With several processes as SupConLoss: of the whole batch.
    """
    _check('positives', positives, ('class', 'image'))
    features = features.float()
    sizes = _all_sizes(len(features), sizes)
    if labels is not None and labels.dim() == 3:
        anchors, contrasts, self_index = _anchors_and_contrasts(features, sizes)
        u, v, _ = _anchors_and_contrasts(F.normalize(labels, dim=2), sizes)
        return 100 * _global_mean((u * v[_nearest(anchors, contrasts, self_index)]).sum(1))
    anchors, contrasts, self_index = _views(features, labels, sizes, 'all', hard_negatives)
    source_class = _source_class(contrasts.labels) if hard_negatives else None
    nearest = _nearest(anchors.z, contrasts.z, self_index, anchors.labels, source_class)
    hits = anchors.ids(positives) == contrasts.ids(positives)[nearest]
    return 100 * _global_mean(hits.float(), anchors.labels >= 0)


# ---------------------------------------------- Reference implementation ----------------------------------------------


def reference_loss(anchors: Tensor, contrasts: Tensor, weights: Tensor, allowed: Tensor, temperature: float = 0.07,
                   summation_location: str = 'out', denominator_mode: str = 'all',
                   log_weights: Tensor | float = 0.) -> Tensor:
    """The loss L_i of each anchor as the formula is written, with n x m matrices: [n].

    Nothing here calls it: tests and benchmarks compare the losses with it. The loss of a batch z [N, dim] with labels
    [N] is the mean of

        not_self = ~torch.eye(N, dtype=torch.bool)
        reference_loss(z, z, (labels[:, None] == labels) & not_self, not_self)

    Args:
        anchors: z_i, [n, dim].
        contrasts: z_j, [m, dim].
        weights: w_ij, [n, m]: above 0 where j is in P(i), else 0. Booleans count as 1 and 0.
        allowed: [n, m] booleans: whether j is in A(i).
        temperature, summation_location, denominator_mode: as for SupConLoss.
        log_weights: b_ij, [n, m]: the denominator sums exp(s_ij + b_ij).
    """
    similarity = anchors @ contrasts.T / temperature                                    # s_ij
    weights = weights.to(similarity.dtype)
    sum_of_weights = weights.sum(1)
    valid = sum_of_weights > 0                                                          # other anchors have the loss 0
    if denominator_mode == 'all':
        log_denominator = _masked_logsumexp(similarity + log_weights, allowed)          # [n, 1]
    else:
        negatives = allowed & (weights == 0)
        log_denominator = _masked_logsumexp(similarity + log_weights, negatives)        # [n, 1]
        if denominator_mode == 'one_positive':
            log_denominator = torch.logaddexp(similarity, log_denominator)              # [n, m]
        else:
            valid = valid & negatives.any(1)
    log_prob = similarity - torch.where(valid[:, None], log_denominator, 0)             # log(exp(s_ij) / D_ij)
    sum_of_weights = sum_of_weights.clamp(min=torch.finfo(similarity.dtype).tiny)
    if summation_location == 'out':                                                     # mean of the log
        losses = -(weights * log_prob).sum(1) / sum_of_weights
    else:                                                                               # log of the mean
        log_sum = _masked_logsumexp(log_prob + weights.clamp(min=1e-30).log(), weights > 0)[:, 0]
        losses = sum_of_weights.log() - log_sum
    return torch.where(valid, losses, 0)


def _masked_logsumexp(logits, mask):
    """log of the sum of exp(logits) where mask is True: [n, m] -> [n, 1]; -inf, without gradient, for an empty row."""
    some = mask.any(1, keepdim=True)
    result = logits.masked_fill(~mask & some, -torch.inf).logsumexp(1, keepdim=True)
    return torch.where(some, result, -torch.inf)


# ---------------------------------------- Views: the anchors and the contrasts ----------------------------------------


class _Views(NamedTuple):
    """Views of images, view after view: first all first views, then all second ones."""
    z: Tensor               # [n, dim]
    images: Tensor          # [n] the number of their image in the whole batch
    labels: Tensor          # [n] their label; the number again where there are no labels, so that each image is a class
    n_views: int            # how many there are of each image

    def ids(self, positives):
        """What the positives of a view share with it, [n]."""
        return self.labels if positives == 'class' else self.images


def _views(features, labels, sizes, contrast_mode, hard_negatives):
    """-> anchors of this process and contrasts of all processes (_Views); which contrast each anchor is, [n]."""
    n_views = features.shape[1]
    images = torch.arange(sum(sizes), device=features.device)
    if labels is None:
        labels = images
    else:
        labels = _gather(labels.flatten(), sizes)
        if not hard_negatives:
            _check_labels(labels, labels >= 0, 'labels are negative, expected classes from 0 on, or '
                          'hard_negatives=True and -(c + 1) for class c')
    z, all_z, self_index = _anchors_and_contrasts(features, sizes, contrast_mode)
    contrasts = _Views(all_z, images.repeat(n_views), labels.repeat(n_views), n_views)
    n_anchor_views = n_views if contrast_mode == 'all' else 1
    return _Views(z, contrasts.images[self_index], contrasts.labels[self_index], n_anchor_views), contrasts, self_index


def _views_of_keys(keys, labels):
    """Each key is the one view of an image; the first ones are of the images of the batch."""
    images = torch.arange(len(keys), device=keys.device)
    # A copy, since a queue may take new labels before the backward pass.
    return _Views(keys, images, images if labels is None else labels.clone(), 1)


def _anchors_and_contrasts(x, sizes, contrast_mode='all'):
    """Anchors and contrasts among x [bsz, n_views, dim] of this process, of `sizes` in all of them.

    -> anchors [n, dim] of this process, view after view; contrasts, the views [n_views * sum(sizes), dim] of all
    processes, view after view; and self_index [n]: which of these each anchor is.
    """
    bsz, n_views = x.shape[:2]
    contrasts = _gather(x, sizes).transpose(0, 1).flatten(0, 1)
    n_anchor_views = n_views if contrast_mode == 'all' else 1
    anchors = x[:, :n_anchor_views].transpose(0, 1).flatten(0, 1)
    images = torch.arange(bsz, device=x.device) + sum(sizes[:_rank()])
    self_index = sum(sizes) * torch.arange(n_anchor_views, device=x.device)[:, None] + images
    return anchors, contrasts, self_index.flatten()


def _at_least_float32(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@contextlib.contextmanager
def _full_precision(device):
    """Similarities are divided by the temperature, and need float32: no autocast, and neither TF32 nor bfloat16 in its
    place, where torch.set_float32_matmul_precision or an environment variable (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, set in
    some containers) allows them."""
    backends, name, exact = [torch.backends.cuda, torch.backends.mkldnn], 'fp32_precision', 'ieee'
    if not hasattr(torch.backends.cuda.matmul, name):                   # PyTorch before 2.9
        backends, name, exact = [torch.backends.cuda], 'allow_tf32', False
    before = {backend.matmul: getattr(backend.matmul, name) for backend in backends}
    lower = {matmul: value for matmul, value in before.items() if value not in ('none', exact)}
    for matmul in lower:
        setattr(matmul, name, exact)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for matmul, value in lower.items():
            setattr(matmul, name, value)


def _once_differentiable(backward):
    """Marks a backward pass whose own derivative is not computed: to ask for it is an error. With PyTorch's decorator
    of this name it is silently 0 where the gradient that comes in is a constant, as that of a loss is."""
    @functools.wraps(backward)
    def first_derivatives(ctx, *gradients):
        if torch.is_grad_enabled():                                     # with create_graph=True alone
            raise RuntimeError('this loss has no second derivatives (create_graph=True); reference_loss has')
        return backward(ctx, *gradients)
    return first_derivatives


def _check_labels(labels, valid, message):
    """Labels that are not valid are an error: at once on a CPU; a GPU is not waited for, it stops at its next use."""
    if labels.is_cuda:
        torch._assert_async(valid.all(), message)
    elif not valid.all():
        raise ValueError(f'{message}; found {labels[~valid][0].item()}')


def _source_class(labels):
    """For a hard negative the class it was made from, whose anchors alone it is a contrast of; -1 for other contrasts:
    [m]; None where a CPU finds no hard negative."""
    if labels.device.type == 'cpu' and bool((labels >= 0).all()):
        return None
    return torch.where(labels >= 0, -1, -labels.long() - 1)             # labels may be uint8


# ---------------------------------------- Mean over the positives: class sums -----------------------------------------


def _mean_positive(anchors, contrasts, positives, self_index):
    """The mean of z_i . z_j over j in P(i), and whether there is any: [n] each.

    Views with the same id have the same positives, but for themselves: one sum for each id is enough.
    """
    ids = contrasts.ids(positives)
    if self_index is None:
        ids = torch.cat([ids, anchors.ids(positives)])
    ids = _numbered(ids)
    anchor_ids = ids[len(contrasts.z):] if self_index is None else ids[self_index]
    contrast_ids = ids[:len(contrasts.z)]

    in_distribution = (contrasts.labels >= 0).to(contrasts.z.dtype)
    counts = in_distribution.new_zeros(len(ids)).index_add(0, contrast_ids, in_distribution)
    sums = contrasts.z.new_zeros(len(ids), contrasts.z.shape[1])
    sums = sums.index_add(0, contrast_ids, contrasts.z * in_distribution[:, None])
    counts = counts[anchor_ids]
    # index_select, since the backward pass of sums[anchor_ids] adds in an order that changes from run to run on a CPU.
    sums = sums.index_select(0, anchor_ids)
    if self_index is not None:
        counts = counts - 1
        sums = sums - anchors.z
    return (anchors.z * sums).sum(1) / counts.clamp(min=1), counts > 0


def _numbered(ids):
    """Consecutive ids from 0, as torch.unique(ids, return_inverse=True)[1], without waiting for the device."""
    ordered, order = ids.sort()
    numbers = torch.diff(ordered, prepend=ordered[:1]).ne(0).cumsum(0)
    return torch.empty_like(numbers).scatter_(0, order, numbers)


# ------------------------------------------------ Blocked log-sum-exp -------------------------------------------------

# Similarities held at a time. 2**20 floats are 4 MB, which stay in the cache of a CPU; a batch of 512 images takes one
# block. 2**24 are 64 MB, small beside a network on a GPU, and work enough for each of its kernels. _RowLosses holds
# about six tensors of this size.
BLOCK = 2**20
BLOCK_CUDA = 2**24


def _log_sum_exp(anchors, contrasts, temperature, self_index, unit_length=False, labels=None, source_class=None):
    """log sum_{j in A(i)} exp(s_ij) for each anchor: [n]. Where s is symmetric, half of it is enough."""
    if self_index is not None and len(anchors) == len(contrasts) > 0 and source_class is None:      # the same views
        bound = _bound(anchors.detach(), temperature, unit_length)
        # exp(-2 bound) does not vanish, nor its inverse overflow, times the scale of a loss in mixed precision.
        if 2 * bound < -math.log(torch.finfo(anchors.dtype).tiny) - 25:
            return _SymmetricLogSumExp.apply(anchors, temperature, 0. if anchors.is_cuda else bound)
    return _LogSumExp.apply(anchors, contrasts, temperature, self_index, labels, source_class)


def _bound(z, temperature, unit_length):
    """What no |s_ij| exceeds; inf where it is not known. A GPU is not asked for it."""
    if not z.is_cuda:
        return (z.square().sum(1).amax() / temperature).item() if z.device.type == 'cpu' else math.inf
    if not unit_length or len(z) <= TILE_CUDA:                          # of one block there is no other half
        return math.inf
    longest = 1.01                                                      # float16 features, and rounding
    torch._assert_async(~(torch.linalg.vector_norm(z, dim=1).amax() > longest),         # nan is reported as the loss
                        f'features are longer than {longest}, expected unit length, or unit_length=False')
    return longest**2 / temperature


class _LogSumExp(torch.autograd.Function):
    """log sum_{j in A(i)} exp(anchors_i . contrasts_j / temperature) for each anchor i: [n].

    With `self_index` [n], A(i) leaves out the contrast self_index[i], which is anchor i. With `source_class`
    [n_contrasts] (-1, or the class whose anchors alone see the contrast) and `labels` [n], it also leaves out contrasts
    made from another class. Keeps only the n results and recomputes the similarities in the backward pass.
    """

    @staticmethod
    def forward(ctx, anchors, contrasts, temperature, self_index, labels, source_class):
        result = anchors.new_empty(len(anchors))
        for rows in _blocks(anchors, contrasts):
            logits = _logits(anchors, contrasts, rows, temperature, self_index, labels, source_class)
            torch.logsumexp(logits, 1, out=result[rows])
        # An anchor without contrasts has log 0 = -inf; any finite value in its place gives the gradient 0.
        finite = result.masked_fill(result == -torch.inf, 0)
        ctx.save_for_backward(anchors, contrasts, self_index, labels, source_class, finite)
        ctx.temperature = temperature
        return result

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad):
        anchors, contrasts, self_index, labels, source_class, result = ctx.saved_tensors
        grad = grad / ctx.temperature

        def grad_logits(rows):
            logits = _logits(anchors, contrasts, rows, ctx.temperature, self_index, labels, source_class)
            return logits.sub_(result[rows, None]).exp_().mul_(grad[rows, None])
        return *_gradients(anchors, contrasts, ctx.needs_input_grad[1], grad_logits), None, None, None, None


def _blocks(anchors, contrasts):
    """Slices of the anchors, as many as have BLOCK similarities."""
    step = max(1, (BLOCK_CUDA if anchors.is_cuda else BLOCK) // max(1, len(contrasts)))
    return [slice(i, min(i + step, len(anchors))) for i in range(0, len(anchors), step)]


def _gradients(anchors, contrasts, of_contrasts, grad_logits):
    """Gradients of anchors and contrasts (None where not needed, as by keys) from grad_logits(rows), [rows, m]."""
    grad_anchors = torch.empty_like(anchors)
    grad_contrasts = torch.zeros_like(contrasts) if of_contrasts else None
    with _full_precision(anchors.device):
        for rows in _blocks(anchors, contrasts):
            block = grad_logits(rows)
            torch.mm(block, contrasts, out=grad_anchors[rows])
            if of_contrasts:
                grad_contrasts.addmm_(block.T, anchors[rows])
    return grad_anchors, grad_contrasts


def _logits(anchors, contrasts, rows, temperature=1., self_index=None, labels=None, source_class=None):
    """s_ij of some anchors, -inf where j is not in A(i): [rows, n_contrasts]."""
    logits = (anchors[rows] / temperature) @ contrasts.T
    if self_index is not None:
        logits.scatter_(1, self_index[rows, None], -torch.inf)
    if source_class is not None:
        logits.masked_fill_((source_class >= 0) & (source_class != labels[rows, None]), -torch.inf)
    return logits


def _nearest(anchors, contrasts, self_index, labels=None, source_class=None):
    """The contrast in A(i) that is most similar to each anchor, [n]."""
    nearest = [_logits(anchors, contrasts, rows, 1., self_index, labels, source_class).argmax(1)
               for rows in _blocks(anchors, contrasts)]
    return torch.cat(nearest) if nearest else self_index


# ----------------------------------------------- Symmetric log-sum-exp ------------------------------------------------

# Side of the square blocks, in views: 512 to 1,024 are fastest on a CPU (benchmarks/README.md).
TILE = 1024
TILE_CUDA = 4096


class _SymmetricLogSumExp(torch.autograd.Function):
    """log sum_{j != i} exp(z_i . z_j / temperature) for each row of z [n, dim]: [n].

    The matrix E_ij = exp(s_ij - shift) is symmetric, so half of its blocks are computed, each for its rows and for its
    columns. The gradient with g_i of the results is sum_j E_ij (g_i / sum_i + g_j / sum_j) z_j / temperature.
    All |s_ij| have to be so small that, with 0 and their bound as the shift, no exponential overflows or vanishes.
    """

    @staticmethod
    def forward(ctx, z, temperature, shift):
        sums = z.new_zeros(len(z))
        for rows, columns, block in _SymmetricLogSumExp._blocks(z, temperature, shift):
            sums[rows].add_(block.sum(1))
            if rows != columns:
                sums[columns].add_(block.sum(0))
        ctx.save_for_backward(z, sums)
        ctx.temperature = temperature
        ctx.shift = shift
        return sums.log() + shift

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad):
        z, sums = ctx.saved_tensors
        scale = grad / sums.masked_fill(sums == 0, 1) / ctx.temperature         # a single row has no contrasts
        grad_z = torch.zeros_like(z)
        factors = z.new_empty(min(_SymmetricLogSumExp._side(z), len(z))**2)
        with _full_precision(z.device):
            for rows, columns, block in _SymmetricLogSumExp._blocks(z, ctx.temperature, ctx.shift):
                factor = factors[:block.numel()].view_as(block)
                block.mul_(torch.add(scale[rows, None], scale[columns], out=factor))
                grad_z[rows].addmm_(block, z[columns])
                if rows != columns:
                    grad_z[columns].addmm_(block.T, z[rows])
        return grad_z, None, None

    @staticmethod
    def _side(z):
        return TILE_CUDA if z.is_cuda else TILE

    @staticmethod
    def _blocks(z, temperature, shift):
        """The blocks of E on and above the diagonal, in one buffer: yields rows, columns, block."""
        scaled, side = z / temperature, _SymmetricLogSumExp._side(z)
        buffer = z.new_empty(min(side, len(z))**2)
        slices = [slice(i, min(i + side, len(z))) for i in range(0, len(z), side)]
        for number, rows in enumerate(slices):
            for columns in slices[number:]:
                shape = rows.stop - rows.start, columns.stop - columns.start
                block = torch.mm(scaled[rows], z[columns].T, out=buffer[:math.prod(shape)].view(shape))
                if rows == columns:
                    block.diagonal().fill_(-torch.inf)      # fill_diagonal_ cannot be compiled
                if shift:
                    block.sub_(shift)
                yield rows, columns, block.exp_()


# ------------------------------------------- Blocked losses of any setting --------------------------------------------


class _Pairs(NamedTuple):
    """What decides which contrasts are in P(i) and A(i), and their weights in the denominator."""
    anchors: _Views
    contrasts: _Views
    self_index: Tensor | None               # [n] the contrast that is the anchor
    positives: str = 'class'
    source_class: Tensor | None = None      # [m]
    positives_cap: int = -1
    class_sizes: Tensor | None = None       # [m] how many contrasts have the class of each

    def block(self, rows, mask):
        """w_ij, above 0 where j is in P(i), and whether j is in A(i), of some anchors: [rows, m] each."""
        anchors, contrasts = self.anchors, self.contrasts
        if mask is None:
            weights = anchors.ids(self.positives)[rows, None] == contrasts.ids(self.positives)
        else:
            images = torch.arange(rows.start, rows.stop, device=mask.device) % len(mask)
            weights = mask[images].repeat(1, contrasts.n_views)
        allowed = torch.ones_like(weights, dtype=torch.bool)
        if self.self_index is not None:
            weights.scatter_(1, self.self_index[rows, None], 0)
            allowed.scatter_(1, self.self_index[rows, None], False)
        if self.source_class is not None:
            in_distribution = self.source_class < 0
            weights = weights & in_distribution
            allowed &= in_distribution | (self.source_class == anchors.labels[rows, None])
        if self.positives_cap >= 0:
            of_others = weights.bool() & (contrasts.images != anchors.images[rows, None])
            rank = of_others.unflatten(1, (contrasts.n_views, -1))[:, 0].cumsum(1, dtype=torch.int32)
            beyond = of_others & (rank > self.positives_cap // contrasts.n_views).repeat(1, contrasts.n_views)
            weights = weights.masked_fill(beyond, 0)
            allowed &= ~beyond
        return weights, allowed


class _RowLosses(torch.autograd.Function):
    """L_i of each anchor for all settings of SupConLoss, pairs and mask [bsz, images]: [n].

    Computes the formula of reference_loss for a block of rows at a time; keeps n losses and n denominators. With
    q_ij = exp(s_ij + b_ij) / D_i and p_ij = w_ij / sum_j w_ij, for 'in' multiplied by exp(log_prob_ij + L_i),

        d L_i / d s_ij = q_ij sum_j p_ij - p_ij

    Where the positive is added to D_i ('one_positive'), log_prob_ij = log(exp(s_ij) / (exp(s_ij) + D_i)), and p_ij is
    multiplied by D_i / (exp(s_ij) + D_i).
    """

    @staticmethod
    def forward(ctx, anchors, contrasts, mask, pairs, temperature, location='out', denominator='all'):
        result = anchors.new_empty(len(anchors))
        log_denominators = torch.empty_like(result)
        plain = location == 'out' and denominator != 'one_positive'     # D_ip is the same for all p
        for rows in _blocks(anchors, contrasts):
            logits, p, left_out = _RowLosses._block(anchors, contrasts, rows, mask, pairs, temperature, denominator)
            if plain:
                mean_positive = torch.linalg.vecdot(p, logits)
            log_denominator = _RowLosses._terms(logits if plain else logits.clone(), p, left_out, pairs).logsumexp(1)
            if plain:
                losses = log_denominator - mean_positive
            else:
                log_prob = _RowLosses._log_prob(logits, log_denominator, denominator)
                losses = -((p * log_prob).sum(1) if location == 'out' else _RowLosses._log_mean_exp(log_prob, p))
            valid = p.sum(1) > 0
            if denominator != 'one_positive':
                valid &= log_denominator != -torch.inf
            result[rows] = torch.where(valid, losses, 0)
            # inf marks an anchor that adds 0. Without negatives any finite value that is small enough will do.
            log_denominator = log_denominator.clamp(min=torch.finfo(result.dtype).min)
            log_denominators[rows] = torch.where(valid, log_denominator, torch.inf)
        ctx.save_for_backward(anchors, contrasts, mask, result, log_denominators)
        ctx.settings = pairs, temperature, location, denominator
        return result

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad):
        anchors, contrasts, mask, result, log_denominators = ctx.saved_tensors
        pairs, temperature, location, denominator = ctx.settings
        grad = torch.where(log_denominators == torch.inf, 0, grad / temperature)
        plain = location == 'out' and denominator != 'one_positive'

        def grad_logits(rows):
            logits, p, left_out = _RowLosses._block(anchors, contrasts, rows, mask, pairs, temperature, denominator)
            log_denominator = log_denominators[rows]
            terms = _RowLosses._terms(logits if plain else logits.clone(), p, left_out, pairs)
            q = terms.sub_(log_denominator[:, None]).exp_()
            if not plain:
                if location == 'in':
                    log_prob = _RowLosses._log_prob(logits, log_denominator, denominator)
                    highest = math.log(torch.finfo(p.dtype).max) - 1            # only of contrasts with p_ij = 0
                    p.mul_(log_prob.add_(result[rows, None]).clamp_(max=highest).exp_())
                if denominator == 'one_positive':
                    p.mul_(torch.sigmoid(log_denominator[:, None] - logits))
                q.mul_(p.sum(1, keepdim=True))
            return q.sub_(p).mul_(grad[rows, None])
        return *_gradients(anchors, contrasts, ctx.needs_input_grad[1], grad_logits), None, None, None, None, None

    @staticmethod
    def _block(anchors, contrasts, rows, mask, pairs, temperature, denominator):
        """s_ij, w_ij / sum_j w_ij, and whether D_i leaves j out, of some anchors: [rows, m] each."""
        weights, allowed = pairs.block(rows, mask)
        left_out = ~allowed if denominator == 'all' else ~allowed | weights.bool()
        p = weights.to(anchors.dtype)
        p.div_(p.sum(1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny))
        return _logits(anchors, contrasts, rows, temperature), p, left_out

    @staticmethod
    def _terms(logits, p, left_out, pairs):
        """s_ij + b_ij, -inf where D_i leaves j out, in place of s_ij."""
        if pairs.class_sizes is not None:                               # the anchor itself does not count in its class
            logits.sub_(torch.where(p > 0, (pairs.class_sizes - 1).log(), pairs.class_sizes.log()))
        return logits.masked_fill_(left_out, -torch.inf)

    @staticmethod
    def _log_prob(logits, log_denominator, denominator):
        """log(exp(s_ij) / D_ij)."""
        x = logits - log_denominator[:, None]
        if denominator == 'one_positive':                               # F.logsigmoid takes 7 times as long on a CPU
            return torch.sigmoid(x.abs()).log_().add_(x.clamp_(max=0))
        return x

    @staticmethod
    def _log_mean_exp(x, p):
        """log sum_j p_ij exp(x_ij) for each row, [n]; neither log(0) nor exp(-inf), which are slow on a CPU."""
        highest = x.masked_fill(p == 0, -torch.inf).amax(1, keepdim=True)
        return highest[:, 0] + ((x - highest).clamp_(max=0).exp_().mul_(p)).sum(1).log()


# ---------------------------------------------------- Collectives -----------------------------------------------------
#
# These repeat some of util/distributed.py, so that this file stands alone.
# With one process nothing is sent. Each of several calls backward on the same number, the loss of the whole batch, and
# gets from _gather the sum of what all processes pass back. So the gradients of the parameters have to be averaged
# afterwards, as DistributedDataParallel does: the average is the gradient of that loss.
# torch.distributed.nn.functional.all_gather would do the same, but is deprecated; what replaces it is private.


def _n_processes():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank():
    return dist.get_rank() if _n_processes() > 1 else 0


def _all_sizes(n, known=None):
    """The numbers n of all processes, a list; unless they are known, sent from the CPU where it has a way, so that no
    GPU is waited for."""
    if known is not None:
        if len(known) != _n_processes() or known[_rank()] != n:
            raise ValueError(f'sizes are {known}, expected one for each of {_n_processes()} processes, {n} for process '
                             f'{_rank()}')
        return known
    if _n_processes() == 1:
        return [n]
    backends = dist.get_backend_config()
    mine = torch.tensor([n], device='cpu' if 'cpu' in backends or backends in ('gloo', 'mpi') else 'cuda')
    sizes = [torch.empty_like(mine) for _ in range(_n_processes())]
    dist.all_gather(sizes, mine)
    return torch.cat(sizes).tolist()


def _gather(x, sizes):
    """The rows of all processes, with gradient: [n, ...] -> [sum(sizes), ...]; sizes as `_all_sizes(n)`."""
    return x if len(sizes) == 1 else _Gather.apply(x, sizes)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes):
        ctx.rows = slice(sum(sizes[:_rank()]), sum(sizes[:_rank() + 1]))
        padded = x.new_zeros(max(sizes), *x.shape[1:])                  # collectives want equal shapes
        padded[:len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, sizes)])

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.rows], None


def _all_reduce_sum(x):
    """The sum of x over all processes, with gradient."""
    return _gather(x[None], [1] * _n_processes()).sum(0)


def _global_mean(values, counted=None):
    """The mean of the values [n] of all processes, or of those that are `counted` ([n] bool); 0 where there is none."""
    if counted is None:
        counted = torch.ones_like(values, dtype=torch.bool)
    total, count = _all_reduce_sum(torch.stack([torch.where(counted, values, 0).sum(), counted.sum().to(values.dtype)]))
    return total / count.clamp(min=1)
