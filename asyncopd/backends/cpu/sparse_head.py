"""The sampled head: logits at the K ids of a row and their gradient, from K rows of the weight and no pass over all V.

Any row stride of hidden states and weight; rows whose elements are not contiguous are copied first, which for a weight
[V, H] costs more than the op itself. `threads` and `isa`: see logits.py.
"""

import torch
from torch import Tensor

from asyncopd.backends.cpu.memory import empty_gradient
from asyncopd.backends.native import (
    _C,
    DTYPE_CODES,
    ID_TYPE_CODES,
    check_ids,
    raise_for_status,
)
from asyncopd.backends.reference.accumulate import check_gradient
from asyncopd.backends.reference.head import Head


def linear_gather_logits(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    mask: Tensor | None,
    *,
    threads: int | None = None,
    isa: int = -1,
) -> Tensor:
    """hidden [N, H], ids [N, K] -> fp32 logits [N, K]; -inf at pads and in masked rows.

    hidden is of the weight's dtype, or fp32, whose gradient is then not rounded: a part of a sum over shards. The bias
    has any float dtype, mask [N] is bool. Raises ValueError for ids outside [-1, V), in masked rows as well.
    """
    hidden, weight, ids, mask = _check(hidden, head, ids, mask)
    bias = None if head.bias is None else head.bias.to(torch.float32).contiguous()
    logits = torch.empty(ids.shape, dtype=torch.float32)
    status = _C.cpu_linear_gather_logits(
        hidden=hidden.data_ptr(),
        hidden_stride=hidden.stride(0),
        hidden_dtype=DTYPE_CODES[hidden.dtype],
        weight=weight.data_ptr(),
        weight_stride=weight.stride(0),
        dtype=DTYPE_CODES[weight.dtype],
        bias=0 if bias is None else bias.data_ptr(),
        ids=ids.data_ptr(),
        id_type=ID_TYPE_CODES[ids.dtype],
        mask=0 if mask is None else mask.data_ptr(),
        rows=ids.shape[0],
        vocab=weight.shape[0],
        width=weight.shape[1],
        num_ids=ids.shape[1],
        temperature=head.temperature,
        logit_scale=head.logit_scale,
        softcap=head.softcap or 0.0,
        logits=logits.data_ptr(),
        threads=torch.get_num_threads() if threads is None else threads,
        isa=isa,
    )
    raise_for_status(status, "cpu_linear_gather_logits", weight.shape[0], ids)
    return logits


