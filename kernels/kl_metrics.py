"""The metrics of a loss, reduced on the device in a fixed order: no float atomics, nothing that a run could change.

A program of the loss kernel writes the sums over its rows, and the upper 15 bits of each drawn entry's ratio (that is
128 bins to an octave). Then two small kernels: one that finds the bins around the 99th percentile, and one with a
program a metric that adds the sums of all programs, as pairs of floats.

The percentile takes two histograms in place of one of 32,768 bins: of the exponents, added up inside each program of
the loss kernel, and of the 7 bits below within the exponent that has the rank. On policy nearly all ratios are in one
or two bins, and an atomic addition for each entry would wait for the one before it; here it is one a program and bin.
Counts are integers, so their order does not matter.

Bytes: 2 an entry written and read again, 28 a program, and 3 kB of histograms.
"""

import triton
import triton.language as tl
from torch import Tensor

from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.kl_divergence import row_sum
from asyncopd.kernels.launch import on_device
from asyncopd.kernels.numeric import INF, exp_precise, sum_pair

COARSE = 256  # bins of the exponent
FINE = 128  # of the 7 bits below
# Sums that a program of the loss kernel writes: one for each metric in the order of LossMetrics, except that the place
# of ratio_p99, which is no sum, has the number of rows that count.
SUMS = 7
ROWS_THAT_COUNT, RATIO_MEAN, RATIO_P99 = tl.constexpr(5), tl.constexpr(4), tl.constexpr(5)

FINE_BLOCK = 4096  # entries of a program
REDUCE_BLOCK, REDUCE_WARPS = 2048, 8  # programs whose sums are added at a time


