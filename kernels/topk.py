"""Exact top-K log-probabilities from the row summary.

The K best groups, by (peak descending, index ascending), hold the K best elements in the order (value descending, id
ascending): a better element's group has a better peak, or an equal one and a smaller index. Applied twice:

    groups of 64 -> the K best -> their sub-groups of 8 -> the K best -> 8 K elements -> the K best -> their ranks

so no step chooses among more than max(V / 64, 8 K) keys, all in registers, and a row of equal logits costs what any
other does. One program a row, the first choice in a kernel of its own: it takes 8 warps where the rest (K = 64) takes
2, and a program's registers are those of its largest step.

A choice is the K-th largest key, found by bisection between bounds that narrow from step to step (5 to 9 counts each in
bf16, 8 to 13 in fp32, for usual rows), and one cumulative sum that places what is above it and the first of what equals
it. Nothing is sorted; ranks are counted (K^2 compares).

NaN comes first, -0 equals +0. Bytes of a row (V = 151,936, bf16, K = 64) after the summary's: peaks 4,748 and tiles
304 read, 8,192 of logits read again twice over (the second time an eighth, from L1): with the summary 1.08 reads.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.launch import Prepared, Scale, cdiv, check_logits, padded, warps_for
from asyncopd.kernels.numeric import log_ratio, logsumexp_of, lowest_key, order_key, row_logsumexp
from asyncopd.kernels.summary import GROUP, TILE_GROUPS, Summary, count_groups, row_start, shift_of, summarize

SUB = 8  # columns of a sub-group: one 16-byte load of a 16-bit dtype
KEYS = 8  # a thread holds of a choice
ELEMENTS = 16  # logits a thread reads again at a time
COMPARES = 8  # rivals that a thread compares with at a time, all its keys together
MAX_K = 1024


@triton.jit
def store_best(
    out,  # [count or more] int32: positions of the chosen keys, ascending
    keys,  # [BLOCK <= 32768] int32
    lowest,  # int32 that at least `count` of them reach
    count,
    BLOCK: tl.constexpr,
):
    """Chooses the `count` largest keys, the first of equal ones; returns a lower bound of the keys chosen.

    The bisection ends at the smallest key chosen, or earlier, at any number that exactly `count` keys reach.
    """
    low = lowest.to(tl.int64)
    high = tl.max(keys, axis=0).to(tl.int64)
    while low < high:
        middle = high - (high - low) // 2
        reached = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), axis=0)
        low = tl.where(reached >= count, middle, low)
        high = tl.where(reached == count, middle, tl.where(reached > count, high, middle - 1))
    threshold = low.to(tl.int32)
    above = (keys > threshold).to(tl.int32)
    equal = (keys == threshold).to(tl.int32)
    needed = count - tl.sum(above, axis=0)
    # Both counts in one cumulative sum.
    before = tl.cumsum(above * 65536 + equal, axis=0) - (above * 65536 + equal)
    above_before, equal_before = before >> 16, before & 0xFFFF
    chosen = above + tl.where(equal_before < needed, equal, 0) > 0
    tl.store(out + above_before + tl.minimum(equal_before, needed), tl.arange(0, BLOCK), mask=chosen)
    return threshold


@triton.jit
def _groups_kernel(
    peaks,  # [N, group_stride], the logits' dtype; NaN where the group holds one
    work,  # [N, work_stride] int32: see work_size
    group_stride,  # of peaks: at least `groups`, a multiple of 16
    work_stride,
    groups,
    k,
    GROUPS: tl.constexpr,  # a power of two, at least `groups`
    BOUND: tl.constexpr,  # where in `work`
):
    """The k best groups of each row, ascending, and a lower bound of their keys, for the next choice."""
    row = tl.program_id(0)
    nothing: tl.constexpr = lowest_key(peaks.dtype.element_ty)
    out = row_start(work, row, work_stride)
    group = tl.arange(0, GROUPS)
    # What lies between `groups` and the stride is read and thrown away: so loads are wide.
    peak = tl.load(row_start(peaks, row, group_stride) + group, mask=group < group_stride, other=0.0)
    keys = tl.where(group < groups, order_key(peak), nothing)
    lowest = tl.min(tl.where(group < groups, keys, 2147483647), axis=0)
    lowest = store_best(out, keys, lowest, tl.minimum(k, groups), GROUPS)
    tl.store(out + BOUND, lowest)


@triton.jit
def _topk_kernel(
    logits,  # [N, V], unit column stride
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
    TILES: tl.constexpr,  # a power of two, at least `tiles`
    K: tl.constexpr,  # a power of two, at least k and CHUNK
    CHUNK: tl.constexpr,
    RIVALS: tl.constexpr,  # compared with at a time
    SHIFT: tl.constexpr,
    FIND_SUBS: tl.constexpr,
    FIND_TOP: tl.constexpr,
):
    row = tl.program_id(0)
    base = row_start(logits, row, row_stride)
    nothing: tl.constexpr = lowest_key(logits.dtype.element_ty)
    subs: tl.constexpr = GROUP // SUB
    chosen_groups = row_start(work, row, work_stride)
    chosen_subs = chosen_groups + K
    final = chosen_subs + K
    sub_keys = final + K
    bound = sub_keys + K * subs
    num_groups = tl.minimum(k, groups)
    num_subs = tl.minimum(k, (vocab + SUB - 1) // SUB)
    at = tl.arange(0, K)

    if FIND_SUBS:
        for start in range(0, K, CHUNK):
            group_at = start + tl.arange(0, CHUNK)
            index = tl.load(chosen_groups + group_at, mask=group_at < num_groups, other=0)
            sub = index[:, None] * subs + tl.arange(0, subs)[None, :]
            column = sub[:, :, None] * SUB + tl.arange(0, SUB)[None, None, :]
            there = (group_at < num_groups)[:, None, None] & (column < vocab)
            key = tl.where(there, order_key(tl.load(base + column, mask=there, other=0.0)), nothing)
            to = group_at[:, None] * subs + tl.arange(0, subs)[None, :]
            tl.store(sub_keys + to, tl.max(key, axis=2))
        # Each of the chosen groups has a sub-group as good as its peak, and that one a column: a bound on the k-th of
        # them holds on, unless there are fewer than k.
        lowest = tl.where(groups < k, nothing, tl.load(bound))
        tl.debug_barrier()
        keys = tl.load(sub_keys + tl.arange(0, K * subs))
        lowest = store_best(chosen_subs, keys, lowest, num_subs, K * subs)
        tl.debug_barrier()
        # From positions among the chosen groups to first columns.
        position = tl.load(chosen_subs + at, mask=at < num_subs, other=0)
        first = (tl.load(chosen_groups + position // subs) * subs + position % subs) * SUB
        tl.debug_barrier()
        tl.store(chosen_subs + at, first, mask=at < num_subs)
        tl.store(bound, lowest)
        tl.debug_barrier()

    if not FIND_TOP:
        return
    lowest = tl.where(num_subs < k, nothing, tl.load(bound))
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
    top, log_high, log_low = row_logsumexp(
        tile_peaks + row.to(tl.int64) * tiles,
        tile_sums + row.to(tl.int64) * tiles,
        tiles,
        scale,
        scale_low,
        TILES,
        SHIFT,
    )
    out = row.to(tl.int64) * out_stride + rank
    tl.store(ids + out, column.to(tl.int64), mask=at < k)
    tl.store(logprobs + out, log_ratio(z.to(tl.float32), top, log_high, log_low, t, t_low), mask=at < k)
    tl.store(lse + row, logsumexp_of(top, log_high, log_low, t, t_low))


def padded_k(k: int) -> int:
    return padded(k, 16)


@lru_cache(maxsize=256)
def work_size(k: int) -> tuple[int, int]:
    """int32 a row, and where among them the bound is.

    First come K each of chosen groups, chosen sub-groups and the top k; then the keys of the groups' sub-groups; then
    the bound, padded so that every row is aligned.
    """
    bound = padded_k(k) * (3 + GROUP // SUB)
    return bound + 16, bound


class Blocks(NamedTuple):
    """Sizes of the second kernel for k: what a thread holds stays within registers."""

    K: int
    CHUNK: int
    RIVALS: int
    num_warps: int

    def steps(self) -> list[tuple[bool, bool]]:
        """FIND_SUBS, FIND_TOP of the launches: one, or two where all of it in one kernel spills registers (sm_90)."""
        return [(True, True)] if self.K <= 512 else [(True, False), (False, True)]

    @classmethod
    def of(cls, k: int) -> "Blocks":
        K = padded_k(k)
        num_warps = min(16, max(1, K * SUB // (32 * KEYS)))
        chunk = min(64, K, num_warps * 32 * ELEMENTS // GROUP)
        return cls(K, chunk, min(K, max(1, num_warps * 32 * COMPARES // K)), num_warps)


def choose_groups(peaks: Tensor, groups: int, k: int) -> Tensor:
    """peaks [N, groups or more] -> int32 [N, work_size]: each row begins with its min(k, groups) best, ascending."""
    rows = peaks.shape[0]
    work = torch.empty(rows, work_size(k)[0], dtype=torch.int32, device=peaks.device)
    if rows:
        _prepared_groups(peaks.stride(0), groups, k)(rows, peaks, work)
    return work


@lru_cache(maxsize=256)
def _prepared_groups(group_stride: int, groups: int, k: int) -> Prepared:
    (size, bound), block = work_size(k), padded(groups, 64)
    return Prepared(_groups_kernel, group_stride, size, groups, k, block, bound, num_warps=warps_for(block, 16))


def launch_topk(
    logits: Tensor,
    summary: Summary,
    k: int,
    scale: Scale,
    ids: Tensor,
    logprobs: Tensor,
    lse: Tensor,
    columns: int | None = None,
) -> None:
    """Writes the first k columns of ids and logprobs [N, k or more], and lse [N].

    columns: how many the tiles' sums are of, where the logits are but some of the row's.
    """
    rows, vocab = logits.shape
    if rows == 0:
        return
    peaks, _, tile_peaks, tile_sums = summary
    work = choose_groups(peaks, count_groups(vocab), k)
    columns = vocab if columns is None else columns
    for step in _prepared_steps(vocab, columns, summary.tiles, k, logits.stride(0), ids.stride(0), scale):
        step(rows, logits, tile_peaks, tile_sums, work, ids, logprobs, lse)


@lru_cache(maxsize=256)
def _prepared_steps(
    vocab: int, columns: int, tiles: int, k: int, row_stride: int, out_stride: int, scale: Scale
) -> tuple[Prepared, ...]:
    blocks = Blocks.of(k)
    return tuple(
        Prepared(
            _topk_kernel,
            row_stride,
            work_size(k)[0],
            out_stride,
            vocab,
            count_groups(vocab),
            tiles,
            k,
            *scale,
            GROUP,
            SUB,
            padded(tiles, 1),
            blocks.K,
            blocks.CHUNK,
            blocks.RIVALS,
            shift_of(columns),
            find_subs,
            find_top,
            num_warps=blocks.num_warps,
        )
        for find_subs, find_top in blocks.steps()
    )


def check_k(name: str, k: int, vocab: int) -> None:
    limit = min(vocab, MAX_K)
    if not 0 <= k <= limit:
        raise ValueError(f"{name}: got {k}, expected 0..{limit} on the triton backend (V = {vocab}, at most {MAX_K})")


def topk_logprobs(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, V] -> ids int64 [N, k], log-probabilities fp32 [N, k], LSE [N]; k up to 1024."""
    logits = check_logits(logits)
    rows, vocab = logits.shape
    check_k("k", k, vocab)
    scale, device = Scale.of(temperature), logits.device
    ids = torch.empty(rows, k, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, k, dtype=torch.float32, device=device)
    lse = torch.empty(rows, dtype=torch.float32, device=device)
    launch_topk(logits, summarize(logits, scale, peaks=True, sums=False), k, scale, ids, logprobs, lse)
    return ids, logprobs, lse


