"""The compiled module `asyncopd._C` and what the backends that call it share: codes, statuses, checks of tensors."""

import torch
from torch import Tensor

try:
    from asyncopd import _C
except ImportError as error:  # a checkout that was never built, or built for another Python
    _C = None  # type: ignore[assignment]
    _import_error = str(error)

# csrc/cpu/codes.h
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ID_TYPE_CODES = {torch.int32: 0, torch.int64: 1}
OK, BAD_ID, SAMPLED_SUPPORT, NO_POLICY = 0, 1, 3, 4


def unavailable_reason() -> str | None:
    """Why no compiled kernel can run here, as a sentence; None if they can."""
    if _C is None:
        return f"the compiled module asyncopd._C cannot be imported ({_import_error})"
    return None


def raise_for_status(status: int, name: str, vocab: int, ids: Tensor | None = None) -> None:
    """Turn what a launcher returned into the error that its caller should see; `ids` are named if they are given."""
    if status == BAD_ID and ids is not None:
        low, high = ids.aminmax()
        raise ValueError(f"ids: got values from {int(low)} to {int(high)}, expected -1 (pad) or 0..{vocab - 1}")
    if status == BAD_ID:
        raise ValueError(f"ids: got a value outside of -1 (pad) and 0..{vocab - 1}")
    if status != OK:
        raise RuntimeError(f"asyncopd._C.{name} refused its arguments (status {status})")


def check_logits(logits: Tensor, temperature: float) -> Tensor:
    """Logits with unit stride inside a row, or a TypeError or ValueError that says what is wrong with them.

    The callers have checked most of this; it is repeated because a kernel given raw pointers cannot.
    """
    if logits.dtype not in DTYPE_CODES:
        raise TypeError(f"logits: got {logits.dtype}, expected float32, bfloat16 or float16")
    if logits.dim() != 2:
        raise ValueError(f"logits: got shape {list(logits.shape)}, expected [N, V]")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a number above 0")
    return logits if logits.stride(1) == 1 else logits.contiguous()


def check_ids(ids: Tensor, like: Tensor, like_name: str) -> Tensor:
    """Contiguous ids [N, K] for the rows of `like`."""
    if ids.dtype not in ID_TYPE_CODES:
        raise TypeError(f"ids: got {ids.dtype}, expected int32 or int64")
    if ids.dim() != 2 or like.dim() != 2 or like.shape[0] != ids.shape[0]:
        raise ValueError(f"{like_name}, ids: got {list(like.shape)}, {list(ids.shape)}, expected [N, ..], [N, K]")
    if like.device != ids.device:
        raise ValueError(f"{like_name}, ids: got {like.device} and {ids.device}, expected one device")
    return ids.contiguous()
