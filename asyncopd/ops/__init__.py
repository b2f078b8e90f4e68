"""One file an op family: checks, the `torch.library` op with its fake and gradient, and the public function."""

from asyncopd.ops.accumulate import linear_gather_logits_into
from asyncopd.ops.extract import linear_topk_logprobs, topk_logprobs
from asyncopd.ops.gather import gather_logprobs
from asyncopd.ops.linear_gather import linear_gather_logprobs
from asyncopd.ops.sample import sample_support

__all__ = [
    "gather_logprobs",
    "linear_gather_logits_into",
    "linear_gather_logprobs",
    "linear_topk_logprobs",
    "sample_support",
    "topk_logprobs",
]
