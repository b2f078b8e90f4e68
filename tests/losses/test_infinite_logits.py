"""Tokens without probability, on either side: coefficient 0, values infinite only if the divergence is."""

import math
from typing import Any

import pytest
import torch
from each_backend import Backend
from oracle import Options, reverse_row, rows_of
from scenes import full_support, on, scene
from torch import Tensor

from asyncopd import Support, forward_kl, gather_logprobs, linear_reverse_kl, reverse_kl

INF = float("inf")
GATHER = ("gather_logprobs", "gather_logprobs_backward")
pytestmark = pytest.mark.ops("kl_rows", *GATHER)
REVERSE: list[dict[str, Any]] = [
    {},
    {"baseline": "mean"},
    {"baseline": "loo"},
    {"tail": "bucket"},
    {"tail": "renormalize"},
    {"normalize": "sampled"},
    {"normalize": "sampled", "baseline": "mean"},
]


def run(backend: Backend, log_p: Tensor, log_q: Tensor, loss: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Row values and gradient of the logits, over the whole vocabulary."""
    logits = backend.tensor(log_p).requires_grad_()
    sup = full_support(backend.tensor(log_q))
    rows = loss(gather_logprobs(logits, sup.ids), sup, reduction="none", **options)
    rows.sum().backward()
    assert logits.grad is not None
    return rows.detach(), logits.grad


@pytest.mark.parametrize("options", REVERSE, ids=str)
def test_a_token_the_student_cannot_write(backend: Backend, rng: torch.Generator, options: dict[str, Any]) -> None:
    # Banned tokens are as good as absent: the same loss on the vocabulary without them.
    s = scene(rng)
    log_p = s.log_p.clone()
    log_p[:, [2, 5]] = -INF
    left = [0, 1, 3, 4, 6, 7, 8, 9, 10]
    values, gradient = run(backend, log_p, s.log_q, reverse_kl, **options)
    assert (gradient[:, [2, 5]] == 0).all()
    assert gradient.isfinite().all()
    if "tail" not in options:
        p = log_p[:, left].log_softmax(1)
        backend.close(values, (p.exp() * (p - s.log_q[:, left])).sum(1))
        signal = p - s.log_q[:, left]
        backend.close(gradient[:, left], p.exp() * (signal - (p.exp() * signal).sum(1, keepdim=True)))


def test_a_token_nobody_can_write(backend: Backend, rng: torch.Generator) -> None:
    s = scene(rng)
    log_p, log_q = s.log_p.clone(), s.log_q.clone()
    log_p[:, 3] = log_q[:, 3] = -INF
    for loss in (reverse_kl, forward_kl):
        for tail in ("drop", "renormalize"):
            values, gradient = run(backend, log_p, log_q, loss, tail=tail)
            assert values.isfinite().all()
            assert gradient.isfinite().all()
            assert (gradient[:, 3] == 0).all()


@pytest.mark.parametrize("options", REVERSE, ids=str)
def test_a_token_the_teacher_cannot_write(backend: Backend, rng: torch.Generator, options: dict[str, Any]) -> None:
    # The divergence is infinite and says so; training goes on with the finite terms.
    s = scene(rng)
    log_q = s.log_q.clone()
    log_q[1, 4] = -INF
    values, gradient = run(backend, s.log_p, log_q, reverse_kl, **options)
    assert values[1] == INF
    assert values[[0, 2, 3, 4]].isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient.abs().sum(1) > 0).all()


@pytest.mark.parametrize("baseline", ["none", "mean", "loo"])
def test_infinite_signals_have_no_coefficient(backend: Backend, rng: torch.Generator, baseline: Any) -> None:
    s = scene(rng)
    ids = torch.tensor([[0, 4, 7, 4]]).expand(5, 4)
    teacher = s.log_q.gather(1, ids)
    teacher[:, [1, 3]] = -INF
    log_w = -math.log(4) - s.log_mu.gather(1, ids)
    sup = on(backend, Support(ids, teacher, log_w))
    student = backend.tensor(s.log_p).gather(1, sup.ids).requires_grad_()
    rows = reverse_kl(student, sup, baseline=baseline, reduction="none")
    rows.sum().backward()
    assert (rows == INF).all()
    assert student.grad is not None
    assert (student.grad[:, [1, 3]] == 0).all()
    _, coef = rows_of(reverse_row, student.detach(), sup, Options(baseline=baseline))
    backend.close(student.grad, coef)


def test_a_probability_that_underflows_where_the_teacher_has_none(backend: Backend) -> None:
    # p = e^-2000 is 0 in any dtype: 0 log(0 / 0) is 0, on both sides.
    teacher, weights = (torch.tensor([[-0.5, x]]) for x in (-INF, 0.0))
    sup = on(backend, Support(torch.tensor([[0, 1]]), teacher, weights))
    student = backend.tensor(torch.tensor([[-0.25, -2000.0]])).requires_grad_()
    rows = reverse_kl(student, sup, reduction="none")
    rows.sum().backward()
    assert rows.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad[0, 1] == 0


def test_a_nan_row_that_counts_is_not_hidden(backend: Backend, rng: torch.Generator) -> None:
    s = scene(rng)
    sup = full_support(backend.tensor(s.log_q))
    student = backend.tensor(s.log_p).clone()
    student[3] = float("nan")
    for loss in (reverse_kl, forward_kl):
        rows = loss(student, sup, reduction="none")
        assert rows.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("loss", [reverse_kl, forward_kl])
def test_a_nan_row_that_its_caller_drops_gets_no_gradient(backend: Backend, rng: torch.Generator, loss: Any) -> None:
    s = scene(rng)
    log_q = s.log_q.clone()
    log_q[2, 5] = float("nan")
    student = backend.tensor(s.log_p).clone()
    student[3] = float("nan")
    student.requires_grad_()
    loss(student, full_support(backend.tensor(log_q)), reduction="none")[[0, 1, 4]].sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (student.grad[[2, 3]] == 0).all()


def test_forward_kl_of_a_token_the_student_cannot_write(backend: Backend, rng: torch.Generator) -> None:
    s = scene(rng)
    log_p = s.log_p.clone()
    log_p[2, 6] = -INF
    for tail in ("drop", "bucket", "renormalize"):
        values, gradient = run(backend, log_p, s.log_q, forward_kl, tail=tail)
        assert values[2] == INF
        assert values[[0, 1, 3, 4]].isfinite().all()
        assert gradient.isfinite().all()
        assert gradient[2, 6] == 0


def test_forward_kl_of_a_token_the_teacher_cannot_write(backend: Backend, rng: torch.Generator) -> None:
    s = scene(rng)
    log_q = s.log_q.clone()
    log_q[:, 6] = -INF
    log_q = log_q.log_softmax(1)
    values, gradient = run(backend, s.log_p, log_q, forward_kl)
    left = [i for i in range(11) if i != 6]
    q = log_q[:, left]
    backend.close(values, (q.exp() * (q - s.log_p[:, left])).sum(1))
    backend.close(gradient, s.log_p.exp() - log_q.exp())


def test_a_masked_nan_row_poisons_nothing(backend: Backend, rng: torch.Generator) -> None:
    s = scene(rng)
    mask = backend.tensor(torch.tensor([True, True, False, True, True]))
    sup = full_support(backend.tensor(s.log_q.clone()))
    clean = backend.tensor(s.log_p).clone().requires_grad_()
    expected = reverse_kl(gather_logprobs(clean, sup.ids), sup, mask=mask)
    expected.backward()
    sup.teacher_logprobs[2], sup.log_weights[2] = float("nan"), float("nan")
    logits = backend.tensor(s.log_p).clone()
    logits[2] = float("nan")
    logits.requires_grad_()
    for loss in (reverse_kl, forward_kl):
        logits.grad = None
        value = loss(gather_logprobs(logits, sup.ids), sup, mask=mask)
        value.backward()
        assert value.isfinite()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert (logits.grad[2] == 0).all()
        if loss is reverse_kl:
            backend.close(value.detach(), expected.detach().double())


@pytest.mark.parametrize("options", [{}, {"baseline": "mean"}, {"normalize": "sampled"}], ids=str)
def test_a_minus_inf_bias_in_the_fused_loss(rng: torch.Generator, options: dict[str, Any]) -> None:
    s = scene(rng)
    hidden, weight = torch.randn(5, 3, generator=rng).double(), torch.randn(11, 3, generator=rng).double()
    bias = torch.zeros(11, dtype=torch.float64)
    bias[[0, 9]] = -INF
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = linear_reverse_kl(leaves[0], leaves[1], full_support(s.log_q), bias=leaves[2], **options)
    loss.backward()
    assert loss.isfinite()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert leaves[1].grad is not None
    assert (leaves[1].grad[[0, 9]] == 0).all()
