"""Draws from a row's distribution, with or without its head, by a two-level inverse CDF over the row summary.

kernels/rest.py makes the cumulative sum of the group masses. A program here is a block of draws of one row: Philox
numbers, a binary search for the group, a cumulative sum over its 64 logits.

A number u of 53 bits becomes a target floor(u * total) without rounding, and what has no mass is never drawn: masses
are fixed point, inside a group with 40 fractional bits of its own largest. What is inexact are the masses themselves:
a group's from fp32 exponentials and their sum, to about 2e-7 of itself. So every step of the distribution function is
within 3e-7 of its place, within 1e-8 for the usual row, and cutting off loses at most 2e-10 of the mass; a draw can
differ from another backend's only where its number falls that close to a step.

Bytes of a row (V = 151,936, bf16) after the summary's: peaks and sums 14,244 read, their cumulative sum 18,992 written,
128 read again for each draw and each id of the head: with the summary, and the choice of 16 + 48, 1.21 reads.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.backends.reference.rows import check_ids_in_range
from asyncopd.backends.reference.sample import check_possible
from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.launch import INTERPRET, Prepared, Scale, cdiv, check_logits, float_pair, padded
from asyncopd.kernels.numeric import (
    INF,
    exp_scaled,
    log_fixed,
    log_ratio,
    logsumexp_of,
    row_logsumexp,
    sum_pair,
    to_fixed,
)
from asyncopd.kernels.rest import head_end, in_head, launch_rest, rest_of_groups
from asyncopd.kernels.summary import GROUP, TILE_GROUPS, Sizes, count_groups, row_start, shift_of, summarize
from asyncopd.kernels.topk import check_k, launch_topk

DRAWS = 32  # a program's draws
TINY = tl.constexpr(2.0**-126)
GROUP_SHIFT = tl.constexpr(40)


@triton.jit
def uniform_bits(stream, row, draw):  # int64, int64, int32 [n] -> int64 [n]
    """2^63 times the uniform numbers of asyncopd/backends/reference/philox.py, which are odd multiples of 2^-53."""
    zero = draw * 0
    row_low, row_high = zero + (row & 0xFFFFFFFF).to(tl.int32), zero + (row >> 32).to(tl.int32)
    a, b, c, d = tl.philox(stream.to(tl.uint64, bitcast=True), draw // 2, zero, row_low, row_high)
    odd = draw % 2 == 1
    high, low = tl.where(odd, c, a).to(tl.uint32), tl.where(odd, d, b).to(tl.uint32)
    bits = ((high >> 6).to(tl.int64) << 26) | (low >> 6).to(tl.int64)
    return (2 * bits + 1) << 10


@triton.jit
def scaled(fraction, total):  # both below 2^63
    """floor(fraction / 2^63 * total), exactly."""
    return tl.umulhi(fraction.to(tl.uint64), (total * 2).to(tl.uint64)).to(tl.int64)


@triton.jit
def ratio(part, whole):  # 0 <= part < whole < 2^51
    """part / whole in units of 2^-63, cut off after 48 bits: a division in digits of 12 bits."""
    quotient = part * 0
    for _ in range(4):
        part = part << 12
        digit = part // whole
        part -= digit * whole
        quotient = (quotient << 12) | digit
    return quotient << 15


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _draw_kernel(
    logits,  # [N, V], unit column stride
    cdf,  # [N, group_stride] int64
    rest_peaks,  # [N] fp32
    tile_peaks,  # [N, tiles] fp32
    tile_sums,  # [N, tiles] fp32
    streams,  # [N] int64, or anything
    sampled_ids,  # [N] int32 or int64, or anything
    ids,  # [N, out_stride] int64: the head, then the draws
    log_weights,  # [N, out_stride] fp32
    logprobs,  # [N, out_stride] fp32
    lse,  # [N] fp32
    seed_low,
    seed_high,
    row_stride,
    out_stride,
    group_stride,
    vocab,
    groups,
    tiles,
    head,
    num_samples,
    blocks,  # of draws to a row
    log_count,  # log(num_samples)
    log_count_low,
    t,
    t_low,
    scale,
    scale_low,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,  # GROUPS = 2^STEPS
    TILES: tl.constexpr,
    DRAWS: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_HEAD: tl.constexpr,
    HAS_STREAMS: tl.constexpr,
    HAS_SAMPLED: tl.constexpr,
):
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    base, row_ids = row_start(logits, row, row_stride), row_start(ids, row, out_stride)
    row_cdf = row_start(cdf, row, group_stride)
    last_key, last_id = head_end(base, row_ids, head, HAS_HEAD)
    draw = block * DRAWS + tl.arange(0, DRAWS)
    if HAS_STREAMS:
        u = uniform_bits(tl.load(streams + row), tl.full((), 0, tl.int64), draw)
    else:
        seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
        u = uniform_bits(seed, row.to(tl.int64), draw)

    rest_peak = tl.load(rest_peaks + row)
    total = tl.load(row_cdf + groups - 1)
    regular = tl.abs(rest_peak) < INF
    target = scaled(u, tl.where(regular, total, vocab))
    group = tl.zeros([DRAWS], tl.int32)
    for step in range(STEPS):
        probe = group + (GROUPS >> (step + 1)) - 1
        passed = tl.load(row_cdf + probe, mask=probe < groups, other=9223372036854775807) <= target
        group += tl.where(passed, GROUPS >> (step + 1), 0)
    group = tl.minimum(group, groups - 1)
    before = tl.load(row_cdf + group - 1, mask=group > 0, other=0)
    mass = tl.load(row_cdf + group) - before
    # Without mass, what follows is thrown away; it has to stay within bounds.
    mass = tl.maximum(mass, 1)
    within = ratio(tl.minimum(tl.maximum(target - before, 0), mass - 1), mass)

    z = rest_of_groups(base, group, vocab, last_key, last_id, GROUP)
    peak = tl.max(z, axis=1)
    origin = tl.where(tl.abs(peak) < INF, peak, 0.0)
    masses = exp_scaled(z - origin[:, None], scale, scale_low)
    masses = tl.where(masses <= 1.0, masses, 0.0)
    column_cdf = tl.cumsum(to_fixed(masses, GROUP_SHIFT), axis=1)
    place = scaled(within, tl.max(column_cdf, axis=1))
    column = tl.sum((column_cdf <= place[:, None]).to(tl.int32), axis=1)
    token = tl.where(regular, (group * GROUP + tl.minimum(column, GROUP - 1)).to(tl.int64), target)
    if HAS_SAMPLED:
        own = tl.load(sampled_ids + row).to(tl.int64)
        own = tl.where((own >= 0) & (own < vocab), own, 0)
        keep = in_head(tl.load(base + own), own, last_key, last_id)
        token = tl.where(tl.where(draw == 0, keep.to(tl.int32), 1) == 0, own, token)

    # log w = log(rest) - log M - z / T, and log mu = z / T - LSE.
    z = tl.load(base + token).to(tl.float32)
    rest_high, rest_low = log_fixed(tl.where(regular, total, 1), SHIFT)
    rest_high = tl.where(regular, rest_high, tl.where(rest_peak == rest_peak, 0.0, float("nan")))
    rest_high, error = sum_pair(rest_high, -log_count)
    rest_low = tl.where(regular, error + (rest_low - log_count_low), 0.0)
    weight = -log_ratio(z, rest_peak, rest_high, rest_low, t, t_low)
    # Exactly 0 marks what was not drawn.
    weight = tl.where(weight == 0.0, TINY, weight)
    at_tiles = row.to(tl.int64) * tiles
    top, log_high, log_low = row_logsumexp(
        tile_peaks + at_tiles, tile_sums + at_tiles, tiles, scale, scale_low, TILES, SHIFT
    )
    logprob = log_ratio(z, top, log_high, log_low, t, t_low)
    empty = rest_peak == -INF
    there = draw < num_samples
    tl.store(row_ids + head + draw, tl.where(empty, -1, token), mask=there)
    tl.store(row_start(log_weights, row, out_stride) + head + draw, tl.where(empty, -INF, weight), mask=there)
    tl.store(row_start(logprobs, row, out_stride) + head + draw, tl.where(empty, -INF, logprob), mask=there)
    if block == 0:
        tl.store(lse + row, logsumexp_of(top, log_high, log_low, t, t_low))
        if HAS_HEAD:
            for start in range(0, head, DRAWS):
                at = start + tl.arange(0, DRAWS)
                tl.store(row_start(log_weights, row, out_stride) + at, 0.0, mask=at < head)


def sample_support(
    logits: Tensor,
    num_samples: int,
    head: int,
    seed: int,
    streams: Tensor | None,
    sampled_ids: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [N, V] -> ids int64 [N, K], log-weights, log mu at the ids, LSE [N]; K = head + samples, head <= 1024.

    The uniform numbers are the reference's bit for bit; the draws are too, except for numbers within rounding of a step
    of the distribution function (see the top of this file).
    """
    logits = check_logits(logits)
    rows, vocab = logits.shape
    check_k("head", head, vocab)
    if sampled_ids is not None:
        sampled_ids = sampled_ids.contiguous()
        if INTERPRET:  # what depends on the data cannot be refused on a device
            check_ids_in_range(sampled_ids, vocab, "sampled_ids", pads=False)
            check_possible(logits, sampled_ids.long())
    scale, device, fp32 = Scale.of(temperature), logits.device, torch.float32
    k = head + num_samples
    ids = torch.empty(rows, k, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, k, dtype=fp32, device=device)
    # Draws' kernel writes all of it.
    log_weights = (torch.empty if num_samples else torch.zeros)(rows, k, dtype=fp32, device=device)
    lse = torch.empty(rows, dtype=fp32, device=device)
    summary = summarize(logits, scale, peaks=True, sums=num_samples > 0)
    if head:
        launch_topk(logits, summary, head, scale, ids, logprobs, lse)
    if rows == 0 or num_samples == 0:
        return ids, log_weights, logprobs, lse
    cdf, rest_peaks = launch_rest(logits, summary, ids, head, scale)
    has_streams, has_sampled = streams is not None, sampled_ids is not None
    prepared = _prepared(vocab, logits.stride(0), head, num_samples, scale, has_streams, has_sampled)
    prepared(
        rows * cdiv(num_samples, DRAWS),
        logits,
        cdf,
        rest_peaks,
        summary.tile_peaks,
        summary.tile_sums,
        rest_peaks if streams is None else streams.contiguous(),
        rest_peaks if sampled_ids is None else sampled_ids,
        ids,
        log_weights,
        logprobs,
        lse,
        _signed_word(seed),
        _signed_word(seed >> 32),
    )
    return ids, log_weights, logprobs, lse


