"""Where the coefficients sum to zero, and that dW then touches only the rows of the head that a support names."""

from typing import Any

import pytest
import torch
from each_backend import Backend
from scenes import DRAWS, full_support, on, scene, support

from asyncopd import Correction, Support, forward_kl, gather_logprobs, linear_forward_kl, linear_reverse_kl, reverse_kl

LINEAR = ("linear_gather_logprobs", "linear_gather_logprobs_backward", "linear_gather_logits",
          "linear_gather_logits_backward", "linear_logsumexp", "gather_logprobs")  # fmt: skip


def coefficients(student: torch.Tensor, sup: Support, loss: Any = reverse_kl, **options: Any) -> torch.Tensor:
    student = student.detach().requires_grad_()
    loss(student, sup, reduction="sum", **options).backward()
    assert student.grad is not None
    return student.grad


@pytest.mark.ops("kl_rows")
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("draw", DRAWS)
def test_the_mean_baseline_makes_every_draw_sum_to_zero(
    backend: Backend, rng: torch.Generator, draw: str, told: bool
) -> None:
    s = scene(rng)
    sup = on(backend, support(s, draw, rng, told=told))
    c = coefficients(backend.tensor(s.log_p).gather(1, sup.ids), sup, baseline="mean")
    backend.close(c.sum(1), torch.zeros(5))
    if draw != "sampled_token":
        assert c.abs().max() > 1e-3


@pytest.mark.ops("kl_rows")
@pytest.mark.parametrize("correction", [Correction(ratio_cap=1.1), Correction(advantage="behavior")], ids=str)
def test_the_mean_baseline_sums_to_zero_with_a_cap_or_an_old_advantage(
    backend: Backend, rng: torch.Generator, correction: Correction
) -> None:
    s = scene(rng)
    sup = on(backend, support(s, "samples", rng))
    student = backend.tensor(s.log_p).gather(1, sup.ids)
    backend.close(coefficients(student, sup, baseline="mean", correction=correction).sum(1), torch.zeros(5))


@pytest.mark.ops("kl_rows")
@pytest.mark.parametrize("stale", [False, True])
def test_leave_one_out_sums_to_zero_on_policy_only(backend: Backend, rng: torch.Generator, stale: bool) -> None:
    s = scene(rng, stale=stale)
    sup = on(backend, support(s, "samples", rng))
    total = coefficients(backend.tensor(s.log_p).gather(1, sup.ids), sup, baseline="loo").sum(1)
    if stale:
        assert (total.abs() > 1e-3).any()
    else:
        backend.close(total, torch.zeros(5))


@pytest.mark.ops("kl_rows")
@pytest.mark.parametrize("baseline", ["none", "mean", "loo"])
@pytest.mark.parametrize("draw", ["samples", "head_tail", "teacher_samples"])
def test_the_sampled_normalisation_sums_to_zero(
    backend: Backend, rng: torch.Generator, draw: str, baseline: Any
) -> None:
    s = scene(rng)
    sup = on(backend, support(s, draw, rng))
    logits = backend.tensor(s.log_p + 4.0).gather(1, sup.ids)
    backend.close(coefficients(logits, sup, normalize="sampled", baseline=baseline).sum(1), torch.zeros(5))


@pytest.mark.ops("kl_rows")
@pytest.mark.parametrize("loss", [reverse_kl, forward_kl])
def test_renormalised_divergences_sum_to_zero(backend: Backend, rng: torch.Generator, loss: Any) -> None:
    s = scene(rng)
    sup = on(backend, support(s, "student_top_k", rng))
    student = backend.tensor(s.log_p).gather(1, sup.ids)
    backend.close(coefficients(student, sup, loss, tail="renormalize").sum(1), torch.zeros(5))


@pytest.mark.ops("kl_rows")
def test_without_a_baseline_they_do_not(backend: Backend, rng: torch.Generator) -> None:
    s = scene(rng)
    for draw in DRAWS:
        sup = on(backend, support(s, draw, rng))
        assert coefficients(backend.tensor(s.log_p).gather(1, sup.ids), sup).sum(1).abs().max() > 1e-3


