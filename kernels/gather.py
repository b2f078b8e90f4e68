"""LSE and log-probabilities at a few ids of each row, and the gradient.

    lp[n, k] = z[n, id] / T - LSE(z[n] / T)
    dlogits  = (scatter(g at ids) - (sum_k g) softmax(z / T)) / T

Forward: the row summary without its groups (one read of the logits, V * 2 bytes a row in bf16), then a program per
row and block of ids, which reads one logit an id. Backward: one read and one write of [N, V] for the softmax term,
then the ids, each written with all its gradients, summed in the order of k: no atomics, so no run differs from
another, and nothing is rounded to 16 bits before it is whole.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.backends.reference.rows import check_ids_in_range
from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.launch import INTERPRET, Prepared, Scale, cdiv, check_logits, padded
from asyncopd.kernels.numeric import INF, LOG2E, log_ratio, logsumexp_of, row_logsumexp, to_storage
from asyncopd.kernels.summary import TILE_GROUPS, count_groups, row_start, shift_of, summarize

IDS = 128  # a program's ids
TILE = 2048  # a program's columns in the backward pass
RIVALS = 8  # ids compared with at a time


@triton.jit
def _gather_kernel(
    logits,  # [N, V], unit column stride; [N, K], those at the ids, where GATHERED
    ids,  # [N, K] int32 or int64
    tile_peaks,  # [N, tiles] fp32
    tile_sums,  # [N, tiles] fp32
    logprobs,  # [N, K] fp32
    lse,  # [N] fp32
    row_stride,
    vocab,
    tiles,
    k,
    blocks,  # of ids to a row
    t,
    t_low,
    scale,
    scale_low,
    GATHERED: tl.constexpr,
    IDS: tl.constexpr,
    TILES: tl.constexpr,
    SHIFT: tl.constexpr,
):
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    at_tiles = row.to(tl.int64) * tiles
    top, log_high, log_low = row_logsumexp(
        tile_peaks + at_tiles, tile_sums + at_tiles, tiles, scale, scale_low, TILES, SHIFT
    )
    at = block * IDS + tl.arange(0, IDS)
    token = tl.load(row_start(ids, row, k) + at, mask=at < k, other=-1)
    inside = (token >= 0) & (token < vocab)
    place = at if GATHERED else token
    z = tl.load(row_start(logits, row, row_stride) + place, mask=inside, other=0.0).to(tl.float32)
    out = log_ratio(z, top, log_high, log_low, t, t_low)
    # A device cannot refuse an id; it is not read, and shows.
    out = tl.where(token == -1, -INF, tl.where(inside, out, float("nan")))
    tl.store(row_start(logprobs, row, k) + at, out, mask=at < k)
    if block == 0:
        tl.store(lse + row, logsumexp_of(top, log_high, log_low, t, t_low))


@triton.jit
def _totals_kernel(
    grad,  # [N, K] fp32
    ids,  # [N, K] int32 or int64
    totals,  # [N] fp32
    k,
    IDS: tl.constexpr,
):
    """The sum of each row's gradients, without those of pads."""
    row = tl.program_id(0)
    total = tl.zeros([IDS], tl.float32)
    for start in range(0, k, IDS):
        at = start + tl.arange(0, IDS)
        token = tl.load(row_start(ids, row, k) + at, mask=at < k, other=-1)
        total += tl.where(token == -1, 0.0, tl.load(row_start(grad, row, k) + at, mask=at < k, other=0.0))
    tl.store(totals + row, tl.sum(total, axis=0))


@triton.jit
def softmax_term(z, lse, total, t):
    """-total softmax / T. A row whose gradients sum to zero, or that has no mass, never multiplies its softmax."""
    probability = tl.exp2(tl.fma(z, t, -lse) * LOG2E)
    probability = tl.where((total == 0.0) | (lse == -INF), 0.0, probability)
    return probability * (-total * t)


