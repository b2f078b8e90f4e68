"""The [N, K] reverse-KL loss on gathered log-probabilities.

The forward makes the coefficients, which are the gradient; the backward scales them. So there are three lines for
asyncopd: forward and backward, to compare with torch, and the forward alone, without and with metrics, to compare with
a read of its inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import asyncopd
from bench.families.base import (
    COMPILED,
    EAGER,
    LIMIT,
    OURS,
    TOLERANCE,
    Family,
    Provider,
    compiled,
    relative_difference,
    require,
    sum_difference,
    worst,
)
from bench.inputs import LossInputs, loss_inputs

FORWARD = f"{OURS}, forward"
METRICS = f"{OURS}, forward with metrics"


class Loss(NamedTuple):
    value: Tensor  # scalar
    grad: Tensor | None  # [N, K]; None if only the forward ran


@dataclass(frozen=True)
class Oracle:
    terms: Tensor  # [N, K], sum to the loss
    grad: Tensor


def weighted_terms(logprobs: Tensor, teacher: Tensor, log_weights: Tensor) -> Tensor:
    """w p (log p - log q), [N, K]: what the value sums, and the coefficients c of the gradient too (no baseline)."""
    return (log_weights + logprobs).exp() * (logprobs - teacher)


def zero_sum(terms: Tensor, logprobs: Tensor, log_weights: Tensor) -> Tensor:
    """c = w p (A - b), with b the w p weighted mean of A: baseline="mean"."""
    omega = (log_weights + logprobs).exp()
    return terms - omega * (terms.sum(1, keepdim=True) / omega.sum(1, keepdim=True))


def torch_reverse_kl(
    logprobs: Tensor,
    teacher: Tensor,
    log_weights: Tensor,
    mask: Tensor | None = None,
    valid: int | None = None,
    *,
    centred: bool = False,
) -> Tensor:
    """Value sum w p A and gradient sum c grad log p, mean over the valid rows, in plain torch."""
    terms = weighted_terms(logprobs, teacher, log_weights).detach()
    c = zero_sum(terms, logprobs.detach(), log_weights) if centred else terms
    surrogate = (c * logprobs).sum(1)
    rows = terms.sum(1) + (surrogate - surrogate.detach())
    if mask is not None:
        rows = torch.where(mask, rows, 0.0)
    return rows.sum() / (valid or rows.shape[0])


def oracle(inputs: LossInputs) -> Oracle:
    s = inputs.support
    student, teacher, log_weights = (x.detach().double() for x in (inputs.student_logprobs, *_scores(s)))
    c = weighted_terms(student, teacher, log_weights) / student.shape[0]
    return Oracle(c, c)


def _scores(support: asyncopd.Support) -> tuple[Tensor, Tensor]:
    return support.teacher_logprobs, support.log_weights


def check(o: Oracle, loss: Loss) -> float:
    error = sum_difference(loss.value, o.terms)
    if loss.grad is not None:
        error = worst(error, relative_difference(loss.grad, o.grad))
    return require(error, TOLERANCE[torch.float32], "loss or gradient")


def limit(inputs: LossInputs) -> Callable[[], object]:
    student, support = inputs.student_logprobs.detach(), inputs.support
    if inputs.case.size == "gpu":
        return partial(_read_and_write, student, *_scores(support), support.ids)
    tensors = (student, *_scores(support), support.ids)
    return lambda: [tensor.amax(dim=1) for tensor in tensors]


def _read_and_write(student: Tensor, teacher: Tensor, log_weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """One read of all that a loss reads and one write of what c takes, in as few launches as torch has for it."""
    return torch.addcmul(student, teacher, log_weights), ids.amax(dim=1)


def _prepare_torch(function: Callable[..., Tensor], inputs: LossInputs) -> Callable[[], Loss]:
    return _with_backward(partial(function, inputs.student_logprobs, *_scores(inputs.support)), inputs)


def _forward(inputs: LossInputs) -> Callable[[], Tensor]:
    return partial(asyncopd.reverse_kl, inputs.student_logprobs, inputs.support)


def _with_backward(forward: Callable[[], Tensor], inputs: LossInputs) -> Callable[[], Loss]:
    def forward_and_backward() -> Loss:
        value = forward()
        (grad,) = torch.autograd.grad(value, inputs.student_logprobs)
        return Loss(value.detach(), grad)

    return forward_and_backward


def _forward_alone(inputs: LossInputs) -> Callable[[], Loss]:
    forward = _forward(inputs)
    return lambda: Loss(forward(), None)


def _forward_with_metrics(inputs: LossInputs) -> Callable[[], Loss]:
    forward = partial(asyncopd.reverse_kl, inputs.student_logprobs, inputs.support, return_metrics=True)
    return lambda: Loss(forward()[0], None)


KL = Family(
    name="kl",
    title="Reverse KL over [N, K] supports, forward + backward",
    limit="one read (amax) of log p, log q, log w and ids; of size gpu, one read and one write of c",
    error="relative",
    inputs=loss_inputs,
    oracle=oracle,
    providers=(
        Provider(LIMIT, limit),
        Provider(EAGER, partial(_prepare_torch, torch_reverse_kl), check),
        Provider(COMPILED, lambda i: _prepare_torch(compiled(torch_reverse_kl), i), check),
        Provider(OURS, lambda i: _with_backward(_forward(i), i), check),
        Provider(FORWARD, _forward_alone, check),
        Provider(METRICS, _forward_with_metrics, check),
    ),
)
