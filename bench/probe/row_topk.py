# mypy: disable-error-code="no-untyped-def"
"""A candidate, to be decided by measurement: LSE + top-K of a row in one program, which reads the row once.

It does what kernels/summary.py and kernels/topk.py do in three launches, in the same order, so its results have the
same bits. A program streams the tiles of a row and then chooses, while other programs on the SM stream: the selection,
which is bound by the issue of instructions, hides behind loads. Compiled ahead of time for sm_90 with 8 warps and at
most 80 registers it does not spill, so three programs fit an SM.
"""

import triton
import triton.language as tl

from asyncopd.kernels.numeric import INF, exp_scaled, log_ratio, logsumexp_of, lowest_key, order_key, row_logsumexp
from asyncopd.kernels.summary import group_summary, irregular_summary, row_start
from asyncopd.kernels.topk import store_best


@triton.jit
def summarize_tile(
    base,
    tile,
    vocab,
    peaks,
    tile_peaks,
    tile_sums,
    scale,
    scale_low,
    GROUP: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    WHOLE: tl.constexpr,  # all of the tile's columns are there: loads without a mask are wide
):
    """One tile of the row summary, as summary._summary_kernel makes it."""
    group = tl.arange(0, TILE_GROUPS)
    column = tile * (TILE_GROUPS * GROUP) + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if WHOLE:
        z = tl.load(base + column, eviction_policy="evict_first").to(tl.float32)
    else:
        z = tl.load(base + column, mask=column < vocab, other=-INF).to(tl.float32)
    peak, total = group_summary(z, scale)
    tile_peak = tl.max(peak, axis=0)
    tile_origin = tl.where(tile_peak == -INF, 0.0, tile_peak)
    tile_sum = tl.sum(total * exp_scaled(peak - tile_origin, scale, scale_low), axis=0)
    if tile_sum != tile_sum:
        peak, total = irregular_summary(z, scale)
        tile_peak = tl.max(peak, axis=0)
        tile_sum = tl.where(tl.max((total != total).to(tl.int32), axis=0) > 0, float("nan"), 1.0)
        peak = tl.where(total != total, float("nan"), peak)
    tl.store(tile_peaks + tile, tile_peak)
    tl.store(tile_sums + tile, tile_sum)
    tl.store(peaks + tile * TILE_GROUPS + group, peak.to(peaks.dtype.element_ty))