@triton.jit
def _fill_kernel(
    logits,  # [N, V], unit column stride
    lse,  # [N] fp32
    totals,  # [N] fp32: sum of the row's gradients
    out,  # [N, V], unit column stride
    row_stride,
    out_stride,
    vocab,
    tiles,
    t,
    TILE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    base, to = row_start(logits, row, row_stride), row_start(out, row, out_stride)
    row_lse, total = tl.load(lse + row), tl.load(totals + row)
    column = tile * TILE + tl.arange(0, TILE)
    # As in the summary: a mask would cost whole tiles their wide accesses.
    if tile * TILE + TILE <= vocab:
        z = tl.load(base + column).to(tl.float32)
        value = softmax_term(z, row_lse, total, t)
        tl.store(to + column, to_storage(value, out.dtype.element_ty, INTERPRET))
    else:
        z = tl.load(base + column, mask=column < vocab, other=-INF).to(tl.float32)
        value = softmax_term(z, row_lse, total, t)
        tl.store(to + column, to_storage(value, out.dtype.element_ty, INTERPRET), mask=column < vocab)


@triton.jit
def sum_over_equal_ids(row_ids, row_grad, token, k, IDS: tl.constexpr, RIVALS: tl.constexpr):
    """For each token [IDS] the sum of the row's gradients [k] at ids equal to it, in the order of k."""
    total = tl.zeros([IDS], tl.float32)
    for start in range(0, tl.cdiv(k, RIVALS) * RIVALS, RIVALS):
        at = start + tl.arange(0, RIVALS)
        rival = tl.load(row_ids + at, mask=at < k, other=-1)
        grad = tl.load(row_grad + at, mask=at < k, other=0.0)
        total += tl.sum(tl.where(token[:, None] == rival[None, :], grad[None, :], 0.0), axis=1)
    return total


@triton.jit
def _scatter_kernel(
    grad,  # [N, K] fp32
    logits,  # [N, V], unit column stride
    lse,  # [N] fp32
    totals,  # [N] fp32
    ids,  # [N, K] int32 or int64
    out,  # [N, V], unit column stride: holds the softmax term
    row_stride,
    out_stride,
    vocab,
    k,
    blocks,
    t,
    IDS: tl.constexpr,
    RIVALS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row_ids, row_grad = row_start(ids, row, k), row_start(grad, row, k)
    at = block * IDS + tl.arange(0, IDS)
    token = tl.load(row_ids + at, mask=at < k, other=-1)
    inside = (token >= 0) & (token < vocab)
    sum_of_grads = sum_over_equal_ids(row_ids, row_grad, token, k, IDS, RIVALS)
    # Equal ids all write, and write the same: each added all the gradients in the same order.
    z = tl.load(row_start(logits, row, row_stride) + token, mask=inside, other=0.0).to(tl.float32)
    value = tl.fma(sum_of_grads, t, softmax_term(z, tl.load(lse + row), tl.load(totals + row), t))
    value = to_storage(value, out.dtype.element_ty, INTERPRET)
    tl.store(row_start(out, row, out_stride) + token, value, mask=inside)


def gather_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits [N, V], ids [N, K] -> fp32 log-probabilities [N, K] and LSE [N] of logits / temperature.

    An id outside [-1, V) gives NaN on a device, where nothing can be raised without synchronising.
    """
    logits, ids = check_logits(logits), ids.contiguous()
    vocab = logits.shape[1]
    if INTERPRET:
        check_ids_in_range(ids, vocab)
    scale = Scale.of(temperature)
    summary = summarize(logits, scale, peaks=False, sums=False)
    return logprobs_at(logits, ids, summary.tile_peaks, summary.tile_sums, vocab, scale, gathered=False)


def logprobs_at(
    logits: Tensor, ids: Tensor, tile_peaks: Tensor, tile_sums: Tensor, vocab: int, scale: Scale, *, gathered: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, K] at contiguous ids [N, K], and LSE [N], from tiles [N, j] of a row summary.

    logits: [N, V], or those at the ids [N, K] if they have been `gathered`.
    """
    rows, k = ids.shape
    tiles = tile_peaks.shape[1]
    logprobs = torch.empty(rows, k, dtype=torch.float32, device=logits.device)
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        prepared = _prepared_gather(vocab, logits.stride(0), tiles, k, scale, gathered)
        prepared(rows * max(1, cdiv(k, IDS)), logits, ids, tile_peaks, tile_sums, logprobs, lse)
    return logprobs, lse


@lru_cache(maxsize=256)
def _prepared_gather(vocab: int, row_stride: int, tiles: int, k: int, scale: Scale, gathered: bool) -> Prepared:
    return Prepared(
        _gather_kernel,
        row_stride,
        vocab,
        tiles,
        k,
        max(1, cdiv(k, IDS)),
        *scale,
        gathered,
        IDS,
        padded(tiles, 1),
        shift_of(vocab),
        num_warps=4,
    )


def gather_logprobs_backward(grad: Tensor, logits: Tensor, lse: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """grad [N, K] of the log-probabilities -> gradient [N, V] of the logits, in their dtype; sums are fp32."""
    # The layout that autograd and torch.compile are told of; one without unit stride is written by way of a copy.
    dlogits = torch.empty_like(logits)
    logits, ids = check_logits(logits), ids.contiguous()
    (rows, vocab), k = logits.shape, ids.shape[1]
    if grad.shape != ids.shape or lse.shape != (rows,):
        raise ValueError(f"grad, lse: got {list(grad.shape)}, {list(lse.shape)}, expected {list(ids.shape)}, [{rows}]")
    grad, lse = grad.float().contiguous(), lse.float().contiguous()
    totals = torch.empty(rows, dtype=torch.float32, device=logits.device)
    out = dlogits if dlogits.stride(1) == 1 else torch.empty((rows, vocab), dtype=logits.dtype, device=logits.device)
    tiles = cdiv(vocab, TILE)
    if rows * tiles:
        sums, fill, scatter = _prepared_backward(vocab, logits.stride(0), out.stride(0), k, temperature)
        sums(rows, grad, ids, totals)
        fill(rows * tiles, logits, lse, totals, out)
        if k:
            scatter(rows * cdiv(k, IDS), grad, logits, lse, totals, ids, out)
    return dlogits if out is dlogits else dlogits.copy_(out)


@lru_cache(maxsize=256)
def _prepared_backward(
    vocab: int, row_stride: int, out_stride: int, k: int, temperature: float
) -> tuple[Prepared, Prepared, Prepared]:
    """The launches of `_totals_kernel`, `_fill_kernel` and `_scatter_kernel`."""
    strides, t, blocks = (row_stride, out_stride), Scale.of(temperature).t, cdiv(k, IDS)
    return (
        Prepared(_totals_kernel, k, IDS, num_warps=1),
        Prepared(_fill_kernel, *strides, vocab, cdiv(vocab, TILE), t, TILE, INTERPRET, num_warps=4),
        Prepared(_scatter_kernel, *strides, vocab, k, blocks, t, IDS, RIVALS, INTERPRET, num_warps=4),
    )


def compile_cases() -> list[CompileCase]:
    vocab = 151_936
    tiles = cdiv(count_groups(vocab), TILE_GROUPS)
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        forward = CompileCase(
            name=f"gather-{dtype}",
            kernel=_gather_kernel,
            signature={
                "logits": f"*{dtype}",
                "ids": "*i64",
                **dict.fromkeys(("tile_peaks", "tile_sums", "logprobs", "lse"), "*fp32"),
                **dict.fromkeys(("row_stride", "vocab", "tiles", "k", "blocks"), "i32"),
                **dict.fromkeys(("t", "t_low", "scale", "scale_low"), "fp32"),
                **dict.fromkeys(("GATHERED", "IDS", "TILES", "SHIFT"), "constexpr"),
            },
            constexprs={"GATHERED": False, "IDS": IDS, "TILES": padded(tiles, 1), "SHIFT": shift_of(vocab)},
            num_warps=4,
            max_registers=40,
            divisible=("logits", "ids", "tile_peaks", "tile_sums", "logprobs", "lse", "row_stride", "vocab"),
        )
        fill = CompileCase(
            name=f"gather-backward-fill-{dtype}",
            kernel=_fill_kernel,
            signature={
                "logits": f"*{dtype}",
                **dict.fromkeys(("lse", "totals"), "*fp32"),
                "out": f"*{dtype}",
                **dict.fromkeys(("row_stride", "out_stride", "vocab", "tiles"), "i32"),
                "t": "fp32",
                **dict.fromkeys(("TILE", "INTERPRET"), "constexpr"),
            },
            constexprs={"TILE": TILE, "INTERPRET": False},
            num_warps=4,
            max_registers=40,
            divisible=("logits", "lse", "totals", "out", "row_stride", "out_stride", "vocab"),
        )
        scatter = CompileCase(
            name=f"gather-backward-scatter-{dtype}",
            kernel=_scatter_kernel,
            signature={
                "grad": "*fp32",
                "logits": f"*{dtype}",
                **dict.fromkeys(("lse", "totals"), "*fp32"),
                "ids": "*i64",
                "out": f"*{dtype}",
                **dict.fromkeys(("row_stride", "out_stride", "vocab", "k", "blocks"), "i32"),
                "t": "fp32",
                **dict.fromkeys(("IDS", "RIVALS", "INTERPRET"), "constexpr"),
            },
            constexprs={"IDS": IDS, "RIVALS": RIVALS, "INTERPRET": False},
            num_warps=4,
            max_registers=80,
            divisible=("grad", "logits", "lse", "totals", "ids", "out", "row_stride", "out_stride", "vocab"),
        )
        cases += [forward, fill, scatter]
    totals = CompileCase(
        name="gather-backward-totals",
        kernel=_totals_kernel,
        signature={"grad": "*fp32", "ids": "*i64", "totals": "*fp32", "k": "i32", "IDS": "constexpr"},
        constexprs={"IDS": IDS},
        num_warps=1,
        max_registers=40,
        divisible=("grad", "ids", "totals"),
    )
    return [*cases, totals]
