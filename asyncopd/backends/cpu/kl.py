"""The [N, K] loss: row losses, coefficients and metrics in one pass over the support."""

import math

import torch
from torch import Tensor

from asyncopd.backends.loss_spec import LossMetrics, LossSpec, no_policy_error, sampled_support_error
from asyncopd.backends.native import _C, ID_TYPE_CODES, NO_POLICY, OK, SAMPLED_SUPPORT

# csrc/cpu/kl.h
_DIVERGENCES = {"reverse": 0, "forward": 1}
_TAILS = {"drop": 0, "bucket": 1, "renormalize": 2}
_BASELINES = {"none": 0, "mean": 1, "loo": 2}


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
    rows, num_ids = ids.shape
    # Contiguous, kept alive until the kernel returns.
    student, teacher, log_weights = (
        _matrix(name, value, ids)
        for name, value in (("student", student), ("teacher", teacher), ("log_weights", log_weights))
    )
    ids = ids.contiguous()
    proximal = None if proximal is None else _matrix("proximal", proximal, ids)
    if mask is not None and mask.shape != (rows,):
        raise ValueError(f"mask: got shape {list(mask.shape)}, expected [{rows}]")
    mask = None if mask is None else mask.to(torch.bool).contiguous()
    losses = torch.empty(rows, dtype=torch.float32)
    coef = torch.empty((rows, num_ids), dtype=torch.float32)
    metrics = torch.empty(len(LossMetrics._fields) if spec.metrics else 0, dtype=torch.float32)
    status = _C.cpu_kl_rows(
        student=student.data_ptr(),
        teacher=teacher.data_ptr(),
        log_weights=log_weights.data_ptr(),
        ids=ids.data_ptr(),
        id_type=ID_TYPE_CODES[ids.dtype],
        mask=0 if mask is None else mask.data_ptr(),
        proximal=0 if proximal is None else proximal.data_ptr(),
        rows=rows,
        num_ids=num_ids,
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
        losses=losses.data_ptr(),
        coef=coef.data_ptr(),
        metrics=metrics.data_ptr() if spec.metrics else 0,
        threads=torch.get_num_threads() if threads is None else threads,
        isa=isa,
    )
    if status == SAMPLED_SUPPORT:
        raise sampled_support_error(spec.tail)
    if status == NO_POLICY:
        raise no_policy_error()
    if status != OK:
        raise RuntimeError(f"asyncopd._C.cpu_kl_rows refused its arguments (status {status})")
    return losses, coef, metrics


def _matrix(name: str, value: Tensor, ids: Tensor) -> Tensor:
    if value.shape != ids.shape:
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected {list(ids.shape)} as ids")
    if value.device != ids.device:
        raise ValueError(f"{name}: got device {value.device}, expected {ids.device} as ids")
    return value.detach().to(torch.float32).contiguous()


def _number(value: float | None) -> float:
    return math.nan if value is None else value
