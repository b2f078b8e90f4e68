"""AsyncOPD: kernels, losses and an asynchronous pipeline for on-policy distillation of language models."""

from asyncopd.losses import (
    Correction,
    LinearForwardKLLoss,
    LinearReverseKLLoss,
    LossMetrics,
    forward_kl,
    linear_forward_kl,
    linear_reverse_kl,
    reverse_kl,
)
from asyncopd.ops import (
    gather_logprobs,
    linear_gather_logprobs,
    linear_topk_logprobs,
    sample_support,
    topk_logprobs,
)
from asyncopd.support import AlignedRows, Draw, Support, TopK, align_rows
from asyncopd.vocab_parallel import (
    VocabShard,
    vocab_parallel_linear_forward_kl,
    vocab_parallel_linear_reverse_kl,
    vocab_parallel_linear_topk_logprobs,
    vocab_parallel_topk_logprobs,
)

__version__ = "0.1.0"

__all__ = [
    "AlignedRows",
    "Correction",
    "Draw",
    "LinearForwardKLLoss",
    "LinearReverseKLLoss",
    "LossMetrics",
    "Support",
    "TopK",
    "VocabShard",
    "align_rows",
    "forward_kl",
    "gather_logprobs",
    "linear_forward_kl",
    "linear_gather_logprobs",
    "linear_reverse_kl",
    "linear_topk_logprobs",
    "reverse_kl",
    "sample_support",
    "topk_logprobs",
    "vocab_parallel_linear_forward_kl",
    "vocab_parallel_linear_reverse_kl",
    "vocab_parallel_linear_topk_logprobs",
    "vocab_parallel_topk_logprobs",
]
