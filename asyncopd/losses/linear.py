"""The drop-in losses: language-model head, gather and divergence in one, never an [N, V] tensor.

Which head work a loss needs follows from dz = scatter(c at ids) - (sum_i c_i) softmax(z):

    normalize="sampled"                          K dot products a row each way, nothing vocabulary-wide
    coefficients that sum to 0 in every row      one vocabulary-wide forward for LSE, K rows of the head in the backward
    otherwise                                    vocabulary-wide forward and backward, tile by tile
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from asyncopd.losses.correction import Correction
from asyncopd.losses.kl import forward_kl, reverse_kl
from asyncopd.losses.options import Baseline, Normalize, Reduction, Tail
from asyncopd.ops import checks
from asyncopd.ops.gather import gather_from_head
from asyncopd.support import Support


def linear_reverse_kl(
    hidden: Tensor,
    lm_head_weight: Tensor,
    support: Support,
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
    """`reverse_kl` straight from hidden states; see there for the loss and its options.

    Args:
        hidden: [N, H] bf16, fp16, fp32 (or fp64), aligned: row n predicts the token that row n scores.
        lm_head_weight: [V, H] of the same dtype (under autocast both are cast). A sharded DTensor is gathered.
        support: K entries a row. mask: [N]; masked rows are not computed and may hold anything.
        bias: [V] or None. temperature: divides the logits; the teacher's scores must have been made with the same.
        logit_scale, softcap: as the model applies them.
    Returns: fp32 scalar (fp64 for fp64) or [N], with `return_metrics` (loss, LossMetrics); gradients reach hidden,
        weight and bias, accumulated in fp32.
    Raises: TypeError, ValueError naming the argument.
    """
    kind = _reverse_kl_head_work(normalize, tail, baseline, correction)
    mask = _check(hidden, support, mask)
    scores = gather_from_head(hidden, lm_head_weight, support.ids, mask, kind, bias, temperature, logit_scale, softcap)
    return reverse_kl(
        scores,
        support,
        mask=mask,
        normalize=normalize,
        tail=tail,
        baseline=baseline,
        correction=correction,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        return_metrics=return_metrics,
    )


def linear_forward_kl(
    hidden: Tensor,
    lm_head_weight: Tensor,
    support: Support,
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
    """`forward_kl` straight from hidden states; arguments as `linear_reverse_kl`."""
    mask = _check(hidden, support, mask)
    # Renormalised: c_i = p_i/P - q_i/Q, which sums to 0.
    kind = "centred" if tail == "renormalize" else "logprobs"
    scores = gather_from_head(hidden, lm_head_weight, support.ids, mask, kind, bias, temperature, logit_scale, softcap)
    return forward_kl(
        scores,
        support,
        mask=mask,
        tail=tail,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        return_metrics=return_metrics,
    )


def _check(hidden: Tensor, support: Support, mask: Tensor | None) -> Tensor | None:
    if not isinstance(support, Support):
        raise TypeError(f"support: got {type(support).__name__}, expected asyncopd.Support")
    return checks.check_mask(mask, hidden, "hidden")


def _reverse_kl_head_work(normalize: str, tail: str, baseline: str, correction: Correction | None) -> str:
    if normalize == "sampled":
        return "logits"
    centred = tail == "renormalize" or (tail == "drop" and baseline == "mean")
    return "centred" if centred and (correction is None or correction.keeps_zero_sum) else "logprobs"


class _LinearLoss(nn.Module):
    """A linear loss with its options bound."""

    _function: Callable[..., Any]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        support: Support,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        num_items_in_batch: int | float | Tensor | None = None,
    ) -> Any:
        return type(self)._function(
            hidden, lm_head_weight, support, mask=mask, bias=bias, num_items_in_batch=num_items_in_batch, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearReverseKLLoss(_LinearLoss):
    """`linear_reverse_kl` with its options bound: `loss_fn(hidden, lm_head_weight, support, mask=..., bias=...)`."""

    _function = staticmethod(linear_reverse_kl)

    def __init__(
        self,
        *,
        normalize: Normalize = "exact",
        tail: Tail = "drop",
        baseline: Baseline = "none",
        correction: Correction | None = None,
        reduction: Reduction = "mean",
        return_metrics: bool = False,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(
            normalize=normalize,
            tail=tail,
            baseline=baseline,
            correction=correction,
            reduction=reduction,
            return_metrics=return_metrics,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
        )


class LinearForwardKLLoss(_LinearLoss):
    """`linear_forward_kl` with its options bound."""

    _function = staticmethod(linear_forward_kl)

    def __init__(
        self,
        *,
        tail: Tail = "drop",
        reduction: Reduction = "mean",
        return_metrics: bool = False,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(
            tail=tail,
            reduction=reduction,
            return_metrics=return_metrics,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
        )
