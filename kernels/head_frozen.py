"""The exact loss beside a frozen head: one walk over the vocabulary that keeps nothing, and still an exact dH.

With c_v the sum of a row's coefficients at the id v, C their sum over all ids, p = softmax(y / T), slope = dy/dx:

    dh = 1/T sum over distinct ids v of (c_v - C p_v) slope_v W[v]  -  C / (T Z) sum over other v of e_v slope_v W[v]

The coefficients come from log p at the ids, so they are known after the walk only. But in the second sum they are one
factor a row, C / Z, which can as well be multiplied in at the end. So a block of columns needs two products:

    x = h W_b^T;   e = exp((y - m) / T) slope, 0 at the ids;   U += e W_b                                       4NVH

m is the largest y of the row so far; where a block raises it, the row of U is first multiplied by exp((m_old - m) / T).
The ids' own terms are K rows of the head a row, in fp32 (sparse_rows.py): p_v and c_v may cancel to the last digit, and
e, which is rounded to the head's dtype, would not. dW has no such form, since there the factor is inside of the sum
over rows; neither has the gradient of a bias, so a head with one walks twice (head_walk.py).

Limit: two products, 26 ms at N = 8,192, H = 4,096, V = 151,936 in bf16 on an H100. Beside them a read of x and a write
of e (7.5 GB), a read and a write of the rows of U whose m rises (3.5 times a row if all blocks are alike, 0.9 GB), and
4.3 GB of the head's rows from L2. Memory: 256 MiB of x, 128 each of e and U.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.rows import PAD
from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.epilogue import head_logit
from asyncopd.kernels.gather import IDS, RIVALS, logprobs_at, sum_over_equal_ids
from asyncopd.kernels.gemm import product
from asyncopd.kernels.head_tile import is_row, slope_of, value_at_ids
from asyncopd.kernels.head_walk import Walk
from asyncopd.kernels.launch import INTERPRET, cdiv, launch, padded
from asyncopd.kernels.numeric import INF, LOG2E, row_logsumexp, to_storage
from asyncopd.kernels.sparse_entries import Entries
from asyncopd.kernels.sparse_rows import launch_hidden_gradient
from asyncopd.kernels.summary import row_start, shift_of

TILE = 8192  # columns that a program holds at a time: 16 a thread
SHIFT = 14  # e beside an fp16 head is in units of 2^-14: fp16 ends at 6e-8, and a thousand smaller ones may matter


@triton.jit
def _logits(base, column, columns, stride, logit_scale, softcap, HAS_CAP: tl.constexpr):
    """y of a row's columns; -inf beyond the block."""
    x = tl.load(base + column, mask=column < stride, other=0.0)
    y = head_logit(x, 0.0, logit_scale, softcap, 1.0 / softcap, False, HAS_CAP)
    return tl.where(column < columns, y, -INF)


@triton.jit
def _largest(y):
    """Of those that are no NaN."""
    return tl.max(tl.where(y == y, y, -INF), axis=0)


@triton.jit
def _store_e(
    to, y, origin, column, stride, softcap, scale, HAS_CAP: tl.constexpr, SHIFT: tl.constexpr, INTERPRET: tl.constexpr
):
    """exp((y - origin) / T) 2^SHIFT slope / logit_scale; returns the sum of the exponentials."""
    e = tl.exp2((y - origin) * scale)
    value = e * (2.0**SHIFT)
    if HAS_CAP:
        # Where there is no mass there is no gradient, though the slope of an infinite y be NaN.
        value = tl.where(e == 0.0, 0.0, value * slope_of(y, 1.0, softcap, HAS_CAP))
    tl.store(to + column, to_storage(value, to.dtype.element_ty, INTERPRET), mask=column < stride)
    return tl.sum(e, axis=0)


