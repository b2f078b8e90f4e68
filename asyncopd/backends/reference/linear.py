"""Ops on the logits of a language-model head that are never held whole: z = softcap(scale (h W^T + b)) / T.

Dense family (LSE over the vocabulary): 2NVH to read it, 6NVH more for the gradient with a recomputed tile.
Sparse family (`linear_gather_logits`): only the K rows of W that the support names, 2NKH each way.
Weight gradients accumulate in fp32 (fp64 for fp64) over all chunks and are rounded to the weight's dtype once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncopd.backends.reference.gather import logits_gradient
from asyncopd.backends.reference.rows import PAD, check_ids_in_range, compute_dtype, logprobs_at, row_chunks

VOCAB_BLOCK = 8192  # rows of a low-precision head that are upcast at a time


@dataclass(slots=True)
class Head:
    """The head's tensors and scalars: weight [V, H], bias [V] or None."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float | None

    def dtype(self, hidden: Tensor) -> torch.dtype:
        return compute_dtype(hidden, self.weight)

    def _blocks(self, dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
        """The weight in `dtype`: itself if it already is, else upcast a block of the vocabulary at a time."""
        vocab = self.weight.shape[0]
        if self.weight.dtype == dtype:
            return [(slice(0, vocab), self.weight)]
        starts = range(0, vocab, VOCAB_BLOCK)
        return [(slice(s, min(s + VOCAB_BLOCK, vocab)), self.weight[s : s + VOCAB_BLOCK]) for s in starts]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [C, H] -> z [C, V], in `out` if given: products of the given bf16/fp16 values, summed in fp32."""
        dtype = self.dtype(hidden)
        hidden = hidden.to(dtype)
        z = out
        if z is None:
            z = torch.empty(hidden.shape[0], self.weight.shape[0], dtype=dtype, device=hidden.device)
        for cols, block in self._blocks(dtype):
            torch.mm(hidden, block.to(dtype).t(), out=z[:, cols])
        if self.bias is not None:
            z += self.bias.to(dtype)
        return self.epilogue(z)

    def epilogue(self, z: Tensor) -> Tensor:
        """Scale, softcap and temperature, in place on h W^T + b."""
        if self.logit_scale != 1.0:
            z *= self.logit_scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z.div_(self.temperature) if self.temperature != 1.0 else z

    def epilogue_gradient(self, dz: Tensor, z: Tensor | None) -> Tensor:
        """dz -> gradient of h W^T + b, in place on dz; z is needed with a softcap only (tanh' = 1 - tanh^2)."""
        if self.softcap is not None:
            assert z is not None
            tanh = z * (self.temperature / self.softcap)
            # z = -inf comes from a -inf bias and saturates the cap: its slope is 0.
            dz *= 1.0 - tanh * tanh
        return dz.mul_(self.logit_scale / self.temperature)

    def times_weight(self, dy: Tensor) -> Tensor:
        """dy [C, V] -> dy W [C, H] in dy's dtype."""
        out = torch.zeros(dy.shape[0], self.weight.shape[1], dtype=dy.dtype, device=dy.device)
        for cols, block in self._blocks(dy.dtype):
            out.addmm_(dy[:, cols], block.to(dy.dtype))
        return out


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


def linear_gather_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """hidden [N, H], weight [V, H], ids [N, K] -> log p [N, K], LSE [N]; masked rows get -inf and 0."""
    check_ids_in_range(ids, weight.shape[0])
    head = Head(weight, bias, temperature, logit_scale, softcap)
    dtype = head.dtype(hidden)
    logprobs = torch.full(ids.shape, -torch.inf, dtype=dtype, device=hidden.device)
    lse = torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device)
    valid = _valid_rows(mask, hidden.shape[0], hidden.device)
    hidden, ids = _silence(hidden, ids, mask)
    for chunk in head_chunks(valid.shape[0], weight.shape[0]):
        rows = valid[chunk]
        z = head.logits(hidden[rows])
        lse[rows] = torch.logsumexp(z, dim=1)
        logprobs[rows] = logprobs_at(z, lse[rows], ids[rows])
    return logprobs, lse


def linear_gather_logprobs_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    lse: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [N, K] -> gradients of hidden [N, H], weight [V, H] (empty if not needed), bias [V] (empty without one).

    Where the head is one shard of a vocabulary, lse [N] is that of the whole and ids may be ELSEWHERE. hidden may be
    wider than the head (fp32 beside bf16): its gradient, then a part of a sum over shards, is not rounded.
    """
    head = Head(weight, bias, temperature, logit_scale, softcap)
    dtype = lse.dtype
    dhidden, dweight, dbias = _empty_gradients(hidden, head, dtype, need_weight)
    mask = rows_with_gradient(grad, ids, mask)
    valid = _valid_rows(mask, hidden.shape[0], hidden.device)
    safe_hidden, ids = _silence(hidden, ids, mask)
    for chunk in head_chunks(valid.shape[0], weight.shape[0]):
        rows = valid[chunk]
        h = safe_hidden[rows].to(dtype)
        z = head.logits(h)
        capped = z.clone() if softcap is not None else None
        dy = head.epilogue_gradient(logits_gradient(grad[rows], z, lse[rows], ids[rows]), capped)
        dhidden[rows] = head.times_weight(dy)
        if need_weight:
            dweight.addmm_(dy.t(), h)
        if bias is not None:
            dbias += dy.sum(dim=0)
    return dhidden.to(hidden.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype if bias is None else bias.dtype)


def linear_logsumexp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """LSE [N] of the head's logits; 0 in masked rows."""
    no_ids = torch.empty(hidden.shape[0], 0, dtype=torch.int64, device=hidden.device)
    return linear_gather_logprobs(hidden, weight, no_ids, bias, mask, temperature, logit_scale, softcap)[1]


def linear_gather_logits(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """Unnormalised z at ids [N, K] by K dot products a row (an SDDMM); -inf at pads and in masked rows."""
    check_ids_in_range(ids, weight.shape[0])
    head = Head(weight, bias, temperature, logit_scale, softcap)
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
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As above from the K scores alone (an SpMM each): rows of W that no id names get exactly 0."""
    head = Head(weight, bias, temperature, logit_scale, softcap)
    dtype = logits.dtype
    dhidden, dweight, dbias = _empty_gradients(hidden, head, dtype, need_weight)
    mask = rows_with_gradient(grad, ids, mask)
    valid = _valid_rows(mask, hidden.shape[0], hidden.device)
    safe_hidden, ids = _silence(hidden, ids, mask)
    for chunk in row_chunks(valid.shape[0], ids.shape[1] * weight.shape[1]):
        rows = valid[chunk]
        picked = ids[rows].clamp(min=0).long()
        z = logits[rows].masked_fill(ids[rows] < 0, 0.0) if softcap is not None else None
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
