"""The C++ sampling kernel against the reference in fp64: the same numbers, hence the same draws, and their law."""

import math

import pytest
import torch
from torch import Tensor

from asyncopd.backends.cpu import logits as cpu
from asyncopd.backends.reference import sample as reference
from asyncopd.backends.reference.extract import top_ids

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

sample = cpu.sample_support
Drawn = tuple[Tensor, Tensor, Tensor, Tensor]


def random_logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32, std: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 7919 + vocab)
    return (torch.randn(rows, vocab, generator=generator) * std).to(dtype)


def assert_matches(
    logits: Tensor,
    num_samples: int,
    head: int,
    seed: int = 5,
    streams: Tensor | None = None,
    sampled_ids: Tensor | None = None,
    temperature: float = 1.0,
    isa: int = -1,
    identical: float = 1.0,
) -> Drawn:
    """The reference in fp64: at least this share of the ids, and the values at those."""
    arguments = (num_samples, head, seed, streams, sampled_ids, temperature)
    drawn = ids, log_weights, logprobs, lse = sample(logits, *arguments, isa=isa)
    expected_ids, expected_weights, expected_logprobs, expected_lse = reference.sample_support(
        logits.double(), *arguments
    )
    same = ids == expected_ids
    assert same.double().mean() >= identical
    assert log_weights.dtype == logprobs.dtype == lse.dtype == torch.float32
    # rtol covers the rounding of the fp32 outputs themselves, half a unit in the last place.
    close = {"atol": 2e-6, "rtol": 6e-8, "equal_nan": True}
    torch.testing.assert_close(lse.double(), expected_lse, **close)
    torch.testing.assert_close(log_weights.double()[same], expected_weights[same], **close)
    torch.testing.assert_close(logprobs.double()[same], expected_logprobs[same], **close)
    return drawn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 64, 65, 540, 4097])
@pytest.mark.parametrize("head", [0, 1, 16])
def test_draws_are_the_references(vocab: int, head: int, dtype: torch.dtype, isa: int) -> None:
    logits = random_logits(9, vocab, dtype)
    streams = torch.arange(9) * 12345 - 3
    for temperature in (1.0, 0.5):
        # At most one draw in a few hundred thousand here is within rounding of a boundary; none of these is.
        assert_matches(logits, 48, min(head, vocab), temperature=temperature, isa=isa)
        assert_matches(logits, 5, min(head, vocab), streams=streams, temperature=temperature, isa=isa)


@pytest.mark.parametrize("head", [0, 16, 1024])
@pytest.mark.parametrize(("vocab", "std"), [(151_936, 1.0), (151_936, 6.0), (128_000, 3.0)])
def test_draws_from_a_real_vocabulary(vocab: int, std: float, head: int, isa: int) -> None:
    """Steps of the cumulative distribution are about 1e-5 apart there and known to 1e-9."""
    assert_matches(random_logits(4, vocab, std=std), 4000, head, isa=isa, identical=0.999)


def test_draws_at_a_temperature_are_those_of_the_exact_quotient(isa: int) -> None:
    assert_matches(random_logits(4, 50_001), 2000, 8, temperature=0.7, isa=isa, identical=0.999)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**32])
def test_seeds_and_streams(seed: int, isa: int) -> None:
    logits = torch.zeros(70, 4096)  # equal steps: an id shows 12 bits of its uniform number
    by_seed = assert_matches(logits, 33, 0, seed=seed, isa=isa)
    by_stream = assert_matches(logits[:1], 33, 0, streams=torch.tensor([seed]), isa=isa)
    assert torch.equal(by_seed[0][:1], by_stream[0])


