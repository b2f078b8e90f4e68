"""Exact top-K over a split vocabulary: the K best of every shard's K best, merged alike on all ranks."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from asyncopd.backends.reference.rows import compute_dtype, normalized
from asyncopd.ops import checks
from asyncopd.ops.head import prepare_head
from asyncopd.support import TopK
from asyncopd.vocab_parallel.shard import VocabShard, check_shard, whole_logsumexp

_OPS = torch.ops.asyncopd


@torch.no_grad()
def vocab_parallel_topk_logprobs(logits: Tensor, k: int, shard: VocabShard, *, temperature: float = 1.0) -> TopK:
    """`topk_logprobs` of logits that are split by columns.

    Args:
        logits: [N, V_r], this rank's columns.
        k: 1..V, of the whole vocabulary; it may be more than V_r.
        shard: made once by `VocabShard.of(V_r, group)`.
        temperature: divides the logits.
    Returns: as `topk_logprobs`, the same on every rank; ids are those of the whole vocabulary.
    Raises: TypeError, ValueError naming the argument.
    """
    check_shard(shard)
    checks.check_matrix("logits", logits, "V_r")
    shard.check_size("logits", logits.shape, logits.shape[1])
    checks.check_count("k", k, 1, shard.vocab, "V")
    checks.check_temperature(temperature)
    ids, _, lse = _OPS.topk_logprobs(logits, min(k, shard.size), float(temperature))
    return _merge(logits.gather(1, ids).to(lse.dtype), ids, lse, k, float(temperature), shard)


@torch.no_grad()
def vocab_parallel_linear_topk_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    k: int,
    shard: VocabShard,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TopK:
    """`linear_topk_logprobs` with a head that is split by rows.

    Args:
        hidden: [N, H], the same on every rank. lm_head_weight: [V_r, H], bias: [V_r] or None, this rank's rows.
        k, shard: see `vocab_parallel_topk_logprobs`. The others: see `linear_topk_logprobs`.
    Returns and raises as `vocab_parallel_topk_logprobs`.
    """
    check_shard(shard)
    shard.check_head(hidden, lm_head_weight, bias)
    hidden, weight, bias = prepare_head(hidden, lm_head_weight, bias, temperature, logit_scale, softcap)
    checks.check_count("k", k, 1, shard.vocab, "V")
    head = (bias, float(temperature), float(logit_scale), softcap)
    ids, _, lse = _OPS.linear_topk_logprobs(hidden, weight, min(k, shard.size), *head)
    # The logits themselves decide between shards, and log-probabilities have lost digits of them: so K dot products.
    # By ascending id, because these may tie where the logits that chose the ids differed in their last digit.
    ids = ids.sort(dim=1).values
    values = _OPS.linear_gather_logits(hidden, weight, ids, bias, None, 1.0, float(logit_scale), softcap)
    return _merge(values, ids, lse, k, float(temperature), shard)


def _merge(values: Tensor, ids: Tensor, lse: Tensor, k: int, temperature: float, shard: VocabShard) -> TopK:
    """This shard's min(k, V_r) best (logits before the temperature, columns; equal ones by id) and LSE -> TopK.

    Shards follow each other by id, so among equal logits the one met first has the smaller id, as it should be.
    """
    dtype = compute_dtype(values)
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    counts = [min(k, size) for size in shard.sizes]
    width = max(counts)
    fill = (0, width - values.shape[1])
    # One message: bits travel as they are.
    message = [pad(values, fill).view(integer), pad(ids + shard.offset, fill).to(integer), lse[:, None].view(integer)]
    parts = shard.gather(torch.cat(message, dim=1)).unbind(0)
    values = torch.cat([part[:, :n] for part, n in zip(parts, counts, strict=True)], dim=1).view(dtype)
    candidates = torch.cat([part[:, width : width + n] for part, n in zip(parts, counts, strict=True)], dim=1).long()
    whole = whole_logsumexp(torch.stack([part[:, -1] for part in parts]).view(dtype)).to(dtype)
    order = _OPS.topk_logprobs(values, k, 1.0)[0]
    ids = candidates.gather(1, order)
    return TopK(ids, normalized(values.gather(1, order) / temperature, whole, ids), whole)
