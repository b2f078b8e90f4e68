"""Ops on logits: top-K, sampled supports, gathered log-probabilities and their gradient.

Any row stride; rows whose elements are not contiguous are copied first. Beside the reference's arguments each function
takes `threads` (None: torch's number) and `isa` (-1: the best instruction set of this machine), for tests.
"""

import torch
from torch import Tensor

from asyncopd.backends.native import (
    _C,
    BAD_ID,
    DTYPE_CODES,
    ID_TYPE_CODES,
    check_ids,
    check_logits,
    raise_for_status,
)


def gather_logprobs(
    logits: Tensor, ids: Tensor, temperature: float, *, threads: int | None = None, isa: int = -1
) -> tuple[Tensor, Tensor]:
    """logits [N, V], ids [N, K] on the CPU -> fp32 log-probabilities [N, K] and LSE [N] of logits / temperature.

    Pads (id -1) and -inf logits give -inf; a row with a NaN gives NaN. One read of the logits, whatever K is.
    Raises ValueError for ids outside [-1, V).
    """
    logits, ids = check_logits(logits, temperature), check_ids(ids, logits, "logits")
    (rows, vocab), num_ids = logits.shape, ids.shape[1]
    logprobs = torch.empty((rows, num_ids), dtype=torch.float32)
    lse = torch.empty(rows, dtype=torch.float32)
    status = _C.cpu_gather_logprobs(
        logits=logits.data_ptr(),
        dtype=DTYPE_CODES[logits.dtype],
        row_stride=logits.stride(0),
        ids=ids.data_ptr(),
        id_type=ID_TYPE_CODES[ids.dtype],
        rows=rows,
        vocab=vocab,
        num_ids=num_ids,
        inv_temperature=1.0 / temperature,
        logprobs=logprobs.data_ptr(),
        lse=lse.data_ptr(),
        threads=torch.get_num_threads() if threads is None else threads,
        isa=isa,
    )
    raise_for_status(status, "cpu_gather_logprobs", vocab, ids)
    return logprobs, lse


def gather_logprobs_backward(
    grad: Tensor,
    logits: Tensor,
    lse: Tensor,
    ids: Tensor,
    temperature: float,
    *,
    threads: int | None = None,
    isa: int = -1,
) -> Tensor:
    """grad [N, K] of the log-probabilities -> gradient [N, V] of the logits, in their dtype: one read, one write."""
    # The layout that autograd and torch.compile are told of; one without unit stride is written by way of a copy.
    dlogits = torch.empty_like(logits)
    logits, ids = check_logits(logits, temperature), check_ids(ids, logits, "logits")
    (rows, vocab), num_ids = logits.shape, ids.shape[1]
    if grad.shape != ids.shape or lse.shape != (rows,):
        raise ValueError(f"grad, lse: got {list(grad.shape)}, {list(lse.shape)}, expected {list(ids.shape)}, [{rows}]")
    grad, lse = grad.to(torch.float32).contiguous(), lse.to(torch.float32).contiguous()
    out = dlogits if dlogits.stride(1) == 1 else torch.empty((rows, vocab), dtype=logits.dtype)
    status = _C.cpu_gather_logprobs_backward(
        grad=grad.data_ptr(),
        logits=logits.data_ptr(),
        dtype=DTYPE_CODES[logits.dtype],
        row_stride=logits.stride(0),
        lse=lse.data_ptr(),
        ids=ids.data_ptr(),
        id_type=ID_TYPE_CODES[ids.dtype],
        rows=rows,
        first=0,
        columns=vocab,
        vocab=vocab,
        num_ids=num_ids,
        inv_temperature=1.0 / temperature,
        dlogits=out.data_ptr(),
        out_stride=out.stride(0),
        threads=torch.get_num_threads() if threads is None else threads,
        isa=isa,
    )
    raise_for_status(status, "cpu_gather_logprobs_backward", vocab)
    return dlogits if out is dlogits else dlogits.copy_(out)


