"""The row summary: one streaming pass over the logits, from which LSE, the top K and draws are made.

    peaks[n, g]       the largest logit of the 64 columns of group g, in the logits' dtype
    sums[n, g]        sum of exp((z - peak) / T) over the group, fp32
    tile_peaks, tile_sums [n, j]   the same of 64 groups, for the LSE, fp32

Limit: one read of the logits. A program is one tile of 4,096 columns of one row, so 64 rows of 151,936 logits are 2,432
programs and few rows fill a device as many do, without a second code path; and what a tile's result is depends on
neither the number of rows nor the device. Only tensors laid out alike give the same bits: where the row stride is no
multiple of 16, Triton gives each thread other columns, and sums are taken in another order. A thread has 64 bytes
(bf16) of 16-byte loads in flight, and programs that compute hide behind those that load.

Bytes of a row of V = 151,936 in bf16: read 303,872; peaks 4,748, sums 9,496, tiles 304 written: 1.02 reads with the
peaks, 1.05 with peaks and sums. Groups of 128 would halve what is written, and double what is read again for K groups
(64 to a row: 8,192 bytes now): 21,132 bytes against 17,688 in all for the top 64.

A group measures from its own largest logit, so none underflows because another is large. NaN and +inf show as a NaN sum
(inf - inf); only then is a tile looked at again: peak and sum are NaN where the group holds a NaN; where it holds
+inf, peak is +inf and sum 1.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.launch import Prepared, Scale, cdiv, padded
from asyncopd.kernels.numeric import INF, exp_scaled

GROUP = 64
TILE_GROUPS = 64
# A row's groups are one block of the kernels that choose among them: 1,024 threads with 32 each.
MAX_VOCAB = GROUP * 32768


@triton.jit
def row_start(pointer, row, stride):  # row: any integer
    """Rows are addressed in 64 bits: 14,135 rows of 151,936 logits are more than 2^31."""
    return pointer + row.to(tl.int64) * stride


@triton.jit
def group_summary(z, scale):  # fp32 [groups, columns] -> peaks and sums [groups]
    """Right for groups of finite logits and -inf; the sum of any other group is NaN."""
    peaks = tl.max(z, axis=1)
    origin = tl.where(peaks == -INF, 0.0, peaks)
    return peaks, tl.sum(tl.exp2((z - origin[:, None]) * scale), axis=1)


@triton.jit
def irregular_summary(z, scale):
    """As group_summary, and right for NaN and +inf too. Peaks without NaN; sums NaN for NaN, 1 beside a peak of inf."""
    is_nan = z != z
    z = tl.where(is_nan, -INF, z)
    peaks = tl.max(z, axis=1)
    origin = tl.where(tl.abs(peaks) == INF, 0.0, peaks)
    sums = tl.sum(tl.exp2((z - origin[:, None]) * scale), axis=1)
    sums = tl.where(peaks == INF, 1.0, sums)
    return peaks, tl.where(tl.max(is_nan.to(tl.int32), axis=1) > 0, float("nan"), sums)


@triton.jit
def _summary_kernel(
    logits,  # [N, V], unit column stride
    peaks,  # [N, group_stride], the logits' dtype
    sums,  # [N, group_stride] fp32
    tile_peaks,  # [N, tiles] fp32
    tile_sums,  # [N, tiles] fp32
    row_stride,
    group_stride,
    vocab,
    groups,
    tiles,
    scale,
    scale_low,
    GROUP: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    WRITE_PEAKS: tl.constexpr,
    WRITE_SUMS: tl.constexpr,
):
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    base = row_start(logits, row, row_stride)
    first = tile * TILE_GROUPS * GROUP
    group = tl.arange(0, TILE_GROUPS)
    column = first + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    # A mask would cost the whole tiles their wide loads wherever V is not a multiple of 16.
    if first + TILE_GROUPS * GROUP <= vocab:
        z = tl.load(base + column).to(tl.float32)
    else:
        z = tl.load(base + column, mask=column < vocab, other=-INF).to(tl.float32)
    peak, total = group_summary(z, scale)
    tile_peak = tl.max(peak, axis=0)
    tile_origin = tl.where(tile_peak == -INF, 0.0, tile_peak)
    tile_sum = tl.sum(total * exp_scaled(peak - tile_origin, scale, scale_low), axis=0)
    if tile_sum != tile_sum:
        peak, total = irregular_summary(z, scale)
        tile_peak = tl.max(peak, axis=0)
        # NaN if one of them is: then the tile's is, whatever else there is; otherwise it holds +inf.
        tile_sum = tl.where(tl.max((total != total).to(tl.int32), axis=0) > 0, float("nan"), 1.0)
        peak = tl.where(total != total, float("nan"), peak)
    tl.store(tile_peaks + row.to(tl.int64) * tiles + tile, tile_peak)
    tl.store(tile_sums + row.to(tl.int64) * tiles + tile, tile_sum)
    at = tile * TILE_GROUPS + group
    if WRITE_PEAKS:
        tl.store(row_start(peaks, row, group_stride) + at, peak.to(peaks.dtype.element_ty), mask=at < groups)
    if WRITE_SUMS:
        tl.store(row_start(sums, row, group_stride) + at, total, mask=at < groups)


class Summary(NamedTuple):
    """tile_peaks and tile_sums [N, tiles]; peaks and sums [N, stride], or any tensor where not asked for."""

    peaks: Tensor
    sums: Tensor
    tile_peaks: Tensor
    tile_sums: Tensor

    @property
    def tiles(self) -> int:
        return self.tile_peaks.shape[1]


def count_groups(vocab: int) -> int:
    if vocab > MAX_VOCAB:
        raise ValueError(f"logits: got V = {vocab}, expected at most {MAX_VOCAB} on the triton backend")
    return cdiv(vocab, GROUP)


class Sizes(NamedTuple):
    """What the kernels are told of a row of `vocab` columns."""

    groups: int
    tiles: int
    stride: int  # of peaks and sums: `groups`, a multiple of 16 for the wide loads of whoever reads them
    group_block: int  # powers of two
    tile_block: int
    shift: int

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, vocab: int) -> "Sizes":
        groups = count_groups(vocab)
        tiles = cdiv(groups, TILE_GROUPS)
        return cls(groups, tiles, cdiv(groups, 16) * 16, padded(groups, 64), padded(tiles, 1), shift_of(vocab))


def shift_of(vocab: int) -> int:
    """Fractional bits of a fixed-point sum of `vocab` exponentials: below 2^62 in all, one group's below 2^51."""
    return min(44, 62 - (vocab - 1).bit_length())


