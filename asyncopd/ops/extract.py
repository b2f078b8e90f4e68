"""Exact top-K log-probabilities of a policy, from logits or straight from hidden states."""

import torch
from torch import Tensor

from asyncopd.backends import select
from asyncopd.backends.reference.head import Head
from asyncopd.backends.reference.rows import compute_dtype
from asyncopd.ops import checks
from asyncopd.ops.head import prepare_head
from asyncopd.support import TopK


@torch.library.custom_op("asyncopd::topk_logprobs", mutates_args=())
def _topk_logprobs(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    return select("topk_logprobs", logits.device, logits.dtype)(logits, k, temperature)


@torch.library.custom_op("asyncopd::linear_topk_logprobs", mutates_args=())
def _linear_topk_logprobs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    run = select("linear_topk_logprobs", hidden.device, hidden.dtype)
    return run(hidden, Head(weight, bias, temperature, logit_scale, softcap), k)


def _fake_topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = rows.shape[0], compute_dtype(rows)
    return (
        rows.new_empty(n, k, dtype=torch.int64),
        rows.new_empty(n, k, dtype=dtype),
        rows.new_empty(n, dtype=dtype),
    )


_topk_logprobs.register_fake(lambda logits, k, temperature: _fake_topk(logits, k))
_linear_topk_logprobs.register_fake(lambda hidden, weight, k, *_: _fake_topk(hidden, k))


def topk_logprobs(logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
    """The k most probable ids of each row and their log-probabilities under softmax(logits / temperature).

    Args:
        logits: [N, V] bf16, fp16, fp32 or fp64, any row stride.
        k: 1..V; at most 1,024 on the backends of a GPU (triton, cuda).
        temperature: divides the logits.
    Returns: ids int64 [N, k] (value descending, id ascending among ties), logprobs [N, k] and logsumexp [N] in fp32
        (fp64 for fp64). A row with a NaN has NaN logprobs and logsumexp, and valid ids. No gradient.
    Raises: TypeError, ValueError naming the argument.
    """
    checks.check_matrix("logits", logits, "V")
    checks.check_count("k", k, 1, logits.shape[1], "V")
    checks.check_temperature(temperature)
    return TopK(*_topk_logprobs(logits.detach(), k, float(temperature)))


def linear_topk_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TopK:
    """`topk_logprobs` of the logits softcap(logit_scale (hidden W^T + bias)), which are never held whole.

    Args:
        hidden: [N, H]. lm_head_weight: [V, H] of the same dtype. bias: [V] or None.
        logit_scale, softcap: as the model applies them (scale first; softcap x becomes cap tanh(x / cap)).
    Returns and raises as `topk_logprobs`. Products are summed in fp32 whatever the dtype.
    """
    hidden, weight, bias = prepare_head(hidden, lm_head_weight, bias, temperature, logit_scale, softcap)
    checks.check_count("k", k, 1, weight.shape[0], "V")
    with torch.no_grad():
        out = _linear_topk_logprobs(
            hidden.detach(),
            weight.detach(),
            k,
            None if bias is None else bias.detach(),
            float(temperature),
            float(logit_scale),
            softcap,
        )
    return TopK(*out)
