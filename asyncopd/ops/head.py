"""What every `linear_*` op does with the head it is given before it runs."""

import torch
from torch import Tensor

from asyncopd.ops import checks


def prepare_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gather a sharded head, follow autocast as `F.linear` would, and check the rest."""
    weight, bias = _whole("lm_head_weight", weight), None if bias is None else _whole("bias", bias)
    dtype = _autocast_dtype(hidden) if isinstance(hidden, Tensor) else None
    if dtype is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    checks.check_head(hidden, weight, bias, temperature, logit_scale, softcap)
    return hidden, weight, bias


def head_dtype(hidden: Tensor) -> torch.dtype:
    """What the head is multiplied in."""
    return _autocast_dtype(hidden) or hidden.dtype


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    device = hidden.device.type
    if device == "meta" or hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _whole(name: str, tensor: Tensor) -> Tensor:
    """An FSDP2 / tensor-parallel parameter (DTensor) as the whole tensor; its gradient is scattered back.

    The gradient is the mean over the ranks, as FSDP makes it of every other parameter; ranks that all see the same rows
    (tensor parallelism) get the gradient of those rows either way.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(tensor, DTensor)
    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
