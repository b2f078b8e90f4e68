"""The [N, K] loss ops: row losses or their sum, the coefficients that are their gradient, and metrics, in one pass.

The forward makes the gradient, so a backward only multiplies it by what it is given, and by 1 does nothing. Each op is
here twice: as a custom op, and as a `torch.autograd.Function` for eager calls (see eager.py). The latter owns its
coefficients: the first backward scales them in place and gives them away, another one (of a retained graph) has them
computed again.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from asyncopd.backends import select
from asyncopd.backends.loss_spec import LossMetrics, LossSpec
from asyncopd.backends.reference.rows import compute_dtype
from asyncopd.ops.eager import first_order, plain, save_tensors, saved_tensors

_TENSORS = "Tensor student, Tensor teacher, Tensor log_weights, Tensor ids, Tensor? mask, Tensor? proximal"
_ROWS_SCHEMA = f"({_TENSORS}, str spec) -> (Tensor rows, Tensor coef, Tensor metrics)"
_LOSS_SCHEMA = f"({_TENSORS}, Tensor? denominator, str spec) -> (Tensor loss, Tensor coef, Tensor metrics)"
_Outputs = tuple[Tensor, Tensor, Tensor]


class KLInputs(NamedTuple):
    """Of a loss beside the scores, and without a gradient: the arguments of both ops in their order."""

    teacher: Tensor  # [N, K] log q
    log_weights: Tensor  # [N, K]
    ids: Tensor  # [N, K]
    mask: Tensor | None  # bool [N]
    proximal: Tensor | None  # [N, K]


@torch.library.custom_op("asyncopd::kl_rows", mutates_args=(), schema=_ROWS_SCHEMA)
def kl_rows(
    student: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    proximal: Tensor | None,
    spec: str,
) -> _Outputs:
    """Losses [N], coefficients c [N, K] with respect to `student`, and the values of a LossMetrics."""
    return _run_rows(student, (teacher, log_weights, ids, mask, proximal), LossSpec.parse(spec))


@torch.library.custom_op("asyncopd::kl_loss", mutates_args=(), schema=_LOSS_SCHEMA)
def kl_loss(
    student: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    proximal: Tensor | None,
    denominator: Tensor | None,
    spec: str,
) -> _Outputs:
    """The sum of the losses over `denominator` (None: the number of rows that count), its c, and the metrics."""
    _check_shapes(student, teacher, log_weights, ids, mask, proximal)
    return _run_loss(student, (teacher, log_weights, ids, mask, proximal), denominator, LossSpec.parse(spec))


def _run_rows(student: Tensor, inputs: tuple[Any, ...], spec: LossSpec) -> _Outputs:
    return select("kl_rows", student.device, compute_dtype(student, inputs[0]))(student, *inputs, spec)


def _run_loss(student: Tensor, inputs: tuple[Any, ...], denominator: Tensor | float | None, spec: LossSpec) -> _Outputs:
    run = select("kl_loss", student.device, compute_dtype(student, inputs[0]))
    return run(student, *inputs, denominator, spec)


def _check_shapes(
    student: Tensor, teacher: Tensor, log_weights: Tensor, ids: Tensor, mask: Tensor | None, proximal: Tensor | None
) -> None:
    """For direct calls of the op: the losses have checked this already, and the backends do not check it again."""
    for name, scores in (("teacher", teacher), ("log_weights", log_weights), ("ids", ids), ("proximal", proximal)):
        if scores is not None and (scores.shape != student.shape or scores.device != student.device):
            raise ValueError(
                f"{name}: got {list(scores.shape)} on {scores.device}, "
                f"expected {list(student.shape)} on {student.device} as student"
            )
    if mask is not None and (mask.shape != student.shape[:1] or mask.device != student.device):
        raise ValueError(f"mask: got {list(mask.shape)} on {mask.device}, expected [{student.shape[0]}] beside student")


@kl_rows.register_fake
def _(student: Tensor, teacher: Tensor, *arguments: Any) -> _Outputs:
    return _fake(student, teacher, student.shape[:1], arguments[-1])


@kl_loss.register_fake
def _(student: Tensor, teacher: Tensor, *arguments: Any) -> _Outputs:
    return _fake(student, teacher, (), arguments[-1])


def _fake(student: Tensor, teacher: Tensor, shape: Any, spec: str) -> _Outputs:
    dtype = compute_dtype(student, teacher)
    return (
        student.new_empty(shape, dtype=dtype),
        student.new_empty(student.shape, dtype=dtype),
        student.new_empty(len(LossMetrics._fields) if LossSpec.parse(spec).metrics else 0, dtype=dtype),
    )


# ------------------------------------------------------------------------------------------- gradients of the ops


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    _, coef, metrics = output
    ctx.num_inputs, ctx.dtype = len(inputs), inputs[0].dtype
    ctx.save_for_backward(coef)
    ctx.mark_non_differentiable(coef, metrics)
    ctx.set_materialize_grads(False)  # or coef [N, K] would be given a gradient of zeros


def _gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (ctx.num_inputs - 1)
    if grad is None:
        return None, *nothing
    (coef,) = ctx.saved_tensors
    grad = grad[:, None] if grad.dim() else grad
    # Not a product alone: what the caller dropped has gradient 0, even where a coefficient is NaN.
    return (coef * grad).masked_fill_(grad == 0, 0.0).to(ctx.dtype), *nothing


kl_rows.register_autograd(first_order("kl_rows")(_gradient), setup_context=_save)
kl_loss.register_autograd(first_order("kl_loss")(_gradient), setup_context=_save)


# ------------------------------------------------------------------------------------------------------ eager calls


class KLRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, inputs: KLInputs, spec: LossSpec) -> Tensor | tuple[Tensor, Tensor]:
        rows, ctx.coef, metrics = _run_rows(student, inputs, spec)
        return _saved(ctx, rows, metrics, (student, *inputs, None), spec)

    @staticmethod
    @first_order("kl_rows")
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        coef, ctx.coef = ctx.coef, None
        if coef is None:
            student, *inputs, _ = saved_tensors(ctx)
            coef = _run_rows(student, tuple(inputs), ctx.spec)[1]
        if plain(grad):
            select("scale_rows_", coef.device, coef.dtype)(coef, grad)
        else:
            coef = (coef * grad[:, None]).masked_fill_((grad == 0)[:, None], 0.0)
        return coef.to(ctx.dtype), None, None


class KLLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, inputs: KLInputs, denominator: Tensor | float | None, spec: LossSpec
    ) -> Tensor | tuple[Tensor, Tensor]:
        loss, ctx.coef, metrics = _run_loss(student, inputs, denominator, spec)
        # A tensor is saved, so that autograd detects a change of it before a second backward.
        by = denominator if isinstance(denominator, Tensor) else None
        ctx.denominator = None if by is not None else denominator
        return _saved(ctx, loss, metrics, (student, *inputs, by), spec)

    @staticmethod
    @first_order("kl_loss")
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        coef, ctx.coef = ctx.coef, None
        if coef is None:
            student, *inputs, denominator = saved_tensors(ctx)
            by = ctx.denominator if denominator is None else denominator
            coef = _run_loss(student, tuple(inputs), by, ctx.spec)[1]
        if not plain(grad):
            coef = torch.where(grad == 0, 0.0, coef * grad)
        elif not (grad.is_cpu and grad.item() == 1.0):  # on a device only a kernel can look at it
            select("scale_gradient_", coef.device, coef.dtype)(coef, grad)
        return coef.to(ctx.dtype), None, None, None


def _saved(
    ctx: Any, out: Tensor, metrics: Tensor, inputs: tuple[Tensor | None, ...], spec: LossSpec
) -> Tensor | tuple[Tensor, Tensor]:
    """What the forward returns: the metrics as well where they are wanted. The inputs are for a second backward."""
    student, *others = inputs
    ctx.spec, ctx.dtype = spec, cast(Tensor, student).dtype
    # Detached, since a teacher's scores may have a graph of their own, which would be kept alive.
    save_tensors(ctx, student, *(t.detach() if t is not None and t.requires_grad else t for t in others))
    ctx.set_materialize_grads(False)
    if not spec.metrics:
        return out
    ctx.mark_non_differentiable(metrics)
    return out, metrics


def rows_and_metrics(student: Tensor, inputs: KLInputs, spec: LossSpec) -> tuple[Tensor, Tensor | None]:
    """Row losses [N], differentiable in the scores, and the values of a LossMetrics if they are wanted."""
    if not plain(student, *inputs):
        rows, _, metrics = kl_rows(student, *inputs, spec.text)
    elif student.requires_grad and torch.is_grad_enabled():
        out = KLRows.apply(student, inputs, spec)
        return out if spec.metrics else (out, None)
    else:
        rows, _, metrics = _run_rows(student, inputs, spec)
    return rows, metrics if spec.metrics else None


def loss_and_metrics(
    student: Tensor, inputs: KLInputs, denominator: Tensor | float | None, spec: LossSpec
) -> tuple[Tensor, Tensor | None]:
    """The sum of the row losses over `denominator`, None for the number of rows that count; and the metrics."""
    by = denominator if isinstance(denominator, Tensor) else None
    if torch.compiler.is_compiling() and isinstance(denominator, float | torch.SymFloat):
        # Divided outside of the op: as an argument, each value of the number would be compiled anew.
        one = student.new_ones((), dtype=compute_dtype(student, inputs.teacher))
        loss, _, metrics = kl_loss(student, *inputs, one, spec.text)
        loss = loss / denominator
    elif not plain(student, *inputs, by):
        if not isinstance(denominator, Tensor) and denominator is not None:
            dtype = compute_dtype(student, inputs.teacher)
            denominator = torch.full((), denominator, dtype=dtype, device=student.device)
        loss, _, metrics = kl_loss(student, *inputs, denominator, spec.text)
    elif student.requires_grad and torch.is_grad_enabled():
        out = KLLoss.apply(student, inputs, denominator, spec)
        return out if spec.metrics else (out, None)
    else:
        loss, _, metrics = _run_loss(student, inputs, denominator, spec)
    return loss, metrics if spec.metrics else None
