"""What the exact head does with a tile of products before the next block of the vocabulary overwrites it.

    y = softcap(logit_scale (x + bias)),   x = h W_b^T as the matrix product left it, fp32 [rows, B]

    forward    (peak, sum) of every `TILE` columns for the LSE, as the row summary has them; y at the ids that lie in
               the block; and, where there is room, e = exp((y - peak) / T), which is softmax but for a factor a row
    backward   dx = (scatter(g at ids) - (sum_k g) softmax(y / T)) / T * slope,   slope = dy/dx
               elementwise for the second term; then the entries of the ids, made whole in fp32 before and written once

Limit: one read of the tile forward (and a write of e at 2 bytes), one read and one write at 2 bytes backward. Blocks
are narrow enough that a part of a tile is still in L2; nothing here depends on rows other than its own.

e is kept in fp16 beside a 16-bit head (fp32 beside an fp32 one): measured from its own tile's peak it lies in [0, 1],
so it is off by at most 2^-12 of itself, or 2^-25 of the peak; dx is rounded to the head's dtype anyway.
"""

from typing import Any

import triton
import triton.language as tl

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.epilogue import head_logit
from asyncopd.kernels.gather import IDS, RIVALS, softmax_term, sum_over_equal_ids
from asyncopd.kernels.numeric import INF, LOG2E, to_storage
from asyncopd.kernels.summary import group_summary, irregular_summary, row_start

MAX_TILE = 4096  # columns of a program


@triton.jit
def slope_of(y, logit_scale, softcap, HAS_CAP: tl.constexpr):
    """dy/dx from y. A saturated cap has none, and y = -inf without a cap has the slope of any other y."""
    slope = logit_scale
    if HAS_CAP:
        share = y / softcap
        slope = logit_scale * (1.0 - share * share)
    return slope


@triton.jit
def is_row(row, count, HAS_COUNT: tl.constexpr):
    """Rows beyond the count on the device are not there."""
    there = row >= 0
    if HAS_COUNT:
        there = row < tl.load(count)
    return there


@triton.jit
def forward_kernel(
    x,  # [rows, x_stride] fp32, the products of this block
    bias,  # [V], any float dtype
    ids,  # [rows, K] int32 or int64
    count,  # () rows that there are
    at_ids,  # [rows, K] fp32: y, written where the id lies in this block
    tile_peaks,  # [rows, tiles] fp32
    tile_sums,  # [rows, tiles] fp32
    kept,  # [rows - first_row, columns]: e of the rows from first_row on
    x_stride,
    first_row,
    first,  # column of the block's first, a multiple of TILE
    columns,  # of the block
    block_tiles,  # ceil(columns / TILE)
    tiles,  # of a row in all
    k,
    logit_scale,
    softcap,
    scale,  # log2(e) / T
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    KEEP: tl.constexpr,
    TILE: tl.constexpr,
    IDS: tl.constexpr,
):
    kept_row, tile = tl.program_id(0) // block_tiles, tl.program_id(0) % block_tiles
    row = first_row + kept_row
    if is_row(row, count, HAS_COUNT):
        base = row_start(x, row, x_stride)
        column = tile * TILE + tl.arange(0, TILE)
        inside = column < columns
        y = tl.load(base + column, mask=inside, other=0.0)
        b = 0.0
        if HAS_BIAS:
            b = tl.load(bias + first + column, mask=inside, other=0.0).to(tl.float32)
        y = tl.where(inside, head_logit(y, b, logit_scale, softcap, 1.0 / softcap, HAS_BIAS, HAS_CAP), -INF)
        peak, total = group_summary(y[None, :], scale)
        peak, total = tl.max(peak, axis=0), tl.max(total, axis=0)
        if total != total:
            peaks, totals = irregular_summary(y[None, :], scale)
            peak, total = (
                tl.max(peaks, axis=0),
                tl.where(tl.max((totals != totals).to(tl.int32), axis=0) > 0, float("nan"), 1.0),
            )
        at = row.to(tl.int64) * tiles + first // TILE + tile
        tl.store(tile_peaks + at, peak)
        tl.store(tile_sums + at, total)
        if KEEP:
            origin = tl.where(tl.abs(peak) == INF, 0.0, peak)
            e = tl.exp2((y - origin) * scale)
            tl.store(row_start(kept, kept_row, columns) + column, e.to(kept.dtype.element_ty), mask=inside)
        for start in range(0, k, IDS):
            which = start + tl.arange(0, IDS)
            token = tl.load(row_start(ids, row, k) + which, mask=which < k, other=-1)
            place = token - first
            here = (place >= tile * TILE) & (place < tile * TILE + TILE) & (place < columns)
            y_at = tl.load(base + place, mask=here, other=0.0)
            bias_at = 0.0
            if HAS_BIAS:
                bias_at = tl.load(bias + token, mask=here, other=0.0).to(tl.float32)
            y_at = head_logit(y_at, bias_at, logit_scale, softcap, 1.0 / softcap, HAS_BIAS, HAS_CAP)
            tl.store(row_start(at_ids, row, k) + which, y_at, mask=here)


