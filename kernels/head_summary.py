"""The row summary of a head's logits as the epilogue of their GEMM: no logit is ever written.

    tile_peaks[j, n], tile_sums[j, n]    of the 128 columns (64 in fp32) of part j of row n, for the LSE
    peaks[n, g]                          the largest logit of the 64 columns of group g, for the top K, if asked for

2 N V H FLOPs, then about ten instructions an element of a tile whose products took 2 H: 4 % of them at H = 4096 on
sm_90, where nothing else runs beside (one block an SM). Bytes of a row of V = 151,936: 9,496 of peaks and 9,496 of
parts written, where its logits would be 607,744.

One more kernel merges a row's parts, in fixed point like every LSE here, so in whatever order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.epilogue import Epilogue, head_logit
from asyncopd.kernels.gemm import FP32, GROUP_ROWS, LARGE, SMALL, Tile, tile_for, tile_of, tile_product
from asyncopd.kernels.launch import INTERPRET, Scale, on_device
from asyncopd.kernels.numeric import INF, NAN, exp_scaled, log_fixed, logsumexp_of, to_fixed
from asyncopd.kernels.summary import GROUP, count_groups, row_start, shift_of

MERGE_ROWS = 32  # a program's rows, neighbours in memory
MERGE_PARTS = 16  # that it reads at a time


@triton.jit
def _write_part(
    z,  # fp32 [BM, PART]: products
    bias,  # [V] fp32, or None
    peaks,  # [N, group_stride] fp32
    tile_peaks,  # [parts, N] fp32
    tile_sums,  # [parts, N] fp32
    row,  # [BM]
    part,
    rows,
    columns,
    groups,
    group_stride,
    logit_scale,
    softcap,
    softcap_inverse,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    scale,
    BM: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
    WRITE_PEAKS: tl.constexpr,
):
    column = part * PART + tl.arange(0, PART)
    b = 0.0
    if HAS_BIAS:
        b = tl.load(bias + column, mask=column < columns, other=0.0)[None, :]
    z = head_logit(z, b, logit_scale, softcap, softcap_inverse, HAS_BIAS, HAS_CAP)
    z = tl.where((column < columns)[None, :], z, -INF)
    peak = tl.max(tl.reshape(z, (BM, PART // GROUP, GROUP)), axis=2)
    tile_peak = tl.max(peak, axis=1)
    origin = tl.where(tile_peak == -INF, 0.0, tile_peak)
    tile_sum = tl.sum(tl.exp2((z - origin[:, None]) * scale), axis=1)
    there = row < rows
    # Only a NaN or +inf makes a sum NaN; then it is looked for.
    if tl.max(tl.where(there & (tile_sum != tile_sum), 1, 0), axis=0) > 0:
        is_nan = tl.reshape((z != z).to(tl.int32), (BM, PART // GROUP, GROUP))
        group_nan = tl.max(is_nan, axis=2)
        peak = tl.where(group_nan > 0, NAN, peak)
        tile_nan = tl.max(group_nan, axis=1)
        tile_sum = tl.where(tile_nan > 0, NAN, tl.where(tile_peak == INF, 1.0, tile_sum))
    at = part.to(tl.int64) * rows + row
    tl.store(tile_peaks + at, tile_peak, mask=there)
    tl.store(tile_sums + at, tile_sum, mask=there)
    if WRITE_PEAKS:
        group = part * (PART // GROUP) + tl.arange(0, PART // GROUP)
        to = row_start(peaks, row, group_stride)[:, None] + group[None, :]
        tl.store(to, peak, mask=there[:, None] & (group < groups)[None, :])


@triton.jit
def _head_summary_kernel(
    hidden,  # [N, H]
    weight,  # [V, H]
    bias,  # [V] fp32, or None
    peaks,  # [N, group_stride] fp32; NaN where the group holds one
    tile_peaks,  # [parts, N] fp32
    tile_sums,  # [parts, N] fp32: NaN if the part holds a NaN, 1 if its peak is +inf
    rows,  # N
    columns,  # V
    depth,  # H
    groups,
    group_stride,
    hidden_row_stride,
    hidden_stride,
    weight_row_stride,
    weight_stride,
    logit_scale,
    softcap,
    softcap_inverse,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    WRITE_PEAKS: tl.constexpr,
    WHOLE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(columns, BN), GROUP_ROWS)
    row = row_tile * BM + tl.arange(0, BM)
    column = column_tile * BN + tl.arange(0, BN)
    z = tile_product(
        hidden,
        weight,
        row,
        row < rows,
        column,
        column < columns,
        depth,
        hidden_row_stride,
        hidden_stride,
        weight_stride,
        weight_row_stride,
        BM,
        BN,
        BK,
        WHOLE,
        INTERPRET,
    )
    # Two parts of a wide tile, one after the other: all of it at once has not enough registers.
    PARTS: tl.constexpr = 2 if BN >= 128 else 1
    PART: tl.constexpr = BN // PARTS
    left, right = z, z
    if PARTS == 2:
        left, right = tl.split(tl.permute(tl.reshape(z, (BM, 2, PART)), (0, 2, 1)))
    for i in tl.static_range(PARTS):
        _write_part(
            left if i == 0 else right,
            bias,
            peaks,
            tile_peaks,
            tile_sums,
            row,
            column_tile * PARTS + i,
            rows,
            columns,
            groups,
            group_stride,
            logit_scale,
            softcap,
            softcap_inverse,
            HAS_BIAS,
            HAS_CAP,
            scale,
            BM,
            PART,
            GROUP,
            WRITE_PEAKS,
        )


@triton.jit
def _merge_kernel(
    tile_peaks,  # [parts, N] fp32
    tile_sums,  # [parts, N] fp32
    row_peaks,  # [N] fp32
    row_sums,  # [N] fp32: as tile_sums, of the whole row
    lse,  # [N] fp32
    rows,
    parts,
    t,
    t_low,
    scale,
    scale_low,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[None, :]
    peak = tl.full([ROWS], -INF, tl.float32)
    broken = tl.zeros([ROWS], tl.int32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None].to(tl.int64)
        at, mask = part * rows + row[None, :], there & (part < parts)
        peak = tl.maximum(peak, tl.max(tl.load(tile_peaks + at, mask=mask, other=-INF), axis=0))
        sums = tl.load(tile_sums + at, mask=mask, other=0.0)
        broken = tl.maximum(broken, tl.max((sums != sums).to(tl.int32), axis=0))
    regular = (tl.abs(peak) < INF) & (broken == 0)
    origin = tl.where(regular, peak, 0.0)
    total = tl.zeros([ROWS], tl.int64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None].to(tl.int64)
        at, mask = part * rows + row[None, :], there & (part < parts)
        peaks = tl.load(tile_peaks + at, mask=mask, other=-INF)
        sums = tl.load(tile_sums + at, mask=mask, other=0.0)
        masses = sums * exp_scaled(peaks - origin[None, :], scale, scale_low)
        # NaN and infinite rows are not summed: their total has to be one that a logarithm takes.
        total += tl.sum(to_fixed(tl.where(regular[None, :], masses, 0.0), SHIFT), axis=0)
    log_high, log_low = log_fixed(tl.where(regular, total, 1 << SHIFT), SHIFT)
    log_high = tl.where(regular, log_high, tl.where(broken > 0, NAN, 0.0))
    log_low = tl.where(regular, log_low, 0.0)
    row_sum = tl.where(regular, total.to(tl.float32) * (1.0 / (1 << SHIFT)), tl.where(broken > 0, NAN, 1.0))
    tl.store(row_peaks + row, peak, mask=row < rows)
    tl.store(row_sums + row, row_sum, mask=row < rows)
    tl.store(lse + row, logsumexp_of(peak, log_high, log_low, t, t_low), mask=row < rows)


class HeadSummary(NamedTuple):
    """peaks [N, groups, rounded up to 16] or [N, 0]; row_peaks, row_sums and lse [N]."""

    peaks: Tensor
    row_peaks: Tensor
    row_sums: Tensor
    lse: Tensor


def summarize_head(hidden: Tensor, weight: Tensor, epilogue: Epilogue, scale: Scale, *, peaks: bool) -> HeadSummary:
    """hidden [N, H], weight [V, H], of one dtype and with a unit stride each."""
    (rows, depth), vocab = hidden.shape, weight.shape[0]
    groups = count_groups(vocab)
    tile = tile_for(hidden, rows, vocab)
    stride = triton.cdiv(groups, 16) * 16
    # Both parts of the last tile are written, even if the row ends in the first: -inf and 0.
    parts = triton.cdiv(vocab, tile.BN) * (2 if tile.BN >= 128 else 1)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    out = HeadSummary(empty(rows, stride if peaks else 0), empty(rows), empty(rows), empty(rows))
    tile_peaks, tile_sums = empty(parts, rows), empty(parts, rows)
    if rows == 0:
        return out
    with on_device(hidden):
        _head_summary_kernel[(triton.cdiv(rows, tile.BM) * triton.cdiv(vocab, tile.BN),)](
            hidden,
            weight,
            epilogue.bias,
            out.peaks,
            tile_peaks,
            tile_sums,
            rows,
            vocab,
            depth,
            groups,
            stride,
            *hidden.stride(),
            *weight.stride(),
            *epilogue[1:],
            scale.scale,
            tile.BM,
            tile.BN,
            tile.BK,
            GROUP_ROWS,
            GROUP,
            peaks,
            depth % tile.BK == 0,
            INTERPRET,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        _merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
            tile_peaks,
            tile_sums,
            *out[1:],
            rows,
            parts,
            *scale,
            MERGE_ROWS,
            MERGE_PARTS,
            shift_of(vocab),
            num_warps=4,
        )
    return out


def head_logsumexp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """LSE [N] fp32 of the logits / temperature of a head, without its logits. hidden [N, H], weight [V, H]."""
    epilogue = Epilogue.of(bias, logit_scale, softcap)
    return summarize_head(hidden, weight, epilogue, Scale.of(temperature), peaks=False).lse


def compile_cases() -> list[CompileCase]:
    cases = [
        CompileCase(
            name="head-merge",
            kernel=_merge_kernel,
            signature={
                **dict.fromkeys(("tile_peaks", "tile_sums", "row_peaks", "row_sums", "lse"), "*fp32"),
                **dict.fromkeys(("rows", "parts"), "i32"),
                **dict.fromkeys(("t", "t_low", "scale", "scale_low"), "fp32"),
                **dict.fromkeys(("ROWS", "PARTS", "SHIFT"), "constexpr"),
            },
            constexprs={"ROWS": MERGE_ROWS, "PARTS": MERGE_PARTS, "SHIFT": shift_of(151_936)},
            num_warps=4,
            max_registers=80,
            divisible=("tile_peaks", "tile_sums", "row_peaks", "row_sums", "lse", "rows"),
        )
    ]
    tiles = [("fp32", "", (80, 90, 100), FP32)]
    for capability, large in LARGE.items():
        tiles += [(dtype, f"-{10 * capability}", (10 * capability,), large) for dtype in ("bf16", "fp16")]
    for dtype, suffix, archs, tile in tiles:
        for what, full, peaks in (("topk", False, True), ("lse", False, False), ("topk-full", True, True)):
            if dtype == "fp16" and what != "topk":  # as bf16
                continue
            cases.append(_case(f"head-summary-{what}-{dtype}{suffix}", archs, dtype, tile, full, peaks))
    for capability, small in SMALL.items():
        arch = 10 * capability
        cases.append(_case(f"head-summary-small-{arch}", (arch,), "bf16", small, full=True, peaks=True))
    return cases


def _case(name: str, archs: tuple[int, ...], dtype: str, tile: Tile, full: bool, peaks: bool) -> CompileCase:
    """full: bias, softcap and an H that BK does not divide."""
    constexprs = {
        "hidden_stride": 1,
        "weight_stride": 1,
        "HAS_BIAS": full,
        "HAS_CAP": full,
        "BM": tile.BM,
        "BN": tile.BN,
        "BK": tile.BK,
        "GROUP_ROWS": GROUP_ROWS,
        "GROUP": GROUP,
        "WRITE_PEAKS": peaks,
        "WHOLE": not full,
        "INTERPRET": False,
    }
    names = {
        **dict.fromkeys(("hidden", "weight"), f"*{dtype}"),
        **dict.fromkeys(("bias", "peaks", "tile_peaks", "tile_sums"), "*fp32"),
        **dict.fromkeys(("rows", "columns", "depth", "groups", "group_stride"), "i32"),
        **dict.fromkeys(("hidden_row_stride", "hidden_stride", "weight_row_stride", "weight_stride"), "i32"),
        **dict.fromkeys(("logit_scale", "softcap", "softcap_inverse"), "fp32"),
        **dict.fromkeys(("HAS_BIAS", "HAS_CAP"), "constexpr"),
        "scale": "fp32",
    }
    return CompileCase(
        name=name,
        kernel=_head_summary_kernel,
        signature={**names, **dict.fromkeys(constexprs, "constexpr")},
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        # 256 threads: one block of 8 warps an SM, or two of 4.
        max_registers=255,
        divisible=(
            *("hidden", "weight", "bias", "peaks", "tile_peaks", "tile_sums"),
            *("rows", "columns", "depth", "group_stride", "hidden_row_stride", "weight_row_stride"),
        ),
        archs=archs,
    )