@triton.jit(do_not_specialize=("block", "blocks"))
def _online_kernel(
    x,  # [rows, stride] fp32: products of this block
    ids,  # [rows, K] int32 or int64
    count,  # () rows that there are
    at_ids,  # [rows, K] fp32: y, written where the id lies in this block
    peaks,  # [rows, blocks] fp32: the largest y up to the end of each block
    sums,  # [rows, blocks] fp32: the block's exponentials, measured from there
    e,  # [rows, stride], the head's dtype
    mixed,  # [rows, H] fp32: U, measured from the peak of the block before
    stride,
    first,  # column of the block's first
    columns,  # of the block
    block,  # its number
    blocks,
    width,  # H
    k,
    logit_scale,
    softcap,
    scale,  # log2(e) / T
    HAS_CAP: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
    IDS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row = tl.program_id(0)
    if is_row(row, count, HAS_COUNT):
        base, to = row_start(x, row, stride), row_start(e, row, stride)
        at = row.to(tl.int64) * blocks + block
        before = tl.load(peaks + at - 1, mask=block > 0, other=-INF)
        column = tl.arange(0, TILE)
        # Held in registers; of a wider block, which few rows have, the rest is read twice.
        y = _logits(base, column, columns, stride, logit_scale, softcap, HAS_CAP)
        peak = tl.maximum(_largest(y), before)
        for start in range(TILE, columns, TILE):
            more = _logits(base, start + column, columns, stride, logit_scale, softcap, HAS_CAP)
            peak = tl.maximum(peak, _largest(more))
        origin = tl.where(tl.abs(peak) == INF, 0.0, peak)
        total = _store_e(to, y, origin, column, stride, softcap, scale, HAS_CAP, SHIFT, INTERPRET)
        for start in range(TILE, columns, TILE):
            more = _logits(base, start + column, columns, stride, logit_scale, softcap, HAS_CAP)
            total += _store_e(to, more, origin, start + column, stride, softcap, scale, HAS_CAP, SHIFT, INTERPRET)
        tl.store(peaks + at, peak)
        # As the row summary has it: NaN where there is one, and 1 from a peak of inf.
        tl.store(sums + at, tl.where(total != total, float("nan"), tl.where(peak == INF, 1.0, total)))
        if (block > 0) & (peak != before):
            factor = tl.exp2((before - origin) * scale)
            for start in range(0, width, TILE):
                place = row_start(mixed, row, width) + start + column
                u = tl.load(place, mask=start + column < width, other=0.0)
                tl.store(place, u * factor, mask=start + column < width)
        # What is written below was written by other threads above.
        tl.debug_barrier()
        for start in range(0, k, IDS):
            which = start + tl.arange(0, IDS)
            token = tl.load(row_start(ids, row, k) + which, mask=which < k, other=-1)
            place = token - first
            here = (place >= 0) & (place < columns)
            y_at = tl.load(base + place, mask=here, other=0.0)
            y_at = head_logit(y_at, 0.0, logit_scale, softcap, 1.0 / softcap, False, HAS_CAP)
            tl.store(row_start(at_ids, row, k) + which, y_at, mask=here)
            tl.store(to + place, tl.zeros([IDS], to.dtype.element_ty), mask=here)


@triton.jit
def _first_of_equal_ids(row_ids, token, at, k, IDS: tl.constexpr, RIVALS: tl.constexpr):
    """Whether no id of the row before position `at` [IDS] is equal."""
    seen = tl.zeros([IDS], tl.int32)
    for start in range(0, k, RIVALS):
        rivals = start + tl.arange(0, RIVALS)
        rival = tl.load(row_ids + rivals, mask=rivals < k, other=-1)
        equal = (token[:, None] == rival[None, :]) & (rivals[None, :] < at[:, None])
        seen = tl.maximum(seen, tl.max(equal.to(tl.int32), axis=1))
    return seen == 0


@triton.jit
def _corrections_kernel(
    grad,  # [rows, K] fp32: 0 at pads
    ids,  # [rows, K]; -1 throughout a row that takes no part
    at_ids,  # [rows, K] fp32: y
    logprobs,  # [rows, K] fp32
    totals,  # [rows] fp32: sum of the row's gradients
    peaks,  # [rows, blocks] fp32
    sums,  # [rows, blocks] fp32
    factors,  # [rows, K] fp32: of W[id] in dh
    keys,  # [rows, K] int32: ids, or `vocab` for pads and for what equals an id before it
    shares,  # [rows] fp32: of U in dh
    vocab,
    blocks,
    k,
    id_blocks,  # of ids to a row
    logit_scale,
    softcap,
    t,
    scale,
    scale_low,
    HAS_CAP: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCKS: tl.constexpr,  # a power of two, at least `blocks`
    FIXED: tl.constexpr,
    IDS: tl.constexpr,
    RIVALS: tl.constexpr,
):
    row, block = tl.program_id(0) // id_blocks, tl.program_id(0) % id_blocks
    row_ids, row_grad = row_start(ids, row, k), row_start(grad, row, k)
    at = block * IDS + tl.arange(0, IDS)
    token = tl.load(row_ids + at, mask=at < k, other=-1)
    gradient = sum_over_equal_ids(row_ids, row_grad, token, k, IDS, RIVALS)
    total = tl.load(totals + row)
    logprob = tl.load(row_start(logprobs, row, k) + at, mask=at < k, other=-INF)
    y = tl.load(row_start(at_ids, row, k) + at, mask=(at < k) & (token >= 0), other=0.0)
    value = value_at_ids(gradient, logprob, total, y, logit_scale, softcap, t, HAS_CAP)
    tl.store(row_start(factors, row, k) + at, value, mask=at < k)
    counts = (token >= 0) & (token < vocab) & _first_of_equal_ids(row_ids, token, at, k, IDS, RIVALS)
    tl.store(row_start(keys, row, k) + at, tl.where(counts, token, vocab).to(tl.int32), mask=at < k)
    if block == 0:
        start = row.to(tl.int64) * blocks
        peak, log_high, log_low = row_logsumexp(peaks + start, sums + start, blocks, scale, scale_low, BLOCKS, FIXED)
        share = tl.exp2(-(log_high + log_low) * LOG2E) * (2.0**-SHIFT) * (-total * t) * logit_scale
        # Infinite logits share the mass among them, and what that is is not a number.
        share = tl.where(peak == INF, float("nan"), share)
        # A row without gradient or mass never multiplies its U, which may be NaN.
        tl.store(shares + row, tl.where((total == 0.0) | ((peak == -INF) & (log_high == log_high)), 0.0, share))


class FrozenWalk(Walk):
    """A walk for the loss and the gradient of the hidden states alone; the head has no bias."""

    def __init__(self, hidden: Tensor, ids: Tensor, head: Head, count: Tensor | None) -> None:
        super().__init__(hidden, ids, head, count, whole=True)
        self.mixed = self._empty(*hidden.shape)
        self.shift = SHIFT if head.weight.dtype == torch.float16 else 0

    def scores(self) -> tuple[Tensor, Tensor]:
        """log p [rows, K] and LSE [rows], and U in `mixed`; rows beyond the count hold anything."""
        (rows, k), weight, device = self.ids.shape, self.head.weight, self.hidden.device
        products = self.blocks.memory(rows, torch.float32, device)
        exponentials = self.blocks.memory(rows, weight.dtype, device)
        tile = min(TILE, self.blocks.tile)
        for number, block in enumerate(self.blocks.blocks):
            x, e = block.take(products, rows), block.take(exponentials, rows)
            product(self.hidden, weight[block.cols].t(), x, count=self.count, counted="rows")
            if rows:
                launch(
                    _online_kernel,
                    rows,
                    x,
                    self.ids,
                    self.count,
                    self.at_ids,
                    self.tile_peaks,
                    self.tile_sums,
                    e,
                    self.mixed,
                    block.stride,
                    block.cols.start,
                    block.width,
                    number,
                    self.blocks.tiles,
                    weight.shape[1],
                    k,
                    self.head.logit_scale,
                    self._softcap,
                    self.scale.scale,
                    self.head.softcap is not None,
                    self.count is not None,
                    self.shift,
                    tile,
                    IDS,
                    INTERPRET,
                    num_warps=warps_of(tile),
                )
            product(e, weight[block.cols], self.mixed, count=self.count, counted="rows", accumulate=number > 0)
        return logprobs_at(
            self.at_ids, self.ids, self.tile_peaks, self.tile_sums, self.vocab, self.scale, gathered=True
        )

    def hidden_gradient(self, grad: Tensor, logprobs: Tensor) -> Tensor:
        """Of sum(grad * log p), grad [rows, K]: [rows, H] in the dtype of the hidden states."""
        grad = grad.to(torch.float32).masked_fill(self.ids == PAD, 0.0)
        # A row without coefficients adds nothing, whatever its hidden state holds.
        ids = self.ids.masked_fill(~(grad != 0.0).any(dim=1, keepdim=True), PAD)
        (rows, k), device = ids.shape, ids.device
        entries = Entries(self._empty(rows, k), torch.empty((rows, k), dtype=torch.int32, device=device))
        shares, id_blocks = self._empty(rows), max(1, cdiv(k, IDS))
        if rows:
            launch(
                _corrections_kernel,
                rows * id_blocks,
                grad,
                ids,
                self.at_ids,
                logprobs,
                grad.sum(dim=1),
                self.tile_peaks,
                self.tile_sums,
                *entries,
                shares,
                self.vocab,
                self.blocks.tiles,
                k,
                id_blocks,
                self.head.logit_scale,
                self._softcap,
                self.scale.t,
                self.scale.scale,
                self.scale.scale_low,
                self.head.softcap is not None,
                self.shift,
                padded(self.blocks.tiles, 1),
                shift_of(self.vocab),
                IDS,
                RIVALS,
                num_warps=4,
            )
        dhidden = torch.empty(self.hidden.shape, dtype=self.hidden.dtype, device=device)
        launch_hidden_gradient(entries, self.head.weight, dhidden, base=(self.mixed, shares))
        return dhidden


def warps_of(tile: int) -> int:
    """16 elements a thread."""
    return max(1, min(16, tile // 512))


def compile_cases() -> list[CompileCase]:
    cases = []
    for head, cap in (("bf16", False), ("fp16", True), ("fp32", False)):
        shift = SHIFT if head == "fp16" else 0
        flags: dict[str, Any] = {"HAS_CAP": cap, "HAS_COUNT": True, "SHIFT": shift}
        sizes = ("stride", "first", "columns", "block", "blocks", "width", "k")
        cases.append(
            CompileCase(
                name=f"head-online-{head}" + ("-softcap" if cap else ""),
                kernel=_online_kernel,
                signature={
                    "x": "*fp32",
                    "ids": "*i64",
                    "count": "*i32",
                    **dict.fromkeys(("at_ids", "peaks", "sums"), "*fp32"),
                    "e": f"*{head}",
                    "mixed": "*fp32",
                    **dict.fromkeys(sizes, "i32"),
                    **dict.fromkeys(("logit_scale", "softcap", "scale"), "fp32"),
                    **dict.fromkeys((*flags, "TILE", "IDS", "INTERPRET"), "constexpr"),
                },
                constexprs={**flags, "TILE": TILE, "IDS": IDS, "INTERPRET": False},
                num_warps=warps_of(TILE),
                max_registers=64,
                divisible=(
                    *("x", "ids", "count", "at_ids", "peaks", "sums", "e", "mixed"),
                    *("stride", "first", "columns", "width", "k"),
                ),
            )
        )
    constants = {"HAS_CAP": True, "SHIFT": 0, "BLOCKS": 32, "FIXED": shift_of(151_936), "IDS": IDS, "RIVALS": RIVALS}
    numbers = ("logit_scale", "softcap", "t", "scale", "scale_low")
    corrections = CompileCase(
        name="head-corrections",
        kernel=_corrections_kernel,
        signature={
            "grad": "*fp32",
            "ids": "*i64",
            **dict.fromkeys(("at_ids", "logprobs", "totals", "peaks", "sums", "factors"), "*fp32"),
            "keys": "*i32",
            "shares": "*fp32",
            **dict.fromkeys(("vocab", "blocks", "k", "id_blocks"), "i32"),
            **dict.fromkeys(numbers, "fp32"),
            **dict.fromkeys(constants, "constexpr"),
        },
        constexprs=constants,
        num_warps=4,
        max_registers=80,
        divisible=(
            *("grad", "ids", "at_ids", "logprobs", "totals", "peaks", "sums", "factors", "keys", "shares"),
            *("vocab", "k"),
        ),
    )
    return [*cases, corrections]
