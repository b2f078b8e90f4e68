"""Differentiable log-probabilities at a few ids of each row of logits.

The op is here twice: as a custom op, and as a `torch.autograd.Function` for eager calls (see eager.py). Both run the
same functions of a backend, and save the same.
"""

from typing import Any

import torch
from torch import Tensor

from asyncopd.backends import select
from asyncopd.backends.reference.rows import compute_dtype
from asyncopd.ops import checks
from asyncopd.ops.eager import first_order, plain, save_tensors, saved_tensors


def _run_gather(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return select("gather_logprobs", logits.device, logits.dtype)(logits, ids, temperature)


def _run_gather_backward(grad: Tensor, logits: Tensor, lse: Tensor, ids: Tensor, temperature: float) -> Tensor:
    run = select("gather_logprobs_backward", logits.device, logits.dtype)
    return run(grad, logits, lse, ids, temperature)


_gather = torch.library.custom_op("asyncopd::gather_logprobs", _run_gather, mutates_args=())
_gather_backward = torch.library.custom_op("asyncopd::gather_logprobs_backward", _run_gather_backward, mutates_args=())


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


@first_order("gather_logprobs")
def _gather_gradient(ctx: Any, grad: Tensor, _grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
    logits, lse, ids = saved_tensors(ctx)
    run = _run_gather_backward if plain(grad, logits) else _gather_backward
    return run(grad, logits, lse, ids, ctx.temperature), None, None


_gather.register_autograd(_gather_gradient, setup_context=_save_gather)


class GatherLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        logprobs, lse = _run_gather(logits, ids, temperature)
        ctx.temperature = temperature
        save_tensors(ctx, logits, lse, ids)
        return logprobs

    backward = staticmethod(_gather_gradient)


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
    if not plain(logits, ids):
        return _gather(logits, ids, float(temperature))[0]
    if logits.requires_grad and torch.is_grad_enabled():
        return GatherLogprobs.apply(logits, ids, float(temperature))
    return _run_gather(logits, ids, float(temperature))[0]
