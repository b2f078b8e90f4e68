"""The two losses on log-probabilities that somebody has already gathered."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from asyncopd.backends.loss_spec import SPEC_FIELDS, LossMetrics, LossSpec
from asyncopd.losses.correction import Correction
from asyncopd.losses.options import BASELINES, NORMALIZE, TAILS, Baseline, Normalize, Reduction, Tail
from asyncopd.losses.reduce import check_reduction, denominator
from asyncopd.ops import checks
from asyncopd.ops.kl import KLInputs, loss_and_metrics, rows_and_metrics
from asyncopd.support import Support


def reverse_kl(
    student_logprobs: Tensor,
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
) -> Any:
    """Reverse KL(student || teacher) estimated on a support; its gradient is the score-function form.

    Value R = sum_i w_i p_i A_i with A_i = log p_i - log q_i under the current student; gradient sum_i c_i grad log p_i,
    c_i = w_i p_i (A_i - b). The `+1` of the plain derivative is left out (design of arXiv 2606.24143): on sampled
    supports its expectation is zero, on truncated ones it is what pushes probability mass off the support.

    Args:
        student_logprobs: [N, K] log p at `support.ids` (`gather_logprobs`); with normalize="sampled" unnormalised
            logits will do as well.
        support: ids, log q and log w, [N, K] each; K at most 2,048 on the triton backend.
        mask: [N] bool or 0/1, rows that count.
        normalize: "exact": log-probabilities as given. "sampled": normalised by log sum_i w_i exp(z_i) over the
            support: consistent, not unbiased; no vocabulary-wide work at all.
        tail: what truncated (top-k) supports do with the missing mass: "drop" the bare sum, which can be
            negative; "bucket" everything off the support is one more outcome; "renormalize" condition on the support.
            The last two are true divergences with their true gradients; sampled supports take "drop" only. "bucket"
            knows the mass off the support to 1e-6 in fp32: give fp64 log-probabilities where less than that matters.
        baseline: b: "none"; "mean", the w p weighted mean of A (the c_i sum to 0; on M samples scales the
            gradient by about 1 - 1/M); "loo", leave-one-out over the independent draws (unbiased). Only with
            tail="drop".
        correction: see `Correction`; M-sample supports only. None: importance weights alone.
        reduction: "mean" per valid row, "sum", "none" ([N]).
        num_items_in_batch: divides the sum instead: valid rows over all micro-batches and ranks.
        return_metrics: return (loss, LossMetrics). (Hence the annotation Any: a union would have to be narrowed by
            everybody who calls `.backward()`.)
    Returns: fp32 (fp64 for fp64) scalar or [N]. An entry where the teacher has no mass but the student has makes the
        value infinite; it takes no part in the gradient.
    Raises: TypeError, ValueError naming the argument.
    """
    _check_scores(student_logprobs, support)
    check_reduction(reduction, num_items_in_batch)
    mask = checks.check_mask(mask, student_logprobs, "student_logprobs")
    spec = reverse_spec(support, normalize, tail, baseline, correction, return_metrics)
    return kl_of_scores(student_logprobs, support, mask, proximal_of(correction), spec, reduction, num_items_in_batch)


def forward_kl(
    student_logprobs: Tensor,
    support: Support,
    *,
    mask: Tensor | None = None,
    tail: Tail = "drop",
    reduction: Reduction = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
    return_metrics: bool = False,
) -> Any:
    """Forward KL(teacher || student) estimated on a support: F = sum_i w_i q_i (log q_i - log p_i).

    Args, returns and raises as `reverse_kl`. With tail="drop" a truncated support leaves the mass off the
    support out of value and gradient, which then is not 0 where teacher == student; "bucket" and "renormalize"
    mend that.
    """
    _check_scores(student_logprobs, support)
    check_reduction(reduction, num_items_in_batch)
    mask = checks.check_mask(mask, student_logprobs, "student_logprobs")
    spec = forward_spec(support, tail, return_metrics)
    return kl_of_scores(student_logprobs, support, mask, None, spec, reduction, num_items_in_batch)


def reverse_spec(
    support: Support, normalize: str, tail: str, baseline: str, correction: Correction | None, metrics: bool
) -> LossSpec:
    """The options of `reverse_kl`, checked against each other and against the support."""
    _check_tail(tail, support)
    checks.check_choice("normalize", normalize, NORMALIZE)
    checks.check_choice("baseline", baseline, BASELINES)
    if tail != "drop":
        if baseline != "none":
            raise ValueError(
                f"baseline: got {baseline!r} with tail={tail!r}, expected 'none': that gradient has no free b"
            )
        if normalize != "exact":
            raise ValueError(f"normalize: got {normalize!r} with tail={tail!r}, expected 'exact'")
    if normalize == "sampled" and support.draw == "top_k":
        raise ValueError(
            "normalize: got 'sampled' with a top-k support, expected 'exact': a truncated sum estimates no normaliser "
            "(tail='renormalize' conditions both models on the support)"
        )
    if baseline == "loo" and support.draw == "top_k":
        raise ValueError("baseline: got 'loo' with a top-k support, expected independent samples")
    _check_correction(correction, support, tail)
    c = correction or _NO_CORRECTION
    options = (normalize, tail, baseline, _head_is_certain(support), correction is not None, c.advantage)
    return _spec("reverse", *options, c.ratio_cap, c.clip_eps, c.m2_budget, c.proximal_cap, metrics)


def forward_spec(support: Support, tail: str, metrics: bool) -> LossSpec:
    """The options of `forward_kl`, checked."""
    _check_tail(tail, support)
    c = _NO_CORRECTION
    options = ("exact", tail, "none", _head_is_certain(support), False, c.advantage)
    return _spec("forward", *options, c.ratio_cap, c.clip_eps, c.m2_budget, c.proximal_cap, metrics)


def _spec(*options: Any) -> LossSpec:
    """The same object for the same options, in the order of LossSpec's fields."""
    # A compiler traces through the cache, and warns that it does.
    return _new_spec(*options) if torch.compiler.is_compiling() else _kept_spec(*options)


