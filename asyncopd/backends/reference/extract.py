"""Exact top-K log-probabilities of a row, largest first, ties by smaller id."""

from dataclasses import replace

import torch
from torch import Tensor

from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.linear import head_chunks
from asyncopd.backends.reference.rows import compute_dtype, normalized, row_chunks


def top_ids(logits: Tensor, k: int) -> Tensor:
    """Ids [C, k] of the k largest of logits [C, V]: value descending, id ascending among ties, NaN first.

    A stable sort, because `torch.topk` promises no order among ties.
    """
    return torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :k]


def topk_logprobs(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, V] -> ids int64 [N, k], log-probabilities [N, k], LSE [N]."""
    num_rows, vocab = logits.shape
    out = _empty_topk(num_rows, k, compute_dtype(logits), logits.device)
    for rows in row_chunks(num_rows, vocab):
        # Ordered by the logits as they came: dividing by T can merge neighbours and so reorder ties.
        _topk_of_chunk(logits[rows], temperature, rows, out)
    return out


def linear_topk_logprobs(hidden: Tensor, head: Head, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `topk_logprobs` on the logits of a head; hidden [N, H]."""
    before_temperature = replace(head, temperature=1.0)
    out = _empty_topk(hidden.shape[0], k, head.dtype(hidden), hidden.device)
    for rows in head_chunks(hidden.shape[0], head.weight.shape[0]):
        _topk_of_chunk(before_temperature.logits(hidden[rows]), head.temperature, rows, out)
    return out


def _empty_topk(n: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(n, k, dtype=torch.int64, device=device),
        torch.empty(n, k, dtype=dtype, device=device),
        torch.empty(n, dtype=dtype, device=device),
    )


def _topk_of_chunk(logits: Tensor, temperature: float, rows: slice, out: tuple[Tensor, Tensor, Tensor]) -> None:
    ids, logprobs, lse = out
    ids[rows] = top_ids(logits, ids.shape[1])
    z = logits.to(lse.dtype) / temperature
    lse[rows] = torch.logsumexp(z, dim=1)
    logprobs[rows] = normalized(z.gather(1, ids[rows]), lse[rows], ids[rows])
