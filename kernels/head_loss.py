"""The exact loss through the head with its gradients: three products with the head where there is room for what they
share, two beside a frozen head, and no [N, V] tensor. See head_walk.py for the limit and the memory."""

import torch
from torch import Tensor

from asyncopd import backends
from asyncopd.backends.loss_spec import LossSpec
from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.rows import check_ids_in_range, compute_dtype
from asyncopd.kernels.head import finished
from asyncopd.kernels.head_frozen import FrozenWalk
from asyncopd.kernels.head_gradients import Gradients
from asyncopd.kernels.head_walk import Rows, Walk, room_for


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
    check_ids_in_range(ids, head.weight.shape[0])
    rows = Rows.of(mask)
    hidden_used, ids_used = rows.take(hidden), rows.take_ids(ids)
    teacher, log_weights = rows.take(teacher), rows.take(log_weights)
    proximal = None if proximal is None else rows.take(proximal)
    kl_rows = backends.select("kl_rows", hidden.device, compute_dtype(hidden, teacher))
    if need_hidden and not need_weight and head.bias is None:
        frozen = FrozenWalk(hidden_used, ids_used, head, rows.count)
        logprobs, _ = frozen.scores()
        row_losses, coef, metrics = kl_rows(logprobs, teacher, log_weights, ids_used, None, proximal, spec)
        dhidden = rows.put(frozen.hidden_gradient(coef / denominator, logprobs), 0.0)
        none = head.weight.new_empty
        return row_losses.sum() / denominator, metrics, dhidden, none(0, hidden.shape[1]), none(0)

    gradients = Gradients.of(hidden_used, head, need_hidden, need_weight)
    walk = Walk(hidden_used, ids_used, head, rows.count)
    kept = room_for(hidden.shape[0], gradients.weight, head, walk.blocks)
    logprobs, lse = walk.forward(kept)
    row_losses, coef, metrics = kl_rows(logprobs, teacher, log_weights, ids_used, None, proximal, spec)
    # A row without coefficients adds nothing, whatever its hidden state holds: 0 * NaN in a product would.
    del hidden_used
    walk.hidden = torch.where((coef != 0).any(dim=1, keepdim=True), walk.hidden, 0.0)
    walk.backward(coef / denominator, logprobs, lse, gradients, kept)
    return row_losses.sum() / denominator, metrics, *finished(gradients, rows, hidden, head)
