"""The losses and extraction for a head split by vocabulary over a torch.distributed group (tensor parallelism).

Rank r of the group holds consecutive rows of the head (or columns of the logits), the ranks' parts following each other
in the order of ranks; their sizes may differ. Hidden states, support, mask and everything else are the same on all
ranks of the group, and so is what is returned. Each function takes a `VocabShard`, made once, and otherwise the
arguments of its plain form, every option of which works:

    vocab_parallel_topk_logprobs(logits, k, shard, ...)                          topk_logprobs
    vocab_parallel_linear_topk_logprobs(hidden, lm_head_weight, k, shard, ...)   linear_topk_logprobs
    vocab_parallel_linear_reverse_kl(hidden, lm_head_weight, support, shard, ...)  linear_reverse_kl
    vocab_parallel_linear_forward_kl(hidden, lm_head_weight, support, shard, ...)  linear_forward_kl

What travels, for N rows: top-K one all_gather of 2 min(K, V_r) + 1 numbers a row (value, id, LSE); the losses one
all_gather of LSE (a number a row), one all_reduce of the [N, K] scores and, in the backward, one all_reduce of the
gradient [N, H] of the hidden states, in fp32. The gradients of weight and bias are complete where they are. Nothing of
size N x V_r exists anywhere. Each rank's products with its part of the head are 2 N V_r H in the forward and 6 N V_r H
in the backward, which computes the logits again: no gradient can be made before the other ranks' LSE is there.
"""

from asyncopd.vocab_parallel.extract import vocab_parallel_linear_topk_logprobs, vocab_parallel_topk_logprobs
from asyncopd.vocab_parallel.losses import vocab_parallel_linear_forward_kl, vocab_parallel_linear_reverse_kl
from asyncopd.vocab_parallel.shard import VocabShard

__all__ = [
    "VocabShard",
    "vocab_parallel_linear_forward_kl",
    "vocab_parallel_linear_reverse_kl",
    "vocab_parallel_linear_topk_logprobs",
    "vocab_parallel_topk_logprobs",
]
