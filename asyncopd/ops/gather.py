"""Differentiable log-probabilities at a few ids of each row, from logits or straight from hidden states."""

from typing import Any

import torch
from torch import Tensor

from asyncopd.backends import select
from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.rows import compute_dtype
from asyncopd.ops import checks
from asyncopd.ops.head import prepare_head

# ---------------------------------------------------------------------------------------------- from logits


@torch.library.custom_op("asyncopd::gather_logprobs", mutates_args=())
def _gather(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return select("gather_logprobs", logits.device, logits.dtype)(logits, ids, temperature)


@torch.library.custom_op("asyncopd::gather_logprobs_backward", mutates_args=())
def _gather_backward(grad: Tensor, logits: Tensor, lse: Tensor, ids: Tensor, temperature: float) -> Tensor:
    run = select("gather_logprobs_backward", logits.device, logits.dtype)
    return run(grad, logits, lse, ids, temperature)


@_gather.register_fake
def _(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logits)
    return logits.new_empty(ids.shape, dtype=dtype), logits.new_empty(logits.shape[0], dtype=dtype)


@_gather_backward.register_fake
def _(grad: Tensor, logits: Tensor, lse: Tensor, ids: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(logits)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, ids, ctx.temperature = inputs
    ctx.save_for_backward(logits, output[1], ids)
    ctx.mark_non_differentiable(output[1])


def _gather_gradient(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor, None, None]:
    logits, lse, ids = ctx.saved_tensors
    return _gather_backward(grad, logits, lse, ids, ctx.temperature), None, None


_gather.register_autograd(_gather_gradient, setup_context=_save_gather)


def gather_logprobs(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at ids, differentiable in the logits.

    Args:
        logits: [N, V] bf16, fp16, fp32 or fp64, any row stride. Row n predicts the token that row n scores.
        ids: [N, K] int32 or int64 in 0..V-1; -1 pads.
        temperature: divides the logits.
    Returns: [N, K] fp32 (fp64 for fp64); -inf at pads and where the logit is -inf. The gradient has the logits' dtype.
    Raises: TypeError, ValueError naming the argument.
    """
    checks.check_matrix("logits", logits, "V")
    checks.check_ids("ids", ids, logits, "logits")
    checks.check_temperature(temperature)
    return _gather(logits, ids, float(temperature))[0]


# ---------------------------------------------------------------------------------------- from hidden states


@torch.library.custom_op("asyncopd::linear_gather_logprobs", mutates_args=())
def _linear_gather(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    run = select("linear_gather_logprobs", hidden.device, hidden.dtype)
    return run(hidden, Head(weight, bias, temperature, logit_scale, softcap), ids, mask)


@torch.library.custom_op("asyncopd::linear_gather_logprobs_backward", mutates_args=())
def _linear_gather_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    lse: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    run = select("linear_gather_logprobs_backward", hidden.device, hidden.dtype)
    head = Head(weight, bias, temperature, logit_scale, softcap)
    return run(grad, hidden, head, lse, ids, mask, need_weight)


@torch.library.custom_op("asyncopd::linear_gather_logits", mutates_args=())
def _linear_logits(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    run = select("linear_gather_logits", hidden.device, hidden.dtype)
    return run(hidden, Head(weight, bias, temperature, logit_scale, softcap), ids, mask)


@torch.library.custom_op("asyncopd::linear_gather_logits_backward", mutates_args=())
def _linear_logits_backward(
    grad: Tensor,
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    run = select("linear_gather_logits_backward", hidden.device, hidden.dtype)
    head = Head(weight, bias, temperature, logit_scale, softcap)
    return run(grad, logits, hidden, head, ids, mask, need_weight)


@torch.library.custom_op("asyncopd::linear_logsumexp", mutates_args=())
def _linear_logsumexp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    run = select("linear_logsumexp", hidden.device, hidden.dtype)
    return run(hidden, Head(weight, bias, temperature, logit_scale, softcap), mask)


@_linear_gather.register_fake
def _(hidden: Tensor, weight: Tensor, ids: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(hidden)
    return hidden.new_empty(ids.shape, dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype)


@_linear_logits.register_fake
def _(hidden: Tensor, weight: Tensor, ids: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=compute_dtype(hidden))


@_linear_logsumexp.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))


def _fake_head_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    vocab, width = weight.shape
    return (
        hidden.new_empty(hidden.shape),
        weight.new_empty(vocab if need_weight else 0, width),
        weight.new_empty(0) if bias is None else bias.new_empty(vocab),
    )


@_linear_gather_backward.register_fake
def _(
    grad: Tensor, hidden: Tensor, weight: Tensor, lse: Tensor, ids: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_head_gradients(hidden, weight, bias, rest[-1])


@_linear_logits_backward.register_fake
def _(
    grad: Tensor, logits: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_head_gradients(hidden, weight, bias, rest[-1])


def _save_head(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weight, ids, bias, mask, *ctx.scalars = inputs
    saved = output[1] if isinstance(output, tuple) else output  # LSE, or the logits at the ids
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(saved, hidden, weight, ids, bias, mask)


def _linear_gather_gradient(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    lse, hidden, weight, ids, bias, mask = ctx.saved_tensors
    need_weight = ctx.needs_input_grad[1]
    dh, dw, db = _linear_gather_backward(grad, hidden, weight, lse, ids, bias, mask, *ctx.scalars, need_weight)
    return dh, dw if need_weight else None, None, None if bias is None else db, None, None, None, None


def _linear_logits_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, hidden, weight, ids, bias, mask = ctx.saved_tensors
    need_weight = ctx.needs_input_grad[1]
    dh, dw, db = _linear_logits_backward(grad, logits, hidden, weight, ids, bias, mask, *ctx.scalars, need_weight)
    return dh, dw if need_weight else None, None, None if bias is None else db, None, None, None, None


_linear_gather.register_autograd(_linear_gather_gradient, setup_context=_save_head)
_linear_logits.register_autograd(_linear_logits_gradient, setup_context=_save_head)


def linear_gather_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """`gather_logprobs` of the logits softcap(logit_scale (hidden W^T + bias)), which are never held whole.

    Args:
        hidden: [N, H]. lm_head_weight: [V, H] of the same dtype. ids: [N, K], -1 pads. bias: [V] or None.
        temperature, logit_scale, softcap: see `linear_topk_logprobs`.
    Returns: [N, K] fp32 (fp64 for fp64), differentiable in hidden, weight and bias; gradients
        accumulate in fp32.
    Raises: TypeError, ValueError naming the argument.
    """
    return gather_from_head(hidden, lm_head_weight, ids, None, "logprobs", bias, temperature, logit_scale, softcap)


def gather_from_head(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    kind: str,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    """Scores [N, K] of a head at ids for the losses; masked rows are not computed and get -inf.

    kind "logprobs": log p, with its whole gradient. "logits": unnormalised z from K dot products a row.
    "centred": log p whose gradient leaves out the normaliser's. Right where the coefficients of every row sum to
    zero, and then only the support's rows of the head are touched by the backward: NKH work in place of NVH.
    """
    hidden, weight, bias = prepare_head(hidden, weight, bias, temperature, logit_scale, softcap)
    checks.check_ids("ids", ids, hidden, "hidden")
    scalars = (float(temperature), float(logit_scale), softcap)
    if kind == "logprobs":
        return _linear_gather(hidden, weight, ids, bias, mask, *scalars)[0]
    logits = _linear_logits(hidden, weight, ids, bias, mask, *scalars)
    if kind == "logits":
        return logits
    detached_bias = None if bias is None else bias.detach()
    return logits - _linear_logsumexp(hidden.detach(), weight.detach(), detached_bias, mask, *scalars)[:, None]