SPARSE: list[tuple[str, dict[str, Any]]] = [
    ("samples", {"baseline": "mean"}),
    ("head_tail", {"baseline": "mean"}),
    ("teacher_top_k", {"baseline": "mean"}),
    ("samples", {"baseline": "mean", "correction": Correction(ratio_cap=1.1)}),
    ("head_tail", {"normalize": "sampled"}),
    ("samples", {"normalize": "sampled", "baseline": "loo"}),
    ("student_top_k", {"tail": "renormalize"}),
]


# Here they do not sum to zero, or do so on policy only: a clip drops some of the coefficients.
DENSE: list[tuple[str, dict[str, Any]]] = [
    ("samples", {}),
    ("samples", {"baseline": "loo"}),
    ("head_tail", {"baseline": "loo"}),
    ("samples", {"baseline": "mean", "correction": Correction(clip_eps=0.1)}),
    ("samples", {"baseline": "mean", "correction": Correction(m2_budget=0.01)}),
    ("student_top_k", {"tail": "bucket"}),
]


@pytest.mark.ops("kl_rows", *LINEAR)
@pytest.mark.parametrize(
    ("draw", "options", "sparse"), [(*c, True) for c in SPARSE] + [(*c, False) for c in DENSE], ids=str
)
def test_only_the_supports_rows_of_the_head_get_a_gradient(
    backend: Backend, rng: torch.Generator, draw: str, options: dict[str, Any], sparse: bool
) -> None:
    hidden = backend.tensor(torch.randn(4, 6, generator=rng, dtype=torch.float64)).requires_grad_()
    weight = backend.tensor(torch.randn(90, 6, generator=rng, dtype=torch.float64)).requires_grad_()
    bias = backend.tensor(torch.randn(90, generator=rng, dtype=torch.float64)).requires_grad_()
    s = scene(rng, rows=4, vocab=90)
    sup = on(backend, support(s, draw, rng))
    head: dict[str, Any] = {"temperature": 0.8, "logit_scale": 1.2, "softcap": 4.0}
    linear_reverse_kl(hidden, weight, sup, bias=bias, **head, **options).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    named = torch.zeros(90, dtype=torch.bool)
    named[sup.ids.unique().cpu()] = True
    assert (weight.grad[~named] == 0).all() == sparse
    assert (bias.grad[~named] == 0).all() == sparse

    # And it is the same gradient as through all logits.
    oracle = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    z = 4.0 * torch.tanh((oracle[0] @ oracle[1].t() + oracle[2]) * 1.2 / 4.0) / 0.8
    wide = Support(sup.ids, sup.teacher_logprobs.double(), sup.log_weights.double(), sup.draw)
    at_ids = z.gather(1, sup.ids) if "normalize" in options else gather_logprobs(z, sup.ids)
    reverse_kl(at_ids, wide, **options).backward()
    for mine, theirs in zip((hidden, weight, bias), oracle, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        backend.close(mine.grad, theirs.grad)


@pytest.mark.ops("kl_rows", *LINEAR)
def test_renormalised_forward_kl_touches_only_the_supports_rows(backend: Backend, rng: torch.Generator) -> None:
    hidden = backend.tensor(torch.randn(4, 6, generator=rng, dtype=torch.float64))
    weight = backend.tensor(torch.randn(90, 6, generator=rng, dtype=torch.float64)).requires_grad_()
    sup = on(backend, support(scene(rng, rows=4, vocab=90), "teacher_top_k", rng))
    linear_forward_kl(hidden, weight, sup, tail="renormalize").backward()
    assert weight.grad is not None
    dense = weight.detach().double().requires_grad_()
    wide = Support(sup.ids, sup.teacher_logprobs.double(), sup.log_weights.double(), sup.draw)
    forward_kl(gather_logprobs(hidden.double() @ dense.t(), sup.ids), wide, tail="renormalize").backward()
    assert dense.grad is not None
    backend.close(weight.grad, dense.grad)
    named = torch.zeros(90, dtype=torch.bool)
    named[sup.ids.unique().cpu()] = True
    assert (weight.grad[~named] == 0).all()


@pytest.mark.ops("kl_rows")
def test_a_full_support_of_a_scene_sums_to_the_loss(backend: Backend, rng: torch.Generator) -> None:
    # c_i = p_i A_i on the full support, so the sum is the loss itself: a check on the sign of c.
    s = scene(rng)
    sup = on(backend, full_support(s.log_q))
    student = backend.tensor(s.log_p)
    backend.close(coefficients(student, sup).sum(1), (s.log_p.exp() * (s.log_p - s.log_q)).sum(1))
