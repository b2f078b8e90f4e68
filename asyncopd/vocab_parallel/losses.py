"""The drop-in losses with a head that is split by vocabulary."""

from typing import Any

from torch import Tensor

from asyncopd.backends.loss_spec import LossSpec
from asyncopd.losses.correction import Correction
from asyncopd.losses.kl import check_support, forward_spec, kl_of_scores, proximal_of, reverse_spec
from asyncopd.losses.linear import head_work
from asyncopd.losses.options import Baseline, Normalize, Reduction, Tail
from asyncopd.losses.reduce import check_reduction
from asyncopd.ops import checks
from asyncopd.support import Support
from asyncopd.vocab_parallel.scores import vocab_parallel_scores
from asyncopd.vocab_parallel.shard import VocabShard, check_shard


def vocab_parallel_linear_reverse_kl(
    hidden: Tensor,
    lm_head_weight: Tensor,
    support: Support,
    shard: VocabShard,
    *,
    mask: Tensor | None = None,
    normalize: Normalize = "exact",
    tail: Tail = "drop",
    baseline: Baseline = "none",
    correction: Correction | None = None,
    reduction: Reduction = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
    return_metrics: bool = False,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Any:
    """`linear_reverse_kl` with a head that is split by rows; see there for the loss and its options.

    Args:
        hidden: [N, H], the same on every rank, as are support (with ids of the whole vocabulary) and mask.
        lm_head_weight: [V_r, H], bias: [V_r] or None: this rank's rows, plain tensors.
        shard: made once by `VocabShard.of(V_r, group)`.
    Returns: as `linear_reverse_kl`, the same on every rank. Every rank has to take its gradient, with the same upstream
        gradient: then those of weight and bias are of this rank's rows, and that of hidden is whole, on every rank.
    Raises: TypeError, ValueError naming the argument.
    """
    check_support(support)
    spec = reverse_spec(support, normalize, tail, baseline, correction, return_metrics)
    scalars = (temperature, logit_scale, softcap)
    return _vocab_parallel_kl(
        hidden,
        lm_head_weight,
        bias,
        support,
        shard,
        mask,
        scalars,
        spec,
        proximal_of(correction),
        reduction,
        num_items_in_batch,
    )


def vocab_parallel_linear_forward_kl(
    hidden: Tensor,
    lm_head_weight: Tensor,
    support: Support,
    shard: VocabShard,
    *,
    mask: Tensor | None = None,
    tail: Tail = "drop",
    reduction: Reduction = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
    return_metrics: bool = False,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Any:
    """`linear_forward_kl` with a head that is split by rows; arguments as `vocab_parallel_linear_reverse_kl`."""
    check_support(support)
    spec = forward_spec(support, tail, return_metrics)
    scalars = (temperature, logit_scale, softcap)
    return _vocab_parallel_kl(
        hidden, lm_head_weight, bias, support, shard, mask, scalars, spec, None, reduction, num_items_in_batch
    )


def _vocab_parallel_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    support: Support,
    shard: VocabShard,
    mask: Tensor | None,
    scalars: tuple[float, float, float | None],
    spec: LossSpec,
    proximal: Tensor | None,
    reduction: str,
    num_items: int | float | Tensor | None,
) -> Any:
    check_shard(shard)
    check_reduction(reduction, num_items)
    mask = checks.check_mask(mask, hidden, "hidden")
    scores = vocab_parallel_scores(hidden, weight, support.ids, mask, head_work(spec), bias, *scalars, shard)
    # The [N, K] loss is every rank's own: the same numbers, made by the same code.
    return kl_of_scores(scores, support, mask, proximal, spec, reduction, num_items)
