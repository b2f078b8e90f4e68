"""The metrics of a loss, see `LossMetrics`: reductions over what the loss has computed anyway."""

import torch
from torch import Tensor


def loss_metrics(
    valid: Tensor, log_w: Tensor, log_p: Tensor, log_q: Tensor, coef: Tensor, changed: Tensor, drawn: Tensor
) -> Tensor:
    """[N, K] terms -> the values of a LossMetrics. log_w is -inf where an entry is not valid, and neither is drawn.

    changed: bool, where a correction changed the gradient. drawn: bool, entries that are not certain.
    """
    log_weight = log_w + log_p
    weight = torch.exp(log_weight)
    mass = weight.sum(dim=1)
    # By logarithms, because the square of a small weight may be 0.
    ess = torch.exp(2 * torch.logsumexp(log_weight, dim=1) - torch.logsumexp(2 * log_weight, dim=1))
    by_row = torch.stack([mass, torch.exp(log_w + log_q).sum(dim=1), ess.masked_fill(mass == 0, 0.0), coef.sum(dim=1)])
    used = valid.any(dim=1)
    means = by_row.masked_fill(~used, 0.0).sum(dim=1) / used.sum().clamp(min=1)

    ratio = drawn.sum(dim=1, keepdim=True) * weight
    count = drawn.sum()
    mean = ratio.masked_fill(~drawn, 0.0).sum() / count.clamp(min=1)
    fraction = (changed & drawn).sum() / count.clamp(min=1)
    return torch.cat([means, torch.stack([mean, _percentile_99(ratio, drawn, count), fraction.to(mean.dtype)])])


def _percentile_99(ratio: Tensor, drawn: Tensor, count: Tensor) -> Tensor:
    """The smallest ratio that at least 99 % of the drawn entries do not exceed; NaN counts as the largest."""
    if ratio.numel() == 0:
        return ratio.new_zeros(())
    ascending = ratio.masked_fill(~drawn, torch.nan).flatten().sort().values
    rank = (count - count // 100 - 1).clamp(min=0)  # ceil(0.99 count) - 1, in integers
    # gather, because indexing by a tensor of no dimensions would read it back: .item().
    return ascending.gather(0, rank[None])[0].masked_fill(count == 0, 0.0)
