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
- Several processes (torch.distributed): each has a part of the batch. Its views are anchors, the views of all processes
  are contrasts, and each gets the loss of the whole batch.

The second term needs no N x N matrix: mean_{j in P(i)} s_ij = z_i . (class sum - z_i) / (count - 1), and with unit
vectors u_i = y_i / |y_i| the weighted sum is z_i . M u_i / temperature, M = sum_j z_j u_j^T [dim, C]. The first is
computed over blocks, and each block is computed again in the backward pass.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from util.distributed import gather, mean, rank, sizes_of, total

# Similarities held at a time by the blocked log-sum-exp. 2**21 floats are 8 MB, which stay in the cache of a CPU; a
# batch of 1,024 pictures takes two blocks.
BLOCK = 2**21
# Side of the square blocks of a symmetric matrix on a CPU; 512 to 1,024 are fastest (benchmarks/README.md).
TILE = 1024


class _ContrastiveLoss(nn.Module):
    """The settings of both losses."""

    def __init__(self, temperature=0.07, contrast_mode='all', base_temperature=0.07):
        super().__init__()
        _check('contrast_mode', contrast_mode, ('all', 'one'))
        if temperature <= 0 or base_temperature <= 0:
            raise ValueError(f'temperature {temperature} and base_temperature {base_temperature} must be positive')
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature


