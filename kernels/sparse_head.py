"""The sampled head: logits of a language-model head at the K ids of a row, and their gradient, without the other V - K.

    z[n, k] = softcap(s (h[n] . W[v] + b[v])) / T,  v = ids[n, k]

    dh[n] = sum_k dy[n, k] W[ids[n, k]]
    dW[v] = sum over (n, k) with ids[n, k] = v of dy[n, k] h[n];  db[v] likewise of dy[n, k]

sparse_rows.py has z and dh, a program a row; sparse_weight.py dW and db, a program a run of entries sorted by id;
sparse_entries.py what goes before; each with its bytes. In all, N = 8,192, K = 64, H = 4,096, V = 151,936, bf16: 13 GB
from L2 (three times 4.3), and from memory W twice and dW once, at most 3.7 GB: rows of dW that no id names are zeroed.
Three GEMMs of the whole head would be 3 x 10.2 TFLOP. Scratch: 134 MB in the forward; in the backward 67 MB and some
20 MB of entries.

A dense dW is the one thing here that is V wide. `linear_gather_logits_backward_into` has none: it adds to a gradient
that the caller keeps, and touches the rows that ids name.
"""

import torch
from torch import Tensor

from asyncopd.backends.reference.accumulate import check_gradient
from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.rows import check_ids_in_range
from asyncopd.kernels.launch import DEVICE_TYPE, DTYPES, check_ids
from asyncopd.kernels.softcap import Factors
from asyncopd.kernels.sparse_entries import launch_entries
from asyncopd.kernels.sparse_rows import launch_hidden_gradient, launch_logits
from asyncopd.kernels.sparse_weight import launch_weight_gradient


def linear_gather_logits(hidden: Tensor, head: Head, ids: Tensor, mask: Tensor | None) -> Tensor:
    """hidden [N, H] of the weight's dtype, ids [N, K] -> fp32 logits [N, K]; -inf at pads and in masked rows.

    The bias has any float dtype, mask [N] is bool. Any row strides; a weight without unit stride inside its rows is
    copied. An id outside [-1, V) gives NaN on a device, where nothing can be raised without synchronising.
    """
    hidden, weight, ids = _check(hidden, head, ids, mask)
    if mask is not None:
        ids = ids.masked_fill(~mask[:, None], -1)
    bias = None if head.bias is None else head.bias.to(torch.float32).contiguous()
    return launch_logits(hidden, weight, ids, bias, Factors.of(head), head.softcap is not None)


def linear_gather_logits_backward(
    grad: Tensor,
    logits: Tensor,
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    mask: Tensor | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [N, K] of `logits` -> gradients of hidden [N, H], weight [V, H] ([0, H] if not needed), bias [V] or [0].

    Each in the dtype of what it is the gradient of, rounded to it once; rows of the weight that no id names get 0.
    As in the reference, hidden may be wider than the head.
    """
    weight, bias = head.weight, head.bias
    vocab, width = weight.shape
    dweight = torch.empty(vocab if need_weight else 0, width, dtype=weight.dtype, device=weight.device)
    dbias = torch.empty(0 if bias is None else vocab, dtype=torch.float32, device=weight.device)
    wanted = (dweight if need_weight else None, None if bias is None else dbias)
    dhidden = _backward(grad, logits, hidden, head, ids, mask, *wanted, add=False)
    return dhidden, dweight, dbias.to(weight.dtype if bias is None else bias.dtype)


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
    """Adds the gradients of the weight and the bias to weight_grad [V, H] and bias_grad [V]; returns that of hidden.

    For trainers that keep a gradient over several micro-batches. Both have any of the dtypes, best fp32: each sum is
    made in fp32, added to what is there, and rounded once. Only rows that ids name are read or written.
    weight_grad has unit stride inside its rows, bias_grad is contiguous. A captured CUDA graph adds at every replay.
    """
    shape, device = head.weight.shape, head.weight.device
    check_gradient("weight_grad", weight_grad, shape, device, tuple(DTYPES))
    if bias_grad is not None:
        check_gradient("bias_grad", bias_grad, shape[:1], device, tuple(DTYPES))
    return _backward(grad, logits, hidden, head, ids, mask, weight_grad, bias_grad, add=True)


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
) -> Tensor:
    hidden, weight, ids = _check(hidden, head, ids, mask)
    if grad.shape != ids.shape or logits.shape != ids.shape:
        raise ValueError(
            f"grad, logits: got {list(grad.shape)}, {list(logits.shape)}, expected {list(ids.shape)} twice"
        )
    grad, logits = grad.to(torch.float32).contiguous(), logits.to(torch.float32).contiguous()
    mask = None if mask is None else mask.contiguous()
    entries = launch_entries(grad, logits, ids, mask, weight.shape[0], Factors.of(head), head.softcap is not None)
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    launch_hidden_gradient(entries, weight, dhidden)
    launch_weight_gradient(entries, hidden, dweight, dbias, weight.shape[0], add=add)
    return dhidden


def _check(hidden: Tensor, head: Head, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weight with unit column strides, contiguous ids; or an error that says what is wrong."""
    weight, bias = head.weight, head.bias
    if weight.dtype not in DTYPES or hidden.dtype not in (weight.dtype, torch.float32):
        raise TypeError(
            f"hidden, weight: got {hidden.dtype}, {weight.dtype}, expected one of float32, bfloat16, float16 for both "
            "(or float32 for hidden)"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"hidden, weight: got {list(hidden.shape)}, {list(weight.shape)}, expected [N, H], [V, H]")
    if weight.shape[0] >= 2**31:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected less than 2^31 rows")
    ids = check_ids(ids, hidden)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {list(bias.shape)}, expected [{weight.shape[0]}]")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != ids.shape[:1]):
        raise ValueError(f"mask: got {mask.dtype} {list(mask.shape)}, expected torch.bool [{ids.shape[0]}]")
    if not head.temperature > 0:
        raise ValueError(f"temperature: got {head.temperature}, expected a number above 0")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"softcap: got {head.softcap}, expected a number above 0, or None")
    devices = {str(tensor.device) for tensor in (hidden, weight, ids, bias, mask) if tensor is not None}
    if len(devices) > 1 or hidden.device.type != DEVICE_TYPE:
        raise ValueError(
            f"hidden, weight, ids, bias, mask: got devices {sorted(devices)}, expected one of {DEVICE_TYPE}"
        )
    check_ids_in_range(ids, weight.shape[0])
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    return hidden, weight if weight.stride(1) == 1 else weight.contiguous(), ids
