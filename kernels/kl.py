"""The [N, K] loss: row losses, the coefficients that are their gradient, and metrics.

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
does not depend on the other rows.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncopd.backends.loss_spec import LossSpec
from asyncopd.backends.reference.kl import check_weights, second_moment_threshold
from asyncopd.kernels.compile_case import CompileCase
from asyncopd.kernels.kl_divergence import forward_rows, less, log_mass, log_ratio_or_zero, tailed_reverse_rows
from asyncopd.kernels.kl_metrics import COARSE, FINE, SUMS, launch_metrics, measure
from asyncopd.kernels.kl_reverse import advantage, baseline, behaviour_logprobs, clip, corrected_log_weight, score
from asyncopd.kernels.launch import DEVICE_TYPE, DTYPES, on_device, padded, warps_for
from asyncopd.kernels.numeric import INF, exp_precise
from asyncopd.kernels.summary import row_start

ENTRIES = 512  # of a program, where a row is not longer
MAX_IDS = 2048  # of a row: it is one block, and 512 threads have 4 entries each


@triton.jit
def load_scores(pointer, rows, row_stride, columns, column_stride, inside, there, nothing):
    """A block of a matrix of any layout as fp32; `nothing` where there is no entry, whatever stands there."""
    at = row_start(pointer, rows, row_stride)[:, None] + columns.to(tl.int64)[None, :] * column_stride
    return tl.where(there, tl.load(at, mask=inside, other=0.0).to(tl.float32), nothing)


@triton.jit
def _kl_kernel(
    student,  # [N, K] fp32, bf16 or fp16, any strides, as all inputs: log p, or logits if normalize is "sampled"
    teacher,  # [N, K] log q
    log_weights,  # [N, K] log w
    ids,  # [N, K] int32 or int64, below 0 for a pad
    mask,  # [N] uint8, or None
    proximal,  # [N, K] log p_prox, or None
    threshold,  # scalar fp32, or None: M2PO's tau
    losses,  # [N] fp32
    coef,  # [N, K] fp32; if SEEKS: the log-ratios that a clip could bind, else 0
    sums,  # [SUMS, programs] fp32, or None: without metrics
    bins,  # [N, K] int16, or None
    histogram,  # [COARSE + FINE] int64, or None
    student_row,
    student_column,
    teacher_row,
    teacher_column,
    weights_row,
    weights_column,
    ids_row,
    ids_column,
    mask_stride,
    proximal_row,
    proximal_column,
    num_rows,
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
    SEEKS: tl.constexpr,  # the entries that a clip could bind, for M2PO's tau, and nothing else
    COARSE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < num_rows)[:, None] & (column < num_ids)[None, :]
    id_at = row_start(ids, row, ids_row)[:, None] + column.to(tl.int64)[None, :] * ids_column
    valid = tl.load(id_at, mask=inside, other=-1) >= 0
    if mask is not None:
        counts = tl.load(row_start(mask, row, mask_stride), mask=row < num_rows, other=0) != 0
        valid &= counts[:, None]
    log_p = load_scores(student, row, student_row, column, student_column, inside, valid, -INF)
    log_q = load_scores(teacher, row, teacher_row, column, teacher_column, inside, valid, 0.0)
    log_w = load_scores(log_weights, row, weights_row, column, weights_column, inside, valid, -INF)
    drawn = valid
    if HEAD_IS_CERTAIN:
        drawn = valid & (log_w != 0.0)
    changed = tl.zeros_like(log_p) != 0.0
    out_at = row_start(coef, row, num_ids)[:, None] + column[None, :]

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
            anchor = load_scores(proximal, row, proximal_row, column, proximal_column, inside, valid, 0.0)
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

    tl.store(out_at, c, mask=inside)
    if not SEEKS:
        tl.store(losses + row, tl.sum(loss, axis=1), mask=row < num_rows)
    if sums is not None:
        key = measure(log_w, log_p, log_q, c, valid, drawn, changed, sums, histogram, COARSE)
        tl.store(row_start(bins, row, num_ids)[:, None] + column[None, :], key, mask=inside)


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
    if student.device.type == "cpu":
        there = ids >= 0 if mask is None else (ids >= 0) & mask.to(torch.bool)[:, None]
        check_weights(there, log_weights, spec)
    (rows, num_ids), device = ids.shape, ids.device
    losses = torch.empty(rows, dtype=torch.float32, device=device)
    coef = torch.empty((rows, num_ids), dtype=torch.float32, device=device)
    metrics = torch.empty(SUMS if spec.metrics else 0, dtype=torch.float32, device=device)
    if ids.numel() == 0:
        return losses.zero_(), coef, metrics.zero_()
    width = padded(num_ids, 1)
    block_rows = max(1, ENTRIES // width)
    programs = triton.cdiv(rows, block_rows)
    scores = [_readable(x) for x in (student, teacher, log_weights)]
    proximal = None if proximal is None else _readable(proximal)
    mask = None if mask is None else mask.to(torch.bool).view(torch.uint8)

    def launch(threshold: Tensor | None, *, clips: bool, seeks: bool, scratch: tuple[Tensor, ...] | None) -> None:
        with on_device(coef):
            _kl_kernel[(programs,)](
                *scores,
                ids,
                mask,
                proximal,
                threshold,
                losses,
                coef,
                *(scratch or (None, None, None)),
                *(stride for matrix in (*scores, ids) for stride in matrix.stride()),
                0 if mask is None else mask.stride(0),
                *((0, 0) if proximal is None else proximal.stride()),
                rows,
                num_ids,
                *_bounds(spec),
                block_rows,
                width,
                spec.divergence,
                spec.normalize,
                spec.tail,
                spec.baseline,
                spec.head_is_certain,
                spec.advantage == "behavior",
                spec.ratio_cap is not None,
                clips,
                seeks,
                COARSE,
                num_warps=warps_for(block_rows * width, 4),
            )

    threshold = None
    if spec.m2_budget is not None:
        launch(None, clips=False, seeks=True, scratch=None)
        # In fp64, because a cumulative sum over half a million fp32 numbers is not exact to the last digit.
        log_ratio = coef.double()
        threshold = second_moment_threshold(log_ratio, log_ratio != 0, spec.m2_budget).float()
    clips = spec.clip_eps is not None or threshold is not None
    if not spec.metrics:
        launch(threshold, clips=clips, seeks=False, scratch=None)
        return losses, coef, metrics
    sums = torch.empty((SUMS, programs), dtype=torch.float32, device=device)
    bins = torch.empty((rows, num_ids), dtype=torch.int16, device=device)
    histogram = torch.zeros(COARSE + FINE, dtype=torch.int64, device=device)
    launch(threshold, clips=clips, seeks=False, scratch=(sums, bins, histogram))
    launch_metrics(sums, bins, histogram, metrics)
    return losses, coef, metrics


def _bounds(spec: LossSpec) -> tuple[float, float, float, float]:
    """log of the cap and of the proximal cap, PPO's bounds of the log-ratio; 0 where there is none."""
    low = high = 0.0
    if spec.clip_eps is not None:
        low, high = math.log1p(-spec.clip_eps) if spec.clip_eps < 1 else -math.inf, math.log1p(spec.clip_eps)
    return 0.0 if spec.ratio_cap is None else math.log(spec.ratio_cap), math.log(spec.proximal_cap), low, high


