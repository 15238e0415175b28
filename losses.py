"""Supervised contrastive losses: one formula, one core, memory linear in the number of views.

For anchors z_i, contrasts z_j, similarities s_ij = z_i . z_j / temperature, positives P(i) and
allowed contrasts A(i) (never z_i itself):

    L_i  = logsumexp_{j in A(i)} s_ij  -  mean_{j in P(i)} s_ij
    loss = temperature / base_temperature * mean_i L_i

- SupCon: P(i) holds the other views of all pictures with i's label
  (Khosla et al., 2020, https://arxiv.org/abs/2004.11362, Eq. 2).
- SimCLR: P(i) holds the other views of the same picture
  (Chen et al., 2020, https://arxiv.org/abs/2002.05709, Eq. 1).
- GenSCL: labels are distributions y_i over the classes, and the mean is weighted with cos(y_i, y_j)
  (Kim et al., 2022, https://arxiv.org/abs/2206.00384).
- Near-out-of-distribution pictures made from class c carry the label -(c + 1). They are hard negatives:
  no anchors, nobody's positives, and in A(i) only for anchors of class c.

The second term needs no N x N matrix: mean_{j in P(i)} s_ij = z_i . (class sum - z_i) / (count - 1), and with unit
vectors u_i = y_i / |y_i| the weighted sum is z_i . M u_i / temperature, M = sum_j z_j u_j^T [dim, C]. The first is
computed over blocks of rows, and each block is computed again in the backward pass.
"""
import torch
from torch import nn
from torch.nn import functional as F

# Similarities held at a time by the blocked log-sum-exp. 2**21 floats are 8 MB, which stay in the cache of a CPU; a
# batch of 1,024 pictures takes two blocks.
BLOCK = 2**21


class _ContrastiveLoss(nn.Module):
    """The settings of both losses."""

    def __init__(self, temperature=0.07, contrast_mode='all', base_temperature=0.07):
        super().__init__()
        if contrast_mode not in ('all', 'one'):
            raise ValueError(f"contrast_mode is {contrast_mode!r}, expected 'all' or 'one'")
        if temperature <= 0 or base_temperature <= 0:
            raise ValueError(f'temperature {temperature} and base_temperature {base_temperature} must be positive')
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature


