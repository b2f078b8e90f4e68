"""Sampled supports give the exact reverse-KL value and gradient in expectation, on policy and with a stale mu.

Every outcome of the draw is enumerated with its probability, so the expectation is exact and not a statistic.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from oracle import dense_forward, dense_reverse, reverse_gradient
from scenes import Scene, scene
from torch import Tensor

from asyncopd import Correction, Support, forward_kl, gather_logprobs, linear_reverse_kl, reverse_kl, sample_support

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}  # fp64 rounding of a few thousand weighted outcomes


def outcomes(log_mu: Tensor, m: int, head: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Every draw of head + M tokens from one policy [V]: ids [R, K], log-weights [R, K], probabilities [R]."""
    top = torch.sort(log_mu, descending=True, stable=True).indices[:head]
    rest = [token for token in range(log_mu.numel()) if token not in top.tolist()]
    mass = sum(math.exp(log_mu[token]) for token in rest)
    ids, log_w, prob = [], [], []
    for drawn in itertools.product(rest, repeat=m):
        ids.append([*top.tolist(), *drawn])
        # An exact 0 where the weight is 1: rounding must not decide what looks certain.
        tail = [math.log(mass / m) - float(log_mu[token]) for token in drawn]
        log_w.append([0.0] * head + [0.0 if abs(w) < 1e-14 else w for w in tail])
        prob.append(math.prod(math.exp(log_mu[token]) / mass for token in drawn))
    assert math.isclose(sum(prob), 1.0)
    return torch.tensor(ids), torch.tensor(log_w, dtype=torch.float64), torch.tensor(prob, dtype=torch.float64)


def expectation(s: Scene, loss: Any, m: int, head: int = 0, policy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """E[value] and E[dz] of a row loss over all outcomes of a draw from mu (or another policy)."""
    ids, log_w, prob = outcomes((s.log_mu if policy is None else policy)[0], m, head)
    z = (s.log_p[0] + 1.5).clone().requires_grad_()
    kind = "teacher_samples" if policy is not None else "head_tail" if head else "samples"
    sup = Support(ids, s.log_q[0][ids], log_w, kind)  # type: ignore[arg-type]
    values = loss(gather_logprobs(z.expand(len(ids), -1), ids), sup, reduction="none")
    expected = (prob * values).sum()
    expected.backward()
    assert z.grad is not None
    return expected.detach(), z.grad


@pytest.mark.parametrize("baseline", ["none", "loo"])
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(("m", "head"), [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2), (3, 2)])
def test_reverse_kl_is_unbiased(rng: torch.Generator, m: int, head: int, stale: bool, baseline: Any) -> None:
    s = scene(rng, rows=1, vocab=6, stale=stale)
    value, gradient = expectation(s, lambda *a, **k: reverse_kl(*a, baseline=baseline, **k), m, head)
    torch.testing.assert_close(value, dense_reverse(s.log_p, s.log_q)[0], **CLOSE)
    torch.testing.assert_close(gradient, reverse_gradient(s.log_p, s.log_q)[0], **CLOSE)


@pytest.mark.parametrize("policy", ["behaviour", "teacher"])
@pytest.mark.parametrize("m", [2, 3])
def test_leave_one_out_counts_draws_of_weight_one(rng: torch.Generator, m: int, policy: str) -> None:
    """mu = 1 / M gives log w = 0, as a head entry has; the support says that they are draws all the same."""
    s = scene(rng, rows=1, vocab=m)
    flat = torch.full((1, m), -math.log(m), dtype=torch.float64)
    s = Scene(s.log_p, s.log_q if policy == "behaviour" else flat, flat)
    drawn_from = None if policy == "behaviour" else s.log_q
    value, gradient = expectation(s, lambda *a, **k: reverse_kl(*a, baseline="loo", **k), m, policy=drawn_from)
    torch.testing.assert_close(value, dense_reverse(s.log_p, s.log_q)[0], **CLOSE)
    torch.testing.assert_close(gradient, reverse_gradient(s.log_p, s.log_q)[0], **CLOSE)


@pytest.mark.parametrize(("m", "baseline"), [(1, "none"), (2, "none"), (3, "loo")])
def test_reverse_kl_over_teacher_samples_is_unbiased(rng: torch.Generator, m: int, baseline: Any) -> None:
    s = scene(rng, rows=1, vocab=6)
    value, gradient = expectation(s, lambda *a, **k: reverse_kl(*a, baseline=baseline, **k), m, policy=s.log_q)
    torch.testing.assert_close(value, dense_reverse(s.log_p, s.log_q)[0], **CLOSE)
    torch.testing.assert_close(gradient, reverse_gradient(s.log_p, s.log_q)[0], **CLOSE)


