"""Differentiable scores at a few ids of each row, straight from hidden states: log-probabilities, or logits alone.

Each op is here twice: as a custom op, and as a `torch.autograd.Function` for eager calls (see eager.py). Both run the
same functions of a backend, and save the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from asyncopd.backends import select
from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.rows import compute_dtype
from asyncopd.ops import checks
from asyncopd.ops.eager import first_order, plain, save_tensors, saved_tensors
from asyncopd.ops.head import prepare_head


def _run_linear_gather(
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


def _run_linear_gather_backward(
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


def _run_linear_logits(
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


def _run_linear_logits_backward(
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


def _run_linear_logsumexp(
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


_linear_gather = torch.library.custom_op("asyncopd::linear_gather_logprobs", _run_linear_gather, mutates_args=())
_linear_gather_backward = torch.library.custom_op(
    "asyncopd::linear_gather_logprobs_backward", _run_linear_gather_backward, mutates_args=()
)
_linear_logits = torch.library.custom_op("asyncopd::linear_gather_logits", _run_linear_logits, mutates_args=())
_linear_logits_backward = torch.library.custom_op(
    "asyncopd::linear_gather_logits_backward", _run_linear_logits_backward, mutates_args=()
)
_linear_logsumexp = torch.library.custom_op("asyncopd::linear_logsumexp", _run_linear_logsumexp, mutates_args=())


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


# Gradients of hidden, weight and bias, with the backend's function or the op.
_HeadGradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _logprobs_gradients(ctx: Any, grad: Tensor) -> _HeadGradients:
    lse, hidden, weight, ids, bias, mask = saved_tensors(ctx)
    need_weight = ctx.needs_input_grad[1]
    run: Callable[..., Any] = _run_linear_gather_backward if plain(grad, hidden, weight) else _linear_gather_backward
    dh, dw, db = run(grad, hidden, weight, lse, ids, bias, mask, *ctx.scalars, need_weight)
    return dh, dw if need_weight else None, None if bias is None else db


def _logits_gradients(ctx: Any, grad: Tensor) -> _HeadGradients:
    logits, hidden, weight, ids, bias, mask = saved_tensors(ctx)
    need_weight = ctx.needs_input_grad[1]
    run: Callable[..., Any] = _run_linear_logits_backward if plain(grad, hidden, weight) else _linear_logits_backward
    dh, dw, db = run(grad, logits, hidden, weight, ids, bias, mask, *ctx.scalars, need_weight)
    return dh, dw if need_weight else None, None if bias is None else db


def _of_the_op(gradients: Callable[[Any, Tensor], _HeadGradients]) -> Callable[..., tuple[Tensor | None, ...]]:
    """In the places of the op's arguments."""

    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        dh, dw, db = gradients(ctx, grad)
        return dh, dw, None, db, None, None, None, None

    return backward


_linear_gather.register_autograd(
    first_order("linear_gather_logprobs")(_of_the_op(_logprobs_gradients)), setup_context=_save_head
)
_linear_logits.register_autograd(
    first_order("linear_gather_logits")(_of_the_op(_logits_gradients)), setup_context=_save_head
)
_Scalars = tuple[float, float, float | None]


class LinearGatherLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        mask: Tensor | None,
        scalars: _Scalars,
    ) -> Tensor:
        logprobs, lse = _run_linear_gather(hidden, weight, ids, bias, mask, *scalars)
        ctx.scalars = scalars
        save_tensors(ctx, lse, hidden, weight, ids, bias, mask)
        return logprobs

    @staticmethod
    @first_order("linear_gather_logprobs")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_logprobs_gradients(ctx, grad), None, None, None


class LinearGatherLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        mask: Tensor | None,
        scalars: _Scalars,
    ) -> Tensor:
        logits = _run_linear_logits(hidden, weight, ids, bias, mask, *scalars)
        ctx.scalars = scalars
        save_tensors(ctx, logits, hidden, weight, ids, bias, mask)
        return logits

    @staticmethod
    @first_order("linear_gather_logits")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_logits_gradients(ctx, grad), None, None, None


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
    eager = plain(hidden, weight, bias, ids, mask)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    if kind == "logprobs":
        if eager and learns:
            return LinearGatherLogprobs.apply(hidden, weight, bias, ids, mask, scalars)
        gather = _run_linear_gather if eager else _linear_gather
        return gather(hidden, weight, ids, bias, mask, *scalars)[0]
    if eager and learns:
        logits = LinearGatherLogits.apply(hidden, weight, bias, ids, mask, scalars)
    else:
        logits = (_run_linear_logits if eager else _linear_logits)(hidden, weight, ids, bias, mask, *scalars)
    if kind == "logits":
        return logits
    detached_bias = None if bias is None else bias.detach()
    logsumexp = _run_linear_logsumexp if eager else _linear_logsumexp
    return logits - logsumexp(hidden.detach(), weight.detach(), detached_bias, mask, *scalars)[:, None]