def test_what_is_left_of_a_peaked_row_keeps_its_precision(isa: int) -> None:
    """The head has all of the mass to within e^-200, and e^-900 in the last rows: taken away, not subtracted."""
    logits = random_logits(6, 3000, std=2.0)
    logits[:3, 77] = 200.0
    logits[3:, 77] = 900.0
    logits[:, 78] = 150.0
    _, log_weights, _, _ = assert_matches(logits, 64, 2, isa=isa)
    assert log_weights.isfinite().all()
    rest = logits.double().index_fill(1, torch.tensor([77, 78]), -INF).logsumexp(1)
    ids = sample(logits, 64, 2, 5, None, None, 1.0, isa=isa)[0][:, 2:]
    expected = rest[:, None] - math.log(64) - logits.double().gather(1, ids)
    torch.testing.assert_close(log_weights[:, 2:].double(), expected, atol=2e-6, rtol=6e-8)


@pytest.mark.parametrize("head", [0, 2])
def test_sampled_ids(head: int, isa: int) -> None:
    logits = random_logits(50, 300)
    own = top_ids(logits, 5)[:, 1:2].flatten()  # in a head of 2
    own[::2] = torch.randint(0, 300, (25,), generator=torch.Generator().manual_seed(1))
    assert_matches(logits, 6, head, sampled_ids=own, isa=isa)
    assert_matches(logits, 6, head, sampled_ids=own.int(), isa=isa)


def test_impossible_sampled_ids_are_refused(isa: int) -> None:
    logits = random_logits(3, 9)
    logits[1, 4] = -INF
    for head in (0, 9):
        with pytest.raises(ValueError, match=r"sampled_ids: got token 4, whose logit is -inf"):
            sample(logits, 2, head, 0, None, torch.tensor([0, 4, 1]), 1.0, isa=isa)
    for bad in (-1, 9, 2**40):
        with pytest.raises(ValueError, match=rf"sampled_ids: got {bad}, expected 0\.\.8"):
            sample(logits, 2, 0, 0, None, torch.tensor([0, bad, 1]), 1.0, isa=isa)


@pytest.mark.parametrize("head", [0, 2, 64, 700])
def test_minus_infinity_and_an_empty_rest(head: int, isa: int) -> None:
    logits = random_logits(6, 700)
    logits[0, ::2] = -INF
    logits[1, 1:] = -INF
    logits[2, :-2] = -INF
    logits[3] = -INF
    logits[4, :640] = -INF
    ids, log_weights, logprobs, _ = assert_matches(logits, 20, head, isa=isa)
    pads = ids == -1
    assert pads[3, head:].all()
    assert (log_weights[pads] == -INF).all()
    assert (logprobs[pads] == -INF).all()
    assert not logprobs.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", [0, 1, 4, 300])
def test_nan_rows_stay_in_their_row(head: int, dtype: torch.dtype, isa: int) -> None:
    logits = random_logits(7, 300, dtype)
    clean = sample(logits, 6, head, 3, None, None, 1.0, isa=isa)
    logits[1, 7] = NAN
    logits[2, ::2] = NAN
    logits[3] = NAN
    logits[4, 100], logits[4, 5] = INF, NAN
    logits[5, [1, 2, 250]] = INF
    drawn = ids, _, logprobs, lse = assert_matches(logits, 6, head, seed=3, isa=isa)
    empty = head == 300
    assert (ids[:, head:] == -1).all() if empty else ((ids >= 0) & (ids < 300)).all()
    assert lse[1:5].isnan().all()
    assert logprobs[1:5][ids[1:5] >= 0].isnan().all()
    for mine, theirs in zip(drawn, clean, strict=True):
        assert torch.equal(mine[[0, 6]], theirs[[0, 6]])


def test_a_draw_of_weight_one_does_not_look_like_a_head(isa: int) -> None:
    logits = torch.full((3, 100), -INF)
    logits[:, 40] = 1.5
    _, log_weights, _, _ = assert_matches(logits, 1, 0, isa=isa)
    assert (log_weights == torch.finfo(torch.float32).tiny).all()
    assert torch.equal(log_weights, reference.sample_support(logits, 1, 0, 5, None, None, 1.0)[1])