def topk_logprobs(
    logits: Tensor, k: int, temperature: float, *, threads: int | None = None, isa: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, V] -> ids int64 [N, k], log-probabilities [N, k], LSE [N]; one read of the logits and a little."""
    logits = check_logits(logits, temperature)
    rows, vocab = logits.shape
    _check_within("k", k, vocab)
    ids = torch.empty((rows, k), dtype=torch.int64)
    logprobs = torch.empty((rows, k), dtype=torch.float32)
    lse = torch.empty(rows, dtype=torch.float32)
    status = _C.cpu_topk_logprobs(
        logits=logits.data_ptr(),
        dtype=DTYPE_CODES[logits.dtype],
        row_stride=logits.stride(0),
        rows=rows,
        vocab=vocab,
        k=k,
        inv_temperature=1.0 / temperature,
        ids=ids.data_ptr(),
        logprobs=logprobs.data_ptr(),
        lse=lse.data_ptr(),
        threads=torch.get_num_threads() if threads is None else threads,
        isa=isa,
    )
    raise_for_status(status, "cpu_topk_logprobs", vocab)
    return ids, logprobs, lse


def sample_support(
    logits: Tensor,
    num_samples: int,
    head: int,
    seed: int,
    streams: Tensor | None,
    sampled_ids: Tensor | None,
    temperature: float,
    *,
    threads: int | None = None,
    isa: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [N, V] -> ids int64 [N, K], log-weights, log mu at the ids, LSE [N]; one read of the logits and a little.

    The uniform numbers are the reference's bit for bit. So are the draws, unless a number falls within rounding
    (about 1e-9) of a step of the cumulative distribution.
    """
    logits = check_logits(logits, temperature)
    rows, vocab = logits.shape
    _check_within("head", head, vocab)
    # Contiguous int64, kept alive until the kernel returns.
    streams, sampled_ids = _row_vector("seed", streams, rows), _row_vector("sampled_ids", sampled_ids, rows)
    ids = torch.empty((rows, head + num_samples), dtype=torch.int64)
    log_weights = torch.empty(ids.shape, dtype=torch.float32)
    logprobs = torch.empty(ids.shape, dtype=torch.float32)
    lse = torch.empty(rows, dtype=torch.float32)
    status = _C.cpu_sample_support(
        logits=logits.data_ptr(),
        dtype=DTYPE_CODES[logits.dtype],
        row_stride=logits.stride(0),
        rows=rows,
        vocab=vocab,
        num_samples=num_samples,
        head=head,
        seed=seed,
        streams=0 if streams is None else streams.data_ptr(),
        sampled_ids=0 if sampled_ids is None else sampled_ids.data_ptr(),
        inv_temperature=1.0 / temperature,
        ids=ids.data_ptr(),
        log_weights=log_weights.data_ptr(),
        logprobs=logprobs.data_ptr(),
        lse=lse.data_ptr(),
        threads=torch.get_num_threads() if threads is None else threads,
        isa=isa,
    )
    if status == BAD_ID and sampled_ids is not None:
        _refuse_sampled_ids(logits, sampled_ids)
    raise_for_status(status, "cpu_sample_support", vocab)
    return ids, log_weights, logprobs, lse


def _refuse_sampled_ids(logits: Tensor, token: Tensor) -> None:
    vocab = logits.shape[1]
    outside = token[(token < 0) | (token >= vocab)]
    if outside.numel():
        raise ValueError(f"sampled_ids: got {int(outside[0])}, expected 0..{vocab - 1}")
    impossible = token[logits.gather(1, token[:, None])[:, 0] == -torch.inf]
    raise ValueError(
        f"sampled_ids: got token {int(impossible[0])}, whose logit is -inf, expected a token that the policy can write"
    )


def _row_vector(name: str, value: Tensor | None, rows: int) -> Tensor | None:
    if value is not None and value.shape != (rows,):
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected [{rows}]")
    return None if value is None else value.to(torch.int64).contiguous()


def _check_within(name: str, value: int, vocab: int) -> None:
    if not 0 <= value <= vocab:
        raise ValueError(f"{name}: got {value}, expected 0..{vocab} (V)")
