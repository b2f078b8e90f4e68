"""The `cuda` backend: CUDA kernels of csrc/cuda, compiled into `asyncopd._C` where nvcc was found.

Not yet run on a GPU: the kernels are compiled and inspected (no spills, no fp64 arithmetic), nothing more.
"""

import torch
from torch import Tensor

from asyncopd.backends import native
from asyncopd.backends.native import _C, DTYPE_CODES, ID_TYPE_CODES, check_ids, check_logits


def unavailable_reason() -> str | None:
    """Why this backend cannot run here, as a sentence; None if it can."""
    reason = native.unavailable_reason()
    if reason is not None:
        return reason
    if not _C.cuda:
        return "asyncopd was built without CUDA kernels (no nvcc was found then)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def gather_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits [N, V], ids [N, K] on one GPU -> fp32 log-probabilities [N, K] and LSE [N] of logits / temperature.

    Queued on the current stream, without synchronising; so an id outside [-1, V) cannot raise: it is not read and
    gives NaN. Otherwise as the cpu backend's function.
    """
    logits, ids = check_logits(logits, temperature), check_ids(ids, logits, "logits")
    if logits.device.type != "cuda":
        raise ValueError(f"logits: got device {logits.device}, expected cuda")
    (rows, vocab), num_ids = logits.shape, ids.shape[1]
    logprobs = torch.empty((rows, num_ids), dtype=torch.float32, device=logits.device)
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    # The launcher makes the logits' device current; the context keeps torch's view the same, and restores it.
    with torch.cuda.device(logits.device):
        status = _C.cuda_gather_logprobs(
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
            device=logits.device.index,
            stream=torch.cuda.current_stream(logits.device).cuda_stream,
        )
    if status != 0:
        raise RuntimeError(f"asyncopd._C.cuda_gather_logprobs failed with status {status}")
    return logprobs, lse