@triton.jit
def row_topk_kernel(
    logits,  # [N, V], unit column stride
    peaks,  # [N, group_stride], the logits' dtype
    tile_peaks,  # [N, TILES] fp32
    tile_sums,  # [N, TILES] fp32
    work,  # [N, work_stride] int32: see topk.work_size
    ids,  # [N, out_stride] int64
    logprobs,  # [N, out_stride] fp32
    lse,  # [N] fp32
    row_stride,
    group_stride,
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
    TILE_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,  # a power of two, at least `groups`
    SUB: tl.constexpr,
    TILES: tl.constexpr,  # a power of two, at least `tiles`
    K: tl.constexpr,  # a power of two, at least k
    CHUNK: tl.constexpr,
    RIVALS: tl.constexpr,
    SHIFT: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0)
    nothing: tl.constexpr = lowest_key(logits.dtype.element_ty)
    subs: tl.constexpr = GROUP // SUB
    base = row_start(logits, row, row_stride)
    my_peaks = row_start(peaks, row, group_stride)
    my_tile_peaks, my_tile_sums = tile_peaks + row * TILES, tile_sums + row * TILES
    chosen_groups = row_start(work, row, work_stride)
    chosen_subs = chosen_groups + K
    final = chosen_subs + K
    sub_keys = final + K
    at = tl.arange(0, K)
    num_groups = tl.minimum(k, groups)
    num_subs = tl.minimum(k, (vocab + SUB - 1) // SUB)

    whole = vocab // (GROUP * TILE_GROUPS)
    for tile in tl.range(0, whole, num_stages=STAGES):
        summarize_tile(
            base, tile, vocab, my_peaks, my_tile_peaks, my_tile_sums, scale, scale_low, GROUP, TILE_GROUPS, True
        )
    if whole < tiles:
        summarize_tile(
            base, whole, vocab, my_peaks, my_tile_peaks, my_tile_sums, scale, scale_low, GROUP, TILE_GROUPS, False
        )
    tl.debug_barrier()

    # The k best groups.
    group = tl.arange(0, GROUPS)
    peak = tl.load(my_peaks + group, mask=group < group_stride, other=0.0)
    keys = tl.where(group < groups, order_key(peak), nothing)
    lowest = tl.min(tl.where(group < groups, keys, 2147483647), axis=0)
    bound = store_best(chosen_groups, keys, lowest, num_groups, GROUPS)
    tl.debug_barrier()

    # Their k best sub-groups.
    for start in range(0, K, CHUNK):
        group_at = start + tl.arange(0, CHUNK)
        index = tl.load(chosen_groups + group_at, mask=group_at < num_groups, other=0)
        sub = index[:, None] * subs + tl.arange(0, subs)[None, :]
        column = sub[:, :, None] * SUB + tl.arange(0, SUB)[None, None, :]
        there = (group_at < num_groups)[:, None, None] & (column < vocab)
        key = tl.where(there, order_key(tl.load(base + column, mask=there, other=0.0)), nothing)
        tl.store(sub_keys + group_at[:, None] * subs + tl.arange(0, subs)[None, :], tl.max(key, axis=2))
    lowest = tl.where(groups < k, nothing, bound)
    tl.debug_barrier()
    keys = tl.load(sub_keys + tl.arange(0, K * subs))
    lowest = store_best(chosen_subs, keys, lowest, num_subs, K * subs)
    tl.debug_barrier()
    position = tl.load(chosen_subs + at, mask=at < num_subs, other=0)
    first = (tl.load(chosen_groups + position // subs) * subs + position % subs) * SUB
    tl.debug_barrier()
    tl.store(chosen_subs + at, first, mask=at < num_subs)
    tl.debug_barrier()

    # Their k best elements, and the rank of each.
    lowest = tl.where(num_subs < k, nothing, lowest)
    element = tl.arange(0, K * SUB)
    column = tl.load(chosen_subs + element // SUB, mask=element // SUB < num_subs, other=vocab) + element % SUB
    there = column < vocab
    keys = tl.where(there, order_key(tl.load(base + column, mask=there, other=0.0)), nothing)
    store_best(final, keys, lowest, k, K * SUB)
    tl.debug_barrier()
    position = tl.load(final + at, mask=at < k, other=0)
    column = tl.load(chosen_subs + position // SUB) + position % SUB
    z = tl.load(base + column, mask=at < k, other=0.0)
    key = tl.where(at < k, order_key(z), nothing)
    tl.debug_barrier()
    tl.store(final + at, key)
    tl.debug_barrier()
    rank = tl.zeros([K], tl.int32)
    for start in range(0, K, RIVALS):
        rival_at = start + tl.arange(0, RIVALS)
        rival = tl.load(final + rival_at)
        wins = (rival[None, :] > key[:, None]) | ((rival[None, :] == key[:, None]) & (rival_at[None, :] < at[:, None]))
        rank += tl.sum(wins.to(tl.int32), axis=1)

    top, log_high, log_low = row_logsumexp(my_tile_peaks, my_tile_sums, tiles, scale, scale_low, TILES, SHIFT)
    out = row.to(tl.int64) * out_stride + rank
    tl.store(ids + out, column.to(tl.int64), mask=at < k)
    tl.store(logprobs + out, log_ratio(z.to(tl.float32), top, log_high, log_low, t, t_low), mask=at < k)
    tl.store(lse + row, logsumexp_of(top, log_high, log_low, t, t_low))
