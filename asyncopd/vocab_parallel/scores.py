"""Scores [N, K] of a split head at ids of the whole vocabulary, the same on every rank, and their gradient.

Each rank runs the plain ops on its part with the ids that it holds. With the parts' LSE_r:
    LSE = log sum_r exp(LSE_r)        log p = (log p_r - LSE) + LSE_r where the id is held, summed over the ranks
    dz_r = scatter(c at ids held here) - (sum of all c) exp(z_r - LSE)
An id that another rank holds goes to the backward as ELSEWHERE: it counts in that sum, and is scattered nowhere. So dW
and db are whole where they are, and dH is the sum over ranks of dz_r W_r, added up in fp32 and rounded once.
"""

from typing import Any

import torch
from torch import Tensor

from asyncopd.backends.reference.rows import PAD, check_ids_in_range, compute_dtype
from asyncopd.ops import checks
from asyncopd.ops.head import prepare_head
from asyncopd.vocab_parallel.shard import VocabShard, whole_logsumexp

_OPS = torch.ops.asyncopd


def vocab_parallel_scores(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    kind: str,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    shard: VocabShard,
) -> Tensor:
    """`gather_from_head` with a split head, see there for the kinds: weight [V_r, H], bias [V_r] or None.

    Pads have score 0, which no loss looks at.
    """
    shard.check_head(hidden, weight, bias)
    hidden, weight, bias = prepare_head(hidden, weight, bias, temperature, logit_scale, softcap)
    checks.check_ids("ids", ids, hidden, "hidden")
    if not torch.compiler.is_compiling():  # which cannot refuse what it does not see
        check_ids_in_range(ids, shard.vocab)
    head = (hidden, weight, bias)
    scalars = (float(temperature), float(logit_scale), softcap)
    if kind == "logprobs":
        return _LogProbs.apply(*head, ids, mask, scalars, shard)
    logits = _Logits.apply(*head, ids, mask, scalars, shard)
    if kind == "logits":
        return logits
    with torch.no_grad():
        lse = whole_logsumexp(shard.gather(_OPS.linear_logsumexp(*head, mask, *scalars))).to(logits.dtype)
    return logits - lse[:, None]


def _from_holders(scores: Tensor, local: Tensor, ids: Tensor, shard: VocabShard) -> Tensor:
    """Each score from the one rank that holds its id; all others add 0, so nothing is rounded."""
    # A device cannot refuse an id: this one nobody holds, and it shows.
    return shard.sum(torch.where(local >= 0, scores, 0.0)).masked_fill_((ids >= shard.vocab) | (ids < PAD), torch.nan)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        mask: Tensor | None,
        scalars: tuple[float, float, float | None],
        shard: VocabShard,
    ) -> Tensor:
        local = shard.local_ids(ids)
        part, part_lse = _OPS.linear_gather_logprobs(hidden, weight, local.clamp(min=PAD), bias, mask, *scalars)
        lse = whole_logsumexp(shard.gather(part_lse))
        # Not inf - inf where this part is as infinite as the whole: its scores know already.
        shift = torch.where(part_lse == lse, 0.0, part_lse - lse).to(part.dtype)
        ctx.scalars, ctx.shard = scalars, shard
        ctx.save_for_backward(lse.to(part.dtype), hidden, weight, bias, mask, local)
        return _from_holders(part + shift[:, None], local, ids, shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lse, hidden, weight, bias, mask, local = ctx.saved_tensors
        gradients = _OPS.linear_gather_logprobs_backward(
            grad, _wide(hidden), weight, lse, local, bias, mask, *ctx.scalars, ctx.needs_input_grad[1]
        )
        return _finished(ctx, hidden, *gradients)


class _Logits(torch.autograd.Function):
    """Nothing here is V wide but dW: an id held elsewhere is a pad."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        mask: Tensor | None,
        scalars: tuple[float, float, float | None],
        shard: VocabShard,
    ) -> Tensor:
        local = shard.local_ids(ids)
        part = _OPS.linear_gather_logits(hidden, weight, local.clamp(min=PAD), bias, mask, *scalars)
        ctx.scalars, ctx.shard = scalars, shard
        ctx.save_for_backward(part, hidden, weight, bias, mask, local)
        return _from_holders(part, local, ids, shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        part, hidden, weight, bias, mask, local = ctx.saved_tensors
        gradients = _OPS.linear_gather_logits_backward(
            grad,
            part,
            _wide(hidden),
            weight,
            local.clamp(min=PAD),
            bias,
            mask,
            *ctx.scalars,
            ctx.needs_input_grad[1],
        )
        return _finished(ctx, hidden, *gradients)


def _wide(hidden: Tensor) -> Tensor:
    """In the dtype of sums, so that the ops leave this rank's part of dH unrounded."""
    return hidden.to(compute_dtype(hidden))


def _finished(ctx: Any, hidden: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor) -> tuple[Tensor | None, ...]:
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    return (
        ctx.shard.sum(dhidden).to(hidden.dtype) if need_hidden else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        None,
        None,
        None,
        None,
    )
