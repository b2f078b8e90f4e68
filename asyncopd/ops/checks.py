"""Argument checks that read shapes, dtypes and devices only, so they cost nothing and work on fake tensors."""

import math

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_matrix(name: str, value: Tensor, columns: str) -> None:
    """A float matrix [N, columns] of a dtype that logits and hidden states come in."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    if value.dim() != 2:
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected [N, {columns}]; flatten batch and length")
    if value.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name}: got {value.dtype}, expected bfloat16, float16, float32 or float64")


def check_ids(name: str, ids: Tensor, like: Tensor, like_name: str) -> None:
    """Integer ids [N, K] beside the rows of `like`. Their range is checked where they are read."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: got {type(ids).__name__}, expected a tensor")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {ids.dtype}, expected int32 or int64")
    if ids.dim() != 2 or ids.shape[0] != like.shape[0]:
        raise ValueError(f"{name}: got shape {list(ids.shape)}, expected [{like.shape[0]}, K] as {like_name} has rows")
    check_device(name, ids, like, like_name)


def check_device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: got device {value.device}, expected {like.device} as {like_name}")


def check_row_vector(name: str, value: Tensor, like: Tensor, like_name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """A vector [N], one entry a row of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: got {value.dtype}, expected {' or '.join(str(d) for d in dtypes)}")
    if value.shape != like.shape[:1]:
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected [{like.shape[0]}] as {like_name} has rows")
    check_device(name, value, like, like_name)


def check_mask(mask: Tensor | None, like: Tensor, like_name: str) -> Tensor | None:
    """A bool or 0/1 mask [N], as bool."""
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.is_floating_point():
        mask = mask.bool()
    integers = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    check_row_vector("mask", mask, like, like_name, integers)
    return mask.bool()


def check_count(name: str, value: int, low: int, high: int | None, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"{low}..{high}"
        raise ValueError(f"{name}: got {value}, expected {bounds} ({what})")


def check_temperature(value: float) -> None:
    """Within what the fp32 kernels can divide by: beyond, a logit of -inf would not be told from one that is small."""
    check_positive("temperature", value)
    if not 1e-30 <= value <= 1e30:
        raise ValueError(f"temperature: got {value}, expected a number from 1e-30 to 1e30")


def check_positive(name: str, value: float | None) -> None:
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value}, expected a finite number above 0")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """A language-model head: hidden [N, H], weight [V, H], bias [V]."""
    check_matrix("hidden", hidden, "H")
    check_matrix("lm_head_weight", weight, "H")
    check_device("lm_head_weight", weight, hidden, "hidden")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"lm_head_weight: got shape {list(weight.shape)}, expected [V, {hidden.shape[1]}] as hidden has columns"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"lm_head_weight: got shape {list(weight.shape)}, expected at least one row (V)")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"lm_head_weight: got {weight.dtype}, expected {hidden.dtype} as hidden (or use autocast)")
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype not in LOGIT_DTYPES:
            got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
            raise TypeError(f"bias: got {got}, expected a tensor of a float dtype")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: got shape {list(bias.shape)}, expected [{weight.shape[0]}]")
        check_device("bias", bias, hidden, "hidden")
    check_temperature(temperature)
    check_positive("softcap", softcap)
    if not isinstance(logit_scale, int | float):
        raise TypeError(f"logit_scale: got {type(logit_scale).__name__}, expected a number")
    if not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale: got {logit_scale}, expected a finite number other than 0")
