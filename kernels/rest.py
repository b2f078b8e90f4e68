"""What is left of a row when its head is taken away: the cumulative sum of its group masses.

One program a row. Groups that hold some of the head are summed again without it: subtracting would leave the rounding
of what is taken away. Then masses[g] = sums[g] exp((peaks[g] - largest left) / T), and their sum from the left.

Masses are fixed point: 44 fractional bits of the largest probability that is left (fewer beyond 2^18 columns). So the
sum is exact in any order, never falls, and is the same on every device. Cutting off loses at most 2^-44 of the largest
probability a group.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.launch import Prepared, Scale, padded, warps_for
from asyncopd.kernels.numeric import INF, exp_scaled, order_key, to_fixed
from asyncopd.kernels.summary import GROUP, Sizes, Summary, count_groups, irregular_summary, row_start, shift_of

HEADS = 16  # ids of the head at a time


@triton.jit
def in_head(
    logit,  # of the logits' dtype
    column,
    last_key,  # of the last of the head
    last_id,
):
    """The head is what comes before its last element, or is it, in the order (value descending, id ascending)."""
    key = order_key(logit)
    return tl.where(key == last_key, (column <= last_id).to(tl.int32), (key > last_key).to(tl.int32)) > 0


@triton.jit
def head_end(logits, ids, head, HAS_HEAD: tl.constexpr):
    """Key and id of the last of a row's head; above everything without one."""
    if HAS_HEAD:
        last = tl.load(ids + head - 1).to(tl.int32)
        return order_key(tl.load(logits + last)), last
    else:
        return tl.full((), 2147483647, tl.int32), tl.full((), -1, tl.int32)


@triton.jit
def rest_of_groups(logits, group, vocab, last_key, last_id, GROUP: tl.constexpr):  # group [n] -> fp32 [n, GROUP]
    """Logits of groups; -inf outside the row and in its head."""
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    z = tl.load(logits + column, mask=column < vocab, other=-INF)
    return tl.where(in_head(z, column, last_key, last_id), -INF, z.to(tl.float32))


@triton.jit
def _rest_kernel(
    logits,  # [N, V], unit column stride
    ids,  # [N, out_stride] int64: the head comes first
    peaks,  # [N, group_stride], the logits' dtype; the head's groups are overwritten
    sums,  # [N, group_stride] fp32, likewise
    cdf,  # [N, group_stride] int64
    rest_peaks,  # [N] fp32: the largest logit left; NaN where a NaN is left
    row_stride,
    out_stride,
    group_stride,
    vocab,
    groups,
    head,
    scale,
    scale_low,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # a power of two, at least `groups`
    HEADS: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_HEAD: tl.constexpr,
):
    row = tl.program_id(0)
    row_peaks, row_sums = row_start(peaks, row, group_stride), row_start(sums, row, group_stride)
    if HAS_HEAD:
        base, row_ids = row_start(logits, row, row_stride), row_start(ids, row, out_stride)
        last_key, last_id = head_end(base, row_ids, head, HAS_HEAD)
        for start in range(0, tl.cdiv(head, HEADS) * HEADS, HEADS):
            at = start + tl.arange(0, HEADS)
            # A group that holds several of the head is summed as often, to the same result.
            group = tl.load(row_ids + at, mask=at < head, other=0).to(tl.int32) // GROUP
            z = rest_of_groups(base, group, vocab, last_key, last_id, GROUP)
            peak, total = irregular_summary(z, scale)
            tl.store(row_peaks + group, peak.to(peaks.dtype.element_ty), mask=at < head)
            tl.store(row_sums + group, total, mask=at < head)
        tl.debug_barrier()
    # What lies between `groups` and the stride is read and thrown away, and written: so accesses are wide.
    group = tl.arange(0, GROUPS)
    peak = tl.load(row_peaks + group, mask=group < group_stride, other=0.0).to(tl.float32)
    total = tl.load(row_sums + group, mask=group < group_stride, other=0.0)
    total = tl.where(group < groups, total, 0.0)
    broken = tl.max((total != total).to(tl.int32), axis=0)
    peak = tl.where(total > 0.0, peak, -INF)
    top = tl.max(peak, axis=0)
    mass = tl.where(total > 0.0, total, 0.0) * exp_scaled(peak - tl.where(top == -INF, 0.0, top), scale, scale_low)
    # Where NaN or +inf is left, draws are uniform and nobody reads this.
    mass = tl.where(tl.where(broken > 0, INF, top) < INF, mass, 0.0)
    tl.store(
        row_start(cdf, row, group_stride) + group, tl.cumsum(to_fixed(mass, SHIFT), axis=0), mask=group < group_stride
    )
    tl.store(rest_peaks + row, tl.where(broken > 0, float("nan"), top))


def launch_rest(logits: Tensor, summary: Summary, ids: Tensor, head: int, scale: Scale) -> tuple[Tensor, Tensor]:
    """Cumulative sums int64 [N, groups or more] and largest logit left [N] without the first `head` of ids.

    Overwrites the summary's peaks and sums of the groups that the head is in.
    """
    rows, vocab = logits.shape
    sizes = Sizes.of(vocab)
    cdf = torch.empty(rows, sizes.stride, dtype=torch.int64, device=logits.device)
    rest_peaks = torch.empty(rows, dtype=torch.float32, device=logits.device)
    prepared = _prepared(vocab, logits.stride(0), ids.stride(0), head, scale)
    prepared(rows, logits, ids, summary.peaks, summary.sums, cdf, rest_peaks)
    return cdf, rest_peaks


@lru_cache(maxsize=256)
def _prepared(vocab: int, row_stride: int, out_stride: int, head: int, scale: Scale) -> Prepared:
    sizes = Sizes.of(vocab)
    return Prepared(
        _rest_kernel,
        row_stride,
        out_stride,
        sizes.stride,
        vocab,
        sizes.groups,
        head,
        scale.scale,
        scale.scale_low,
        GROUP,
        sizes.group_block,
        HEADS,
        sizes.shift,
        head > 0,
        num_warps=warps_for(sizes.group_block, 16),
    )


def compile_cases() -> list[CompileCase]:
    vocab = 151_936
    block = padded(count_groups(vocab), 64)
    return [
        CompileCase(
            name=f"sample-rest-{name}-{dtype}",
            kernel=_rest_kernel,
            signature={
                "logits": f"*{dtype}",
                "ids": "*i64",
                "peaks": f"*{dtype}",
                "sums": "*fp32",
                "cdf": "*i64",
                "rest_peaks": "*fp32",
                **dict.fromkeys(("row_stride", "out_stride", "group_stride", "vocab", "groups", "head"), "i32"),
                **dict.fromkeys(("scale", "scale_low"), "fp32"),
                **dict.fromkeys(("GROUP", "GROUPS", "HEADS", "SHIFT", "HAS_HEAD"), "constexpr"),
            },
            constexprs={
                "GROUP": GROUP,
                "GROUPS": block,
                "HEADS": HEADS,
                "SHIFT": shift_of(vocab),
                "HAS_HEAD": has_head,
            },
            num_warps=warps_for(block, 16),
            max_registers=96,
            divisible=(
                *("logits", "ids", "peaks", "sums", "cdf", "rest_peaks"),
                *("row_stride", "out_stride", "group_stride", "vocab"),
            ),
        )
        for dtype in ("bf16", "fp16", "fp32")
        for name, has_head in (("plain", False), ("head", True))
    ]
