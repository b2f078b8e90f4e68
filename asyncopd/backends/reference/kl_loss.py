"""The [N, K] loss as the number that is trained on: the sum of the row losses over a denominator, and its gradient."""

import torch
from torch import Tensor

from asyncopd.backends.loss_spec import LossSpec
from asyncopd.backends.reference.kl import kl_rows


def kl_loss(
    student: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    proximal: Tensor | None,
    denominator: Tensor | float | None,
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), coefficients [N, K] that are its gradient by `student`, values of a LossMetrics.

    denominator: of the sum of the row losses; None for the number of rows that count. A tensor that is 0, and a count
    of 0, stand for 1: the sum is 0 already, and its gradient must not be 0 / 0.
    """
    rows, coef, metrics = kl_rows(student, teacher, log_weights, ids, mask, proximal, spec)
    if mask is not None:
        rows = torch.where(mask, rows, 0.0)
    by = as_divisor(denominator, rows, mask, rows.dtype)
    return rows.sum() / by, coef / by, metrics


def as_divisor(denominator: Tensor | float | None, rows: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A denominator of `kl_loss` as a tensor () above 0, for a tensor that has these rows."""
    if denominator is None:
        denominator = float(max(rows.shape[0], 1)) if mask is None else mask.sum()
    if not isinstance(denominator, Tensor):
        return torch.full((), denominator, dtype=dtype, device=rows.device)
    return torch.where(denominator > 0, denominator, 1.0).to(dtype)


def scale_rows_(coef: Tensor, factors: Tensor) -> None:
    """coef [N, K] times factors [N], in place; 0 where the factor is 0, even if the coefficient is NaN."""
    coef.mul_(factors[:, None]).masked_fill_((factors == 0)[:, None], 0.0)
