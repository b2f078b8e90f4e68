"""Ops on the logits of a language-model head that are never held whole: z = softcap(scale (h W^T + b)) / T.

Dense family (LSE over the vocabulary): 2NVH to read it, 6NVH more for the gradient with a recomputed tile.
Sparse family (`linear_gather_logits`): only the K rows of W that the support names, 2NKH each way.
Weight gradients accumulate in fp32 (fp64 for fp64) over all chunks and are rounded to the weight's dtype once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from asyncopd.backends.reference.gather import logits_gradient
from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.rows import PAD, check_ids_in_range, logprobs_at, row_chunks


def head_chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Chunks of rows whose logits make a tile: never more than a quarter of all rows, so never an [N, V] tensor."""
    return row_chunks(num_rows, vocab_size, at_most=-(-num_rows // 4))


def _valid_rows(mask: Tensor | None, num_rows: int, device: torch.device) -> Tensor:
    """Positions of the rows to compute. Host data is compacted; device data is not, since its count is unknown here."""
    if mask is None or device.type != "cpu":
        return torch.arange(num_rows, device=device)
    return mask.nonzero().squeeze(1)


def _silence(hidden: Tensor, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masked rows become zero hidden states with no ids, so that a NaN in them reaches neither dW nor the loss."""
    if mask is None:
        return hidden, ids
    return torch.where(mask[:, None], hidden, 0), torch.where(mask[:, None], ids, -1)


def rows_with_gradient(grad: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Rows that take part in the backward: one that the caller dropped is 0, whatever its hidden state holds."""
    used = ((grad != 0) & (ids != PAD)).any(dim=1)
    return used if mask is None else used & mask


def _empty_gradients(
    hidden: Tensor, head: Head, dtype: torch.dtype, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for dH [N, H], dW [V, H] and db [V]. A frozen head, whose gradient nobody wants, gets no [V, H] tensor."""
    vocab, width = head.weight.shape
    return (
        torch.zeros(hidden.shape, dtype=dtype, device=hidden.device),
        torch.zeros(vocab if need_weight else 0, width, dtype=dtype, device=hidden.device),
        torch.zeros(0 if head.bias is None else vocab, dtype=dtype, device=hidden.device),
    )


def linear_gather_logprobs(hidden: Tensor, head: Head, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """hidden [N, H], ids [N, K] -> log p [N, K], LSE [N]; masked rows get -inf and 0."""
    vocab = head.weight.shape[0]
    check_ids_in_range(ids, vocab)
    dtype = head.dtype(hidden)
    logprobs = torch.full(ids.shape, -torch.inf, dtype=dtype, device=hidden.device)
    lse = torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device)
    valid = _valid_rows(mask, hidden.shape[0], hidden.device)
    hidden, ids = _silence(hidden, ids, mask)
    for chunk in head_chunks(valid.shape[0], vocab):
        rows = valid[chunk]
        z = head.logits(hidden[rows])
        lse[rows] = torch.logsumexp(z, dim=1)
        logprobs[rows] = logprobs_at(z, lse[rows], ids[rows])
    return logprobs, lse


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

    Where the head is one shard of a vocabulary, lse [N] is that of the whole and ids may be ELSEWHERE. hidden may be
    wider than the head (fp32 beside bf16): its gradient, then a part of a sum over shards, is not rounded.
    """
    weight, bias = head.weight, head.bias
    dtype = lse.dtype
    dhidden, dweight, dbias = _empty_gradients(hidden, head, dtype, need_weight)
    mask = rows_with_gradient(grad, ids, mask)
    valid = _valid_rows(mask, hidden.shape[0], hidden.device)
    safe_hidden, ids = _silence(hidden, ids, mask)
    for chunk in head_chunks(valid.shape[0], weight.shape[0]):
        rows = valid[chunk]
        z = head.logits(safe_hidden[rows])
        h = safe_hidden[rows].to(dtype)
        capped = z.clone() if head.softcap is not None else None
        dy = head.epilogue_gradient(logits_gradient(grad[rows], z, lse[rows], ids[rows]), capped)
        dhidden[rows] = head.times_weight(dy)
        if need_weight:
            dweight.addmm_(dy.t(), h)
        if bias is not None:
            dbias += dy.sum(dim=0)
    return dhidden.to(hidden.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype if bias is None else bias.dtype)


def linear_logsumexp(hidden: Tensor, head: Head, mask: Tensor | None) -> Tensor:
    """LSE [N] of the head's logits; 0 in masked rows."""
    no_ids = torch.empty(hidden.shape[0], 0, dtype=torch.int64, device=hidden.device)
    return linear_gather_logprobs(hidden, head, no_ids, mask)[1]


def linear_gather_logits(hidden: Tensor, head: Head, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Unnormalised z at ids [N, K] by K dot products a row (an SDDMM); -inf at pads and in masked rows."""
    weight, bias = head.weight, head.bias
    check_ids_in_range(ids, weight.shape[0])
    dtype = head.dtype(hidden)
    logits = torch.full(ids.shape, -torch.inf, dtype=dtype, device=hidden.device)
    valid = _valid_rows(mask, hidden.shape[0], hidden.device)
    hidden, ids = _silence(hidden, ids, mask)
    for chunk in row_chunks(valid.shape[0], ids.shape[1] * weight.shape[1]):
        rows = valid[chunk]
        picked = ids[rows].clamp(min=0).long()
        z = torch.einsum("ckh,ch->ck", weight[picked].to(dtype), hidden[rows].to(dtype))
        if bias is not None:
            z += bias[picked].to(dtype)
        logits[rows] = head.epilogue(z).masked_fill(ids[rows] < 0, -torch.inf)
    return logits


def linear_gather_logits_backward(
    grad: Tensor,
    logits: Tensor,
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    mask: Tensor | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As above from the K scores alone (an SpMM each): rows of W that no id names get exactly 0."""
    weight, bias = head.weight, head.bias
    dtype = logits.dtype
    dhidden, dweight, dbias = _empty_gradients(hidden, head, dtype, need_weight)
    mask = rows_with_gradient(grad, ids, mask)
    valid = _valid_rows(mask, hidden.shape[0], hidden.device)
    safe_hidden, ids = _silence(hidden, ids, mask)
    for chunk in row_chunks(valid.shape[0], ids.shape[1] * weight.shape[1]):
        rows = valid[chunk]
        picked = ids[rows].clamp(min=0).long()
        z = logits[rows].masked_fill(ids[rows] < 0, 0.0) if head.softcap is not None else None
        dy = head.epilogue_gradient(grad[rows].to(dtype).masked_fill(ids[rows] < 0, 0.0), z)
        h = safe_hidden[rows].to(dtype)
        # A pad reads row 0 of the head, and 0 * NaN must not come of it.
        pads = (ids[rows] < 0)[:, :, None]
        dhidden[rows] = torch.einsum("ck,ckh->ch", dy, weight[picked].to(dtype).masked_fill_(pads, 0.0))
        if need_weight:
            terms = (dy[:, :, None] * h[:, None, :]).masked_fill_(pads, 0.0)
            dweight.index_add_(0, picked.flatten(), terms.flatten(0, 1))
        if bias is not None:
            dbias.index_add_(0, picked.flatten(), dy.flatten())
    return dhidden.to(hidden.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype if bias is None else bias.dtype)
