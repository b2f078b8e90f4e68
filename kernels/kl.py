"""The [N, K] loss: row losses or their sum, the coefficients that are their gradient, and metrics.

    reverse   R = sum_i w_i p_i A_i,  A_i = log p_i - log q_i      c_i = w_i p_i (A_i - b)
    forward   F = sum_i w_i q_i (log q_i - log p_i)                c_i = -w_i q_i

with the tails, baselines and corrections of asyncopd/backends/reference/kl.py: kl_reverse.py has the score function,
kl_divergence.py the true divergences, kl_metrics.py the metrics. Each combination of options is an instance of its own,
so the usual loss has none of the others' instructions.

Limit: one read of the inputs and one write of c. An entry is 12 bytes of scores, 8 of its id (int64; it is only asked
whether it is a pad) and 4 of c, a row 4 more: N = 8192, K = 64 is 12.6 MB. Metrics add 4 bytes an entry (see there),
M2PO a pass of its own (20 read, 4 written) and a sort of 8-byte keys. Two to five exponentials an entry cost less.

A program is a block of about 512 entries in registers, whole rows of it: 8 rows of K = 64, 512 of K = 1. A thread holds
4 adjacent entries, or 16 bytes of scores, and the 16 threads of such a row sum it by shuffles. What a row's result is
does not depend on the other rows. For the loss as one number each program writes a sum, and a second kernel adds them:
in the same order whatever the device does first.
"""

import math
from functools import lru_cache

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.backends.loss_spec import LossSpec
from asyncopd.backends.reference.kl import check_weights, second_moment_threshold
from asyncopd.kernels.kl_divergence import forward_rows, less, log_mass, log_ratio_or_zero, tailed_reverse_rows
from asyncopd.kernels.kl_metrics import COARSE, FINE, SUMS, launch_metrics, measure
from asyncopd.kernels.kl_reverse import advantage, baseline, behaviour_logprobs, clip, corrected_log_weight, score
from asyncopd.kernels.launch import DEVICE_TYPE, DTYPES, Prepared, cdiv, padded, warps_for
from asyncopd.kernels.numeric import INF, exp_precise, sum_pair

ENTRIES = 512  # of a program, where a row is not longer
MAX_IDS = 2048  # of a row: it is one block, and 1,024 threads have 2 entries each
TOTAL_BLOCK = 1024  # programs whose sums are added at a time


@triton.jit
def load_scores(pointer, at, inside, there, nothing):
    """A block of a contiguous matrix as fp32; `nothing` where there is no entry, whatever stands there."""
    return tl.where(there, tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32), nothing)


@triton.jit
def inverse_of(denominator):  # [] of any dtype
    """1 / denominator; 1 where that is not above 0: the sum is 0 then, and its gradient must not be 0 / 0."""
    by = tl.load(denominator).to(tl.float32)
    return tl.div_rn(1.0, tl.where(by > 0.0, by, 1.0))