@lru_cache(maxsize=256)
def _prepared(
    vocab: int, row_stride: int, head: int, num_samples: int, scale: Scale, has_streams: bool, has_sampled: bool
) -> Prepared:
    sizes = Sizes.of(vocab)
    return Prepared(
        _draw_kernel,
        row_stride,
        head + num_samples,
        sizes.stride,
        vocab,
        sizes.groups,
        sizes.tiles,
        head,
        num_samples,
        cdiv(num_samples, DRAWS),
        *float_pair(math.log(num_samples)),
        *scale,
        GROUP,
        sizes.group_block,
        sizes.group_block.bit_length() - 1,
        sizes.tile_block,
        DRAWS,
        sizes.shift,
        head > 0,
        has_streams,
        has_sampled,
        num_warps=4,
    )


def _signed_word(value: int) -> int:
    """The low 32 bits as an int32: an argument of one type whatever the seed is."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


def compile_cases() -> list[CompileCase]:
    vocab = 151_936
    groups = count_groups(vocab)
    block, tiles = padded(groups, 64), padded(cdiv(groups, TILE_GROUPS), 1)
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        for name, has_head in (("plain", False), ("head", True)):
            draw = CompileCase(
                name=f"sample-draw-{name}-{dtype}",
                kernel=_draw_kernel,
                signature={
                    "logits": f"*{dtype}",
                    "cdf": "*i64",
                    **dict.fromkeys(("rest_peaks", "tile_peaks", "tile_sums"), "*fp32"),
                    **dict.fromkeys(("streams", "sampled_ids", "ids"), "*i64"),
                    **dict.fromkeys(("log_weights", "logprobs", "lse"), "*fp32"),
                    **dict.fromkeys(("seed_low", "seed_high", "row_stride", "out_stride", "group_stride"), "i32"),
                    **dict.fromkeys(("vocab", "groups", "tiles", "head", "num_samples", "blocks"), "i32"),
                    **dict.fromkeys(("log_count", "log_count_low", "t", "t_low", "scale", "scale_low"), "fp32"),
                    **dict.fromkeys(("GROUP", "GROUPS", "STEPS", "TILES", "DRAWS", "SHIFT"), "constexpr"),
                    **dict.fromkeys(("HAS_HEAD", "HAS_STREAMS", "HAS_SAMPLED"), "constexpr"),
                },
                constexprs={
                    "GROUP": GROUP,
                    "GROUPS": block,
                    "STEPS": block.bit_length() - 1,
                    "TILES": tiles,
                    "DRAWS": DRAWS,
                    "SHIFT": shift_of(vocab),
                    "HAS_HEAD": has_head,
                    "HAS_STREAMS": has_head,
                    "HAS_SAMPLED": has_head,
                },
                num_warps=4,
                max_registers=72,
                divisible=(
                    *("logits", "cdf", "rest_peaks", "tile_peaks", "tile_sums", "streams", "sampled_ids", "ids"),
                    *("log_weights", "logprobs", "lse", "row_stride", "out_stride", "group_stride", "vocab"),
                ),
            )
            cases.append(draw)
    return cases
