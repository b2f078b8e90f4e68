"""The drop-in losses: language-model head, gather and divergence in one, never an [N, V] tensor.

Which head work a loss needs follows from dz = scatter(c at ids) - (sum_i c_i) softmax(z):

    normalize="sampled"                          K dot products a row each way, nothing vocabulary-wide
    coefficients that sum to 0 in every row      one vocabulary-wide forward for LSE, K rows of the head in the backward
    otherwise                                    vocabulary-wide forward and backward, tile by tile: in one op that
                                                 makes the gradients in the forward, if the loss is a mean or a sum
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from asyncopd.backends.loss_spec import LossMetrics, LossSpec
from asyncopd.backends.reference.kl_loss import as_divisor
from asyncopd.backends.reference.rows import compute_dtype
from asyncopd.losses.correction import Correction
from asyncopd.losses.kl import check_support, forward_spec, kl_of_scores, proximal_of, reverse_spec
from asyncopd.losses.options import Baseline, Normalize, Reduction, Tail
from asyncopd.losses.reduce import check_reduction, denominator
from asyncopd.ops import checks
from asyncopd.ops.head import head_dtype, prepare_head
from asyncopd.ops.linear_gather import gather_from_head
from asyncopd.ops.linear_kl import loss_and_metrics
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
    check_support(support)
    spec = reverse_spec(support, normalize, tail, baseline, correction, return_metrics)
    return _linear_kl(
        hidden,
        lm_head_weight,
        bias,
        support,
        mask,
        (temperature, logit_scale, softcap),
        spec,
        proximal_of(correction),
        reduction,
        num_items_in_batch,
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
    check_support(support)
    return _linear_kl(
        hidden,
        lm_head_weight,
        bias,
        support,
        mask,
        (temperature, logit_scale, softcap),
        forward_spec(support, tail, return_metrics),
        None,
        reduction,
        num_items_in_batch,
    )


def _linear_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    support: Support,
    mask: Tensor | None,
    scalars: tuple[float, float, float | None],
    spec: LossSpec,
    proximal: Tensor | None,
    reduction: str,
    num_items: int | float | Tensor | None,
) -> Any:
    check_reduction(reduction, num_items)
    mask = checks.check_mask(mask, hidden, "hidden")
    work = head_work(spec)
    leaves = (hidden, weight) if bias is None else (hidden, weight, bias)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
    # M2PO's threshold depends on all rows, so no row's gradient is known before every row's score is. fp16 gradients
    # would be rounded before the scale of the loss is known (GradScaler) that is to keep them from being 0.
    early = spec.m2_budget is None and reduction != "none" and head_dtype(hidden) != torch.float16
    if work == "logprobs" and trains and early:
        return _with_gradients(hidden, weight, bias, support, mask, scalars, spec, proximal, reduction, num_items)
    scores = gather_from_head(hidden, weight, support.ids, mask, work, bias, *scalars)
    return kl_of_scores(scores, support, mask, proximal, spec, reduction, num_items)


def head_work(spec: LossSpec) -> str:
    """Which of the three kinds above, as `gather_from_head` calls them: "logits", "centred" or "logprobs"."""
    if spec.normalize == "sampled":
        return "logits"
    # Forward, renormalised: c_i = p_i/P - q_i/Q, which sums to 0. A clip drops some of the coefficients.
    centred = spec.tail == "renormalize" or (spec.divergence == "reverse" and spec.baseline == "mean")
    clipped = spec.clip_eps is not None or spec.m2_budget is not None
    return "centred" if centred and not clipped else "logprobs"


def _with_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    support: Support,
    mask: Tensor | None,
    scalars: tuple[float, float, float | None],
    spec: LossSpec,
    proximal: Tensor | None,
    reduction: str,
    num_items: int | float | Tensor | None,
) -> Any:
    """The scalar loss by the op that makes its gradients in the forward."""
    hidden, weight, bias = prepare_head(hidden, weight, bias, *scalars)
    checks.check_ids("ids", support.ids, hidden, "hidden")
    teacher, log_weights = support.teacher_logprobs, support.log_weights
    divisor = denominator(hidden, teacher, reduction, num_items)
    divisor = as_divisor(divisor, hidden, mask, compute_dtype(hidden, teacher))
    inputs = (mask, support.ids, teacher, log_weights, proximal, divisor)
    options = (float(scalars[0]), float(scalars[1]), scalars[2])
    loss, metrics = loss_and_metrics(hidden, weight, bias, inputs, options, spec)
    return (loss, LossMetrics(*metrics.unbind())) if spec.metrics else loss


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