@triton.jit
def backward_kernel(
    x,  # [rows - first_row, x_stride] of the rows from first_row on: products in fp32, or e where FROM_KEPT
    bias,  # [V]
    count,  # ()
    tile_peaks,  # [rows, tiles] fp32: what e is measured from
    lse,  # [rows] fp32
    totals,  # [rows] fp32: sum of the row's gradients
    dx,  # [rows, dx_stride], the head's dtype
    x_stride,
    dx_stride,
    first_row,
    first,
    columns,
    block_tiles,
    tiles,
    logit_scale,
    softcap,
    t,  # 1 / T
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    FROM_KEPT: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    x_row, tile = tl.program_id(0) // block_tiles, tl.program_id(0) % block_tiles
    row = first_row + x_row
    column = tile * TILE + tl.arange(0, TILE)
    inside = column < columns
    to = row_start(dx, row, dx_stride) + column
    if is_row(row, count, HAS_COUNT):
        value = tl.load(row_start(x, x_row, x_stride) + column, mask=inside, other=0.0).to(tl.float32)
        row_lse, total = tl.load(lse + row), tl.load(totals + row)
        if FROM_KEPT:
            peak = tl.load(tile_peaks + row.to(tl.int64) * tiles + first // TILE + tile)
            origin = tl.where(tl.abs(peak) == INF, 0.0, peak)
            share = tl.exp2(tl.fma(origin, t, -row_lse) * LOG2E) * (-total * t)
            # Where there is no mass there is nothing of an infinite share either, but a NaN row is NaN everywhere.
            value = tl.where(value == 0.0, tl.where(row_lse == row_lse, 0.0, float("nan")), value * share) * logit_scale
            # A row without mass or gradient never multiplies its e, which may be NaN.
            value = tl.where((total == 0.0) | (row_lse == -INF), 0.0, value)
        else:
            b = 0.0
            if HAS_BIAS:
                b = tl.load(bias + first + column, mask=inside, other=0.0).to(tl.float32)
            y = head_logit(value, b, logit_scale, softcap, 1.0 / softcap, HAS_BIAS, HAS_CAP)
            slope = slope_of(y, logit_scale, softcap, HAS_CAP)
            # Where the softmax has no mass there is no gradient, though the slope of an infinite y be NaN.
            value = softmax_term(y, row_lse, total, t)
            value = tl.where(value == 0.0, 0.0, value * slope)
        tl.store(to, to_storage(value, dx.dtype.element_ty, INTERPRET), mask=inside)
    elif HAS_BIAS:
        # Nobody reads these rows but the sum for the bias.
        tl.store(to, tl.zeros([TILE], dx.dtype.element_ty), mask=inside)


@triton.jit
def values_kernel(
    grad,  # [rows, K] fp32
    ids,  # [rows, K]
    at_ids,  # [rows, K] fp32: y
    logprobs,  # [rows, K] fp32
    totals,  # [rows] fp32
    values,  # [rows, K] fp32: the whole of dx at the ids
    k,
    blocks,  # of ids to a row
    logit_scale,
    softcap,
    t,
    HAS_CAP: tl.constexpr,
    IDS: tl.constexpr,
    RIVALS: tl.constexpr,
):
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row_ids, row_grad = row_start(ids, row, k), row_start(grad, row, k)
    at = block * IDS + tl.arange(0, IDS)
    token = tl.load(row_ids + at, mask=at < k, other=-1)
    gradient = sum_over_equal_ids(row_ids, row_grad, token, k, IDS, RIVALS)
    total = tl.load(totals + row)
    logprob = tl.load(row_start(logprobs, row, k) + at, mask=at < k, other=-INF)
    softmax = tl.where(logprob == -INF, 0.0, tl.exp2(logprob * LOG2E) * total)
    softmax = tl.where(total == 0.0, 0.0, softmax)
    y = tl.load(row_start(at_ids, row, k) + at, mask=(at < k) & (token >= 0), other=0.0)
    slope = slope_of(y, logit_scale, softcap, HAS_CAP)
    value = (gradient - softmax) * t
    tl.store(row_start(values, row, k) + at, tl.where(value == 0.0, 0.0, value * slope), mask=at < k)


@triton.jit
def scatter_kernel(
    values,  # [rows, K] fp32
    ids,  # [rows, K]
    count,  # ()
    dx,  # [rows, dx_stride]: holds the softmax term
    dx_stride,
    first,
    columns,
    k,
    blocks,
    HAS_COUNT: tl.constexpr,
    IDS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if is_row(row, count, HAS_COUNT):
        at = block * IDS + tl.arange(0, IDS)
        token = tl.load(row_start(ids, row, k) + at, mask=at < k, other=-1)
        here = (token >= first) & (token < first + columns)
        value = tl.load(row_start(values, row, k) + at, mask=here, other=0.0)
        # Equal ids all write, and write the same.
        value = to_storage(value, dx.dtype.element_ty, INTERPRET)
        tl.store(row_start(dx, row, dx_stride) + (token - first), value, mask=here)


def _case(name: str, kernel: Any, types: str, constexprs: dict[str, Any], *, warps: int, registers: int) -> CompileCase:
    """types: those of the arguments before the constexprs, in their order; pointers are aligned, some sizes too."""
    names = kernel.arg_names
    signature = dict(zip(names, [*types.split(), *("constexpr",) * len(constexprs)], strict=True))
    aligned = ("x_stride", "dx_stride", "first", "columns")
    return CompileCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=warps,
        max_registers=registers,
        divisible=tuple(n for n in names if n in aligned or signature[n].startswith("*")),
    )


def compile_cases() -> list[CompileCase]:
    cases = []
    for head, kept in (("bf16", "fp16"), ("fp16", "fp16"), ("fp32", "fp32")):
        flags = {"HAS_BIAS": False, "HAS_CAP": False, "HAS_COUNT": True}
        capped = {"HAS_BIAS": True, "HAS_CAP": True, "HAS_COUNT": True}
        for what, options, keep in (("keep", flags, True), ("bias-cap", capped, False)):
            cases.append(
                _case(
                    f"head-forward-{what}-{head}",
                    forward_kernel,
                    f"*fp32 *{head} *i64 *i32 *fp32 *fp32 *fp32 *{kept} i32 i32 i32 i32 i32 i32 i32 fp32 fp32 fp32",
                    {**options, "KEEP": keep, "TILE": MAX_TILE, "IDS": IDS},
                    warps=8,
                    registers=80,
                )
            )
            source = kept if keep else "fp32"
            cases.append(
                _case(
                    f"head-backward-{what}-{head}",
                    backward_kernel,
                    f"*{source} *{head} *i32 *fp32 *fp32 *fp32 *{head} i32 i32 i32 i32 i32 i32 i32 fp32 fp32 fp32",
                    {**options, "FROM_KEPT": keep, "TILE": MAX_TILE, "INTERPRET": False},
                    warps=8,
                    registers=80,
                )
            )
        cases.append(
            _case(
                f"head-scatter-{head}",
                scatter_kernel,
                f"*fp32 *i64 *i32 *{head} i32 i32 i32 i32 i32",
                {"HAS_COUNT": True, "IDS": IDS, "INTERPRET": False},
                warps=4,
                registers=40,
            )
        )
    values = {"HAS_CAP": True, "IDS": IDS, "RIVALS": RIVALS}
    types = "*fp32 *i64 *fp32 *fp32 *fp32 *fp32 i32 i32 fp32 fp32 fp32"
    return [*cases, _case("head-values", values_kernel, types, values, warps=4, registers=80)]
