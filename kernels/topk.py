"""Exact top-K log-probabilities from the row summary.

The K best groups, by (peak descending, index ascending), hold the K best elements in the order (value descending, id
ascending): a better element's group has a better peak, or an equal one and a smaller index. Applied twice:

    groups of 64 -> the K best -> their sub-groups of 8 -> the K best -> 8 K elements -> the K best -> their ranks

so no step chooses among more than max(V / 64, 8 K) keys, all in registers, and a row of equal logits costs what any
other does. One program a row. A choice is the K-th largest key, found bit by bit (16 or 32 counts), and one cumulative
sum that places what is above it and the first of what equals it; nothing is sorted, ranks are counted (K^2 compares).

NaN comes first, -0 equals +0. Bytes of a row (V = 151,936, bf16, K = 64) after the summary's: peaks 4,748 and tiles
304 read, 8,192 of logits read again twice over (the second time an eighth, from L1): with the summary 1.07 reads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.launch import Scale, check_logits, on_device, padded, warps_for
from asyncopd.kernels.numeric import key_value, log_ratio, logsumexp_of, lowest_key, order_key, row_logsumexp
from asyncopd.kernels.summary import GROUP, TILE_GROUPS, Summary, count_groups, row_start, shift_of, summarize

SUB = 8  # columns of a sub-group: one 16-byte load of a 16-bit dtype
CHUNK = 64  # groups read again at a time
RANKS = 32  # rivals compared with at a time
MAX_K = 1024


@triton.jit
def best(
    keys,  # [BLOCK <= 32768] int32, at least `count` of them above the lowest key of BITS bits
    count,
    BITS: tl.constexpr,
):
    """Which `count` keys are the largest, the first of equal ones; and for each its place among them, in order."""
    threshold = tl.full((), -(1 << (BITS - 1)), tl.int64)
    for step in range(BITS):
        trial = threshold + (tl.full((), 1, tl.int64) << (BITS - 1 - step))
        reached = tl.sum((keys >= trial.to(tl.int32)).to(tl.int32), axis=0)
        threshold = tl.where(reached >= count, trial, threshold)
    above = keys > threshold.to(tl.int32)
    equal = keys == threshold.to(tl.int32)
    # Both counts in one cumulative sum.
    both = above.to(tl.int32) * 65536 + equal.to(tl.int32)
    before = tl.cumsum(both, axis=0) - both
    needed = count - tl.sum(above.to(tl.int32), axis=0)
    equal_before = before & 0xFFFF
    chosen = above | (equal & (equal_before < needed))
    return chosen, (before >> 16) + tl.minimum(equal_before, needed)


@triton.jit
def _topk_kernel(
    logits,  # [N, V], unit column stride
    peaks,  # [N, groups], the logits' dtype; NaN where the group holds one
    tile_peaks,  # [N, tiles] fp32
    tile_sums,  # [N, tiles] fp32
    work,  # [N, work_stride] int32: see work_size
    ids,  # [N, out_stride] int64, the first k of each row are written
    logprobs,  # [N, out_stride] fp32, likewise
    lse,  # [N] fp32
    row_stride,
    work_stride,
    out_stride,
    vocab,
    groups,
    tiles,
    k,
    t,
    t_low,
    scale,
    scale_low,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    GROUPS: tl.constexpr,  # a power of two, at least `groups`
    TILES: tl.constexpr,  # a power of two, at least `tiles`
    K: tl.constexpr,  # a power of two, at least k and CHUNK
    CHUNK: tl.constexpr,
    RANKS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    row = tl.program_id(0)
    base = row_start(logits, row, row_stride)
    dtype: tl.constexpr = logits.dtype.element_ty
    bits: tl.constexpr = dtype.primitive_bitwidth
    nothing: tl.constexpr = lowest_key(dtype)
    subs: tl.constexpr = GROUP // SUB
    chosen_groups = row_start(work, row, work_stride)
    sub_keys = chosen_groups + K
    chosen_subs = sub_keys + K * subs
    final_keys = chosen_subs + K
    final_ids = final_keys + K

    group = tl.arange(0, GROUPS)
    peak = tl.load(row_start(peaks, row, groups) + group, mask=group < groups, other=0.0)
    keys = tl.where(group < groups, order_key(peak), nothing)
    num_groups = tl.minimum(k, groups)
    chosen, place = best(keys, num_groups, bits)
    tl.store(chosen_groups + place, group, mask=chosen)
    tl.debug_barrier()

    for start in range(0, K, CHUNK):
        at = start + tl.arange(0, CHUNK)
        index = tl.load(chosen_groups + at, mask=at < num_groups, other=0)
        sub = index[:, None] * subs + tl.arange(0, subs)[None, :]
        column = sub[:, :, None] * SUB + tl.arange(0, SUB)[None, None, :]
        there = (at < num_groups)[:, None, None] & (column < vocab)
        key = tl.where(there, order_key(tl.load(base + column, mask=there, other=0.0)), nothing)
        to = at[:, None] * subs + tl.arange(0, subs)[None, :]
        tl.store(sub_keys + to, tl.max(key, axis=2))
    tl.debug_barrier()

    at = tl.arange(0, K * subs)
    num_subs = tl.minimum(k, (vocab + SUB - 1) // SUB)
    chosen, place = best(tl.load(sub_keys + at), num_subs, bits)
    index = tl.load(chosen_groups + at // subs, mask=chosen, other=0) * subs + at % subs
    tl.store(chosen_subs + place, index, mask=chosen)
    tl.debug_barrier()

    at = tl.arange(0, K * SUB)
    there = at // SUB < num_subs
    column = tl.load(chosen_subs + at // SUB, mask=there, other=0) * SUB + at % SUB
    there = there & (column < vocab)
    keys = tl.where(there, order_key(tl.load(base + column, mask=there, other=0.0)), nothing)
    chosen, place = best(keys, k, bits)
    tl.store(final_keys + place, keys, mask=chosen)
    tl.store(final_ids + place, column, mask=chosen)
    tl.debug_barrier()

    at = tl.arange(0, K)
    key = tl.load(final_keys + at, mask=at < k, other=nothing)
    rank = tl.zeros([K], tl.int32)
    for start in range(0, K, RANKS):
        rival_at = start + tl.arange(0, RANKS)
        rival = tl.load(final_keys + rival_at, mask=rival_at < k, other=nothing)
        wins = (rival[None, :] > key[:, None]) | (
            (rival[None, :] == key[:, None]) & (rival_at[None, :] < at[:, None])
        )
        rank += tl.sum(wins.to(tl.int32), axis=1)
    top, log_high, log_low = row_logsumexp(
        tile_peaks + row.to(tl.int64) * tiles, tile_sums + row.to(tl.int64) * tiles, tiles, scale, scale_low, TILES, SHIFT
    )
    out = row.to(tl.int64) * out_stride + rank
    tl.store(ids + out, tl.load(final_ids + at, mask=at < k, other=0).to(tl.int64), mask=at < k)
    tl.store(logprobs + out, log_ratio(key_value(key, dtype), top, log_high, log_low, t, t_low), mask=at < k)
    tl.store(lse + row, logsumexp_of(top, log_high, log_low, t, t_low))


def padded_k(k: int) -> int:
    return padded(k, CHUNK)


def work_size(k: int) -> int:
    """int32 a row: chosen groups, keys of their sub-groups, chosen sub-groups, keys and ids of the top k."""
    return padded_k(k) * (GROUP // SUB + 4)


def launch_topk(
    logits: Tensor, summary: Summary, k: int, scale: Scale, ids: Tensor, logprobs: Tensor, lse: Tensor
) -> None:
    """Writes the first k columns of ids and logprobs [N, k or more], and lse [N]."""
    rows, vocab = logits.shape
    if rows == 0:
        return
    groups, K = count_groups(vocab), padded_k(k)
    work = torch.empty((rows, work_size(k)), dtype=torch.int32, device=logits.device)
    block = padded(groups, 64)
    with on_device(logits):
        _topk_kernel[(rows,)](
            logits,
            summary.peaks,
            summary.tile_peaks,
            summary.tile_sums,
            work,
            ids,
            logprobs,
            lse,
            logits.stride(0),
            work.stride(0),
            ids.stride(0),
            vocab,
            groups,
            summary.tiles,
            k,
            *scale,
            GROUP,
            SUB,
            block,
            padded(summary.tiles, 1),
            K,
            CHUNK,
            RANKS,
            shift_of(vocab),
            num_warps=_warps(block, K),
        )


def _warps(block: int, K: int) -> int:
    return max(warps_for(block, 16), warps_for(K * SUB, 8))


def check_k(name: str, k: int, vocab: int) -> None:
    limit = min(vocab, MAX_K)
    if not 0 <= k <= limit:
        raise ValueError(f"{name}: got {k}, expected 0..{limit} on the triton backend (V = {vocab}, at most {MAX_K})")


def topk_logprobs(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, V] -> ids int64 [N, k], log-probabilities fp32 [N, k], LSE [N]; k up to 1024."""
    logits = check_logits(logits, temperature)
    rows, vocab = logits.shape
    check_k("k", k, vocab)
    scale = Scale.of(temperature)
    ids = torch.empty((rows, k), dtype=torch.int64, device=logits.device)
    logprobs = torch.empty((rows, k), dtype=torch.float32, device=logits.device)
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    launch_topk(logits, summarize(logits, scale, peaks=True, sums=False), k, scale, ids, logprobs, lse)
    return ids, logprobs, lse


