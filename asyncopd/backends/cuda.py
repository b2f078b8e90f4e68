"""The `cuda` backend: CUDA kernels of csrc/cuda, compiled into `asyncopd._C` where nvcc was found.

Not yet run on a GPU: the kernels are compiled and inspected (no spills, no fp64 arithmetic), and tested on a CPU,
thread by thread (tests/cuda_on_host).
"""

import torch
from torch import Tensor

from asyncopd.backends import native
from asyncopd.backends.native import _C, DTYPE_CODES, ID_TYPE_CODES, OK, check_ids, check_logits

# csrc/cuda/row.cuh and topk.cu
MAX_VOCAB = 1 << 30
MAX_K = 1024


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
    logits, ids = _check_logits(logits, temperature), check_ids(ids, logits, "logits")
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
    _raise_for_status(status, "cuda_gather_logprobs")
    return logprobs, lse


def topk_logprobs(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, V] -> ids int64 [N, k], log-probabilities fp32 [N, k], LSE [N]; k up to 1024. One read of the logits.

    Queued on the current stream, without synchronising. A row's results are the same whatever is beside it.
    """
    logits = _check_logits(logits, temperature)
    (rows, vocab), dtype = logits.shape, DTYPE_CODES[logits.dtype]
    if not 1 <= k <= min(vocab, MAX_K):
        raise ValueError(f"k: got {k}, expected 1..{min(vocab, MAX_K)} on the cuda backend (V = {vocab})")
    ids = torch.empty((rows, k), dtype=torch.int64, device=logits.device)
    logprobs = torch.empty((rows, k), dtype=torch.float32, device=logits.device)
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    multiprocessors = torch.cuda.get_device_properties(logits.device).multi_processor_count
    parts = _C.cuda_topk_parts(dtype, rows, vocab, k, multiprocessors)
    scratch_bytes = _C.cuda_topk_scratch_bytes(dtype, rows, vocab, k, parts)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=logits.device)
    with torch.cuda.device(logits.device):
        status = _C.cuda_topk_logprobs(
            logits=logits.data_ptr(),
            dtype=dtype,
            row_stride=logits.stride(0),
            rows=rows,
            vocab=vocab,
            k=k,
            inv_temperature=1.0 / temperature,
            parts=parts,
            scratch=scratch.data_ptr(),
            ids=ids.data_ptr(),
            logprobs=logprobs.data_ptr(),
            lse=lse.data_ptr(),
            device=logits.device.index,
            stream=torch.cuda.current_stream(logits.device).cuda_stream,
        )
    _raise_for_status(status, "cuda_topk_logprobs")
    return ids, logprobs, lse


def _check_logits(logits: Tensor, temperature: float) -> Tensor:
    logits = check_logits(logits, temperature)
    if logits.device.type != "cuda":
        raise ValueError(f"logits: got device {logits.device}, expected cuda")
    if logits.shape[1] > MAX_VOCAB:
        raise ValueError(f"logits: got V = {logits.shape[1]}, expected at most {MAX_VOCAB} on the cuda backend")
    return logits


def _raise_for_status(status: int, name: str) -> None:
    if status < 0:
        raise RuntimeError(f"asyncopd._C.{name}: CUDA error {-status} from the launch")
    if status != OK:
        raise RuntimeError(f"asyncopd._C.{name} refused its arguments (status {status})")