def linear_gather_logits_backward(
    grad: Tensor,
    logits: Tensor,
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    mask: Tensor | None,
    need_weight: bool,
    *,
    threads: int | None = None,
    isa: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [N, K] of `logits` -> gradients of hidden [N, H], weight [V, H] ([0, H] if not needed), bias [V] or [0].

    Each in the dtype of what it is the gradient of, rounded to it once. Without need_weight and bias nothing is V wide.
    """
    weight, bias = head.weight, head.bias
    dweight = empty_gradient(weight) if need_weight else None
    dbias = None if bias is None else torch.empty(bias.shape, dtype=torch.float32)
    dhidden = _backward(grad, logits, hidden, head, ids, mask, dweight, dbias, add=False, threads=threads, isa=isa)
    return (
        dhidden,
        weight.new_empty(0, weight.shape[1]) if dweight is None else dweight,
        weight.new_empty(0) if bias is None or dbias is None else dbias.to(bias.dtype),
    )


def linear_gather_logits_backward_into(
    grad: Tensor,
    logits: Tensor,
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    mask: Tensor | None,
    weight_grad: Tensor,
    bias_grad: Tensor | None,
    *,
    threads: int | None = None,
    isa: int = -1,
) -> Tensor:
    """Adds the gradients of the weight and the bias to weight_grad [V, H] and bias_grad [V]; returns that of hidden.

    Each sum is added to what is there in fp32 at least, and rounded to any of the dtypes. Only rows of weight_grad that
    ids name are read or written; they have unit stride and do not overlap.
    """
    shape, device = head.weight.shape, head.weight.device
    check_gradient("weight_grad", weight_grad, shape, device, tuple(DTYPE_CODES))
    if bias_grad is not None:
        check_gradient("bias_grad", bias_grad, shape[:1], device, tuple(DTYPE_CODES))
    dbias = None if bias_grad is None else torch.empty(bias_grad.shape, dtype=torch.float32)
    dhidden = _backward(grad, logits, hidden, head, ids, mask, weight_grad, dbias, add=True, threads=threads, isa=isa)
    if bias_grad is not None and dbias is not None:
        bias_grad.copy_(dbias.add_(bias_grad))
    return dhidden


def _backward(
    grad: Tensor,
    logits: Tensor,
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    mask: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    *,
    add: bool,
    threads: int | None,
    isa: int,
) -> Tensor:
    """dhidden; writes dbias, and writes dweight or adds to it."""
    hidden, weight, ids, mask = _check(hidden, head, ids, mask)
    if grad.shape != ids.shape or logits.shape != ids.shape:
        raise ValueError(
            f"grad, logits: got {list(grad.shape)}, {list(logits.shape)}, expected {list(ids.shape)} twice"
        )
    grad, logits = grad.to(torch.float32).contiguous(), logits.to(torch.float32).contiguous()
    vocab, width = weight.shape
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype)
    status = _C.cpu_linear_gather_logits_backward(
        grad=grad.data_ptr(),
        logits=logits.data_ptr(),
        hidden=hidden.data_ptr(),
        hidden_stride=hidden.stride(0),
        hidden_dtype=DTYPE_CODES[hidden.dtype],
        weight=weight.data_ptr(),
        weight_stride=weight.stride(0),
        dtype=DTYPE_CODES[weight.dtype],
        ids=ids.data_ptr(),
        id_type=ID_TYPE_CODES[ids.dtype],
        mask=0 if mask is None else mask.data_ptr(),
        rows=ids.shape[0],
        vocab=vocab,
        width=width,
        num_ids=ids.shape[1],
        temperature=head.temperature,
        logit_scale=head.logit_scale,
        softcap=head.softcap or 0.0,
        dhidden=dhidden.data_ptr(),
        dweight=0 if dweight is None else dweight.data_ptr(),
        dweight_stride=0 if dweight is None else dweight.stride(0),
        dweight_dtype=DTYPE_CODES[weight.dtype if dweight is None else dweight.dtype],
        add=add,
        dbias=0 if dbias is None else dbias.data_ptr(),
        threads=torch.get_num_threads() if threads is None else threads,
        isa=isa,
    )
    raise_for_status(status, "cpu_linear_gather_logits_backward", vocab)
    return dhidden


def _check(
    hidden: Tensor, head: Head, ids: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Hidden states, weight, ids and mask as the kernels take them.

    The callers have checked most of this; it is repeated because a kernel given raw pointers cannot.
    """
    weight, bias = head.weight, head.bias
    if weight.dtype not in DTYPE_CODES or hidden.dtype not in (weight.dtype, torch.float32):
        raise TypeError(
            f"hidden, weight: got {hidden.dtype}, {weight.dtype}, expected one of float32, bfloat16, float16 for both "
            "(or float32 for hidden)"
        )
    ids = check_ids(ids, hidden, "hidden")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [V, {hidden.shape[1]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {list(bias.shape)}, expected [{weight.shape[0]}]")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != ids.shape[:1]):
        raise ValueError(f"mask: got {mask.dtype} {list(mask.shape)}, expected torch.bool [{ids.shape[0]}]")
    if not head.temperature > 0:
        raise ValueError(f"temperature: got {head.temperature}, expected a number above 0")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap: got {head.softcap}, expected a number above 0, or None")
    devices = {tensor.device.type for tensor in (hidden, weight, ids, bias, mask) if tensor is not None}
    if devices != {"cpu"}:
        raise ValueError(f"hidden, weight, ids, bias, mask: got devices {sorted(devices)}, expected cpu")
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    return hidden, weight, ids, None if mask is None else mask.contiguous()
