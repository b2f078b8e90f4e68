"""The [N, K] loss op: row losses, the coefficients that are their gradient, and metrics, in one pass."""

from typing import Any

import torch
from torch import Tensor

from asyncopd.backends import select
from asyncopd.backends.loss_spec import SPEC_SCHEMA, LossMetrics, LossSpec
from asyncopd.backends.reference.rows import compute_dtype

_SCHEMA = (
    f"(Tensor student, Tensor teacher, Tensor log_weights, Tensor ids, Tensor? mask, Tensor? proximal, {SPEC_SCHEMA})"
    " -> (Tensor rows, Tensor coef, Tensor metrics)"
)


@torch.library.custom_op("asyncopd::kl_rows", mutates_args=(), schema=_SCHEMA)
def kl_rows(
    student: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    proximal: Tensor | None,
    *spec: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N], coefficients c [N, K] with respect to `student`, and the values of a LossMetrics."""
    run = select("kl_rows", student.device, compute_dtype(student, teacher))
    return run(student, teacher, log_weights, ids, mask, proximal, LossSpec.of(spec))


@kl_rows.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    proximal: Tensor | None,
    *spec: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    return (
        student.new_empty(student.shape[0], dtype=dtype),
        student.new_empty(student.shape, dtype=dtype),
        student.new_empty(len(LossMetrics._fields) if LossSpec.of(spec).metrics else 0, dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, coef, metrics = output
    ctx.num_inputs, ctx.dtype = len(inputs), inputs[0].dtype
    ctx.save_for_backward(coef)
    ctx.mark_non_differentiable(coef, metrics)


def _gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (coef,) = ctx.saved_tensors
    # Not a product alone: a row that the caller dropped has gradient 0, even if its coefficients are NaN.
    dstudent = (coef * grad[:, None]).masked_fill_((grad == 0)[:, None], 0.0)
    return dstudent.to(ctx.dtype), *(None for _ in range(ctx.num_inputs - 1))


kl_rows.register_autograd(_gradient, setup_context=_save)
