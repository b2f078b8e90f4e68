"""The metrics that a loss returns, against sums over single entries."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from each_backend import Backend
from oracle import Options, metrics_of
from scenes import DRAWS, on, scene, support, with_pads
from torch import Tensor

from asyncopd import (
    Correction,
    LinearForwardKLLoss,
    LinearReverseKLLoss,
    LossMetrics,
    Support,
    forward_kl,
    gather_logprobs,
    linear_forward_kl,
    linear_reverse_kl,
    reverse_kl,
)

pytestmark = pytest.mark.ops("kl_rows")


def problem(
    backend: Backend, rng: torch.Generator, draw: str, *, rows: int = 9, told: bool = True
) -> tuple[Tensor, Support, Tensor]:
    """Log-probabilities, a support with a row of pads alone and garbage at the pads, and a mask."""
    s = scene(rng, rows=rows, vocab=11)
    sup = support(s, draw, rng, told=told)
    student = s.log_p.gather(1, sup.ids)
    sup = with_pads(sup, [0, 2] if sup.ids.shape[1] > 2 else [0])
    wide = torch.full(sup.ids.shape, 3.0, dtype=torch.float64)
    wide[sup.ids >= 0] = student.flatten()
    sup.ids[4] = -1
    mask = torch.ones(rows, dtype=torch.bool)
    mask[[1, 7]] = False
    return backend.tensor(wide), on(backend, sup), backend.tensor(mask)


def check(backend: Backend, metrics: LossMetrics, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        actual = getattr(metrics, name)
        assert actual.shape == ()
        assert not actual.requires_grad
        if name == "ratio_p99" and backend.name != "reference":  # a histogram
            torch.testing.assert_close(actual.item(), value, rtol=0.01, atol=0)
        else:
            backend.close(actual, torch.tensor(value, dtype=torch.float64))


def gradient_of(loss: Callable[..., Any], student: Tensor, sup: Support, **options: Any) -> tuple[LossMetrics, Tensor]:
    student = student.clone().requires_grad_()
    value, metrics = loss(student, sup, reduction="sum", return_metrics=True, **options)
    torch.testing.assert_close(value, loss(student, sup, reduction="sum", **options), rtol=0, atol=0)
    value.backward()
    assert student.grad is not None
    return metrics, student.grad


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("draw", DRAWS)
def test_masses_sizes_and_ratios(backend: Backend, rng: torch.Generator, draw: str, told: bool, masked: bool) -> None:
    student, sup, mask = problem(backend, rng, draw, told=told)
    certain = not told or draw not in ("samples", "sampled_token", "teacher_samples")
    for normalize in ("exact",) if "top_k" in draw else ("exact", "sampled"):
        o = Options(normalize, certain=(lambda log_w: log_w == 0) if certain else (lambda log_w: False))
        options: dict[str, Any] = {"normalize": normalize, "mask": mask if masked else None}
        metrics, coef = gradient_of(reverse_kl, student, sup, **options)
        check(backend, metrics, metrics_of(student, sup, coef, o, options["mask"]))
        assert metrics.clip_fraction == 0
        if normalize == "sampled":
            backend.close(metrics.student_mass, torch.tensor(1.0).double())
    o = Options(certain=(lambda log_w: log_w == 0) if certain else (lambda log_w: False))
    metrics, coef = gradient_of(forward_kl, student, sup, mask=mask)
    check(backend, metrics, metrics_of(student, sup, coef, o, mask))
    assert metrics.clip_fraction == 0


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("loss", [reverse_kl, forward_kl])
def test_tails_leave_the_masses_as_they_are(backend: Backend, rng: torch.Generator, loss: Any, tail: str) -> None:
    student, sup, mask = problem(backend, rng, "student_top_k")
    metrics, coef = gradient_of(loss, student, sup, mask=mask, tail=tail)
    check(backend, metrics, metrics_of(student, sup, coef, mask=mask))
    assert metrics.ratio_mean == metrics.ratio_p99 == 0  # nothing was drawn
    assert metrics.student_mass < 0.99


def test_effective_number_of_entries(backend: Backend) -> None:
    ids = backend.tensor(torch.tensor([[0, 1, 2, 3]]))
    for log_p, expected in (([-40.0] * 4, 4.0), ([-60.0, -200.0, -200.0, -200.0], 1.0), ([-math.inf] * 4, 0.0),
                            ([-1.0, -1.0, -math.inf, -math.inf], 2.0)):  # fmt: skip
        student = backend.tensor(torch.tensor([log_p]))
        metrics = reverse_kl(student, Support(ids, student, torch.zeros_like(student)), return_metrics=True)[1]
        backend.close(metrics.ess, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 250])
def test_the_percentile_counts_from_one(backend: Backend, rng: torch.Generator, count: int) -> None:
    """Rows of one sample whose ratios are 2, 4, 6, .. in any order: the rank is ceil(0.99 count)."""
    ratios = 2.0 * (1 + torch.randperm(count, generator=rng)).double()
    log_mu = torch.full((count, 1), -9.0, dtype=torch.float64)
    student = backend.tensor(log_mu + ratios.log()[:, None])
    sup = Support(torch.zeros_like(student, dtype=torch.int64), student, backend.tensor(-log_mu), "samples")
    metrics = reverse_kl(student, sup, return_metrics=True)[1]
    rank = -(-99 * count // 100)
    torch.testing.assert_close(
        metrics.ratio_p99.item(), 2.0 * rank, rtol=1e-5 if backend.name == "reference" else 0.01, atol=0
    )
    backend.close(metrics.ratio_mean, ratios.mean())


def changed_share(plain: Tensor, coef: Tensor, sup: Support, mask: Tensor) -> float:
    valid = (sup.ids >= 0) & mask[:, None]
    return float(((plain - coef).abs() > 1e-6)[valid].sum() / valid.sum())


@pytest.mark.parametrize("correction", [Correction(ratio_cap=1.1), Correction(clip_eps=0.1), Correction(m2_budget=0.01),
                                        Correction(advantage="behavior")], ids=str)  # fmt: skip
def test_share_of_entries_that_a_correction_changed(
    backend: Backend, rng: torch.Generator, correction: Correction
) -> None:
    student, sup, mask = problem(backend, rng, "samples")
    metrics, coef = gradient_of(reverse_kl, student, sup, mask=mask, correction=correction)
    if correction.advantage == "behavior":
        assert metrics.clip_fraction == 0
        return
    expected = changed_share(gradient_of(reverse_kl, student, sup, mask=mask)[1], coef, sup, mask)
    assert 0.05 < expected < 0.95
    backend.close(metrics.clip_fraction, torch.tensor(expected).double())
    expected_rest = metrics_of(student, sup, coef, Options(certain=lambda log_w: False), mask)
    check(backend, metrics, expected_rest)  # of the ratios as they are, not as they were capped


def test_share_with_a_drop_counts_an_entry_once(backend: Backend, rng: torch.Generator) -> None:
    student, sup, mask = problem(backend, rng, "samples")
    proximal = student + 0.5 * torch.randn(student.shape, generator=rng).to(student)
    proximal[2, 1] = 9.0  # dropped, where its own ratio binds or not
    correction = Correction(clip_eps=0.05, proximal_logprobs=proximal, proximal_cap=1.5)
    metrics, coef = gradient_of(reverse_kl, student, sup, mask=mask, correction=correction)
    expected = changed_share(gradient_of(reverse_kl, student, sup, mask=mask)[1], coef, sup, mask)
    assert 0.05 < expected < 0.95
    backend.close(metrics.clip_fraction, torch.tensor(expected).double())


def test_an_entry_without_probability_is_not_changed(backend: Backend) -> None:
    student = backend.tensor(torch.tensor([[-math.inf, -1.0, -1.0, -1.0]]))
    log_q = backend.tensor(torch.tensor([[-2.0, -2.0, -math.inf, -2.0]]))
    log_w = torch.full_like(student, -math.log(4) + 2.0)
    sup = Support(backend.tensor(torch.tensor([[0, 1, 2, 3]])), log_q, log_w, "samples")
    proximal = torch.full_like(student, 5.0)
    for correction in (Correction(ratio_cap=1.1), Correction(clip_eps=0.1, proximal_logprobs=proximal)):
        # One has no mass to lose, and one no gradient, its divergence being infinite.
        metrics = reverse_kl(student, sup, correction=correction, return_metrics=True)[1]
        assert metrics.clip_fraction == 0.5


@pytest.mark.parametrize("rows", [0, 3])
def test_no_valid_row_gives_zeros(backend: Backend, rows: int) -> None:
    student = backend.tensor(torch.randn(rows, 4))
    ids = torch.ones_like(student, dtype=torch.int64)
    sup = Support(ids, student, student, "samples")
    pads = Support(torch.full_like(ids, -1), student, student, "samples")
    mask = backend.tensor(torch.zeros(rows, dtype=torch.bool))
    for loss in (reverse_kl, forward_kl):
        for chosen, masked in ((sup, mask), (pads, None)):
            value, metrics = loss(student, chosen, mask=masked, return_metrics=True)
            assert value == 0
            assert all(metric == 0 for metric in metrics)
            assert len(metrics) == 7


def test_a_nan_shows(backend: Backend, rng: torch.Generator) -> None:
    student, sup, mask = problem(backend, rng, "samples")
    student[3, 1] = torch.nan
    metrics = reverse_kl(student, sup, mask=mask, return_metrics=True)[1]
    for name in ("student_mass", "ess", "coef_sum", "ratio_mean"):
        assert getattr(metrics, name).isnan(), name
    assert not metrics.teacher_mass.isnan()
    mask[3] = False
    metrics = reverse_kl(student, sup, mask=mask, return_metrics=True)[1]
    assert not torch.stack(metrics).isnan().any()


@pytest.mark.ops("gather_logprobs", "linear_gather_logprobs", "linear_gather_logits")
@pytest.mark.parametrize("forward", [False, True])
def test_fused_losses_and_modules_return_them_too(backend: Backend, rng: torch.Generator, forward: bool) -> None:
    _, sup, mask = problem(backend, rng, "samples")
    hidden, weight = (backend.tensor(torch.randn(n, 4, generator=rng).double()) for n in (9, 11))
    plain, fused, module = (
        (forward_kl, linear_forward_kl, LinearForwardKLLoss)
        if forward
        else (reverse_kl, linear_reverse_kl, LinearReverseKLLoss)
    )
    expected = plain(gather_logprobs(hidden @ weight.t(), sup.ids), sup, mask=mask, return_metrics=True)
    layer: Any = module(return_metrics=True)
    for value, metrics in (
        fused(hidden, weight, sup, mask=mask, return_metrics=True),
        layer(hidden, weight, sup, mask=mask),
    ):
        backend.close(value, expected[0].double())
        backend.close(torch.stack(metrics), torch.stack(expected[1]).double())


def test_compiled(backend: Backend, rng: torch.Generator) -> None:
    student, sup, mask = problem(backend, rng, "samples")

    def run(scores: Tensor) -> tuple[Tensor, LossMetrics]:
        inside = Support(sup.ids, sup.teacher_logprobs, sup.log_weights, "samples")
        return reverse_kl(scores, inside, mask=mask, correction=Correction(clip_eps=0.2), return_metrics=True)

    torch._dynamo.reset()
    loss, metrics = torch.compile(run, backend="aot_eager", fullgraph=True)(student.requires_grad_())
    loss.backward()
    assert isinstance(metrics, LossMetrics)
    for a, b in zip((loss, *metrics), (lambda r: (r[0], *r[1]))(run(student)), strict=True):
        torch.testing.assert_close(a, b)