def compile_cases() -> list[CompileCase]:
    vocab = 151_936
    groups = count_groups(vocab)
    block = padded(groups, 64)
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        cases.append(
            CompileCase(
                name=f"topk-groups-{dtype}",
                kernel=_groups_kernel,
                signature={
                    "peaks": f"*{dtype}",
                    "work": "*i32",
                    **dict.fromkeys(("group_stride", "work_stride", "groups", "k"), "i32"),
                    **dict.fromkeys(("GROUPS", "BOUND"), "constexpr"),
                },
                constexprs={"GROUPS": block, "BOUND": work_size(64)[1]},
                num_warps=warps_for(block, 16),
                max_registers=96,
                divisible=("peaks", "work", "group_stride", "work_stride"),
            )
        )
        for k in (1, 64, 256, 1024):
            blocks = Blocks.of(k)
            for find_subs, find_top in blocks.steps():
                cases.append(
                    CompileCase(
                        name=f"topk-{dtype}-k{k}"
                        + ("" if find_subs and find_top else "-subs" if find_subs else "-top"),
                        kernel=_topk_kernel,
                        signature={
                            "logits": f"*{dtype}",
                            **dict.fromkeys(("tile_peaks", "tile_sums"), "*fp32"),
                            "work": "*i32",
                            "ids": "*i64",
                            **dict.fromkeys(("logprobs", "lse"), "*fp32"),
                            **dict.fromkeys(
                                ("row_stride", "work_stride", "out_stride", "vocab", "groups", "tiles", "k"), "i32"
                            ),
                            **dict.fromkeys(("t", "t_low", "scale", "scale_low"), "fp32"),
                            **dict.fromkeys(("GROUP", "SUB", "TILES", "K", "CHUNK", "RIVALS", "SHIFT"), "constexpr"),
                            **dict.fromkeys(("FIND_SUBS", "FIND_TOP"), "constexpr"),
                        },
                        constexprs={
                            "GROUP": GROUP,
                            "SUB": SUB,
                            "TILES": padded(cdiv(groups, TILE_GROUPS), 1),
                            "K": blocks.K,
                            "CHUNK": blocks.CHUNK,
                            "RIVALS": blocks.RIVALS,
                            "SHIFT": shift_of(vocab),
                            "FIND_SUBS": find_subs,
                            "FIND_TOP": find_top,
                        },
                        num_warps=blocks.num_warps,
                        max_registers=80 if k <= 256 else 128,
                        divisible=(
                            *("logits", "tile_peaks", "tile_sums", "work", "ids", "logprobs", "lse"),
                            *("row_stride", "work_stride", "vocab"),
                        ),
                    )
                )
    return cases
