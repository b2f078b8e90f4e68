"""The `cpu` backend: C++ kernels of csrc/cpu, compiled into `asyncopd._C`.

Every op uses `torch.get_num_threads()` threads and gives the same bits whatever their number and whatever the batch.
fp32, bf16 and fp16 tensors; sums are fp32 inside a block and fp64 across blocks. Each function here has the signature
and the meaning of its namesake in the reference.
"""

from asyncopd.backends.cpu.kl import kl_rows
from asyncopd.backends.cpu.logits import gather_logprobs, gather_logprobs_backward, sample_support, topk_logprobs
from asyncopd.backends.native import unavailable_reason

__all__ = [
    "gather_logprobs",
    "gather_logprobs_backward",
    "kl_rows",
    "sample_support",
    "topk_logprobs",
    "unavailable_reason",
]
