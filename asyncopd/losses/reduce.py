"""From row losses to the number that is trained on."""

from torch import Tensor

from asyncopd.backends.reference.rows import compute_dtype
from asyncopd.losses.options import REDUCTIONS
from asyncopd.ops.checks import check_choice


def check_reduction(reduction: str, num_items_in_batch: int | float | Tensor | None) -> None:
    check_choice("reduction", reduction, REDUCTIONS)
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


def denominator(
    student: Tensor, teacher: Tensor, reduction: str, num_items_in_batch: int | float | Tensor | None
) -> Tensor | float | None:
    """What "mean" and "sum" divide the sum of the row losses by; None for the number of rows that count.

    `num_items_in_batch`, the number of valid rows over all micro-batches and ranks, takes its place: micro-batches of
    unequal length then add up to the loss of the whole batch. (The ops take care of a tensor that is 0.)
    """
    if isinstance(num_items_in_batch, Tensor):
        return num_items_in_batch.to(student.device, compute_dtype(student, teacher)).reshape(())
    if num_items_in_batch is not None:
        return num_items_in_batch
    return 1.0 if reduction == "sum" else None
