"""From row losses to the number that is trained on."""

from typing import get_args

import torch
from torch import Tensor

from asyncopd.backends.reference.rows import compute_dtype
from asyncopd.losses.options import Reduction
from asyncopd.ops.checks import check_choice


def check_reduction(reduction: str, num_items_in_batch: int | float | Tensor | None) -> None:
    check_choice("reduction", reduction, get_args(Reduction))
    if num_items_in_batch is None:
        return
    if reduction == "none":
        raise ValueError("num_items_in_batch: given with reduction='none', expected 'mean' or 'sum'")
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(f"num_items_in_batch: got shape {list(num_items_in_batch.shape)}, expected a scalar")
    elif isinstance(num_items_in_batch, bool) or not isinstance(num_items_in_batch, int | float):
        raise TypeError(f"num_items_in_batch: got {type(num_items_in_batch).__name__}, expected a number or a tensor")
    elif not 0 < num_items_in_batch < float("inf"):
        raise ValueError(f"num_items_in_batch: got {num_items_in_batch}, expected a number above 0")


def reduce_rows(
    row_losses: Tensor, mask: Tensor | None, reduction: str, num_items_in_batch: int | float | Tensor | None
) -> Tensor:
    """[N] -> scalar, or [N] for "none". Masked rows count neither in the sum nor in the mean; no row left gives 0.

    `num_items_in_batch`, the number of valid rows over all micro-batches and ranks, divides the sum: micro-batches of
    unequal length then add up to the loss of the whole batch.
    """
    if mask is not None:
        row_losses = torch.where(mask, row_losses, 0.0)
    if reduction == "none":
        return row_losses
    return row_losses.sum() / denominator(row_losses, mask, reduction, num_items_in_batch)


def denominator(
    rows: Tensor, mask: Tensor | None, reduction: str, num_items_in_batch: int | float | Tensor | None
) -> Tensor | float:
    """What the sum over the rows of a tensor [N, ..] is divided by: never 0."""
    if isinstance(num_items_in_batch, Tensor):
        items = num_items_in_batch.to(rows.device, compute_dtype(rows)).reshape(())
        # No rank has a valid row: the sum is 0 already, and its gradient must not be 0 / 0.
        return torch.where(items > 0, items, 1.0)
    if num_items_in_batch is not None:
        return num_items_in_batch
    if reduction == "sum":
        return 1.0
    return max(rows.shape[0], 1) if mask is None else mask.sum().clamp(min=1)