def chi_square_p(ids: Tensor, p: Tensor, least: float = 40.0) -> float:
    """p-value of Pearson's test, tokens merged, the most probable ones first, until a bin expects about `least`."""
    expected, order = (p.double() * ids.numel()).sort(descending=True)
    counts = torch.bincount(ids.flatten(), minlength=p.numel()).double()[order]
    bins = (expected.cumsum(0) / least).long().unique(return_inverse=True)[1]
    counts, expected = (torch.zeros_like(x).index_add(0, bins, x) for x in (counts, expected))
    small = expected < least / 4
    assert expected[small].sum() < least  # the last bin, and at most one between large tokens and small ones
    counts, expected = counts[~small], expected[~small]
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((counts.numel() - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize("head", [0, 16])
@pytest.mark.parametrize("kind", ["normal", "negative", "peaked", "flat"])
def test_law_at_a_large_vocabulary(kind: str, head: int, isa: int) -> None:
    logits = random_logits(1, 128_000)
    if kind == "negative":
        logits -= 500.0
    elif kind == "peaked":
        logits[0, 99_999] = logits.logsumexp(1)[0] + 3.0  # about 95 %
    elif kind == "flat":
        logits *= 0.01
    ids, _, _, _ = sample(logits.expand(60, -1), 2000, head, 11, None, None, 1.0, isa=isa)
    p = logits[0].double().softmax(0)
    p[ids[0, :head]] = 0.0
    assert p[ids[:, head:]].min() > 0
    # Seeds are fixed, so a pass stays a pass.
    assert chi_square_p(ids[:, head:], p / p.sum()) > 1e-3


def test_the_law_test_sees_a_wrong_law() -> None:
    logits = random_logits(1, 128_000)
    ids, _, _, _ = sample(logits.expand(60, -1), 2000, 0, 11, None, None, 1.0)
    assert chi_square_p(ids, (logits[0].double() * 1.05).softmax(0)) < 1e-6


@pytest.mark.parametrize("shape", [(64, 5003), (5, 70_001), (500, 501)])
def test_threads_and_batch_do_not_change_a_bit(shape: tuple[int, int], isa: int) -> None:
    logits, streams = random_logits(*shape), torch.arange(shape[0]) * 77
    one = sample(logits, 12, 4, 0, streams, None, 0.9, threads=1, isa=isa)
    for threads in (2, 3, 8):
        many = sample(logits, 12, 4, 0, streams, None, 0.9, threads=threads, isa=isa)
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))
    for n in (0, shape[0] // 2, shape[0] - 1):
        row = slice(n, n + 1)
        alone = sample(logits[row], 12, 4, 0, streams[row], None, 0.9, isa=isa)
        assert all(torch.equal(a[row], b) for a, b in zip(one, alone, strict=True))


def test_instruction_sets_agree(isa: int) -> None:
    logits = random_logits(8, 30_000)
    baseline = sample(logits, 500, 32, 1, None, None, 1.0, isa=0)[0]
    ids = sample(logits, 500, 32, 1, None, None, 1.0, isa=isa)[0]
    assert torch.equal(ids[:, :32], baseline[:, :32])
    assert (ids == baseline).double().mean() >= 0.999


def test_row_strides(isa: int) -> None:
    logits = random_logits(6, 1103)
    for view in (logits[:, 1:990], logits[::2], logits[:1].expand(6, -1), logits.t().contiguous().t()):
        assert_matches(view, 9, 3, isa=isa)


def test_empty_and_wrong_arguments() -> None:
    assert sample(torch.empty(0, 5), 2, 1, 0, None, None, 1.0)[0].shape == (0, 3)
    assert (sample(torch.empty(2, 0), 2, 0, 0, None, None, 1.0)[0] == -1).all()
    logits = random_logits(2, 8)
    with pytest.raises(ValueError, match="head: got 9"):
        sample(logits, 1, 9, 0, None, None, 1.0)
    with pytest.raises(ValueError, match=r"seed: got shape \[3\]"):
        sample(logits, 1, 0, 0, torch.zeros(3, dtype=torch.int64), None, 1.0)
    with pytest.raises(TypeError, match=r"logits: got torch\.float64"):
        sample(logits.double(), 1, 0, 0, None, None, 1.0)
    with pytest.raises(RuntimeError, match="status 2"):
        sample(logits, 1, 0, 0, None, None, 1.0, isa=99)
