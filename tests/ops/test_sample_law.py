"""sample_support: what is drawn has the law that its weights claim."""

import math

import pytest
import torch
from each_backend import Backend

from asyncopd import sample_support
from asyncopd.backends.reference.philox import uniforms

pytestmark = pytest.mark.ops("sample_support")
INF = float("inf")
# Chi-square quantiles at p = 1e-3; seeds are fixed, so a pass stays a pass.
CHI2 = {6: 22.5, 9: 27.9, 19: 43.8, 99: 148.2}


def chi_square(ids: torch.Tensor, p: torch.Tensor) -> float:
    """Pearson's statistic of draws against probabilities p [V], each of which expects more than 5 draws."""
    counts, expected = torch.bincount(ids.flatten(), minlength=p.numel()).double(), p.double() * ids.numel()
    assert (expected > 5).all()
    return float(((counts - expected).square() / expected).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_softmax(engine: str, rng: torch.Generator, temperature: float) -> None:
    z = torch.randn(20, generator=rng)
    draw = sample_support(z.expand(2000, 20), num_samples=20, seed=1, temperature=temperature)
    assert chi_square(draw.ids, (z.double() / temperature).softmax(0)) < CHI2[19]


def test_each_position_of_the_draw_follows_the_softmax(engine: str, rng: torch.Generator) -> None:
    z = torch.randn(10, generator=rng)
    draw = sample_support(z.expand(20_000, 10), num_samples=3, seed=4)
    for position in range(3):
        assert chi_square(draw.ids[:, position], z.double().softmax(0)) < CHI2[9]


def test_two_draws_of_a_row_are_independent(engine: str, rng: torch.Generator) -> None:
    z = torch.randn(10, generator=rng)
    ids = sample_support(z.expand(60_000, 10), num_samples=2, seed=8).ids
    p = z.double().softmax(0)
    pairs = p[:, None] * p[None, :]
    counts = torch.bincount(ids[:, 0] * 10 + ids[:, 1], minlength=100).double()
    expected = pairs.flatten() * 60_000
    assert float(((counts - expected).square() / expected).sum()) < CHI2[99]


def test_tail_draws_follow_the_rest_of_the_distribution(engine: str, rng: torch.Generator) -> None:
    z = torch.randn(12, generator=rng)
    draw = sample_support(z.expand(4000, 12), num_samples=8, head=5, seed=2)
    top = torch.sort(z, descending=True, stable=True).indices[:5]
    assert torch.equal(draw.ids[:, :5], top.expand(4000, 5))
    p = z.double().softmax(0)
    p[top] = 0
    left = p > 0
    renumbered = left.cumsum(0)[draw.ids[:, 5:]] - 1
    assert left[draw.ids[:, 5:]].all()
    assert chi_square(renumbered, (p / p.sum())[left]) < CHI2[6]


@pytest.mark.parametrize("head", [0, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_weights_logprobs_and_lse_are_those_of_the_design(
    backend: Backend, rng: torch.Generator, head: int, temperature: float
) -> None:
    z = backend.tensor(2 * torch.randn(8, 25, generator=rng, dtype=torch.float64))
    draw = sample_support(z, num_samples=6, head=head, seed=7, temperature=temperature)
    log_mu = (z.double() / temperature).log_softmax(1)
    top = torch.sort(z, dim=1, descending=True, stable=True).indices[:, :head]
    rest = 1 - log_mu.exp().gather(1, top).sum(1, keepdim=True)
    expected = torch.log(rest / 6) - log_mu.gather(1, draw.ids[:, head:])
    assert torch.equal(draw.ids[:, :head], top)
    assert (draw.log_weights[:, :head] == 0).all()
    backend.close(draw.log_weights, torch.cat([torch.zeros(8, head).double(), expected], 1))
    backend.close(draw.logprobs, log_mu.gather(1, draw.ids))
    backend.close(draw.logsumexp, (z.double() / temperature).logsumexp(1))


@pytest.mark.parametrize("head", [0, 3])
def test_weighted_sums_estimate_sums_over_the_vocabulary(engine: str, rng: torch.Generator, head: int) -> None:
    z, f = torch.randn(12, generator=rng), 0.5 + torch.rand(12, generator=rng).double()
    draw = sample_support(z.expand(100_000, 12), num_samples=2, head=head, seed=6)
    estimates = (draw.log_weights.double().exp() * f[draw.ids]).sum(1)
    error = (estimates.mean() - f.sum()).abs()
    standard_error = estimates.std() / math.sqrt(100_000)
    # 3.5 standard errors; the second line says that a weight wrong by 5 % could not hide in that.
    assert error < 3.5 * standard_error
    assert 3.5 * standard_error < 0.05 * f.sum().abs()


def test_a_row_of_weights_sums_to_the_vocabulary_size_on_average(engine: str, rng: torch.Generator) -> None:
    z = 0.5 * torch.randn(15, generator=rng)
    sums = sample_support(z.expand(50_000, 15), num_samples=4, seed=3).log_weights.double().exp().sum(1)
    assert (sums.mean() - 15).abs() < 3.5 * sums.std() / math.sqrt(50_000)


@pytest.mark.parametrize("offset", [-3e4, -200.0, 0.0, 200.0, 3e4])
def test_a_constant_added_to_the_logits_changes_nothing(engine: str, offset: float) -> None:
    # All-negative logits too: an identity of 0 in a maximum would send every draw to one token.
    z = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 3.0, -2.0, 0.25])
    plain = sample_support(z.expand(300, 8), num_samples=8, seed=5)
    moved = sample_support((z + offset).expand(300, 8), num_samples=8, seed=5)
    assert torch.equal(plain.ids, moved.ids)


def test_a_peaked_row_draws_its_peak(backend: Backend) -> None:
    z = torch.full((50, 1000), -40.0)
    z[:, 777] = 60.0
    draw = sample_support(backend.tensor(z), num_samples=16, seed=2)
    assert (draw.ids == 777).all()
    backend.close(draw.log_weights, torch.full((50, 16), -math.log(16), dtype=torch.float64))


def test_impossible_tokens_are_never_drawn(engine: str) -> None:
    z = torch.zeros(2000, 9)
    z[:, [0, 4, 8]] = -INF  # the first, one inside and the last
    ids = sample_support(z, num_samples=32, seed=11).ids
    assert set(ids.unique().tolist()) == {1, 2, 3, 5, 6, 7}


def test_the_tail_of_a_large_vocabulary_is_not_lost(engine: str) -> None:
    # One token has 98 %, 2^20 others share the rest: an fp32 running sum that starts at 0.98 never sees terms of 2e-8.
    v = 2**20 + 1
    z = torch.zeros(1, v)
    z[0, 0] = math.log(49 * (v - 1))
    ids = sample_support(z, num_samples=100_000, seed=1).ids.flatten()
    n, tail = ids.numel(), ids[ids > 0]
    # Four standard deviations of a binomial.
    assert abs(tail.numel() - 0.02 * n) < 4 * math.sqrt(0.02 * n)
    slices = torch.histc(tail.double(), 8, 1, v - 1)
    assert ((slices - 0.0025 * n).abs() < 4 * math.sqrt(0.0025 * n)).all()


def test_the_reference_inverts_the_exact_distribution_function() -> None:
    # The same tail: a distribution function rounded to fp32 would be off by three tokens.
    v = 2**20 + 1
    z = torch.zeros(1, v)
    z[0, 0] = math.log(49 * (v - 1))
    ids = sample_support(z.double(), num_samples=20_000, seed=1).ids[0]
    u = uniforms(torch.tensor([1]), torch.tensor([0]), 20_000)[0]
    p_first = float(z.double().softmax(1)[0, 0])
    expected = torch.where(u < p_first, 0, 1 + ((u - p_first) / (1 - p_first) * (v - 1)).floor())
    assert ((ids - expected).abs() <= 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_drawn_in_full_precision(
    engine: str, rng: torch.Generator, dtype: torch.dtype
) -> None:
    z = torch.randn(20, generator=rng).to(dtype)
    draw = sample_support(z.expand(2000, 20), num_samples=20, seed=3)
    assert chi_square(draw.ids, z.double().softmax(0)) < CHI2[19]
    assert draw.log_weights.dtype == draw.logprobs.dtype == torch.float32
    torch.testing.assert_close(draw.logprobs[0].double(), z.double().log_softmax(0)[draw.ids[0]], rtol=0, atol=2e-6)


def test_no_samples_is_the_top_k(backend: Backend, rng: torch.Generator) -> None:
    z = backend.tensor(torch.randn(3, 9, generator=rng))
    draw = sample_support(z, num_samples=0, head=9, seed=0)
    assert torch.equal(draw.ids, torch.sort(z, dim=1, descending=True, stable=True).indices)
    assert (draw.log_weights == 0).all()