def _readable(scores: Tensor) -> Tensor:
    scores = scores.detach()
    return scores if scores.dtype in DTYPES else scores.to(torch.float32)


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


_STRIDES = (
    *("student_row", "student_column", "teacher_row", "teacher_column", "weights_row", "weights_column"),
    *("ids_row", "ids_column", "mask_stride", "proximal_row", "proximal_column"),
)
_BOUNDS = ("log_cap", "log_proximal_cap", "log_low", "log_high")


def _compile_case(
    name: str, k: int, max_registers: int, *, dtype: str = "fp32", metrics: bool = False, seeks: bool = False,
    proximal: bool = False, **options: Any
) -> CompileCase:  # fmt: skip
    """Contiguous tensors, as losses are given: column strides of 1 are constants."""
    spec = LossSpec(needs_policy=True, **options)
    width = padded(k, 1)
    block_rows = max(1, ENTRIES // width)
    budget = spec.m2_budget is not None and not seeks
    absent = {
        **({} if proximal else {"proximal": None}),
        **({} if budget else {"threshold": None}),
        **({} if metrics else dict.fromkeys(("sums", "bins", "histogram"))),
    }
    # Triton makes constants of arguments that are 1: the strides of columns, and where K is 1 those of rows and K.
    ones = [stride for stride in _STRIDES if stride.endswith("_column") or stride == "mask_stride" or k == 1]
    ones += ["num_ids"] if k == 1 else []
    constexprs: dict[str, Any] = {
        **absent,
        **dict.fromkeys(ones, 1),
        "ROWS": block_rows,
        "WIDTH": width,
        "DIVERGENCE": spec.divergence,
        "NORMALIZE": spec.normalize,
        "TAIL": spec.tail,
        "BASELINE": spec.baseline,
        "HEAD_IS_CERTAIN": spec.head_is_certain,
        "BEHAVIOUR": spec.advantage == "behavior",
        "HAS_CAP": spec.ratio_cap is not None,
        "CLIPS": spec.clip_eps is not None or budget,
        "SEEKS": seeks,
        "COARSE": COARSE,
    }
    types = {
        **dict.fromkeys(("student", "teacher", "log_weights"), "*fp32"),
        "student": f"*{dtype}",
        "ids": "*i64",
        "mask": "*u8",
        **dict.fromkeys(("proximal", "threshold", "losses", "coef", "sums"), "*fp32"),
        "bins": "*i16",
        "histogram": "*i64",
        **dict.fromkeys((*_STRIDES, "num_rows", "num_ids"), "i32"),
        **dict.fromkeys(_BOUNDS, "fp32"),
    }
    signature = {name: "constexpr" if name in constexprs else types[name] for name in _kl_kernel.arg_names}
    divisible = [n for n in signature if signature[n] != "constexpr" and n not in _BOUNDS and n != "threshold"]
    return CompileCase(
        name=f"kl-{name}-k{k}-{dtype}",
        kernel=_kl_kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=warps_for(block_rows * width, 4),
        max_registers=max_registers,
        divisible=tuple(divisible),
    )


def compile_cases() -> list[CompileCase]:
    """The usual losses, each option at least once, and everything at once at both ends of K."""
    samples: dict[str, Any] = {"head_is_certain": False}
    everything: dict[str, Any] = {
        "normalize": "sampled",
        "baseline": "loo",
        "advantage": "behavior",
        "ratio_cap": 2.0,
        "clip_eps": 0.2,
        "proximal": True,
        "metrics": True,
    }
    return [
        _compile_case("reverse", 64, 40),
        _compile_case("reverse", 64, 40, dtype="bf16"),
        _compile_case("reverse-metrics", 64, 64, metrics=True),
        _compile_case("reverse-sampled-mean", 64, 40, normalize="sampled", baseline="mean"),
        _compile_case("reverse-seek", 64, 40, seeks=True, m2_budget=0.04, **samples),
        _compile_case("reverse-budget", 64, 64, m2_budget=0.04, **samples),
        _compile_case("reverse-bucket", 64, 40, tail="bucket"),
        _compile_case("reverse-renormalize-metrics", 64, 64, tail="renormalize", metrics=True),
        _compile_case("forward", 64, 40, divergence="forward"),
        _compile_case("forward-bucket", 64, 40, divergence="forward", tail="bucket"),
        _compile_case("forward-renormalize-metrics", 64, 64, divergence="forward", tail="renormalize", metrics=True),
        *(_compile_case("everything", k, 128, **everything) for k in (1, 64, 1024, MAX_IDS)),
    ]