@pytest.mark.parametrize(
    ("m", "head", "teacher"), [(1, 0, False), (2, 0, False), (2, 2, False), (1, 0, True), (2, 0, True)]
)
def test_forward_kl_is_unbiased(rng: torch.Generator, m: int, head: int, teacher: bool) -> None:
    s = scene(rng, rows=1, vocab=6)
    value, gradient = expectation(s, forward_kl, m, head, policy=s.log_q if teacher else None)
    torch.testing.assert_close(value, dense_forward(s.log_p, s.log_q)[0], **CLOSE)
    torch.testing.assert_close(gradient, (s.log_p.exp() - s.log_q.exp())[0], **CLOSE)


@pytest.mark.parametrize("m", [2, 3])
def test_the_mean_baseline_scales_the_gradient_by_1_minus_1_over_m_on_policy(rng: torch.Generator, m: int) -> None:
    s = scene(rng, rows=1, vocab=6, stale=False)
    _, gradient = expectation(s, lambda *a, **k: reverse_kl(*a, baseline="mean", **k), m)
    torch.testing.assert_close(gradient, (1 - 1 / m) * reverse_gradient(s.log_p, s.log_q)[0], **CLOSE)


def test_the_value_does_not_depend_on_the_baseline(rng: torch.Generator) -> None:
    s = scene(rng, rows=1, vocab=6)
    values = [expectation(s, lambda *a, b=b, **k: reverse_kl(*a, baseline=b, **k), 2, 1)[0] for b in ("none", "mean")]
    torch.testing.assert_close(values[0], values[1], **CLOSE)


def test_the_behaviour_advantage_is_biased_when_stale_and_only_then(rng: torch.Generator) -> None:
    for stale in (False, True):
        s = scene(rng, rows=1, vocab=6, stale=stale)
        correction = Correction(advantage="behavior")
        _, gradient = expectation(s, lambda *a, c=correction, **k: reverse_kl(*a, correction=c, **k), 2)
        gap = (gradient - reverse_gradient(s.log_p, s.log_q)[0]).abs().max()
        assert (gap > 1e-2) == stale


def test_a_cap_that_never_binds_is_no_correction(rng: torch.Generator) -> None:
    s = scene(rng, rows=1, vocab=6)
    _, gradient = expectation(s, lambda *a, **k: reverse_kl(*a, correction=Correction(ratio_cap=1e9), **k), 2)
    torch.testing.assert_close(gradient, reverse_gradient(s.log_p, s.log_q)[0], **CLOSE)


@pytest.mark.parametrize(("m", "head"), [(1, 0), (2, 0), (2, 2)])
@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_a_weight_wrong_by_5_percent_is_seen(rng: torch.Generator, m: int, head: int, factor: float) -> None:
    s = scene(rng, rows=1, vocab=6)

    def wrong(student: Tensor, sup: Support, **options: Any) -> Tensor:
        log_w = torch.where(sup.log_weights == 0, 0.0, sup.log_weights + math.log(factor))
        return reverse_kl(student, Support(sup.ids, sup.teacher_logprobs, log_w, sup.draw), **options)

    _, gradient = expectation(s, wrong, m, head)
    assert (gradient - reverse_gradient(s.log_p, s.log_q)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(("m", "head"), [(4, 0), (3, 3)])
def test_monte_carlo_from_sample_support_to_the_weight_gradient(
    rng: torch.Generator, m: int, head: int, stale: bool
) -> None:
    """The whole road once: draw, fused loss, gradient of the head's weight, against the exact one."""
    rows, vocab = 60_000, 8
    hidden = torch.ones(rows, 1, dtype=torch.float64)
    mu = 0.8 * torch.randn(vocab, generator=rng, dtype=torch.float64)
    student = mu + (0.5 * torch.randn(vocab, generator=rng, dtype=torch.float64) if stale else 0.0)
    log_q = torch.randn(vocab, generator=rng, dtype=torch.float64).log_softmax(0)
    drawn = sample_support(mu.expand(rows, vocab), num_samples=m, head=head, seed=17)
    sup = Support(drawn.ids, log_q[drawn.ids], drawn.log_weights, "head_tail" if head else "samples")
    # With hidden = 1 the logits are the one column of the weight.
    weight = student[:, None].clone().requires_grad_()
    linear_reverse_kl(hidden, weight, sup).backward()
    assert weight.grad is not None
    exact = reverse_gradient(student.log_softmax(0), log_q)
    # 60,000 rows of 4 draws: standard error about 5e-4; a weight wrong by 5 % is off by 5e-3 or more.
    assert (weight.grad[:, 0] - exact).abs().max() < 2.5e-3
    assert 0.05 * exact.abs().max() > 5e-3
