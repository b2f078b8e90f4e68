"""The [N, K] loss: row losses or their sum, coefficients and metrics in one pass over the support."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from asyncopd.backends.loss_spec import LossMetrics, LossSpec, no_policy_error, sampled_support_error
from asyncopd.backends.native import _C, ID_TYPE_CODES, NO_POLICY, OK, SAMPLED_SUPPORT

# csrc/cpu/kl.h
_DIVERGENCES = {"reverse": 0, "forward": 1}
_TAILS = {"drop": 0, "bucket": 1, "renormalize": 2}
_BASELINES = {"none": 0, "mean": 1, "loo": 2}
_COUNT_ROWS = -1.0  # a denominator that stands for the number of rows that count


def kl_rows(
    student: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    proximal: Tensor | None,
    spec: LossSpec,
    *,
    threads: int | None = None,
    isa: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] log p, log q, log w and ids, bool mask [N] -> losses [N], coefficients [N, K], values of a LossMetrics.

    fp32 out, and inside; inputs of other dtypes and layouts are converted. M2PO reads the support twice. ratio_p99 is
    that of a histogram, within 0.4 %. Raises ValueError where the options do not suit the weights, as the reference.
    """
    if ids.dtype not in ID_TYPE_CODES:
        raise TypeError(f"ids: got {ids.dtype}, expected int32 or int64")
    named = {"student": student, "teacher": teacher, "log_weights": log_weights, "proximal": proximal}
    for name, scores in named.items():
        if scores is not None and scores.shape != ids.shape:
            raise ValueError(f"{name}: got shape {list(scores.shape)}, expected {list(ids.shape)} as ids")
        if scores is not None and scores.device != ids.device:
            raise ValueError(f"{name}: got device {scores.device}, expected {ids.device} as ids")
    if mask is not None and mask.shape != ids.shape[:1]:
        raise ValueError(f"mask: got shape {list(mask.shape)}, expected {list(ids.shape[:1])}")
    losses = torch.empty(ids.shape[0], dtype=torch.float32)
    coef, metrics = _run(student, teacher, log_weights, ids, mask, proximal, spec, 1.0, losses, None, threads, isa)
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
    *,
    threads: int | None = None,
    isa: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (), coefficients that are its gradient [N, K], values of a LossMetrics; see the reference's namesake.

    Arguments as `kl_rows`, but not checked again: the losses have checked them. The row losses are summed in fp64.
    """
    if isinstance(denominator, Tensor):
        denominator = denominator.item()  # costs nothing on a CPU
        denominator = denominator if denominator > 0 else 1.0
    by = _COUNT_ROWS if denominator is None else denominator
    loss = torch.empty((), dtype=torch.float32)
    coef, metrics = _run(student, teacher, log_weights, ids, mask, proximal, spec, by, None, loss, threads, isa)
    return loss, coef, metrics


def scale_rows_(coef: Tensor, factors: Tensor) -> None:
    """coef [N, K] fp32, contiguous, times factors [N], in place; 0 where the factor is 0, even if coef is NaN there."""
    rows, num_ids = coef.shape
    factors = factors.to(torch.float32)
    _C.cpu_scale_rows(coef.data_ptr(), rows, num_ids, factors.data_ptr(), factors.stride(0), torch.get_num_threads())


def _run(
    student: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    proximal: Tensor | None,
    spec: LossSpec,
    denominator: float,
    losses: Tensor | None,
    loss: Tensor | None,
    threads: int | None,
    isa: int,
) -> tuple[Tensor, Tensor]:
    """Coefficients and metrics; row losses or their sum go where they are wanted."""
    # Kept alive until the kernel returns.
    student, teacher, log_weights = _readable(student), _readable(teacher), _readable(log_weights)
    ids = ids.contiguous()
    proximal = None if proximal is None else _readable(proximal)
    mask = None if mask is None else mask.to(torch.bool).contiguous()
    rows, num_ids = ids.shape
    coef = torch.empty((rows, num_ids), dtype=torch.float32)
    metrics = torch.empty(len(LossMetrics._fields) if spec.metrics else 0, dtype=torch.float32)
    status = _C.cpu_kl_rows(
        student.data_ptr(),
        teacher.data_ptr(),
        log_weights.data_ptr(),
        ids.data_ptr(),
        ID_TYPE_CODES[ids.dtype],
        0 if mask is None else mask.data_ptr(),
        0 if proximal is None else proximal.data_ptr(),
        rows,
        num_ids,
        _options(spec),
        denominator,
        0 if losses is None else losses.data_ptr(),
        0 if loss is None else loss.data_ptr(),
        coef.data_ptr(),
        metrics.data_ptr() if spec.metrics else 0,
        torch.get_num_threads() if threads is None else threads,
        isa,
    )
    if status == SAMPLED_SUPPORT:
        raise sampled_support_error(spec.tail)
    if status == NO_POLICY:
        raise no_policy_error()
    if status != OK:
        raise RuntimeError(f"asyncopd._C.cpu_kl_rows refused its arguments (status {status})")
    return coef, metrics


@lru_cache(maxsize=1024)
def _options(spec: LossSpec) -> "_C.KlOptions":
    return _C.KlOptions(
        divergence=_DIVERGENCES[spec.divergence],
        tail=_TAILS[spec.tail],
        baseline=_BASELINES[spec.baseline],
        sampled=spec.normalize == "sampled",
        head_is_certain=spec.head_is_certain,
        needs_policy=spec.needs_policy,
        behaviour=spec.advantage == "behavior",
        ratio_cap=_number(spec.ratio_cap),
        clip_eps=_number(spec.clip_eps),
        m2_budget=_number(spec.m2_budget),
        proximal_cap=spec.proximal_cap,
    )


def _readable(scores: Tensor) -> Tensor:
    """fp32 and contiguous: itself, nearly always."""
    return scores.detach().to(torch.float32).contiguous() if scores.dtype != torch.float32 else scores.contiguous()


def _number(value: float | None) -> float:
    return math.nan if value is None else value
