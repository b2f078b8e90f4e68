"""The [N, K] loss ops: row losses and the coefficients that are their gradient, in one pass."""

from typing import Any

import torch
from torch import Tensor

from asyncopd.backends import select
from asyncopd.backends.reference.rows import compute_dtype


@torch.library.custom_op("asyncopd::reverse_kl", mutates_args=())
def reverse_kl_rows(
    student: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    normalize: str,
    tail: str,
    baseline: str,
    head_is_certain: bool,
    needs_policy: bool,
    advantage: str,
    ratio_cap: float | None,
    clip_eps: float | None,
    m2_budget: float | None,
    proximal: Tensor | None,
    proximal_cap: float,
) -> tuple[Tensor, Tensor]:
    run = select("reverse_kl", student.device, student.dtype)
    return run(
        student,
        teacher,
        log_weights,
        ids,
        mask,
        normalize,
        tail,
        baseline,
        head_is_certain,
        needs_policy,
        advantage,
        ratio_cap,
        clip_eps,
        m2_budget,
        proximal,
        proximal_cap,
    )


@torch.library.custom_op("asyncopd::forward_kl", mutates_args=())
def forward_kl_rows(
    student: Tensor, teacher: Tensor, log_weights: Tensor, ids: Tensor, mask: Tensor | None, tail: str
) -> tuple[Tensor, Tensor]:
    return select("forward_kl", student.device, student.dtype)(student, teacher, log_weights, ids, mask, tail)


def _fake(student: Tensor, teacher: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    return student.new_empty(student.shape[0], dtype=dtype), student.new_empty(student.shape, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.num_inputs, ctx.dtype = len(inputs), inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, grad: Tensor, _grad_coef: Tensor) -> tuple[Tensor | None, ...]:
    (coef,) = ctx.saved_tensors
    # where, not a product: a row that the caller dropped has gradient 0, even if its coefficients are NaN.
    grad = torch.where(grad[:, None] == 0, 0.0, coef * grad[:, None])
    return grad.to(ctx.dtype), *(None for _ in range(ctx.num_inputs - 1))


for _op in (reverse_kl_rows, forward_kl_rows):
    _op.register_fake(_fake)
    _op.register_autograd(_gradient, setup_context=_save)
