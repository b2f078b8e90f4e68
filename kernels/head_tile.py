"""What the exact head does with a tile of products before the next block of the vocabulary overwrites it.

    y = softcap(logit_scale (x + bias)),   x = h W_b^T as the matrix product left it, fp32 [rows, B]

    forward    (peak, sum) of every `TILE` columns for the LSE, as the row summary has them; y at the ids that lie in
               the block; and, where there is room, e = exp((y - peak) / T), which is softmax but for a factor a row
    backward   dx = (scatter(g at ids) - (sum_k g) softmax(y / T)) / T * slope,   slope = dy/dx
               elementwise for the second term; then the entries of the ids, made whole in fp32 before and written once

Limit: one read of the tile forward (and a write of e at 2 bytes), one read and one write at 2 bytes backward. Blocks
are narrow enough that a part of a tile is still in L2; nothing here depends on rows other than its own.

e is kept in fp16 beside a 16-bit head (fp32 beside an fp32 one): measured from its own tile's peak it lies in [0, 1],
so it is off by at most 2^-12 of itself, or 2^-25 of the peak; dx is rounded to the head's dtype anyway. e of the first
rows lies in dW's memory, of the next ones beside it, of the others nowhere; a program looks up which of them its row
is, so that one launch serves all rows of a block.

Rows of a block's tensors (x, dx, e) lie `stride` elements apart: the block's width, rounded up to a multiple of 16. All
of that is loaded and stored, so that a vocabulary of any size has wide accesses; columns beyond the width hold anything
in x and dx, and nobody reads them.
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
def kept_row(inside, beside, row, inside_rows, kept_rows, width, first, stride):
    """Where e of a row begins in this block: in the rows of dW that the block will fill, or beside dW."""
    to = row_start(inside, first, width) + row.to(tl.int64) * stride
    if row >= inside_rows:
        to = row_start(beside, first, kept_rows - inside_rows) + (row - inside_rows).to(tl.int64) * stride
    return to


# A variant for each of these that is 1, or a multiple of 16, would only be one more to compile.
@triton.jit(do_not_specialize=("first_tile", "block_tiles", "tiles", "inside_rows", "kept_rows"))
def forward_kernel(
    x,  # [rows, stride] fp32, the products of this block
    bias,  # [V], any float dtype
    ids,  # [rows, K] int32 or int64
    count,  # () rows that there are
    at_ids,  # [rows, K] fp32: y, written where the id lies in this block
    tile_peaks,  # [rows, tiles] fp32
    tile_sums,  # [rows, tiles] fp32
    inside,  # dW's memory: e of the rows before inside_rows
    beside,  # e of the rows from inside_rows to kept_rows - 1
    stride,
    first,  # column of the block's first
    columns,  # of the block
    first_tile,  # of the block
    block_tiles,  # ceil(columns / TILE)
    tiles,  # of a row in all
    width,  # H: elements of dW to a column
    inside_rows,
    kept_rows,
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
    row, tile = tl.program_id(0) // block_tiles, tl.program_id(0) % block_tiles
    if is_row(row, count, HAS_COUNT):
        base = row_start(x, row, stride)
        column = tile * TILE + tl.arange(0, TILE)
        there = column < stride
        y = tl.load(base + column, mask=there, other=0.0)
        b = 0.0
        if HAS_BIAS:
            b = tl.load(bias + first + column, mask=column < columns, other=0.0).to(tl.float32)
        y = head_logit(y, b, logit_scale, softcap, 1.0 / softcap, HAS_BIAS, HAS_CAP)
        y = tl.where(column < columns, y, -INF)
        peak, total = group_summary(y[None, :], scale)
        peak, total = tl.max(peak, axis=0), tl.max(total, axis=0)
        if total != total:
            peaks, totals = irregular_summary(y[None, :], scale)
            peak, total = (
                tl.max(peaks, axis=0),
                tl.where(tl.max((totals != totals).to(tl.int32), axis=0) > 0, float("nan"), 1.0),
            )
        at = row.to(tl.int64) * tiles + first_tile + tile
        tl.store(tile_peaks + at, peak)
        tl.store(tile_sums + at, total)
        if KEEP:
            origin = tl.where(tl.abs(peak) == INF, 0.0, peak)
            if row < kept_rows:
                e = tl.exp2((y - origin) * scale).to(inside.dtype.element_ty)
                to = kept_row(inside, beside, row, inside_rows, kept_rows, width, first, stride)
                tl.store(to + column, e, mask=there)
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


@triton.jit(do_not_specialize=("first_tile", "block_tiles", "tiles", "inside_rows", "kept_rows"))
def backward_kernel(
    x,  # [rows - kept_rows, stride] fp32: the products of the rows from kept_rows on
    bias,  # [V]
    count,  # ()
    tile_peaks,  # [rows, tiles] fp32: what e is measured from
    lse,  # [rows] fp32
    totals,  # [rows] fp32: sum of the row's gradients
    inside,  # as in the forward
    beside,
    dx,  # [rows, stride], the head's dtype
    stride,
    first,
    columns,
    first_tile,
    block_tiles,
    tiles,
    width,
    inside_rows,
    kept_rows,
    logit_scale,
    softcap,
    t,  # 1 / T
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    KEPT: tl.constexpr,  # some rows were kept
    AGAIN: tl.constexpr,  # some were not, and were multiplied again
    TILE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row, tile = tl.program_id(0) // block_tiles, tl.program_id(0) % block_tiles
    column = tile * TILE + tl.arange(0, TILE)
    there = column < stride
    to = row_start(dx, row, stride) + column
    if is_row(row, count, HAS_COUNT):
        row_lse, total = tl.load(lse + row), tl.load(totals + row)
        if KEPT:
            e = kept_row(inside, beside, row, inside_rows, kept_rows, width, first, stride)
            if row < kept_rows:
                value = tl.load(e + column, mask=there, other=0.0).to(tl.float32)
                peak = tl.load(tile_peaks + row.to(tl.int64) * tiles + first_tile + tile)
                origin = tl.where(tl.abs(peak) == INF, 0.0, peak)
                share = tl.exp2(tl.fma(origin, t, -row_lse) * LOG2E) * (-total * t)
                # Where there is no mass there is nothing of an infinite share either, but a NaN row is NaN everywhere.
                value = (
                    tl.where(value == 0.0, tl.where(row_lse == row_lse, 0.0, float("nan")), value * share) * logit_scale
                )
                # A row without mass or gradient never multiplies its e, which may be NaN.
                value = tl.where((total == 0.0) | (row_lse == -INF), 0.0, value)
                tl.store(to, to_storage(value, dx.dtype.element_ty, INTERPRET), mask=there)
        if AGAIN:
            base = row_start(x, row - kept_rows, stride)
            if row >= kept_rows:
                value = tl.load(base + column, mask=there, other=0.0)
                b = 0.0
                if HAS_BIAS:
                    b = tl.load(bias + first + column, mask=column < columns, other=0.0).to(tl.float32)
                y = head_logit(value, b, logit_scale, softcap, 1.0 / softcap, HAS_BIAS, HAS_CAP)
                slope = slope_of(y, logit_scale, softcap, HAS_CAP)
                # Where the softmax has no mass there is no gradient, though the slope of an infinite y be NaN.
                value = softmax_term(y, row_lse, total, t)
                value = tl.where(value == 0.0, 0.0, value * slope)
                tl.store(to, to_storage(value, dx.dtype.element_ty, INTERPRET), mask=there)
    elif HAS_BIAS:
        # Nobody reads these rows but the sum for the bias.
        tl.store(to, tl.zeros([TILE], dx.dtype.element_ty), mask=there)


@triton.jit
def value_at_ids(gradient, logprob, total, y, logit_scale, softcap, t, HAS_CAP: tl.constexpr):
    """The whole of dx at an id: `gradient` of all the row's entries that name it, `total` of all its entries."""
    softmax = tl.where(logprob == -INF, 0.0, tl.exp2(logprob * LOG2E) * total)
    softmax = tl.where(total == 0.0, 0.0, softmax)
    value = (gradient - softmax) * t
    return tl.where(value == 0.0, 0.0, value * slope_of(y, logit_scale, softcap, HAS_CAP))


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
    y = tl.load(row_start(at_ids, row, k) + at, mask=(at < k) & (token >= 0), other=0.0)
    value = value_at_ids(gradient, logprob, total, y, logit_scale, softcap, t, HAS_CAP)
    tl.store(row_start(values, row, k) + at, value, mask=at < k)


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
    aligned = ("stride", "dx_stride", "first", "columns", "width")
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
    numbers = " ".join(["i32"] * 9)
    for head, kept in (("bf16", "fp16"), ("fp16", "fp16"), ("fp32", "fp32")):
        flags = {"HAS_BIAS": False, "HAS_CAP": False, "HAS_COUNT": True}
        capped = {"HAS_BIAS": True, "HAS_CAP": True, "HAS_COUNT": True}
        for what, options, keep, again in (
            ("keep", flags, True, False),
            ("some", flags, True, True),
            ("bias-cap", capped, False, True),
        ):
            if not (keep and again):  # it makes no difference to the forward
                cases.append(
                    _case(
                        f"head-forward-{what}-{head}",
                        forward_kernel,
                        f"*fp32 *{head} *i64 *i32 *fp32 *fp32 *fp32 *{kept} *{kept} {numbers} i32 fp32 fp32 fp32",
                        {**options, "KEEP": keep, "TILE": MAX_TILE, "IDS": IDS},
                        warps=8,
                        registers=80,
                    )
                )
            cases.append(
                _case(
                    f"head-backward-{what}-{head}",
                    backward_kernel,
                    f"*fp32 *{head} *i32 *fp32 *fp32 *fp32 *{kept} *{kept} *{head} {numbers} fp32 fp32 fp32",
                    {**options, "KEPT": keep, "AGAIN": again, "TILE": MAX_TILE, "INTERPRET": False},
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