class SupConLoss(_ContrastiveLoss):
    """Supervised contrastive loss (SupCon), and without labels the SimCLR loss.

        criterion = SupConLoss(temperature=0.1)
        loss = criterion(features, labels)                          # SupCon
        loss = criterion(features)                                  # SimCLR
        loss = criterion(features, labels, positives='picture')     # SimCLR with hard negatives among the labels

    Args:
        temperature: divides the similarities.
        contrast_mode: 'all': every view is an anchor; 'one': only the first view of each picture is.
            The contrasts are all views of all pictures in both modes.
        base_temperature: the loss is multiplied by temperature / base_temperature.
    """

    def forward(self, features, labels=None, mask=None, positives='class'):
        """Compute the loss of one batch; float16 and bfloat16 features are computed in float32.

        Args:
            features: [bsz, n_views, ...], normally of unit length; dimensions after the second are flattened.
            labels: [bsz] class of each picture; -(c + 1) marks a near-ood picture made from class c (see above).
            mask: [bsz, bsz] weights >= 0 instead of labels: mask[i, j] is how much picture j is a positive of
                picture i. May be asymmetric. Needs the whole similarity matrix in memory.
            positives: what the positives of an anchor share with it: 'class', or only the 'picture', as without labels;
                labels then only tell which near-ood pictures an anchor sees.

        Returns:
            A scalar. An anchor without positives adds 0 and still counts in the mean.

        Raises:
            ValueError: wrong shapes (both are named), labels and mask together, or unknown positives.
        """
        if features.dim() < 3:
            raise ValueError(f'features are {list(features.shape)}, expected [bsz, n_views, ...]')
        if positives not in ('class', 'picture'):
            raise ValueError(f"positives are {positives!r}, expected 'class' or 'picture'")
        if labels is not None and mask is not None:
            raise ValueError('labels and mask are both given, expected at most one')
        bsz, n_views = features.shape[:2]
        if labels is not None and labels.shape not in ((bsz,), (bsz, 1)):
            raise ValueError(f'labels are {list(labels.shape)}, expected [{bsz}] for features {list(features.shape)}')
        if mask is not None and mask.shape != (bsz, bsz):
            raise ValueError(f'mask is {list(mask.shape)}, expected [{bsz}, {bsz}] for features {list(features.shape)}')

        if features.dtype in (torch.float16, torch.bfloat16):
            features = features.float()
        contrasts = features.flatten(2).transpose(0, 1).flatten(0, 1)   # [n_views * bsz, dim], view after view
        anchors = contrasts if self.contrast_mode == 'all' else contrasts[:bsz]
        with torch.autocast(features.device.type, enabled=False):       # similarities / temperature need float32
            if mask is not None:
                loss = self._dense(anchors, contrasts, mask)
            else:
                ids, labels = _ids_and_labels(features, labels, positives)
                loss = self._blocked(anchors, contrasts, ids, labels)
        return loss * (self.temperature / self.base_temperature)

    def _blocked(self, anchors, contrasts, ids, labels):
        n = len(anchors)                                                # anchor i is contrast i
        normal = labels >= 0
        owners = None if normal.all() else torch.where(normal, -1, -labels - 1)
        log_denominator = _LogSumExp.apply(anchors, contrasts, self.temperature, True, labels, owners)

        ids = _dense_ids(ids)
        weight = normal.to(contrasts.dtype)
        counts = contrasts.new_zeros(len(contrasts)).index_add(0, ids, weight)
        sums = torch.zeros_like(contrasts).index_add(0, ids, contrasts * weight[:, None])
        positives = counts[ids[:n]] - 1
        # index_select, since the backward pass of sums[ids] adds in an order that changes from run to run on a CPU.
        others = sums.index_select(0, ids[:n]) - contrasts[:n]
        log_positive = (anchors * others).sum(1) / positives.clamp(min=1) / self.temperature

        is_anchor = normal[:n]
        losses = torch.where(is_anchor & (positives > 0), log_denominator - log_positive, 0)
        return losses.sum() / is_anchor.sum().clamp(min=1)

    def _dense(self, anchors, contrasts, mask):
        n, n_views = len(anchors), len(contrasts) // len(mask)
        itself = torch.eye(n, len(contrasts), dtype=torch.bool, device=anchors.device)
        mask = mask.to(anchors).repeat(n // len(mask), n_views).masked_fill(itself, 0)
        logits = anchors @ contrasts.T / self.temperature
        log_denominator = logits.masked_fill(itself, -torch.inf).logsumexp(1)
        weight = mask.sum(1)
        log_positive = (mask * logits).sum(1) / torch.where(weight > 0, weight, 1)
        return torch.where(weight > 0, log_denominator - log_positive, 0).mean()


class GenSupConLoss(_ContrastiveLoss):
    """Generalized supervised contrastive loss (GenSCL): the labels are distributions over the classes.

        criterion = GenSupConLoss(temperature=0.1)
        loss = criterion((features_1, features_2), (labels_1, labels_2))

    A positive weighs as much as the cosine similarity of its label distribution with the anchor's; for one-hot labels
    this is SupConLoss (Kim et al., 2022, https://arxiv.org/abs/2206.00384).

    Args:
        temperature, base_temperature: as for SupConLoss.
        contrast_mode: 'all': the views of both tuples are anchors and contrasts, itself excluded; 'one': the first are
            the anchors and the second the contrasts.
    """

    def forward(self, features, labels):
        """Compute the loss of one batch; float16 and bfloat16 features are computed in float32.

        Args:
            features: (anchors, contrasts), each [N, dim], normally of unit length.
            labels: (of the anchors, of the contrasts), each [N, C] of numbers >= 0. Integers are allowed; only the
                direction of a row counts.

        Returns:
            A scalar. An anchor whose positives weigh 0 in sum (less than 1e-9) adds 0 and still counts in the mean.

        Raises:
            ValueError: wrong shapes (all are named).
        """
        shapes = [list(tensor.shape) for tensor in (*features, *labels)]
        n, classes = shapes[0][0], shapes[-1][-1]
        if {len(shape) for shape in shapes} != {2} or shapes != [shapes[0]] * 2 + [[n, classes]] * 2:
            raise ValueError(f'features are {shapes[:len(features)]} and labels {shapes[len(features):]}, expected two '
                             'of the same [N, dim] and two of the same [N, C]')
        features = [part.float() if part.dtype in (torch.float16, torch.bfloat16) else part for part in features]
        labels = [F.normalize(part.double(), dim=1) for part in labels]
        all_views = self.contrast_mode == 'all'
        anchors, contrasts = [torch.cat(features)] * 2 if all_views else features
        u, v = [torch.cat(labels)] * 2 if all_views else labels                     # [n_anchors, C], [n_contrasts, C]
        with torch.autocast(anchors.device.type, enabled=False):
            log_denominator = _LogSumExp.apply(anchors, contrasts, self.temperature, all_views, None, None)
            log_positive, has_positives = self._positives(anchors.double(), contrasts.double(), u, v)
            loss = (torch.where(has_positives, log_denominator, 0).sum() - log_positive) / len(anchors)
        return loss.to(anchors.dtype) * (self.temperature / self.base_temperature)

    def _positives(self, anchors, contrasts, u, v):
        """Sum over the anchors of their weighted means of s_ij, and which of them have positives: [n_anchors].

        In float64, since what an anchor adds to its own sums is subtracted again: the rest may be small.
        """
        itself = (u * v).sum(1) if self.contrast_mode == 'all' else torch.zeros_like(u[:, 0])   # w_ii, left out
        weight = u @ v.sum(0) - itself
        has_positives = weight > 1e-9
        scale = torch.where(has_positives, 1 / weight, 0)
        m, m_anchors = contrasts.T @ v, anchors.T @ (scale[:, None] * u)                        # [dim, C] each
        similar = (m * m_anchors).sum() - (scale * itself) @ (anchors * contrasts).sum(1)
        return similar / self.temperature, has_positives


class _LogSumExp(torch.autograd.Function):
    """log sum_{j in A(i)} exp(anchors_i . contrasts_j / temperature) for each anchor i: [n].

    With `same`, anchor i is contrast i, which A(i) leaves out. With `owners` (-1, or the class whose anchors alone see
    the contrast) and `labels`, both [n_contrasts], A(i) also leaves out contrasts that belong to another class.
    Keeps only the n results and recomputes the similarities in the backward pass.
    """

    @staticmethod
    def forward(ctx, anchors, contrasts, temperature, same, labels, owners):
        result = anchors.new_empty(len(anchors))
        for rows in _blocks(anchors, contrasts):
            torch.logsumexp(_logits(anchors, contrasts, rows, temperature, same, labels, owners), 1, out=result[rows])
        # An anchor without contrasts has log 0 = -inf; any finite value in its place gives the gradient 0.
        ctx.save_for_backward(anchors, contrasts, labels, owners, result.masked_fill(result == -torch.inf, 0))
        ctx.temperature, ctx.same = temperature, same
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        anchors, contrasts, labels, owners, result = ctx.saved_tensors
        grad = grad / ctx.temperature
        grad_anchors, grad_contrasts = torch.empty_like(anchors), torch.zeros_like(contrasts)
        with torch.autocast(anchors.device.type, enabled=False):
            for rows in _blocks(anchors, contrasts):
                prob = _logits(anchors, contrasts, rows, ctx.temperature, ctx.same, labels, owners)
                prob.sub_(result[rows, None]).exp_().mul_(grad[rows, None])
                torch.mm(prob, contrasts, out=grad_anchors[rows])
                grad_contrasts.addmm_(prob.T, anchors[rows])
        return grad_anchors, grad_contrasts, None, None, None, None


def _blocks(anchors, contrasts):
    step = max(1, BLOCK // len(contrasts))
    return [slice(i, min(i + step, len(anchors))) for i in range(0, len(anchors), step)]


def _logits(anchors, contrasts, rows, temperature=1., same=True, labels=None, owners=None):
    logits = (anchors[rows] / temperature) @ contrasts.T                # [rows, n_contrasts]
    if same:
        logits.diagonal(rows.start).fill_(-torch.inf)
    if owners is not None:
        logits.masked_fill_((owners >= 0) & (owners != labels[rows, None]), -torch.inf)
    return logits


def _ids_and_labels(features, labels, positives):
    """For all views, view after view: an id that positives share, and the label: [n_views * bsz] each."""
    bsz, n_views = features.shape[:2]
    pictures = torch.arange(bsz, device=features.device)
    labels = pictures if labels is None else labels.flatten()
    return (labels if positives == 'class' else pictures).repeat(n_views), labels.repeat(n_views)


def _dense_ids(ids):
    """Number equal ids alike, from 0: [n] -> [n] int64 below n, without waiting for the device."""
    ordered, order = ids.sort()
    steps = F.pad((ordered[1:] != ordered[:-1]).long(), (1, 0)).cumsum(0)
    return torch.empty_like(steps).scatter_(0, order, steps)


@torch.no_grad()
def contrastive_accuracy(features, labels=None, positives='class'):
    """Share of anchors (%) whose most similar other view in the batch is a positive; a scalar tensor.

    features [bsz, n_views, dim], labels [bsz] and positives as for SupConLoss; or label distributions
    [bsz, n_views, C], then the mean weight (%) of the most similar view. It rises from chance as pretraining learns.
    """
    contrasts = features.detach().float().transpose(0, 1).flatten(0, 1)
    if labels is not None and labels.dim() == 3:
        u = F.normalize(labels.transpose(0, 1).flatten(0, 1), dim=1)
        return 100 * (u * u[_nearest(contrasts)]).sum(1).mean()
    ids, labels = _ids_and_labels(features, labels, positives)
    nearest = _nearest(contrasts, labels, torch.where(labels >= 0, -1, -labels - 1))
    is_anchor = labels >= 0
    return 100 * ((ids == ids[nearest]) & is_anchor).sum() / is_anchor.sum().clamp(min=1)


def _nearest(contrasts, labels=None, owners=None):
    return torch.cat([_logits(contrasts, contrasts, rows, labels=labels, owners=owners).argmax(1)
                      for rows in _blocks(contrasts, contrasts)])