def _new_spec(*options: Any) -> LossSpec:
    return LossSpec(**dict(zip(SPEC_FIELDS, options, strict=True)))


_kept_spec = lru_cache(maxsize=1024)(_new_spec)  # an option may change from step to step
_NO_CORRECTION = Correction()


def proximal_of(correction: Correction | None) -> Tensor | None:
    return None if correction is None else correction.proximal_logprobs


def _head_is_certain(support: Support) -> bool:
    """Whether entries of log-weight exactly 0 were not drawn. Independent samples are drawn, whatever they weigh."""
    return support.draw not in ("samples", "teacher_samples")


def kl_of_scores(
    student: Tensor,
    support: Support,
    mask: Tensor | None,
    proximal: Tensor | None,
    spec: LossSpec,
    reduction: str,
    num_items: int | float | Tensor | None,
) -> Any:
    """The loss from scores [N, K] at the support's ids, with a LossMetrics beside it if the spec says so."""
    inputs = KLInputs(support.teacher_logprobs, support.log_weights, support.ids, mask, proximal)
    if reduction == "none":
        loss, metrics = rows_and_metrics(student, inputs, spec)
    else:
        loss, metrics = loss_and_metrics(
            student, inputs, denominator(student, inputs.teacher, reduction, num_items), spec
        )
    return loss if metrics is None else (loss, LossMetrics(*metrics.unbind()))


def _check_scores(scores: Tensor, support: Support) -> None:
    checks.check_matrix("student_logprobs", scores, "K")
    check_support(support)
    if scores.shape != support.ids.shape:
        raise ValueError(
            f"student_logprobs: got shape {list(scores.shape)}, expected {list(support.ids.shape)} as support"
        )
    checks.check_device("student_logprobs", scores, support.ids, "support")


def check_support(support: Support) -> None:
    if not isinstance(support, Support):
        raise TypeError(f"support: got {type(support).__name__}, expected asyncopd.Support")


def _check_tail(tail: str, support: Support) -> None:
    checks.check_choice("tail", tail, TAILS)
    if tail != "drop" and support.draw not in (None, "top_k"):
        raise ValueError(f"tail: got {tail!r} with a sampled support ({support.draw}), expected 'drop'")


def _check_correction(correction: Correction | None, support: Support, tail: str) -> None:
    if correction is None:
        return
    if not isinstance(correction, Correction):
        raise TypeError(f"correction: got {type(correction).__name__}, expected asyncopd.Correction or None")
    if support.draw not in (None, "samples") or tail != "drop":
        raise ValueError(
            f"correction: needs the behaviour policy, which only M-sample supports carry; got draw={support.draw!r}, "
            f"tail={tail!r}"
        )
    proximal = correction.proximal_logprobs
    if proximal is None:
        return
    if proximal.shape != support.ids.shape:
        raise ValueError(
            f"correction.proximal_logprobs: got shape {list(proximal.shape)}, expected {list(support.ids.shape)}"
        )
    checks.check_device("correction.proximal_logprobs", proximal, support.ids, "support")