def summarize(logits: Tensor, scale: Scale, *, peaks: bool, sums: bool) -> Summary:
    """logits [N, V] with unit column stride."""
    rows, vocab = logits.shape
    sizes, device, fp32 = Sizes.of(vocab), logits.device, torch.float32
    tile_sums = torch.empty(rows, sizes.tiles, dtype=fp32, device=device)
    out = Summary(
        torch.empty(rows, sizes.stride, dtype=logits.dtype, device=device) if peaks else logits,
        torch.empty(rows, sizes.stride, dtype=fp32, device=device) if sums else tile_sums,
        torch.empty(rows, sizes.tiles, dtype=fp32, device=device),
        tile_sums,
    )
    programs = rows * sizes.tiles
    if programs:
        _prepared(vocab, logits.stride(0), scale, peaks, sums)(programs, logits, *out)
    return out


@lru_cache(maxsize=256)
def _prepared(vocab: int, row_stride: int, scale: Scale, peaks: bool, sums: bool) -> Prepared:
    sizes = Sizes.of(vocab)
    return Prepared(
        _summary_kernel,
        row_stride,
        sizes.stride,
        vocab,
        sizes.groups,
        sizes.tiles,
        scale.scale,
        scale.scale_low,
        GROUP,
        TILE_GROUPS,
        peaks,
        sums,
        num_warps=4,
    )


def compile_cases() -> list[CompileCase]:
    return [
        CompileCase(
            name=f"summary-{dtype}-{what}",
            kernel=_summary_kernel,
            signature={
                "logits": f"*{dtype}",
                "peaks": f"*{dtype}",
                "sums": "*fp32",
                "tile_peaks": "*fp32",
                "tile_sums": "*fp32",
                "row_stride": "i32",
                "group_stride": "i32",
                "vocab": "i32",
                "groups": "i32",
                "tiles": "i32",
                "scale": "fp32",
                "scale_low": "fp32",
                **dict.fromkeys(("GROUP", "TILE_GROUPS", "WRITE_PEAKS", "WRITE_SUMS"), "constexpr"),
            },
            constexprs={"GROUP": GROUP, "TILE_GROUPS": TILE_GROUPS, "WRITE_PEAKS": peaks, "WRITE_SUMS": sums},
            num_warps=4,
            max_registers=96,
            divisible=("logits", "peaks", "sums", "tile_peaks", "tile_sums", "row_stride", "group_stride", "vocab"),
        )
        for dtype in ("bf16", "fp16", "fp32")
        for what, peaks, sums in (("lse", False, False), ("peaks", True, False), ("sums", True, True))
    ]
