"""The fused loss as what it means: head and gather, the loss on [N, K], and the gradients of its mean or sum."""

from torch import Tensor

from asyncopd.backends.loss_spec import LossSpec
from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.kl import kl_rows
from asyncopd.backends.reference.linear import linear_gather_logprobs, linear_gather_logprobs_backward


def linear_kl(
    hidden: Tensor,
    head: Head,
    mask: Tensor | None,
    ids: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    proximal: Tensor | None,
    denominator: Tensor,
    need_hidden: bool,
    need_weight: bool,
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, and gradients of hidden [N, H], weight [V, H] (empty if not needed), bias [V] (or empty)."""
    scores, lse = linear_gather_logprobs(hidden, head, ids, mask)
    rows, coef, metrics = kl_rows(scores, teacher, log_weights, ids, mask, proximal, spec)
    dhidden, dweight, dbias = linear_gather_logprobs_backward(
        coef / denominator, hidden, head, lse, ids, mask, need_weight
    )
    return rows.sum() / denominator, metrics, dhidden if need_hidden else dhidden[:0].clone(), dweight, dbias


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor (), in place; 0 where the factor is 0, even if the gradient is NaN."""
    if factor.device.type != "cpu":
        gradient.mul_(factor).masked_fill_(factor == 0, 0.0)
    elif (number := factor.item()) != 1.0:  # reading a number costs nothing there
        if number == 0.0:
            gradient.zero_()
        else:
            gradient.mul_(number)
