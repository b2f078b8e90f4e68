"""The sampled head's backward for a trainer that keeps its gradients: added to what is there, rounded once."""

import torch
from torch import Tensor

from asyncopd.backends.reference.linear import linear_gather_logits_backward


def linear_gather_logits_backward_into(
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
    """Adds to weight_grad [V, H] and, with a bias, bias_grad [V], of any float dtype; returns the gradient of hidden.

    The specification, not the saving: passes over [V, H] in fp32 that a backend does without.
    """
    dtype = logits.dtype
    # The gradient does not depend on the bias, only on whether there is one.
    bias = None if bias_grad is None else torch.zeros(weight.shape[0], dtype=dtype, device=weight.device)
    head = (hidden.to(dtype), weight.to(dtype), ids, bias, mask, temperature, logit_scale, softcap)
    dhidden, dweight, dbias = linear_gather_logits_backward(grad, logits, *head, True)
    for gradient, added in ((weight_grad, dweight), (bias_grad, dbias)):
        if gradient is not None:
            gradient.copy_(gradient.to(dtype) + added)
    return dhidden.to(hidden.dtype)
