"""The specification: every op in plain torch, any device, any float dtype, fp64 included.

Each function takes tensors that `asyncopd.ops` has already checked. Accumulation is fp32, or fp64 for fp64 inputs.
Nothing here ever holds an [N, V] tensor that its caller did not pass in: rows are walked in chunks.
"""

from asyncopd.backends.reference.accumulate import linear_gather_logits_backward_into
from asyncopd.backends.reference.extract import linear_topk_logprobs, topk_logprobs
from asyncopd.backends.reference.gather import gather_logprobs, gather_logprobs_backward
from asyncopd.backends.reference.kl import kl_rows
from asyncopd.backends.reference.kl_loss import kl_loss, scale_rows_
from asyncopd.backends.reference.linear import (
    linear_gather_logits,
    linear_gather_logits_backward,
    linear_gather_logprobs,
    linear_gather_logprobs_backward,
    linear_logsumexp,
)
from asyncopd.backends.reference.linear_kl import linear_kl, scale_gradient_
from asyncopd.backends.reference.sample import sample_support

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
]


def unavailable_reason() -> str | None:
    """Plain torch runs everywhere."""
    return None
