"""Ops on the logits of a head, on top of the walk over its vocabulary (walk.py). Their meaning is the reference's."""

from dataclasses import replace

import torch
from torch import Tensor

from asyncopd.backends.cpu.logits import topk_logprobs
from asyncopd.backends.cpu.walk import Gradients, Tiles, Walk, fits_one_tile
from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.linear import rows_with_gradient
from asyncopd.backends.reference.rows import check_ids_in_range, normalized

# Top-K looks for K columns in every block, so its blocks are wider, and its rows fewer at a time.
TOPK_ROWS, TOPK_TILE_ELEMENTS = 512, 1 << 22


def linear_gather_logprobs(hidden: Tensor, head: Head, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """hidden [N, H], ids [N, K] -> fp32 log p [N, K], LSE [N]; masked rows get -inf and 0."""
    vocab = head.weight.shape[0]
    if mask is None:
        return Walk(hidden, ids, head).forward(Tiles.one(hidden.shape[0], vocab))
    check_ids_in_range(ids, vocab)  # the walk sees those of valid rows only
    walk = Walk(hidden[mask], ids[mask], head)
    logprobs, lse = walk.forward(Tiles.one(walk.hidden.shape[0], vocab))
    return _spread(logprobs, mask, -torch.inf), _spread(lse, mask, 0.0)


def _spread(rows: Tensor, mask: Tensor, fill: float) -> Tensor:
    """The valid rows [C, ..] among all [N, ..]."""
    out = rows.new_full((mask.shape[0], *rows.shape[1:]), fill)
    out[mask] = rows
    return out


def linear_logsumexp(hidden: Tensor, head: Head, mask: Tensor | None) -> Tensor:
    """LSE [N] of the head's logits; 0 in masked rows."""
    no_ids = torch.empty(hidden.shape[0], 0, dtype=torch.int64)
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
    walk = Walk(hidden[used], ids[used], head)
    gradients = Gradients.empty(walk.hidden, head, need_hidden=True, need_weight=need_weight)
    walk.backward(grad[used], lse[used], gradients)
    return finished(gradients, used, hidden, head)


def finished(gradients: Gradients, used: Tensor | None, hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """What the op returns, in the dtypes of what it belongs to; `used` [N]: the rows that were walked, None: all."""
    weight, bias = head.weight, head.bias
    dhidden, dweight, dbias = gradients.hidden, gradients.weight, gradients.bias
    if dhidden is None:
        dhidden = hidden.new_empty(0, hidden.shape[1])
    else:
        dhidden = dhidden.to(hidden.dtype)
        dhidden = dhidden if used is None else _spread(dhidden, used, 0.0)
    return (
        dhidden,
        weight.new_empty(0, weight.shape[1]) if dweight is None else dweight,
        weight.new_empty(0) if bias is None or dbias is None else dbias.to(bias.dtype),
    )


def linear_topk_logprobs(hidden: Tensor, head: Head, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `topk_logprobs` on the head's logits, which exist a tile at a time."""
    if fits_one_tile(hidden.shape[0], head.weight.shape[0]):
        return topk_logprobs(replace(head, temperature=1.0).logits(hidden), k, head.temperature)
    ids = torch.empty(hidden.shape[0], k, dtype=torch.int64)
    logprobs, lse = torch.empty(ids.shape, dtype=torch.float32), torch.empty(hidden.shape[0], dtype=torch.float32)
    for start in range(0, hidden.shape[0], TOPK_ROWS):
        rows = slice(start, start + TOPK_ROWS)
        ids[rows], logprobs[rows], lse[rows] = _topk_of_rows(hidden[rows], head, k)
    return ids, logprobs, lse


def _topk_of_rows(hidden: Tensor, head: Head, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of every block's k best. Among equals the one met first has the smaller id, as it should be."""
    vocab = head.weight.shape[0]
    no_ids = torch.empty(hidden.shape[0], 0, dtype=torch.int64)
    tile_elements = min(TOPK_TILE_ELEMENTS, hidden.shape[0] * vocab // 4)
    walk = Walk(hidden, no_ids, head, tile_elements)
    best_ids, best_logits = [], []

    def keep_best(cols: slice, z: Tensor) -> None:
        ids = topk_logprobs(z, min(k, z.shape[1]), 1.0)[0]
        best_ids.append(ids + cols.start)
        best_logits.append(z.gather(1, ids))

    _, lse = walk.forward(Tiles.one(hidden.shape[0], vocab, tile_elements), keep_best)
    candidates, logits = torch.cat(best_ids, dim=1), torch.cat(best_logits, dim=1)
    order = topk_logprobs(logits, k, 1.0)[0]
    ids = candidates.gather(1, order)
    return ids, normalized(logits.gather(1, order) / head.temperature, lse, ids), lse
