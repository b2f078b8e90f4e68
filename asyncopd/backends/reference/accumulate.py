"""The sampled head's backward for a trainer that keeps its gradients: added to what is there, rounded once."""

from dataclasses import replace

import torch
from torch import Tensor

from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.linear import linear_gather_logits_backward


def check_gradient(
    name: str, gradient: Tensor, shape: torch.Size, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """A buffer that gradients can be added to, row by row and from several threads."""
    if gradient.dtype not in dtypes:
        raise TypeError(f"{name}: got {gradient.dtype}, expected {' or '.join(map(str, dtypes))}")
    side_by_side = gradient.shape[-1] < 2 or gradient.stride(-1) == 1
    apart = gradient.dim() < 2 or len(gradient) < 2 or gradient.stride(0) >= gradient.shape[1]
    if gradient.shape != shape or not (side_by_side and apart):
        got = f"shape {list(gradient.shape)} with strides {list(gradient.stride())}"
        expected = f"shape {list(shape)} with elements of a row side by side and rows that do not overlap"
        raise ValueError(f"{name}: got {got}, expected {expected}")
    if gradient.device != device:
        raise ValueError(f"{name}: got device {gradient.device}, expected {device} as the head")


def linear_gather_logits_backward_into(
    grad: Tensor,
    logits: Tensor,
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    mask: Tensor | None,
    weight_grad: Tensor,
    bias_grad: Tensor | None,
) -> Tensor:
    """Adds to weight_grad [V, H] and, with a bias, bias_grad [V], of any float dtype; returns the gradient of hidden.

    The head comes without its bias, which is in `logits` already.
    The specification, not the saving: passes over [V, H] in fp32 that a backend does without.
    """
    dtype = logits.dtype
    # The gradient does not depend on the bias, only on whether there is one.
    bias = None if bias_grad is None else torch.zeros(head.weight.shape[0], dtype=dtype, device=head.weight.device)
    wide = replace(head, weight=head.weight.to(dtype), bias=bias)
    dhidden, dweight, dbias = linear_gather_logits_backward(grad, logits, hidden.to(dtype), wide, ids, mask, True)
    for gradient, added in ((weight_grad, dweight), (bias_grad, dbias)):
        if gradient is not None:
            gradient.copy_(gradient.to(dtype) + added)
    return dhidden.to(hidden.dtype)