def _check(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, allowed))}")


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
        base_temperature: the loss is multiplied by temperature / base_temperature; 1 multiplies by the temperature.
        summation_location: 'out': mean over the positives of log(exp(s_ip) / D_ip), Eq. 2 of the paper; 'in': the log
            of that mean, Eq. 3.
        denominator_mode: what D_ip sums exp(s_ij) over: 'all' of A(i); 'one_positive': the negatives (A(i) without
            P(i)) and p; 'only_negatives': the negatives.
        positives_cap: at most this many positives of other pictures, a multiple of the number of views: the first in
            the order of the batch with all their views; positives beyond leave A(i) too. -1: all.

    All but the defaults of the last three need the whole similarity matrix in memory.
    """

    def __init__(self, temperature=0.07, contrast_mode='all', base_temperature=0.07, summation_location='out',
                 denominator_mode='all', positives_cap=-1):
        super().__init__(temperature, contrast_mode, base_temperature)
        _check('summation_location', summation_location, ('out', 'in'))
        _check('denominator_mode', denominator_mode, ('all', 'one_positive', 'only_negatives'))
        if positives_cap < -1:
            raise ValueError(f'positives_cap is {positives_cap}, expected -1 or more')
        self.summation_location = summation_location
        self.denominator_mode = denominator_mode
        self.positives_cap = positives_cap

    def forward(self, features, labels=None, mask=None, positives='class', keys=None, key_labels=None):
        """Compute the loss of one batch; float16 and bfloat16 features are computed in float32.

        Where torch.distributed has several processes, all of them call this, each with its part of the batch, which may
        be empty. Each gets the loss of the whole; averaged over them, as DistributedDataParallel does, the gradients
        are those of one process with the whole batch.

        Args:
            features: [bsz, n_views, ...], normally of unit length; dimensions after the second are flattened.
            labels: [bsz] class of each picture; -(c + 1) marks a near-ood picture made from class c (see above).
            mask: [bsz, bsz] weights >= 0 instead of labels: mask[i, j] is how much picture j is a positive of
                picture i. May be asymmetric. Needs the whole similarity matrix in memory. With several processes
                [bsz, pictures of all].
            positives: what the positives of an anchor share with it: 'class', or only the 'picture', as without labels;
                labels then only tell which near-ood pictures an anchor sees.
            keys: [n_keys, dim] contrasts instead of the features, as of a momentum encoder: the first bsz belong to the
                pictures of the batch, the others to earlier ones (He et al., 2020, https://arxiv.org/abs/1911.05722).
                All processes have the same, of the whole batch.
            key_labels: [n_keys] their labels, needed with labels.

        Returns:
            A scalar. An anchor without positives (with 'only_negatives', also one without negatives) adds 0 and still
            counts in the mean.

        Raises:
            ValueError: wrong shapes (both are named), labels and mask together, or unknown positives.
        """
        if features.dim() < 3:
            raise ValueError(f'features are {list(features.shape)}, expected [bsz, n_views, ...]')
        sizes = sizes_of(len(features))
        bsz = sum(sizes)                                                # of the whole batch
        self._check_shapes(features, labels, mask, positives, keys, key_labels, bsz)
        if features.dtype in (torch.float16, torch.bfloat16):
            features = features.float()
        anchors, contrasts, rows = _views(features.flatten(2), sizes, self.contrast_mode)
        labelled = labels is not None
        ids, labels = _ids_and_labels(features, labels, positives, sizes)
        of_contrasts, itself = (ids, labels), rows
        if keys is not None:
            contrasts, itself = keys.to(anchors.dtype), None
            of_contrasts = _ids_and_labels_of_keys(bsz, keys, key_labels, positives)
        ids, labels = ids[rows], labels[rows]
        args = (anchors, contrasts, ids, labels, *of_contrasts, itself)
        dense = (self.summation_location, self.denominator_mode, self.positives_cap) != ('out', 'all', -1)
        with torch.autocast(features.device.type, enabled=False):       # similarities / temperature need float32
            if dense or mask is not None:
                losses = self._dense(*args, rows % max(1, bsz), bsz if keys is None else len(keys), mask)
            else:
                losses = self._blocked(*args, labelled)
            return mean(losses, labels >= 0) * (self.temperature / self.base_temperature)

    def _check_shapes(self, features, labels, mask, positives, keys, key_labels, everything):
        _check('positives', positives, ('class', 'picture'))
        bsz, n_views, dim = features.flatten(2).shape
        if mask is not None and (labels is not None or keys is not None):
            raise ValueError(f"{'labels' if keys is None else 'keys'} and mask are both given, expected at most one")
        if labels is not None and labels.shape not in ((bsz,), (bsz, 1)):
            raise ValueError(f'labels are {list(labels.shape)}, expected [{bsz}] for features {list(features.shape)}')
        if mask is not None and mask.shape != (bsz, everything):
            raise ValueError(f'mask is {list(mask.shape)}, expected [{bsz}, {everything}] for features '
                             f'{list(features.shape)}')
        if keys is not None and (keys.dim() != 2 or len(keys) < everything or keys.shape[1] != dim):
            raise ValueError(f'keys are {list(keys.shape)}, expected [{everything} or more, {dim}] for features '
                             f'{list(features.shape)}')
        if keys is not None and (labels is None) != (key_labels is None) or (
                key_labels is not None and key_labels.shape != keys.shape[:1]):
            raise ValueError('key_labels are expected with keys and labels, one for each key')
        if self.positives_cap > 0 and self.positives_cap % n_views:
            raise ValueError(f'positives_cap is {self.positives_cap}, expected a multiple of {n_views}, the views')

    def _blocked(self, anchors, contrasts, ids, labels, contrast_ids, contrast_labels, itself, labelled):
        """The losses of the anchors, [n]; itself [n]: which contrasts they are, or None."""
        normal = contrast_labels >= 0
        # Without labels there is no hard negative; a GPU is not asked, since the answer would have to be waited for.
        all_normal = not labelled or normal.device.type == 'cpu' and bool(normal.all())
        owners = None if all_normal else torch.where(normal, -1, -contrast_labels - 1)
        log_denominator = _log_sum_exp(anchors, contrasts, self.temperature, itself, labels, owners)

        if itself is not None:
            contrast_ids = _dense_ids(contrast_ids)
            ids = contrast_ids[itself]
        else:
            ids, contrast_ids = _dense_ids(torch.cat([ids, contrast_ids])).split([len(ids), len(contrast_ids)])
        weight = normal.to(contrasts.dtype)
        rows = len(contrasts) + (len(anchors) if itself is None else 0)                 # at most so many ids
        counts = contrasts.new_zeros(rows).index_add(0, contrast_ids, weight)
        sums = contrasts.new_zeros(rows, contrasts.shape[1]).index_add(0, contrast_ids, contrasts * weight[:, None])
        # index_select, since the backward pass of sums[ids] adds in an order that changes from run to run on a CPU.
        positives, sums = counts[ids], sums.index_select(0, ids)
        if itself is not None:
            positives, sums = positives - 1, sums - anchors
        log_positive = (anchors * sums).sum(1) / positives.clamp(min=1) / self.temperature
        return torch.where((labels >= 0) & (positives > 0), log_denominator - log_positive, 0)

    def _dense(self, anchors, contrasts, ids, labels, contrast_ids, contrast_labels, itself, pictures, bsz, mask):
        """As `_blocked`; the anchors are views of `pictures` [n] of bsz, and so are the contrasts, view after view."""
        weight = (ids[:, None] == contrast_ids) & (contrast_labels >= 0)                # [n, m]
        is_itself = torch.zeros_like(weight)
        if itself is not None:
            is_itself.scatter_(1, itself[:, None], True)
        owners = torch.where(contrast_labels >= 0, -1, -contrast_labels - 1)
        allowed = ~is_itself & ((owners < 0) | (owners == labels[:, None]))
        if mask is not None:
            weight = mask.repeat(len(anchors) // max(1, len(mask)), len(contrasts) // max(1, bsz))
        weight = weight.to(anchors.dtype).masked_fill(is_itself, 0)
        if self.positives_cap >= 0:
            over = self._over_cap(weight > 0, pictures, bsz)
            weight, allowed = weight.masked_fill(over, 0), allowed & ~over
        total = weight.sum(1)
        counts = (labels >= 0) & (total > 0)

        logits = anchors @ contrasts.T / self.temperature               # [n, m]
        if self.denominator_mode == 'all':
            log_denominator = _masked_logsumexp(logits, allowed)
        else:
            negatives = allowed & (weight == 0)
            log_denominator = _masked_logsumexp(logits, negatives)
            if self.denominator_mode == 'one_positive':
                log_denominator = torch.logaddexp(logits, log_denominator)
            else:
                counts = counts & negatives.any(1)
        log_prob = logits - torch.where(counts[:, None], log_denominator, 0)
        total = total.clamp(min=torch.finfo(total.dtype).tiny)
        if self.summation_location == 'out':
            losses = -(weight * log_prob).sum(1) / total
        else:
            losses = -_masked_logsumexp(log_prob + weight.clamp(min=1e-30).log(), weight > 0)[:, 0] + total.log()
        return torch.where(counts, losses, 0)

    def _over_cap(self, positive, pictures, bsz):
        """Which positives [n, m] are of other pictures than the first that positives_cap allows."""
        m = positive.shape[1]
        other = positive & (torch.arange(m, device=positive.device) % bsz != pictures[:, None])
        rank = other[:, :bsz].cumsum(1)                                 # alike in each view
        return other & (rank > self.positives_cap // (m // bsz)).repeat(1, m // bsz)


def _views(features, sizes, contrast_mode='all'):
    """Anchors and contrasts among features [bsz, n_views, dim] of this process, of `sizes` in all of them.

    -> anchors [n, dim] of this process, view after view; the views [n_views * sum(sizes), dim] of all processes, view
    after view; and where the anchors are among these, [n].
    """
    bsz, n_views = features.shape[:2]
    views = gather(features, sizes).transpose(0, 1).flatten(0, 1)
    shown = n_views if contrast_mode == 'all' else 1
    rows = torch.arange(bsz, device=features.device) + sum(sizes[:rank()])
    rows = (sum(sizes) * torch.arange(shown, device=features.device)[:, None] + rows).flatten()
    return features[:, :shown].transpose(0, 1).flatten(0, 1), views, rows


def _masked_logsumexp(logits, mask):
    """log sum of exp(logits) where mask, for each row: [n, m] -> [n, 1]; -inf, without gradient, for an empty row."""
    some = mask.any(1, keepdim=True)
    result = logits.masked_fill(~mask & some, -torch.inf).logsumexp(1, keepdim=True)
    return torch.where(some, result, -torch.inf)


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
        sizes = sizes_of(n)
        if self.contrast_mode == 'all':
            anchors, contrasts, itself = _views(torch.stack(features, 1), sizes)
            u, v, _ = _views(torch.stack(labels, 1), sizes)                         # [n_anchors, C], [n_contrasts, C]
        else:
            (anchors, contrasts), (u, v) = ((part[0], gather(part[1], sizes)) for part in (features, labels))
            itself = None
        with torch.autocast(anchors.device.type, enabled=False):
            log_denominator = _log_sum_exp(anchors, contrasts, self.temperature, itself)
            log_positive, has_positives = self._positives(anchors.double(), contrasts.double(), u, v)
            loss = torch.where(has_positives, log_denominator, 0).sum() - log_positive
            loss = total(loss) / max(1, len(contrasts))                             # as many as all anchors
        return loss.to(anchors.dtype) * (self.temperature / self.base_temperature)

    def _positives(self, anchors, contrasts, u, v):
        """Sum over the anchors of their weighted means of s_ij, and which of them have positives: [n_anchors].

        In float64, since what an anchor adds to its own sums is subtracted again: the rest may be small.
        """
        # w_ii, which is left out.
        itself = u.square().sum(1) if self.contrast_mode == 'all' else torch.zeros_like(u[:, 0])
        weight = u @ v.sum(0) - itself
        has_positives = weight > 1e-9
        scale = torch.where(has_positives, 1 / weight, 0)
        m, m_anchors = contrasts.T @ v, anchors.T @ (scale[:, None] * u)                        # [dim, C] each
        similar = (m * m_anchors).sum() - (scale * itself) @ anchors.square().sum(1)
        return similar / self.temperature, has_positives


def _log_sum_exp(anchors, contrasts, temperature, itself, labels=None, owners=None):
    """The results of _LogSumExp, by half of the matrix where that is possible and no device has to be waited for."""
    everything = itself is not None and len(anchors) == len(contrasts) > 0              # in the same order
    if everything and owners is None and anchors.device.type == 'cpu':
        bound = (anchors.detach().square().sum(1).amax() / temperature).item()      # of all |s_ij|
        if 2 * bound < -math.log(torch.finfo(anchors.dtype).tiny) - 10:             # exp(-2 bound) is a normal number
            return _SymmetricLogSumExp.apply(anchors, temperature, bound)
    return _LogSumExp.apply(anchors, contrasts, temperature, itself, labels, owners)


class _SymmetricLogSumExp(torch.autograd.Function):
    """log sum_{j != i} exp(z_i . z_j / temperature) for each row of z [n, dim]: [n].

    The matrix E_ij = exp(s_ij - bound) is symmetric, so half of its blocks are computed, each for its rows and for its
    columns. The gradient with g_i of the results is sum_j E_ij (g_i / sum_i + g_j / sum_j) z_j / temperature.
    `bound` is at least all |s_ij|, so that no exponential overflows and none of the sums is 0.
    """

    @staticmethod
    def forward(ctx, z, temperature, bound):
        sums = z.new_zeros(len(z))
        for rows, columns, block in _SymmetricLogSumExp._blocks(z, temperature, bound):
            sums[rows] += block.sum(1)
            if rows != columns:
                sums[columns] += block.sum(0)
        ctx.save_for_backward(z, sums)
        ctx.temperature, ctx.bound = temperature, bound
        return sums.log() + bound

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        z, sums = ctx.saved_tensors
        scale = grad / sums.masked_fill(sums == 0, 1) / ctx.temperature         # a single row has no contrasts
        grad_z, factors = torch.zeros_like(z), z.new_empty(min(TILE, len(z))**2)
        with torch.autocast(z.device.type, enabled=False):
            for rows, columns, block in _SymmetricLogSumExp._blocks(z, ctx.temperature, ctx.bound):
                factor = factors[:block.numel()].view_as(block)
                block.mul_(torch.add(scale[rows, None], scale[columns], out=factor))
                grad_z[rows].addmm_(block, z[columns])
                if rows != columns:
                    grad_z[columns].addmm_(block.T, z[rows])
        return grad_z, None, None

    @staticmethod
    def _blocks(z, temperature, bound):
        """The blocks of E on and above the diagonal, in one buffer: yields rows, columns, block."""
        scaled, buffer = z / temperature, z.new_empty(min(TILE, len(z))**2)
        parts = [slice(i, min(i + TILE, len(z))) for i in range(0, len(z), TILE)]
        for number, rows in enumerate(parts):
            for columns in parts[number:]:
                shape = rows.stop - rows.start, columns.stop - columns.start
                block = torch.mm(scaled[rows], z[columns].T, out=buffer[:math.prod(shape)].view(shape))
                if rows == columns:
                    block.fill_diagonal_(-torch.inf)
                yield rows, columns, block.sub_(bound).exp_()


class _LogSumExp(torch.autograd.Function):
    """log sum_{j in A(i)} exp(anchors_i . contrasts_j / temperature) for each anchor i: [n].

    With `itself` [n], A(i) leaves out the contrast itself[i], which is anchor i. With `owners` [n_contrasts] (-1, or
    the class whose anchors alone see the contrast) and `labels` [n], it also leaves out contrasts that belong to
    another class. Keeps only the n results and recomputes the similarities in the backward pass.
    """

    @staticmethod
    def forward(ctx, anchors, contrasts, temperature, itself, labels, owners):
        result = anchors.new_empty(len(anchors))
        for rows in _blocks(anchors, contrasts):
            torch.logsumexp(_logits(anchors, contrasts, rows, temperature, itself, labels, owners), 1, out=result[rows])
        # An anchor without contrasts has log 0 = -inf; any finite value in its place gives the gradient 0.
        ctx.save_for_backward(anchors, contrasts, itself, labels, owners, result.masked_fill(result == -torch.inf, 0))
        ctx.temperature = temperature
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        anchors, contrasts, itself, labels, owners, result = ctx.saved_tensors
        grad = grad / ctx.temperature
        grad_anchors = torch.empty_like(anchors)
        grad_contrasts = torch.zeros_like(contrasts) if ctx.needs_input_grad[1] else None       # keys need none
        with torch.autocast(anchors.device.type, enabled=False):
            for rows in _blocks(anchors, contrasts):
                prob = _logits(anchors, contrasts, rows, ctx.temperature, itself, labels, owners)
                prob.sub_(result[rows, None]).exp_().mul_(grad[rows, None])
                torch.mm(prob, contrasts, out=grad_anchors[rows])
                if grad_contrasts is not None:
                    grad_contrasts.addmm_(prob.T, anchors[rows])
        return grad_anchors, grad_contrasts, None, None, None, None


def _blocks(anchors, contrasts):
    step = max(1, BLOCK // max(1, len(contrasts)))
    return [slice(i, min(i + step, len(anchors))) for i in range(0, len(anchors), step)]


def _logits(anchors, contrasts, rows, temperature=1., itself=None, labels=None, owners=None):
    logits = (anchors[rows] / temperature) @ contrasts.T                # [rows, n_contrasts]
    if itself is not None:
        logits.scatter_(1, itself[rows, None], -torch.inf)
    if owners is not None:
        logits.masked_fill_((owners >= 0) & (owners != labels[rows, None]), -torch.inf)
    return logits


def _ids_and_labels(features, labels, positives, sizes):
    """For all views of all processes, view after view: an id that positives share, and the label: [n_views * bsz]."""
    n_views = features.shape[1]
    pictures = torch.arange(sum(sizes), device=features.device)
    labels = pictures if labels is None else gather(labels.flatten(), sizes)
    return (labels if positives == 'class' else pictures).repeat(n_views), labels.repeat(n_views)


def _ids_and_labels_of_keys(bsz, keys, key_labels, positives):
    """The same for keys, the first bsz of which belong to the pictures of the batch: [n_keys] each."""
    pictures = torch.arange(len(keys), device=keys.device)
    labels = pictures if key_labels is None else key_labels
    return (labels if positives == 'class' and key_labels is not None else
            torch.where(pictures < bsz, pictures, -1)), labels


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
    With several processes as SupConLoss: of the whole batch.
    """
    sizes = sizes_of(len(features))
    anchors, contrasts, rows = _views(features.detach().float(), sizes)
    if labels is not None and labels.dim() == 3:
        u, v, _ = _views(F.normalize(labels, dim=2), sizes)
        return 100 * mean((u * v[_nearest(anchors, contrasts, rows)]).sum(1))
    ids, labels = _ids_and_labels(features, labels, positives, sizes)
    nearest = _nearest(anchors, contrasts, rows, labels[rows], torch.where(labels >= 0, -1, -labels - 1))
    return 100 * mean((ids[rows] == ids[nearest]).float(), labels[rows] >= 0)


def _nearest(anchors, contrasts, itself, labels=None, owners=None):
    nearest = [_logits(anchors, contrasts, rows, 1., itself, labels, owners).argmax(1)
               for rows in _blocks(anchors, contrasts)]
    return torch.cat(nearest) if nearest else itself
