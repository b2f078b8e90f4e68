"""The `cpu` backend: C++ kernels of csrc/cpu, compiled into `asyncopd._C`.

Every op uses `torch.get_num_threads()` threads. The kernels give the same bits whatever their number and whatever the
batch; the matrix products of the exact head are torch's, which promises neither. fp32, bf16 and fp16 tensors; sums are
fp32 inside a block and fp64 across blocks. Each function here has the arguments and the meaning of its namesake in the
reference.
"""

from asyncopd.backends.cpu.head import (
    linear_gather_logprobs,
    linear_gather_logprobs_backward,
    linear_logsumexp,
    linear_topk_logprobs,
)
from asyncopd.backends.cpu.head_loss import linear_kl
from asyncopd.backends.cpu.kl import kl_loss, kl_rows, scale_rows_
from asyncopd.backends.cpu.logits import gather_logprobs, gather_logprobs_backward, sample_support, topk_logprobs
from asyncopd.backends.cpu.sparse_head import (
    linear_gather_logits,
    linear_gather_logits_backward,
    linear_gather_logits_backward_into,
)
from asyncopd.backends.native import unavailable_reason
from asyncopd.backends.reference.linear_kl import scale_gradient_

__all__ = [
    "gather_logprobs",
    "gather_logprobs_backward",
    "kl_loss",
    "kl_rows",
    "linear_gather_logits",
    "linear_gather_logits_backward",
    "linear_gather_logits_backward_into",
    "linear_gather_logprobs",
    "linear_gather_logprobs_backward",
    "linear_kl",
    "linear_logsumexp",
    "linear_topk_logprobs",
    "sample_support",
    "scale_gradient_",
    "scale_rows_",
    "topk_logprobs",
    "unavailable_reason",
]
