"""The row summary of a head's logits as the epilogue of their GEMM: no logit is ever written.

    peaks[n, g], sums[n, g]    as in summary.py, of the 64 columns of group g, in fp32

2 N V H FLOPs, then about ten instructions an element of a tile whose products took 2 H FLOPs each; on sm_90, with one
block an SM, nothing runs beside them: 4 % at H = 4096, by the number of instructions. Bytes of a row of V = 151,936:
18,992 written and read again once, where its logits would be 607,744.

One more kernel, a program a row, merges the groups in fixed point like every LSE here.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.epilogue import Epilogue, head_logit
from asyncopd.kernels.gemm import FP32, GROUP_ROWS, LARGE, SMALL, Tile, tile_for, tile_of, tile_product
from asyncopd.kernels.launch import INTERPRET, Scale, cdiv, launch, padded, warps_for
from asyncopd.kernels.numeric import INF, exp_scaled, log_fixed, logsumexp_of, to_fixed
from asyncopd.kernels.summary import GROUP, count_groups, row_start, shift_of


@triton.jit
def _write_group(
    z,  # fp32 [BM, GROUP]: products
    bias,  # [V] fp32, or None
    peaks,  # [N, group_stride] fp32
    sums,  # [N, group_stride] fp32
    row,  # [BM]
    group,
    rows,
    columns,
    group_stride,
    logit_scale,
    softcap,
    softcap_inverse,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    scale,
    GROUP: tl.constexpr,
):
    column = group * GROUP + tl.arange(0, GROUP)
    b = 0.0
    if HAS_BIAS:
        b = tl.load(bias + column, mask=column < columns, other=0.0)[None, :]
    z = head_logit(z, b, logit_scale, softcap, softcap_inverse, HAS_BIAS, HAS_CAP)
    z = tl.where((column < columns)[None, :], z, -INF)
    peak = tl.max(z, axis=1)
    # Measured from 0 where the peak is infinite, exponentials are 0 or inf, and a sum is NaN only if it has a NaN.
    origin = tl.where(tl.abs(peak) == INF, 0.0, peak)
    total = tl.sum(tl.exp2((z - origin[:, None]) * scale), axis=1)
    peak = tl.where(total != total, float("nan"), peak)
    total = tl.where(peak == INF, 1.0, total)
    # The last tile may begin groups that are beyond the row.
    there = row < tl.where(group * GROUP < columns, rows, 0)
    tl.store(row_start(peaks, row, group_stride) + group, peak, mask=there)
    tl.store(row_start(sums, row, group_stride) + group, total, mask=there)


@triton.jit
def _halves(z, BM: tl.constexpr, BN: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(z, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _head_summary_kernel(
    hidden,  # [N, H]
    weight,  # [V, H]
    bias,  # [V] fp32, or None
    peaks,  # [N, group_stride] fp32; NaN where the group holds one
    sums,  # [N, group_stride] fp32; likewise, and 1 where the peak is +inf
    rows,  # N
    columns,  # V
    depth,  # H
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
    # A group after the other: for all of a wide tile at once there are not enough registers.
    GROUPS: tl.constexpr = BN // GROUP
    if GROUPS == 4:
        left, right = _halves(z, BM, BN)
        a, b = _halves(left, BM, BN // 2)
        c, d = _halves(right, BM, BN // 2)
        parts = (a, b, c, d)
    elif GROUPS == 2:
        parts = _halves(z, BM, BN)
    else:
        parts = (z,)
    for i in tl.static_range(GROUPS):
        _write_group(
            parts[i],
            bias,
            peaks,
            sums,
            row,
            column_tile * GROUPS + i,
            rows,
            columns,
            group_stride,
            logit_scale,
            softcap,
            softcap_inverse,
            HAS_BIAS,
            HAS_CAP,
            scale,
            GROUP,
        )


@triton.jit
def _merge_kernel(
    peaks,  # [N, group_stride] fp32
    sums,  # [N, group_stride] fp32
    row_peaks,  # [N] fp32
    row_sums,  # [N] fp32: as sums, of the whole row
    lse,  # [N] fp32
    group_stride,
    groups,
    t,
    t_low,
    scale,
    scale_low,
    GROUPS: tl.constexpr,  # a power of two, at least `groups`
    SHIFT: tl.constexpr,
):
    row = tl.program_id(0)
    row_groups = tl.arange(0, GROUPS)
    there = row_groups < groups
    # A group that holds a NaN says so in its sum; its peak is none.
    total = tl.load(row_start(sums, row, group_stride) + row_groups, mask=there, other=0.0)
    peak = tl.load(row_start(peaks, row, group_stride) + row_groups, mask=there, other=-INF)
    peak = tl.where(total != total, -INF, peak)
    broken = tl.max((total != total).to(tl.int32), axis=0) > 0
    top = tl.max(peak, axis=0)
    regular = (tl.abs(top) < INF) & (broken == 0)
    masses = total * exp_scaled(peak - tl.where(regular, top, 0.0), scale, scale_low)
    # A row of NaN or infinities is not summed: its total is one that a logarithm takes.
    mass = tl.sum(to_fixed(tl.where(regular, masses, 0.0), SHIFT), axis=0)
    log_high, log_low = log_fixed(tl.where(regular, mass, 1 << SHIFT), SHIFT)
    log_high = tl.where(regular, log_high, tl.where(broken, float("nan"), 0.0))
    log_low = tl.where(regular, log_low, 0.0)
    tl.store(row_peaks + row, top)
    row_sum = mass.to(tl.float32) * (1.0 / (1 << SHIFT))
    tl.store(row_sums + row, tl.where(regular, row_sum, tl.where(broken, float("nan"), 1.0)))
    tl.store(lse + row, logsumexp_of(top, log_high, log_low, t, t_low))


class HeadSummary(NamedTuple):
    """peaks [N, groups, rounded up to 16]; row_peaks, row_sums and lse [N]. All fp32."""

    peaks: Tensor
    row_peaks: Tensor
    row_sums: Tensor
    lse: Tensor


def summarize_head(hidden: Tensor, weight: Tensor, epilogue: Epilogue, scale: Scale) -> HeadSummary:
    """hidden [N, H], weight [V, H], of one dtype and with a unit stride each."""
    (rows, depth), vocab = hidden.shape, weight.shape[0]
    groups = count_groups(vocab)
    tile = tile_for(hidden, rows, vocab)
    stride, block = cdiv(groups, 16) * 16, padded(groups, 64)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    sums, out = empty(rows, stride), HeadSummary(empty(rows, stride), empty(rows), empty(rows), empty(rows))
    if rows == 0:
        return out
    launch(
        _head_summary_kernel,
        cdiv(rows, tile.BM) * cdiv(vocab, tile.BN),
        hidden,
        weight,
        epilogue.bias,
        out.peaks,
        sums,
        rows,
        vocab,
        depth,
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
        depth % tile.BK == 0,
        INTERPRET,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    launch(
        _merge_kernel,
        rows,
        out.peaks,
        sums,
        *out[1:],
        stride,
        groups,
        *scale,
        block,
        shift_of(vocab),
        num_warps=warps_for(block, 16),
    )
    return out


def compile_cases() -> list[CompileCase]:
    vocab = 151_936
    block = padded(count_groups(vocab), 64)
    cases = [
        CompileCase(
            name="head-merge",
            kernel=_merge_kernel,
            signature={
                **dict.fromkeys(("peaks", "sums", "row_peaks", "row_sums", "lse"), "*fp32"),
                **dict.fromkeys(("group_stride", "groups"), "i32"),
                **dict.fromkeys(("t", "t_low", "scale", "scale_low"), "fp32"),
                **dict.fromkeys(("GROUPS", "SHIFT"), "constexpr"),
            },
            constexprs={"GROUPS": block, "SHIFT": shift_of(vocab)},
            num_warps=warps_for(block, 16),
            max_registers=96,
            divisible=("peaks", "sums", "row_peaks", "row_sums", "lse", "group_stride"),
        )
    ]
    tiles: list[tuple[str, str, tuple[int, ...], Tile]] = [("fp32", "", (80, 90, 100), FP32)]
    for capability, large in LARGE.items():
        arch = 10 * capability
        tiles += [(dtype, f"-{arch}", (arch,), large) for dtype in ("bf16", "fp16")]
        tiles.append(("bf16", f"-small-{arch}", (arch,), SMALL[capability]))
    for dtype, suffix, archs, tile in tiles:
        cases.append(_case(f"head-summary-{dtype}{suffix}", archs, dtype, tile, full=False))
        if dtype != "fp16":  # as bf16
            cases.append(_case(f"head-summary-full-{dtype}{suffix}", archs, dtype, tile, full=True))
    return cases


def _case(name: str, archs: tuple[int, ...], dtype: str, tile: Tile, *, full: bool) -> CompileCase:
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
        "WHOLE": not full,
        "INTERPRET": False,
    }
    names = {
        **dict.fromkeys(("hidden", "weight"), f"*{dtype}"),
        **dict.fromkeys(("bias", "peaks", "sums"), "*fp32"),
        **dict.fromkeys(("rows", "columns", "depth", "group_stride"), "i32"),
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
            *("hidden", "weight", "bias", "peaks", "sums", "rows", "columns", "depth"),
            *("group_stride", "hidden_row_stride", "weight_row_stride"),
        ),
        archs=archs,
    )
