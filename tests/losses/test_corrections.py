"""Every correction against a loop over single entries, and a second-moment threshold found by bisection."""

import math
from typing import Any

import pytest
import torch
from each_backend import Backend
from oracle import Options, reverse_row, rows_of
from scenes import Scene, on, scene, support, with_pads
from torch import Tensor

from asyncopd import Correction, Support, reverse_kl

pytestmark = pytest.mark.ops("kl_rows")


def run(student: Tensor, sup: Support, **options: Any) -> tuple[Tensor, Tensor]:
    """Row values and coefficients."""
    student = student.detach().requires_grad_()
    rows = reverse_kl(student, sup, reduction="none", **options)
    rows.sum().backward()
    assert student.grad is not None
    return rows.detach(), student.grad


def sampled(backend: Backend, rng: torch.Generator, *, told: bool = True) -> tuple[Scene, Support, Tensor]:
    s = scene(rng, rows=12, vocab=11)
    sup = on(backend, support(s, "samples", rng, told=told, samples=6))
    return s, sup, backend.tensor(s.log_p).gather(1, sup.ids)


def compare(
    backend: Backend, student: Tensor, sup: Support, o: Options, proximal: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    values, coef = run(student, sup, normalize=o.normalize, baseline=o.baseline, **options)
    columns = (student.double(), sup.teacher_logprobs.double(), sup.log_weights.double(), sup.ids)
    expected = []
    for n in range(len(student)):
        p, q, w, ids = (c[n].tolist() for c in columns)
        expected.append(reverse_row(p, q, w, ids, o, None if proximal is None else proximal[n].tolist()))
    backend.close(values, torch.tensor([v for v, _ in expected], dtype=torch.float64))
    backend.close(coef, torch.tensor([c for _, c in expected], dtype=torch.float64))
    return values, coef


def drawn(log_w: float) -> bool:
    """Of M samples no entry is certain."""
    return False


BASELINES = ["none", "mean", "loo"]


@pytest.mark.parametrize("normalize", ["exact", "sampled"])
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("told", [False, True])
def test_no_correction(backend: Backend, rng: torch.Generator, told: bool, baseline: str, normalize: str) -> None:
    _, sup, student = sampled(backend, rng, told=told)
    compare(backend, student, sup, Options(normalize, baseline=baseline, certain=drawn))


@pytest.mark.parametrize("normalize", ["exact", "sampled"])
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("cap", [0.6, 1.0, 1.3])
def test_ratio_cap(backend: Backend, rng: torch.Generator, cap: float, baseline: str, normalize: str) -> None:
    _, sup, student = sampled(backend, rng)
    o = Options(normalize, baseline=baseline, certain=drawn, ratio_cap=cap)
    _, coef = compare(backend, student, sup, o, correction=Correction(ratio_cap=cap))
    plain = run(student, sup, normalize=normalize, baseline=baseline)[1]
    changed = (coef - plain).abs() > 1e-4
    assert changed.any()
    assert baseline != "none" or normalize == "sampled" or not changed.all()


@pytest.mark.parametrize("normalize", ["exact", "sampled"])
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("eps", [0.1, 0.3, 1.5])
def test_ppo_clip(backend: Backend, rng: torch.Generator, eps: float, baseline: str, normalize: str) -> None:
    _, sup, student = sampled(backend, rng)
    o = Options(normalize, baseline=baseline, certain=drawn, clip=(max(1 - eps, 0.0), 1 + eps))
    compare(backend, student, sup, o, correction=Correction(clip_eps=eps))


@pytest.mark.parametrize(("ratio", "good", "binds"), [(2.0, True, True), (2.0, False, False),
                                                      (0.5, False, True), (0.5, True, False),
                                                      (1.1, True, False), (0.9, False, False)])  # fmt: skip
def test_a_clip_binds_only_where_the_ratio_went_its_way(
    backend: Backend, ratio: float, good: bool, binds: bool
) -> None:
    """A good token (A < 0) must not be pushed up any further, a bad one no further down."""
    mu, log_p = math.log(0.2), math.log(0.2 * ratio)
    log_q = log_p + (1.0 if good else -1.0)
    sup = on(backend, Support(torch.tensor([[3]]), torch.tensor([[log_q]]), torch.tensor([[-mu]]), "samples"))
    value, coef = run(backend.tensor(torch.tensor([[log_p]])), sup, correction=Correction(clip_eps=0.2))
    signal = -1.0 if good else 1.0
    clipped = min(max(ratio, 0.8), 1.2) if binds else ratio
    torch.testing.assert_close(coef.double().item(), 0.0 if binds else ratio * signal, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value.double().item(), clipped * signal, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("baseline", ["none", "mean"])
@pytest.mark.parametrize("cap", [0.9, 1.5, 5.0])
def test_decoupled_ppo(backend: Backend, rng: torch.Generator, cap: float, baseline: str) -> None:
    s, sup, student = sampled(backend, rng)
    noise = 0.4 * torch.randn(s.log_p.shape, generator=rng, dtype=torch.float64)
    proximal = backend.tensor((s.log_p + noise).log_softmax(1)).gather(1, sup.ids)
    dropped = (proximal.double() + sup.log_weights.double() + math.log(6)).exp() > cap
    # Where the cap leaves entries of a single id, the mean of A is A itself: A - b is 0 but for rounding, and the sign
    # of that decides whether the clip binds. Such a row has no right answer, not in fp64 either.
    single = torch.tensor([len(set(i[~d].tolist())) == 1 for i, d in zip(sup.ids, dropped, strict=True)])
    rows = torch.ones_like(single) if baseline == "none" else ~single
    assert rows.sum() >= 7
    sup = Support(sup.ids[rows], sup.teacher_logprobs[rows], sup.log_weights[rows], sup.draw)
    student, proximal, dropped = student[rows], proximal[rows], dropped[rows]
    o = Options(baseline=baseline, certain=drawn, clip=(0.8, 1.2), proximal_cap=cap)
    correction = Correction(clip_eps=0.2, proximal_logprobs=proximal, proximal_cap=cap)
    _, coef = compare(backend, student, sup, o, proximal.double(), correction=correction)
    assert dropped.any() == (cap < 5)
    assert (coef[dropped] == 0).all()


def test_decoupled_ppo_with_the_behaviour_as_proximal_is_ppo(backend: Backend, rng: torch.Generator) -> None:
    _, sup, student = sampled(backend, rng)
    proximal = -sup.log_weights - math.log(6)
    one = run(student, sup, correction=Correction(clip_eps=0.2, proximal_logprobs=proximal))
    other = run(student, sup, correction=Correction(clip_eps=0.2))
    for a, b in zip(one, other, strict=True):
        backend.close(a, b.double())


@pytest.mark.parametrize("baseline", BASELINES)
def test_behaviour_advantage(backend: Backend, rng: torch.Generator, baseline: str) -> None:
    _, sup, student = sampled(backend, rng)
    o = Options(baseline=baseline, certain=drawn, advantage="behavior")
    _, coef = compare(backend, student, sup, o, correction=Correction(advantage="behavior"))
    assert (coef - run(student, sup, baseline=baseline)[1]).abs().max() > 1e-2


def test_behaviour_advantage_and_a_clip(backend: Backend, rng: torch.Generator) -> None:
    _, sup, student = sampled(backend, rng)
    o = Options(certain=drawn, advantage="behavior", clip=(0.8, 1.2))
    compare(backend, student, sup, o, correction=Correction(advantage="behavior", clip_eps=0.2))


# ---------------------------------------------------------------------------------------------- second moment


def tau_by_bisection(student: Tensor, sup: Support, budget: float, mask: Tensor | None = None) -> float:
    """tau with mean over the entries a clip could bind of min(log^2 r, tau^2) = budget; inf if the mean is below."""
    squares = []
    for n in range(len(student)):
        if mask is not None and not mask[n]:
            continue
        valid = [k for k in range(student.shape[1]) if sup.ids[n, k] >= 0]
        for k in valid:
            log_p, log_q = float(student[n, k]), float(sup.teacher_logprobs[n, k])
            log_ratio = log_p + float(sup.log_weights[n, k]) + math.log(len(valid))
            if (log_p - log_q) * log_ratio < 0:
                squares.append(log_ratio**2)
    if not squares or sum(squares) / len(squares) < budget:
        return math.inf
    low, high = 0.0, max(squares)
    for _ in range(200):
        mid = (low + high) / 2
        low, high = (mid, high) if sum(min(d, mid) for d in squares) < budget * len(squares) else (low, mid)
    return math.sqrt(high)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("budget", [1e-4, 0.01, 0.04, 0.1, 10.0])
def test_m2po(backend: Backend, rng: torch.Generator, budget: float, told: bool) -> None:
    _, sup, student = sampled(backend, rng, told=told)
    sup, student = pad_and_mask(sup, student)
    mask = torch.ones(12, dtype=torch.bool)
    mask[[2, 7]] = False
    tau = tau_by_bisection(student.double(), sup, budget, mask)
    assert (tau == math.inf) == (budget == 10.0)
    o = Options(certain=drawn, clip=(math.exp(-tau), math.exp(tau)))
    values, coef = run(student, sup, mask=backend.tensor(mask), correction=Correction(m2_budget=budget))
    expected_values, expected_coef = rows_of(reverse_row, student, sup, o)
    backend.close(values, expected_values * mask)
    backend.close(coef, expected_coef * mask[:, None])


def pad_and_mask(sup: Support, student: Tensor) -> tuple[Support, Tensor]:
    """Pads at both ends and inside; they must neither count nor bind."""
    padded = with_pads(sup, [0, 3, 6])
    wide = torch.full(padded.ids.shape, 5.0, dtype=student.dtype, device=student.device)
    wide[:, [1, 2, 3, 5, 6, 7]] = student
    return padded, wide


def test_m2po_spends_exactly_its_budget(rng: torch.Generator) -> None:
    from asyncopd.backends.reference.kl import second_moment_threshold

    for n in (1, 2, 7, 50):
        log_ratio = torch.randn(n, generator=rng, dtype=torch.float64)
        bindable = torch.rand(n, generator=rng) < 0.7
        bindable[0] = True
        for budget in (1e-6, 0.04, 0.5):
            tau = second_moment_threshold(log_ratio, bindable, budget)
            spent = torch.minimum(log_ratio.abs(), tau)[bindable].square().mean()
            full = log_ratio[bindable].square().mean()
            torch.testing.assert_close(spent, torch.minimum(full, torch.tensor(budget).double()))


def test_m2po_without_a_bindable_entry_changes_nothing(backend: Backend, rng: torch.Generator) -> None:
    s = scene(rng, stale=False)  # on policy every log ratio is 0
    sup = on(backend, support(s, "samples", rng))
    student = backend.tensor(s.log_p).gather(1, sup.ids)
    for a, b in zip(run(student, sup, correction=Correction(m2_budget=0.04)), run(student, sup), strict=True):
        backend.close(a, b.double())


# ------------------------------------------------------------------------------------- what mu is recovered from


@pytest.mark.parametrize("correction", [Correction(ratio_cap=1.1), Correction(clip_eps=0.1), Correction(m2_budget=0.01),
                                        Correction(advantage="behavior")], ids=str)  # fmt: skip
def test_mu_is_recovered_from_weights_with_pads(backend: Backend, rng: torch.Generator, correction: Correction) -> None:
    # M is the number of entries that are there, not the width of the matrix.
    _, sup, student = sampled(backend, rng)
    plain = run(student, sup, correction=correction)
    padded, wide = pad_and_mask(sup, student)
    values, coef = run(wide, padded, correction=correction)
    backend.close(values, plain[0].double())
    backend.close(coef[:, [1, 2, 3, 5, 6, 7]], plain[1].double())
    assert (coef[:, [0, 4, 8]] == 0).all()


def test_a_single_sampled_token_is_corrected_too(backend: Backend, rng: torch.Generator) -> None:
    s = scene(rng, rows=20)
    sup = on(backend, support(s, "sampled_token", rng, told=False))
    student = backend.tensor(s.log_p).gather(1, sup.ids)
    compare(backend, student, sup, Options(clip=(0.8, 1.2)), correction=Correction(clip_eps=0.2))