@triton.jit(do_not_specialize=["num_rows"])
def _kl_kernel(
    student,  # [N, K] fp32, bf16 or fp16, contiguous, as all inputs: log p, or logits if normalize is "sampled"
    teacher,  # [N, K] log q
    log_weights,  # [N, K] log w
    ids,  # [N, K] int32 or int64, below 0 for a pad
    mask,  # [N] uint8, or None
    proximal,  # [N, K] log p_prox, or None
    threshold,  # scalar fp32, or None: M2PO's tau
    denominator,  # () of any dtype, or None: what the loss and its coefficients are divided by
    losses,  # [N] fp32, or with TOTAL [programs]: sums over a program's rows, divided
    coef,  # [N, K] fp32; if SEEKS: the log-ratios that a clip could bind, else 0
    sums,  # [SUMS, programs] fp32, or None: without metrics
    bins,  # [N, K] int16, or None
    histogram,  # [COARSE + FINE] int64, or None
    num_rows,
    inverse,  # 1 / denominator, where that is a number
    num_ids,
    log_cap,
    log_proximal_cap,
    log_low,
    log_high,
    ROWS: tl.constexpr,  # of a program
    WIDTH: tl.constexpr,  # a power of two, at least K
    DIVERGENCE: tl.constexpr,  # these: see LossSpec
    NORMALIZE: tl.constexpr,
    TAIL: tl.constexpr,
    BASELINE: tl.constexpr,
    HEAD_IS_CERTAIN: tl.constexpr,
    BEHAVIOUR: tl.constexpr,
    HAS_CAP: tl.constexpr,
    CLIPS: tl.constexpr,
    TOTAL: tl.constexpr,
    SEEKS: tl.constexpr,  # the entries that a clip could bind, for M2PO's tau, and nothing else
    COARSE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < num_rows)[:, None] & (column < num_ids)[None, :]
    at = row.to(tl.int64)[:, None] * num_ids + column[None, :]
    valid = tl.load(ids + at, mask=inside, other=-1) >= 0
    if mask is not None:
        valid &= (tl.load(mask + row, mask=row < num_rows, other=0) != 0)[:, None]
    log_p = load_scores(student, at, inside, valid, -INF)
    log_q = load_scores(teacher, at, inside, valid, 0.0)
    log_w = load_scores(log_weights, at, inside, valid, -INF)
    drawn = valid
    if HEAD_IS_CERTAIN:
        drawn = valid & (log_w != 0.0)
    changed = tl.zeros_like(log_p) != 0.0

    if DIVERGENCE == "forward":
        loss, c = forward_rows(log_w, log_p, log_q, valid, TAIL)
    elif TAIL != "drop":
        loss, c = tailed_reverse_rows(log_p, log_q, valid, TAIL)
    else:
        if NORMALIZE == "sampled":
            # Logits of 30 first lose what they have in common: their sums with log w would be rounded to 2e-6.
            top = tl.max(log_p, axis=1)[:, None]
            log_p = less(log_p, tl.where(tl.abs(top) < INF, top, 0.0))
            log_p = less(log_p, log_mass(log_w + log_p))
        log_mu = behaviour_logprobs(log_w, valid)
        anchor = log_mu
        if proximal is not None:
            anchor = load_scores(proximal, at, inside, valid, 0.0)
        signal = advantage(log_p, log_q, log_mu, valid, BEHAVIOUR)
        # Where the teacher has no mass the divergence is infinite; the value says so, the gradient leaves the term out.
        infinite = signal == INF
        log_omega, changed = corrected_log_weight(
            log_w, log_p, log_mu, anchor, log_cap, log_proximal_cap, HAS_CAP, proximal is not None
        )
        changed = changed & valid & (infinite == 0)
        omega = tl.where(valid, exp_precise(log_omega), 0.0)
        centred = tl.where(infinite, 0.0, signal)
        if BASELINE != "none":
            b = baseline(tl.where(infinite, 0.0, omega), centred, valid, drawn, BASELINE)
            centred = tl.where(infinite, 0.0, centred - b)
        value = omega
        log_ratio = tl.where(valid, log_ratio_or_zero(log_p, anchor), 0.0)
        if CLIPS:
            if threshold is not None:
                log_high = tl.load(threshold)
                log_low = -log_high
            value, omega, binds = clip(omega, centred, log_ratio, log_low, log_high)
            changed |= binds
        loss, c = score(value, omega, signal, centred, exp_precise(log_w + log_p), valid, NORMALIZE)
        if SEEKS:
            bindable = ((centred < 0.0) & (log_ratio > 0.0)) | ((centred > 0.0) & (log_ratio < 0.0))
            c = tl.where(bindable, log_ratio, 0.0)

    if denominator is not None:
        inverse = inverse_of(denominator)
    if SEEKS:
        tl.store(coef + at, c, mask=inside)
    else:
        tl.store(coef + at, c * inverse, mask=inside)
        row_losses = tl.sum(loss, axis=1)
        if TOTAL:
            total = tl.sum(tl.where(row < num_rows, row_losses, 0.0), axis=0)
            tl.store(losses + tl.program_id(0), total * inverse)
        else:
            tl.store(losses + row, row_losses, mask=row < num_rows)
    if sums is not None:
        key = measure(log_w, log_p, log_q, c, valid, drawn, changed, sums, histogram, COARSE)
        tl.store(bins + at, key, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def _total_kernel(
    losses,  # [programs] fp32
    total,  # () fp32
    programs,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    high, low = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, tl.cdiv(programs, BLOCK) * BLOCK, BLOCK):
        high, error = sum_pair(high, tl.load(losses + start + lane, mask=start + lane < programs, other=0.0))
        # An infinity has no rounding error.
        low += tl.where(tl.abs(high) < INF, error, 0.0)
    tl.store(total, tl.sum(high, axis=0) + tl.sum(low, axis=0))


def kl_rows(
    student: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    proximal: Tensor | None,
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] log p, log q, log w and ids, bool mask [N] -> losses [N], coefficients [N, K], values of a LossMetrics.

    fp32 out, and inside; K <= 2048. ratio_p99 is that of a histogram, within 0.4 %. On a device nothing can be raised
    about the data without synchronising: a tail other than "drop" takes sampled entries as if their weight were 1, and
    a correction without a policy takes mu = 1/M for entries of log-weight 0.
    """
    _check(student, teacher, log_weights, ids, mask, proximal, spec)
    losses = torch.empty(ids.shape[0], dtype=torch.float32, device=ids.device)
    coef, metrics = _run(student, teacher, log_weights, ids, mask, proximal, None, 1.0, losses, spec, total=False)
    return losses, coef, metrics


def kl_loss(
    student: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    proximal: Tensor | None,
    denominator: Tensor | float | None,
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (), coefficients that are its gradient [N, K], values of a LossMetrics; see the reference's namesake.

    Arguments as `kl_rows`, but not checked again: the losses have checked them.
    """
    rows, num_ids = ids.shape
    if num_ids > MAX_IDS:
        raise ValueError(f"ids: got shape {list(ids.shape)}, expected [N, K] with K <= {MAX_IDS} on the triton backend")
    if denominator is None:
        denominator = float(max(rows, 1)) if mask is None else mask.sum()
    number = 1.0
    if not isinstance(denominator, Tensor):
        number, denominator = _inverse(denominator), None
    loss = torch.empty((), dtype=torch.float32, device=ids.device)
    programs = cdiv(rows, block_of(num_ids)[0])
    # One program's sum is all.
    losses = loss if programs == 1 else torch.empty(programs, dtype=torch.float32, device=ids.device)
    coef, metrics = _run(
        student, teacher, log_weights, ids, mask, proximal, denominator, number, losses, spec, total=True
    )
    if losses is not loss:
        if ids.numel():
            _total(1, losses, loss, programs)
        else:
            loss.zero_()
    return loss, coef, metrics


def _run(
    student: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    proximal: Tensor | None,
    denominator: Tensor | None,
    inverse: float,
    losses: Tensor,
    spec: LossSpec,
    *,
    total: bool,
) -> tuple[Tensor, Tensor]:
    """Coefficients and metrics; row losses, or with `total` sums of programs, go into `losses`."""
    if ids.is_cpu:
        there = ids >= 0 if mask is None else (ids >= 0) & mask.to(torch.bool)[:, None]
        check_weights(there, log_weights, spec)
    (rows, num_ids), device = ids.shape, ids.device
    coef = torch.empty((rows, num_ids), dtype=torch.float32, device=device)
    metrics = torch.empty(SUMS if spec.metrics else 0, dtype=torch.float32, device=device)
    if not rows * num_ids:
        losses.zero_()
        return coef, metrics.zero_()
    student, teacher, log_weights = _readable(student), _readable(teacher), _readable(log_weights)
    proximal = None if proximal is None else _readable(proximal)
    mask = None if mask is None else mask.to(torch.bool).contiguous().view(torch.uint8)
    inputs = (student, teacher, log_weights, ids.contiguous(), mask, proximal)
    programs = cdiv(rows, block_of(num_ids)[0])
    given = (mask is None, proximal is None, denominator is None)

    threshold = None
    if spec.m2_budget is not None:
        seek = _prepared(spec, num_ids, given, total, seeks=True)
        seek(programs, *inputs, None, denominator, losses, coef, None, None, None, rows, inverse)
        # In fp64, because a cumulative sum over half a million fp32 numbers is not exact to the last digit.
        log_ratio = coef.double()
        threshold = second_moment_threshold(log_ratio, log_ratio != 0, spec.m2_budget).float()
    run = _prepared(spec, num_ids, given, total, seeks=False)
    outputs = (threshold, denominator, losses, coef)
    if not spec.metrics:
        run(programs, *inputs, *outputs, None, None, None, rows, inverse)
        return coef, metrics
    sums = torch.empty((SUMS, programs), dtype=torch.float32, device=device)
    bins = torch.empty((rows, num_ids), dtype=torch.int16, device=device)
    histogram = torch.zeros(COARSE + FINE, dtype=torch.int64, device=device)
    run(programs, *inputs, *outputs, sums, bins, histogram, rows, inverse)
    launch_metrics(sums, bins, histogram, metrics)
    return coef, metrics


@lru_cache(maxsize=256)
def block_of(num_ids: int) -> tuple[int, int]:
    """Rows and columns of a program."""
    width = padded(num_ids, 1)
    return max(1, ENTRIES // width), width


def warps_of(num_ids: int) -> int:
    """Four entries a thread; two in the longest rows, where 16 warps with every option spill on sm_100."""
    rows, width = block_of(num_ids)
    return warps_for(rows * width, 4 if width < MAX_IDS else 2)


@lru_cache(maxsize=256)
def _prepared(spec: LossSpec, num_ids: int, given: tuple[bool, ...], total: bool, *, seeks: bool) -> Prepared:
    """The kernel with all but its tensors. `given`: which of them are there, for each has a Prepared of its own."""
    rows, width = block_of(num_ids)
    return Prepared(
        _kl_kernel,
        num_ids,
        *_bounds(spec),
        rows,
        width,
        spec.divergence,
        spec.normalize,
        spec.tail,
        spec.baseline,
        spec.head_is_certain,
        spec.advantage == "behavior",
        spec.ratio_cap is not None,
        spec.clip_eps is not None or (spec.m2_budget is not None and not seeks),
        total,
        seeks,
        COARSE,
        num_warps=warps_of(num_ids),
    )


_total = Prepared(_total_kernel, TOTAL_BLOCK, num_warps=4)


@lru_cache(maxsize=256)
def _inverse(denominator: float) -> float:
    """As the kernel would compute it from a tensor: in fp32."""
    with numpy.errstate(all="ignore"):
        return float(numpy.float32(1.0) / numpy.float32(denominator))


def _bounds(spec: LossSpec) -> tuple[float, float, float, float]:
    """log of the cap and of the proximal cap, PPO's bounds of the log-ratio; 0 where there is none."""
    low = high = 0.0
    if spec.clip_eps is not None:
        low, high = math.log1p(-spec.clip_eps) if spec.clip_eps < 1 else -math.inf, math.log1p(spec.clip_eps)
    return 0.0 if spec.ratio_cap is None else math.log(spec.ratio_cap), math.log(spec.proximal_cap), low, high


def _readable(scores: Tensor) -> Tensor:
    return (scores if scores.dtype in DTYPES else scores.to(torch.float32)).contiguous()


def _check(
    student: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    proximal: Tensor | None,
    spec: LossSpec,
) -> None:
    """What the public functions have checked, and a kernel that is given pointers cannot."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: got {ids.dtype}, expected int32 or int64")
    if ids.dim() != 2 or ids.shape[1] > MAX_IDS:
        raise ValueError(f"ids: got shape {list(ids.shape)}, expected [N, K] with K <= {MAX_IDS} on the triton backend")
    if ids.device.type != DEVICE_TYPE:
        raise ValueError(f"ids: got device {ids.device}, expected {DEVICE_TYPE}")
    named = {"student": student, "teacher": teacher, "log_weights": log_weights, "proximal": proximal}
    for name, scores in named.items():
        if scores is None:
            continue
        if not scores.is_floating_point():
            raise TypeError(f"{name}: got {scores.dtype}, expected floating point")
        if scores.shape != ids.shape:
            raise ValueError(f"{name}: got shape {list(scores.shape)}, expected {list(ids.shape)} as ids")
        if scores.device != ids.device:
            raise ValueError(f"{name}: got device {scores.device}, expected {ids.device} as ids")
    if mask is not None and mask.shape != ids.shape[:1]:
        raise ValueError(f"mask: got shape {list(mask.shape)}, expected {list(ids.shape[:1])}")
    if mask is not None and mask.device != ids.device:
        raise ValueError(f"mask: got device {mask.device}, expected {ids.device} as ids")
    corrections = (spec.ratio_cap, spec.clip_eps, spec.m2_budget, proximal)
    if spec.advantage == "behavior" or any(x is not None for x in corrections):
        scored = spec.divergence == "reverse" and spec.tail == "drop"
        if not (scored and spec.needs_policy):
            raise ValueError(
                "correction: got one with "
                f"divergence={spec.divergence!r}, tail={spec.tail!r}, needs_policy={spec.needs_policy}, "
                "expected reverse, 'drop' and a behaviour policy"
            )
