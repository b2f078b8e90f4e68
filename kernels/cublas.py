"""16-bit products by cuBLAS that are summed in fp32 and rounded once, whatever torch's settings say.

cuBLAS may split a sum (split-K) and round its parts to 16 bits before it adds them; torch lets it, unless
`allow_bf16_reduced_precision_reduction` (and its fp16 twin) is False. That is one setting of the whole process, so it
is changed for the time of the call only: torch reads it on the host when it chooses the algorithm. While several
threads are inside, the first to enter has saved the setting and the last to leave restores it. A product that another
thread starts in that time is summed in fp32 too.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_SETTINGS = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}
_lock = threading.Lock()
_inside = dict.fromkeys(_SETTINGS, 0)  # threads
_saved: dict[torch.dtype, tuple[bool, bool]] = {}  # reduced precision, split-K


def _read(setting: str) -> tuple[bool, bool]:
    matmul = torch.backends.cuda.matmul
    return bool(getattr(matmul, setting)), bool(getattr(matmul, f"{setting}_split_k", True))


def _write(setting: str, reduced: bool, split_k: bool) -> None:
    # A bool alone means that sums may be split, and is all that older versions take.
    setattr(torch.backends.cuda.matmul, setting, reduced if split_k else (reduced, split_k))


@contextmanager
def fp32_reductions(dtype: torch.dtype) -> Iterator[None]:
    """Products of this 16-bit dtype add the parts of a sum in fp32 inside; the setting is as before afterwards."""
    setting = _SETTINGS[dtype]
    with _lock:
        if _inside[dtype] == 0:
            _saved[dtype] = reduced, split_k = _read(setting)
            if reduced:
                _write(setting, False, split_k)
        _inside[dtype] += 1
    try:
        yield
    finally:
        with _lock:
            _inside[dtype] -= 1
            if _inside[dtype] == 0 and _saved[dtype][0]:
                _write(setting, *_saved[dtype])


def rounds_once(out: Tensor) -> bool:
    """Whether `mm_rounded_once` can make it: not where fp16 sums themselves are switched on."""
    if out.dtype == torch.float16:
        return not torch.backends.cuda.matmul.allow_fp16_accumulation
    return out.dtype == torch.bfloat16


def mm_rounded_once(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out[M, N] = a[M, K] @ b[K, N], all of one 16-bit dtype, on a CUDA device."""
    with fp32_reductions(out.dtype):
        torch.mm(a, b, out=out)