def compile_cases() -> list[CompileCase]:
    vocab = 151_936
    groups = count_groups(vocab)
    block = padded(groups, 64)
    return [
        CompileCase(
            name=f"topk-{dtype}-k{k}",
            kernel=_topk_kernel,
            signature={
                "logits": f"*{dtype}",
                "peaks": f"*{dtype}",
                "tile_peaks": "*fp32",
                "tile_sums": "*fp32",
                "work": "*i32",
                "ids": "*i64",
                "logprobs": "*fp32",
                "lse": "*fp32",
                **dict.fromkeys(
                    ("row_stride", "work_stride", "out_stride", "vocab", "groups", "tiles", "k"),
                    "i32",
                ),
                **dict.fromkeys(("t", "t_low", "scale", "scale_low"), "fp32"),
                **dict.fromkeys(("GROUP", "SUB", "GROUPS", "TILES", "K", "CHUNK", "RANKS", "SHIFT"), "constexpr"),
            },
            constexprs={
                "GROUP": GROUP,
                "SUB": SUB,
                "GROUPS": block,
                "TILES": padded(triton.cdiv(groups, TILE_GROUPS), 1),
                "K": padded_k(k),
                "CHUNK": CHUNK,
                "RANKS": RANKS,
                "SHIFT": shift_of(vocab),
            },
            num_warps=_warps(block, padded_k(k)),
            max_registers=128,
            divisible=(
                "logits",
                "peaks",
                "tile_peaks",
                "tile_sums",
                "work",
                "ids",
                "logprobs",
                "lse",
                "row_stride",
                "work_stride",
                "vocab",
            ),
        )
        for dtype in ("bf16", "fp16", "fp32")
        for k in (1, 64, 256, 1024)
    ]
