"""Head, gather and loss in one op that makes its gradients in the forward, while the logits are there.

A scalar loss needs to know of its upstream gradient only by what factor to multiply: so the backward is no work at all
where that factor is 1, and the head is multiplied three times rather than four. Here as a custom op, and as a
`torch.autograd.Function` for eager calls (see eager.py).
"""

from typing import Any

import torch
from torch import Tensor

from asyncopd.backends import select
from asyncopd.backends.loss_spec import LossMetrics, LossSpec
from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.rows import compute_dtype
from asyncopd.ops.eager import first_order, plain, save_tensors, saved_tensors

_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? mask, Tensor ids, Tensor teacher, Tensor log_weights, "
    "Tensor? proximal, Tensor denominator, float temperature, float logit_scale, float? softcap, bool need_hidden, "
    "bool need_weight, str spec)"
    " -> (Tensor loss, Tensor metrics, Tensor dhidden, Tensor dweight, Tensor dbias)"
)
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("asyncopd::linear_kl", mutates_args=(), schema=_SCHEMA)
def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    ids: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    proximal: Tensor | None,
    denominator: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    spec: str,
) -> _Outputs:
    """Sum of the row losses over `denominator`, the values of a LossMetrics, and the gradients of that loss.

    dhidden [N, H], dweight [V, H] in the dtypes of what they belong to, empty ([0, H]) where not needed; dbias [V],
    empty without a bias.
    """
    head = Head(weight, bias, temperature, logit_scale, softcap)
    support = (ids, teacher, log_weights, proximal)
    return _run(hidden, head, mask, support, denominator, need_hidden, need_weight, LossSpec.parse(spec))


def _run(
    hidden: Tensor,
    head: Head,
    mask: Tensor | None,
    support: tuple[Tensor, Tensor, Tensor, Tensor | None],
    denominator: Tensor,
    need_hidden: bool,
    need_weight: bool,
    spec: LossSpec,
) -> _Outputs:
    run = select("linear_kl", hidden.device, hidden.dtype)
    return run(hidden, head, mask, *support, denominator, need_hidden, need_weight, spec)


@linear_kl.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    ids: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    proximal: Tensor | None,
    denominator: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    spec: str,
) -> _Outputs:
    dtype, (vocab, width) = compute_dtype(hidden, teacher), weight.shape
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(LossMetrics._fields) if LossSpec.parse(spec).metrics else 0, dtype=dtype),
        hidden.new_empty(hidden.shape[0] if need_hidden else 0, width),
        weight.new_empty(vocab if need_weight else 0, width),
        weight.new_empty(0) if bias is None else bias.new_empty(vocab),
    )


# ---------------------------------------------------------------------------------------------- gradients of the op


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
    tensors, ctx.rest = inputs[:9], inputs[9:]
    # Kept by the context itself, so that the backward can hand them out without a copy: dW is as large as the head.
    ctx.gradients = output[2:]
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or each of these would be given a gradient of zeros: another [V, H]


def _gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (6 + len(ctx.rest))
    if grad is None:
        return None, None, None, *nothing
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:  # a second backward through a graph that was retained
        gradients = linear_kl(*ctx.saved_tensors, *ctx.rest)[2:]
    return *_scaled(ctx, gradients, grad, in_place=getattr(ctx, "owns_gradients", False)), *nothing


linear_kl.register_autograd(first_order("linear_kl")(_gradient), setup_context=_save)


def _scaled(ctx: Any, gradients: tuple[Tensor, ...], grad: Tensor, *, in_place: bool) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias times `grad`, those that are needed."""
    scaled = [_times(gradient, grad, in_place=in_place) if gradient.numel() else gradient for gradient in gradients]
    return tuple(
        gradient if needed else None for gradient, needed in zip(scaled, ctx.needs_input_grad[:3], strict=True)
    )


def _times(gradient: Tensor, factor: Tensor, *, in_place: bool) -> Tensor:
    """gradient * factor. A loss that the caller dropped (factor 0) has gradient 0 even where it is NaN."""
    if not in_place or type(factor) is not Tensor or factor.device.type == "meta":  # others are what tracing gives
        return torch.where(factor == 0, 0.0, gradient * factor).to(gradient.dtype)
    # dW is as large as the head: no second one.
    select("scale_gradient_", gradient.device, gradient.dtype)(gradient, factor)
    return gradient


# ------------------------------------------------------------------------------------------------------ eager calls


class LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inputs: tuple[Any, ...],
        scalars: tuple[float, float, float | None],
        spec: LossSpec,
    ) -> tuple[Tensor, Tensor]:
        ctx.scalars, ctx.spec, ctx.needs = scalars, spec, (hidden.requires_grad, weight.requires_grad)
        loss, metrics, *gradients = LinearKL.run(ctx, hidden, weight, bias, *inputs)
        ctx.gradients = tuple(gradients)
        save_tensors(ctx, hidden, weight, bias, *inputs)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def run(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        ids: Tensor,
        teacher: Tensor,
        log_weights: Tensor,
        proximal: Tensor | None,
        denominator: Tensor,
    ) -> _Outputs:
        head, (need_hidden, need_weight) = Head(weight, bias, *ctx.scalars), ctx.needs
        support = (ids, teacher, log_weights, proximal)
        return _run(hidden, head, mask, support, denominator, need_hidden, need_weight, ctx.spec)

    @staticmethod
    @first_order("linear_kl")
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward through a graph that was retained
            gradients = LinearKL.run(ctx, *saved_tensors(ctx))[2:]
        return *_scaled(ctx, gradients, grad, in_place=plain(grad)), None, None, None


def loss_and_metrics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    scalars: tuple[float, float, float | None],
    spec: LossSpec,
) -> tuple[Tensor, Tensor]:
    """`linear_kl` without its gradients: they are the backward's alone, which may scale them in place.

    inputs: mask, ids, teacher, log_weights, proximal and denominator, in that order. Some gradient has to be needed.
    """
    if plain(hidden, weight, bias, *inputs):
        return LinearKL.apply(hidden, weight, bias, inputs, scalars, spec)
    needs = (hidden.requires_grad, weight.requires_grad)
    loss, metrics, *_ = linear_kl(hidden, weight, bias, *inputs, *scalars, *needs, spec.text)
    # The context that `_gradient` is given; not so where functorch wraps it.
    if not torch.compiler.is_compiling() and hasattr(loss.grad_fn, "gradients"):
        loss.grad_fn.owns_gradients = True
    return loss, metrics
