"""What every launcher shares: checks, scales, padded sizes, the device. Nothing here synchronises."""

import math
import os
import struct
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

# Decided when Triton decorates the kernels, so it is read once.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_TYPE = "cpu" if INTERPRET else "cuda"  # of the tensors that kernels take
LARGEST = torch.finfo(torch.float32).max
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Scale(NamedTuple):
    """1 / temperature and log2(e) / temperature, each as the sum of two floats, in the order that kernels take them."""

    t: float
    t_low: float
    scale: float
    scale_low: float

    @classmethod
    def of(cls, temperature: float) -> "Scale":
        return cls(*float_pair(1.0 / temperature), *float_pair(math.log2(math.e) / temperature))


def float_pair(value: float) -> tuple[float, float]:
    """An fp64 number as the sum of two fp32 ones; the largest finite one of its sign where it is too large."""
    high = _as_fp32(max(-LARGEST, min(value, LARGEST)))
    return high, _as_fp32(value - high) if abs(value) < LARGEST else 0.0


def _as_fp32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def check_logits(logits: Tensor, temperature: float) -> Tensor:
    """Logits with unit stride inside a row, or an error that says what is wrong with them."""
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits: got {logits.dtype}, expected float32, bfloat16 or float16")
    if logits.dim() != 2:
        raise ValueError(f"logits: got shape {list(logits.shape)}, expected [N, V]")
    if logits.device.type != DEVICE_TYPE:
        raise ValueError(f"logits: got device {logits.device}, expected {DEVICE_TYPE}")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a number above 0")
    return logits if logits.stride(1) == 1 else logits.contiguous()


def check_ids(ids: Tensor, logits: Tensor) -> Tensor:
    """Contiguous ids [N, K] beside logits [N, V]."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: got {ids.dtype}, expected int32 or int64")
    if ids.dim() != 2 or ids.shape[0] != logits.shape[0]:
        raise ValueError(f"ids: got shape {list(ids.shape)}, expected [{logits.shape[0]}, K] as logits has rows")
    if ids.device != logits.device:
        raise ValueError(f"ids: got device {ids.device}, expected {logits.device} as logits")
    return ids.contiguous()


def on_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device and its current stream."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def padded(n: int, least: int) -> int:
    """The power of two that a block of n needs."""
    return max(least, triton.next_power_of_2(n))


def warps_for(elements: int, per_thread: int) -> int:
    """Warps such that a thread holds about `per_thread` of a block's elements, within what an SM allows."""
    return min(32, max(4, triton.next_power_of_2(-(-elements // (32 * per_thread)))))
