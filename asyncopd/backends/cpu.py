"""The `cpu` backend: C++ kernels of csrc/cpu, compiled into `asyncopd._C`.

`gather_logprobs` reads the logits once, whatever K is. fp32, bf16 and fp16 logits; all arithmetic on
sums is fp32 inside a block of columns and fp64 across blocks.
"""

import torch
from torch import Tensor

try:
    from asyncopd import _C
except ImportError as error:  # a checkout that was never built, or built for another Python
    _C = None  # type: ignore[assignment]
    _import_error = str(error)

# Codes of csrc/cpu/gather.h, shared with the CUDA backend.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ID_TYPE_CODES = {torch.int32: 0, torch.int64: 1}
_OK, _BAD_ID = 0, 1


def unavailable_reason() -> str | None:
    """Why this backend cannot run here, as a sentence; None if it can."""
    if _C is None:
        return f"the compiled module asyncopd._C cannot be imported ({_import_error})"
    return None


def gather_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits [N, V], ids [N, K] on the CPU -> fp32 log-probabilities [N, K] and LSE [N] of logits / temperature.

    Pads (id -1) and -inf logits give -inf; a row with a NaN gives NaN. Uses `torch.get_num_threads()` threads, and
    the result does not depend on their number. Any row stride is taken as it is; rows whose elements are not
    contiguous are copied first. Raises ValueError for ids outside [-1, V).
    """
    return _gather_logprobs(logits, ids, temperature)


def _gather_logprobs(
    logits: Tensor, ids: Tensor, temperature: float, *, threads: int | None = None, isa: int = -1
) -> tuple[Tensor, Tensor]:
    """As `gather_logprobs`; tests also choose the threads and the instruction set (`_C.cpu_isas()`)."""
    logits, ids = check_and_lay_out(logits, ids, temperature)
    (rows, vocab), num_ids = logits.shape, ids.shape[1]
    logprobs = torch.empty((rows, num_ids), dtype=torch.float32)
    lse = torch.empty(rows, dtype=torch.float32)
    status = _C.cpu_gather_logprobs(
        logits=logits.data_ptr(),
        dtype=DTYPE_CODES[logits.dtype],
        row_stride=logits.stride(0),
        ids=ids.data_ptr(),
        id_type=ID_TYPE_CODES[ids.dtype],
        rows=rows,
        vocab=vocab,
        num_ids=num_ids,
        inv_temperature=1.0 / temperature,
        logprobs=logprobs.data_ptr(),
        lse=lse.data_ptr(),
        threads=torch.get_num_threads() if threads is None else threads,
        isa=isa,
    )
    if status == _BAD_ID:
        raise ValueError(f"ids: got a value outside of -1 (pad) and 0..{vocab - 1}")
    if status != _OK:
        raise RuntimeError(f"asyncopd._C.cpu_gather_logprobs refused its arguments (status {status}, isa {isa})")
    return logprobs, lse


def check_and_lay_out(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits with unit stride inside a row and contiguous ids, or a TypeError or ValueError that says what is wrong.

    The callers have checked most of this; it is repeated because a kernel given raw pointers cannot.
    """
    if logits.dtype not in DTYPE_CODES:
        raise TypeError(f"logits: got {logits.dtype}, expected float32, bfloat16 or float16")
    if ids.dtype not in ID_TYPE_CODES:
        raise TypeError(f"ids: got {ids.dtype}, expected int32 or int64")
    if logits.dim() != 2 or ids.dim() != 2 or logits.shape[0] != ids.shape[0]:
        raise ValueError(f"logits, ids: got {list(logits.shape)}, {list(ids.shape)}, expected [N, V], [N, K]")
    if logits.device != ids.device:
        raise ValueError(f"logits, ids: got {logits.device} and {ids.device}, expected one device")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a number above 0")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    return logits, ids.contiguous()