@triton.jit
def measure(
    log_w,  # [rows, K] fp32
    log_p,  # [rows, K] fp32, normalised as the loss normalises
    log_q,  # [rows, K] fp32
    coef,  # [rows, K] fp32
    valid,  # [rows, K] bool
    drawn,  # [rows, K] bool
    changed,  # [rows, K] bool
    sums,  # [SUMS, programs] fp32
    histogram,  # [COARSE + FINE] int64
    COARSE: tl.constexpr,
):
    """Writes a program's sums, adds to the histogram of exponents; returns bins [rows, K] int16, -1 if not drawn."""
    log_weight = log_w + log_p
    weight = exp_precise(log_weight)
    mass, teacher_mass = row_sum(weight), row_sum(exp_precise(log_w + log_q))
    # Relative to the largest, because the square of a small weight may be 0.
    top = tl.max(log_weight, axis=1)[:, None]
    share = tl.exp(log_weight - tl.where(tl.abs(top) == INF, 0.0, top))
    total = row_sum(share)
    effective = tl.where(mass == 0.0, 0.0, total * total / row_sum(share * share))
    is_drawn = drawn.to(tl.float32)
    ratio = row_sum(is_drawn) * weight

    row_counts = tl.max(valid.to(tl.int32), axis=1)[:, None] > 0
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(sums + program, tl.sum(tl.where(row_counts, mass, 0.0)))
    tl.store(sums + programs + program, tl.sum(tl.where(row_counts, teacher_mass, 0.0)))
    tl.store(sums + 2 * programs + program, tl.sum(tl.where(row_counts, effective, 0.0)))
    tl.store(sums + 3 * programs + program, tl.sum(tl.where(row_counts, row_sum(coef), 0.0)))
    tl.store(sums + 4 * programs + program, tl.sum(tl.where(drawn, ratio, 0.0)))
    tl.store(sums + 5 * programs + program, tl.sum(row_counts.to(tl.float32)))
    tl.store(sums + 6 * programs + program, tl.sum((changed & drawn).to(tl.float32)))

    bins = tl.where(drawn, (ratio.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 16, -1)
    size: tl.constexpr = bins.shape[0] * bins.shape[1]
    flat = tl.reshape(bins, [size])
    counts = tl.histogram(tl.where(flat < 0, 0, flat >> 7), COARSE, mask=flat >= 0)
    tl.atomic_add(histogram + tl.arange(0, COARSE), counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    return bins.to(tl.int16)


@triton.jit
def bin_of_rank(counts, rank):  # [bins] int64
    """The first bin up to whose end there are `rank` entries, and how many there are below it."""
    upto = tl.cumsum(counts, axis=0)
    found = tl.sum((upto < rank).to(tl.int32), axis=0)
    return found, tl.sum(tl.where(upto < rank, counts, 0), axis=0)


@triton.jit
def exponent_of_percentile_99(histogram, COARSE: tl.constexpr):
    """The exponent of the smallest ratio that 99 % of all n do not exceed, and its rank among those with it, from 1 on.

    Its rank among all is ceil(0.99 n), in integers.
    """
    counts = tl.load(histogram + tl.arange(0, COARSE))
    total = tl.sum(counts, axis=0)
    rank = total - total // 100
    exponent, below = bin_of_rank(counts, rank)
    return exponent, rank - below


@triton.jit
def _fine_kernel(
    bins,  # [entries] int16, -1 where not drawn
    histogram,  # [COARSE + FINE] int64; the second part is added to
    entries,
    COARSE: tl.constexpr,
    FINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    exponent, _ = exponent_of_percentile_99(histogram, COARSE)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bin = tl.load(bins + at, mask=at < entries, other=-1).to(tl.int32)
    # -1 is shifted to -1, which is no exponent.
    inside = (bin >> 7) == exponent
    fine = tl.histogram(bin & (FINE - 1), FINE, mask=inside)
    tl.atomic_add(histogram + COARSE + tl.arange(0, FINE), fine.to(tl.int64), mask=fine > 0, sem="relaxed")


@triton.jit
def _metrics_kernel(
    sums,  # [SUMS, programs] fp32
    histogram,  # [COARSE + FINE] int64
    metrics,  # [SUMS] fp32
    programs,  # of the loss kernel
    COARSE: tl.constexpr,
    FINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    metric = tl.program_id(0)
    if metric == RATIO_P99:
        exponent, rank = exponent_of_percentile_99(histogram, COARSE)
        within, _ = bin_of_rank(tl.load(histogram + COARSE + tl.arange(0, FINE)), rank)
        # The middle of the bin; where it holds no finite numbers, what it does hold; 0 for the lowest, or for none.
        bits = (exponent << 23) | (within << 16) | 0x8000
        percentile = tl.where(bits == 0x8000, 0, bits).to(tl.float32, bitcast=True)
        percentile = tl.where(exponent == 255, tl.where(within == 0, INF, float("nan")), percentile)
        tl.store(metrics + metric, tl.where(rank == 0, 0.0, percentile))
    else:
        lane = tl.arange(0, BLOCK)
        total, low, rows = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, tl.cdiv(programs, BLOCK) * BLOCK, BLOCK):
            there = start + lane < programs
            total, error = sum_pair(total, tl.load(sums + metric * programs + start + lane, mask=there, other=0.0))
            # An infinity has no rounding error.
            low += tl.where(tl.abs(total) < INF, error, 0.0)
            rows += tl.load(sums + ROWS_THAT_COUNT * programs + start + lane, mask=there, other=0.0)
        drawn = tl.sum(tl.load(histogram + tl.arange(0, COARSE)), axis=0)
        out_of = tl.where(metric < RATIO_MEAN, tl.sum(rows.to(tl.int64), axis=0), drawn)
        mean = (tl.sum(total, axis=0) + tl.sum(low, axis=0)) / tl.maximum(out_of, 1).to(tl.float32)
        tl.store(metrics + metric, mean)


def launch_metrics(sums: Tensor, bins: Tensor, histogram: Tensor, metrics: Tensor) -> None:
    """sums [SUMS, programs], bins [N, K] and histogram [COARSE + FINE] as `measure` left them -> metrics [SUMS]."""
    programs = sums.shape[1]
    with on_device(metrics):
        _fine_kernel[(triton.cdiv(bins.numel(), FINE_BLOCK),)](
            bins, histogram, bins.numel(), COARSE, FINE, FINE_BLOCK, num_warps=4
        )
        _metrics_kernel[(SUMS,)](sums, histogram, metrics, programs, COARSE, FINE, REDUCE_BLOCK, num_warps=REDUCE_WARPS)


def compile_cases() -> list[CompileCase]:
    fine = CompileCase(
        name="kl-metrics-fine",
        kernel=_fine_kernel,
        signature={
            "bins": "*i16",
            "histogram": "*i64",
            "entries": "i32",
            **dict.fromkeys(("COARSE", "FINE", "BLOCK"), "constexpr"),
        },
        constexprs={"COARSE": COARSE, "FINE": FINE, "BLOCK": FINE_BLOCK},
        num_warps=4,
        max_registers=64,
        divisible=("bins", "histogram", "entries"),
    )
    reduce = CompileCase(
        name="kl-metrics-reduce",
        kernel=_metrics_kernel,
        signature={
            "sums": "*fp32",
            "histogram": "*i64",
            "metrics": "*fp32",
            "programs": "i32",
            **dict.fromkeys(("COARSE", "FINE", "BLOCK"), "constexpr"),
        },
        constexprs={"COARSE": COARSE, "FINE": FINE, "BLOCK": REDUCE_BLOCK},
        num_warps=REDUCE_WARPS,
        max_registers=96,
        divisible=("sums", "histogram", "metrics"),
    )
    return [fine, reduce]
