"""The sampled head for a trainer that keeps its gradients: dW is added to a buffer, and never exists by itself.

Of `linear_gather_logits`' backward a dense dW [V, H] is nearly all zeros: at V = 151,936, H = 4,096 in bf16 1.24 GB
that are written, and read again when autograd adds them to `weight.grad`. Here only rows that ids name are touched.
"""

from typing import Any

import torch
from torch import Tensor

from asyncopd.backends import select
from asyncopd.backends.reference.accumulate import check_gradient
from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.rows import compute_dtype
from asyncopd.ops import checks
from asyncopd.ops.eager import plain, save_tensors, saved_tensors
from asyncopd.ops.head import prepare_head
from asyncopd.ops.linear_gather import gather_from_head


def _run_backward_into(
    grad: Tensor,
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    weight_grad: Tensor,
    bias_grad: Tensor | None,
) -> Tensor:
    run = select("linear_gather_logits_backward_into", hidden.device, hidden.dtype)
    head = Head(weight, None, temperature, logit_scale, softcap)
    return run(grad, logits, hidden, head, ids, mask, weight_grad, bias_grad)


_backward_into = torch.library.custom_op(
    "asyncopd::linear_gather_logits_backward_into", _run_backward_into, mutates_args=("weight_grad", "bias_grad")
)


@_backward_into.register_fake
def _(grad: Tensor, logits: Tensor, hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


class _LogitsInto(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        scalars: tuple[float, float, float | None],
        weight_grad: Tensor,
        bias_grad: Tensor | None,
    ) -> Tensor:
        logits = gather_from_head(hidden, weight, ids, mask, "logits", bias, *scalars)
        save_tensors(ctx, logits, hidden, weight, ids, mask)
        # Not saved for backward: autograd would take that each backward changes them for a mistake.
        ctx.scalars, ctx.gradients = scalars, (weight_grad, bias_grad)
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, gradients = saved_tensors(ctx), ctx.gradients
        if plain(grad, *saved, *gradients):
            dhidden = _run_backward_into(grad, *saved, *ctx.scalars, *gradients)
            # As the dispatcher does for what an op changes: autograd then refuses a backward that needs the old values.
            torch.autograd.graph.increment_version([g for g in gradients if g is not None])
        else:
            dhidden = _backward_into(grad, *saved, *ctx.scalars, *gradients)
        return dhidden, None, None, None, None, None, None, None


def linear_gather_logits_into(
    hidden: Tensor,
    lm_head_weight: Tensor,
    ids: Tensor,
    weight_grad: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Unnormalised logits of a head at ids, whose backward adds the head's gradients to buffers of the caller's.

    For `reverse_kl(logits, support, normalize="sampled")` in a trainer that accumulates: instead of a dense gradient
    of the weight, autograd gets none, and weight_grad has it when `backward()` is through. Every backward adds; zeroing
    between steps is the caller's. Eager only: a compiled graph cannot see that its backward changes the buffers. And
    nothing is reduced over ranks: not for a head that DDP or FSDP manages, unless the caller averages the buffers.

    Args:
        hidden: [N, H], the only argument that autograd differentiates; it has to require grad.
        lm_head_weight: [V, H] of the same dtype. ids: [N, K], -1 pads. mask: [N], rows that count. bias: [V] or None.
        weight_grad: [V, H] of any float dtype, best fp32, with rows of any stride that do not overlap; added to in
            place. May be `lm_head_weight.grad`.
        bias_grad: [V], contiguous; there if and only if bias is.
        temperature, logit_scale, softcap: see `linear_topk_logprobs`.
    Returns: [N, K] fp32 (fp64 for fp64); -inf at pads and in masked rows.
    Raises: TypeError, ValueError naming the argument.
    """
    tensors = {"lm_head_weight": lm_head_weight, "bias": bias, "weight_grad": weight_grad, "bias_grad": bias_grad}
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            raise TypeError(f"{name}: got a DTensor, expected a plain tensor with the whole of the head")
    hidden, weight, bias = prepare_head(hidden, lm_head_weight, bias, temperature, logit_scale, softcap)
    checks.check_ids("ids", ids, hidden, "hidden")
    mask = checks.check_mask(mask, hidden, "hidden")
    if (bias is None) != (bias_grad is None):
        raise ValueError(f"bias_grad: got {'none' if bias_grad is None else 'one'}, expected one if there is a bias")
    for name, gradient, of in (("weight_grad", weight_grad, weight), ("bias_grad", bias_grad, bias)):
        if of is not None:
            _check_gradient(name, gradient, of, compute_dtype(hidden))
    if torch.is_grad_enabled() and not hidden.requires_grad:
        raise ValueError("hidden: does not require grad, so there would be no backward to add anything")
    scalars = (float(temperature), float(logit_scale), softcap)
    bias = None if bias is None else bias.detach()
    return _LogitsInto.apply(hidden, weight.detach(), ids, mask, bias, scalars, weight_grad, bias_grad)


def _check_gradient(name: str, gradient: Any, of: Tensor, widest: torch.dtype) -> None:
    if not isinstance(gradient, Tensor):
        raise TypeError(f"{name}: got {type(gradient).__name__}, expected a tensor")
    dtypes = dict.fromkeys((torch.bfloat16, torch.float16, torch.float32, widest))
    check_gradient(name, gradient, of.shape, of.device, tuple(dtypes))
    if gradient.requires_grad:
        raise ValueError(f"{name}: requires grad, expected a buffer that autograd does not follow")
