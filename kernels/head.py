"""The exact head's ops on a device, on top of the walk over its vocabulary. Their meaning is the reference's."""

import torch
from torch import Tensor

from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.linear import rows_with_gradient
from asyncopd.backends.reference.rows import PAD, check_ids_in_range, normalized
from asyncopd.kernels.head_gradients import Gradients
from asyncopd.kernels.head_walk import Rows, Walk
from asyncopd.kernels.sparse_head import linear_gather_logits


def linear_gather_logprobs(hidden: Tensor, head: Head, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """hidden [N, H], ids [N, K] -> fp32 log p [N, K], LSE [N]; masked rows get -inf and 0."""
    check_ids_in_range(ids, head.weight.shape[0])
    rows = Rows.of(mask)
    logprobs, lse = Walk(rows.take(hidden), rows.take_ids(ids), head, rows.count).forward()
    return rows.put(logprobs, -torch.inf), rows.put(lse, 0.0)


def linear_logsumexp(hidden: Tensor, head: Head, mask: Tensor | None) -> Tensor:
    """LSE [N] of the head's logits; 0 in masked rows."""
    no_ids = torch.empty((hidden.shape[0], 0), dtype=torch.int64, device=hidden.device)
    return linear_gather_logprobs(hidden, head, no_ids, mask)[1]


def linear_gather_logprobs_backward(
    grad: Tensor,
    hidden: Tensor,
    head: Head,
    lse: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [N, K] -> gradients of hidden [N, H], weight [V, H] (empty if not needed), bias [V] (empty without one).

    As in the reference, ids may be ELSEWHERE, and hidden wider than the head.
    """
    used = rows_with_gradient(grad, ids, mask)
    rows = Rows.of(used)
    hidden_used, ids_used = rows.take(hidden.to(head.weight.dtype)), rows.take_ids(ids)
    gradients = Gradients.of(hidden_used, head, True, need_weight)
    walk = Walk(hidden_used, ids_used, head, rows.count)
    # The logits at the ids are K products a row; they were not kept.
    scores = linear_gather_logits(hidden_used, head, ids_used.clamp(min=PAD), None)
    lse = rows.take(lse)
    walk.at_ids = scores * head.temperature
    walk.backward(rows.take(grad.float()), normalized(scores, lse, ids_used), lse, gradients)
    return finished(gradients, rows, hidden, head)


def finished(gradients: Gradients, rows: Rows, hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """What an op returns, in the dtypes of what it belongs to."""
    weight, bias = head.weight, head.bias
    dhidden, dweight, dbias = gradients.hidden, gradients.weight, gradients.bias
    return (
        hidden.new_empty(0, hidden.shape[1]) if dhidden is None else rows.put(dhidden.to(hidden.dtype), 0.0),
        weight.new_empty(0, weight.shape[1]) if dweight is None else dweight,
        weight.new_empty(0) if bias is None or dbias is None else dbias.to(bias.dtype),
    )
