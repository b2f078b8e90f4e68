"""sample_support in Triton: the reference's draws, at every edge of its groups, tiles and blocks."""

import math

import pytest
import torch
from each_backend import DEVICES
from torch import Tensor

from asyncopd.backends import reference
from asyncopd.backends.reference.philox import uniforms
from asyncopd.kernels import sample_support
from asyncopd.kernels.sample import _signed_word

DEVICE = DEVICES["triton"]
INF, NAN = float("inf"), float("nan")
# How far from a step of the distribution function a number has to fall for its draw to be certain.
STEP = 3e-7


def draw(logits: Tensor, samples: int, head: int, seed: int, *tensors: Tensor | None, temperature: float = 1.0) -> list:
    on_device = [None if x is None else x.to(DEVICE) for x in (tensors or (None, None))]
    out = sample_support(logits.to(DEVICE), samples, head, seed, *on_device, temperature)
    return [x.cpu() for x in out]


def check(logits: Tensor, samples: int, head: int, seed: int, temperature: float = 1.0) -> None:
    """The reference's draws in fp64, except within rounding of a step; weights and log-probabilities to 2e-6."""
    ids, log_weights, logprobs, lse = draw(logits, samples, head, seed, temperature=temperature)
    exact = reference.sample_support(logits.double(), samples, head, seed, None, None, temperature)
    z = logits.double() / temperature
    rest = z.scatter(1, exact[0][:, :head], -INF)
    for n, i in (ids != exact[0]).nonzero().tolist():
        assert i >= head
        u = uniforms(torch.tensor([seed]), torch.tensor([n]), samples)[0, i - head]
        low, high = sorted((int(ids[n, i]), int(exact[0][n, i])))
        steps = rest[n].softmax(0).cumsum(0)[low:high]
        assert ((steps - u).abs() < STEP).all(), f"row {n}, draw {i}"
    rest_lse = rest.logsumexp(1, keepdim=True)
    tail = ids[:, head:]
    expected = (rest_lse - math.log(max(samples, 1)) - z.gather(1, tail.clamp(min=0))).masked_fill(tail < 0, -INF)
    torch.testing.assert_close(log_weights[:, head:].double(), expected, rtol=2**-23, atol=2e-6, equal_nan=True)
    assert (log_weights[:, :head] == 0).all()
    log_p = (z.gather(1, ids.clamp(min=0)) - z.logsumexp(1, keepdim=True)).masked_fill(ids < 0, -INF)
    torch.testing.assert_close(logprobs.double(), log_p, rtol=2**-23, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(lse.double(), z.logsumexp(1), rtol=2**-23, atol=2e-6, equal_nan=True)
    # Nothing of the head, and nothing without probability, is drawn.
    drawable = rest.gather(1, tail.clamp(min=0)) > -INF
    assert (drawable | (tail < 0) | rest_lse.isnan()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("vocab", "head"), [(1, 0), (64, 3), (65, 0), (500, 16), (4097, 0), (4159, 40)])
def test_draws_are_the_references(rng: torch.Generator, dtype: torch.dtype, vocab: int, head: int) -> None:
    check((3 * torch.randn(2, vocab, generator=rng)).to(dtype), 48, head, 11, temperature=0.8)


@pytest.mark.parametrize("spread", [0.0, 0.5, 12.0])
def test_flat_and_peaked_rows(rng: torch.Generator, spread: float) -> None:
    check(spread * torch.randn(1, 3000, generator=rng) - 500, 200, 5, -7)


def test_draws_fall_on_every_group_in_proportion() -> None:
    # Group g has 2^-g of the mass: counted without asking the reference.
    logits = torch.cat([torch.full((64,), -g * math.log(2)) for g in range(6)])[None]
    ids = draw(logits, 3000, 0, 3)[0][0]
    p = 2.0 ** -torch.arange(6).double()
    expected = 3000 * p / p.sum()
    counts = torch.bincount(ids // 64, minlength=6)
    assert float(((counts - expected).square() / expected).sum()) < 20.5  # p = 1e-3 at 5 degrees of freedom
    within = torch.bincount(ids % 64 // 8, minlength=8)
    assert float(((within - 375).square() / 375).sum()) < 24.3  # at 7


@pytest.mark.parametrize("head", [1, 2, 3, 70])
def test_ties_at_the_end_of_the_head(head: int) -> None:
    # Equal logits: the head is the first ids, one group whole and a part of the next for 70.
    check(torch.zeros(2, 200), 40, head, 5)
    check(torch.tensor([[1.0, 2.0, 2.0, 1.0] * 40]), 40, head, 5)


def test_a_head_that_holds_nearly_all_of_the_mass(rng: torch.Generator) -> None:
    # What is left is 1e-20 of the row: subtracting the head from the whole would leave nothing of it.
    logits = torch.randn(1, 700, generator=rng)
    logits[0, [3, 130, 131]] += 50
    check(logits, 64, 3, 9)


def test_what_is_left_of_broken_rows(rng: torch.Generator) -> None:
    logits = torch.randn(5, 300, generator=rng)
    logits[0, [10, 250]] = NAN  # the head takes both
    logits[1, [10, 11, 250]] = NAN  # one is left: uniform
    logits[2, [10, 250]] = INF
    logits[3, [10, 11, 250]] = INF
    logits[4] = -INF
    logits[4, 77] = 1.0
    ids, log_weights, logprobs, lse = draw(logits, 8, 2, 4)
    exact = reference.sample_support(logits.double(), 8, 2, 4, None, None, 1.0)
    assert torch.equal(ids, exact[0])
    for mine, theirs in zip((log_weights, logprobs, lse), exact[1:], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=2e-6, equal_nan=True)
    assert (ids[4, 2:] == -1).all()


def test_streams_and_the_rollouts_own_token(rng: torch.Generator) -> None:
    logits = 2 * torch.randn(3, 600, generator=rng)
    streams = torch.tensor([5, -(2**63), 2**40 + 1])
    own = torch.stack([logits[0].argmax(), torch.tensor(599), torch.tensor(0)])
    for token in (own, own.int()):
        ids, *_ = draw(logits, 6, 2, 0, streams, token)
        exact = reference.sample_support(logits.double(), 6, 2, 0, streams, token, 1.0)
        assert torch.equal(ids, exact[0])
    assert ids[0, 2] != own[0]  # it lies in the head
    assert ids[1:, 2].tolist() == [599, 0]


def test_a_draw_of_weight_one_does_not_look_like_the_head() -> None:
    draws = draw(torch.zeros(1, 4), 4, 0, 1)
    assert (draws[1] == torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63)])
def test_a_seed_is_two_words(seed: int) -> None:
    low, high = _signed_word(seed), _signed_word(seed >> 32)
    assert min(low, high) >= -(2**31)
    assert max(low, high) < 2**31
    assert (high << 32) + (low & 0xFFFFFFFF) == seed


def test_too_large_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head: got 1025, expected 0\.\.1024"):
        draw(torch.zeros(1, 2000), 1, 1025, 0)
