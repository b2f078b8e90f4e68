"""csrc/cuda/gather.cu on the host, against the reference in fp64: addresses, dtypes, ids, special values."""

import cuda_on_host as host
import pytest
import torch
from torch import Tensor

from asyncopd.backends import reference

pytestmark = host.NEEDED
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def check(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> None:
    """Within 2e-6 of fp64, and a unit of fp32 where that is more; the same bits in every schedule."""
    expected = reference.gather_logprobs(logits.double(), ids, temperature)
    first = host.gather_logprobs(logits, ids, temperature)
    for actual, wanted in zip(first, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=2**-23, atol=2e-6, equal_nan=True)
    for schedule in host.SCHEDULES:
        for one, other in zip(first, host.gather_logprobs(logits, ids, temperature, schedule=schedule), strict=True):
            assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def random_ids(rng: torch.Generator, rows: int, vocab: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(-1, vocab, (rows, 9), generator=rng).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 513, 4095, 9001])
def test_any_length_at_any_address(rng: torch.Generator, dtype: torch.dtype, vocab: int) -> None:
    # Every row begins elsewhere in its 16 bytes, between columns that would show.
    wide = torch.full((4, vocab + 11), NAN, dtype=dtype)
    for n in range(4):
        logits = wide[n : n + 1, 3 + n : 3 + n + vocab]
        logits.copy_(4 * torch.randn(1, vocab, generator=rng))
        check(logits, random_ids(rng, 1, vocab))


@pytest.mark.parametrize("stride", [701, 702, 1408])
def test_rows_of_any_stride(rng: torch.Generator, stride: int) -> None:
    logits = torch.full((3 * stride,), NAN).bfloat16().as_strided((3, 700), (stride, 1))
    logits.copy_(torch.randn(3, 700, generator=rng))
    check(logits, random_ids(rng, 3, 700))


def test_row_offsets_are_64_bits_wide(rng: torch.Generator) -> None:
    logits = torch.randn(1, 300, generator=rng)
    check(logits.as_strided((1, 300), (2**40, 1)), random_ids(rng, 1, 300))


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("offset", [0.0, -90.0])
def test_temperature_and_precision(rng: torch.Generator, temperature: float, offset: float) -> None:
    logits = 10 * torch.randn(2, 20_000, generator=rng) + offset
    check(logits, random_ids(rng, 2, 20_000, torch.int32), temperature)


def test_far_log_probabilities_are_rounded_about_once(rng: torch.Generator) -> None:
    # Of -1300, say: 1 / temperature in one float, or a rounded z - max, would show in the last digit.
    logits = 50 * torch.randn(1, 3000, generator=rng)
    ids = torch.arange(3000)[None]
    for temperature in (0.1, 0.9, 1.9):
        logprobs, lse = host.gather_logprobs(logits, ids, temperature)
        expected, expected_lse = reference.gather_logprobs(logits.double(), ids, temperature)
        # Half a unit in the last place, and what log(s) is off by.
        torch.testing.assert_close(logprobs.double(), expected, rtol=2**-24, atol=1e-6)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=2**-24, atol=1e-6)


def test_a_tiny_temperature_leaves_the_largest() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5, 2.0]])
    logprobs, _ = host.gather_logprobs(logits, torch.arange(4)[None], 1e-30)
    torch.testing.assert_close(logprobs[0, [1, 3]], torch.full((2,), 0.5).log())
    assert (logprobs[0, [0, 2]] < -1e29).all()


def test_sums_of_many_equal_terms(rng: torch.Generator) -> None:
    check(torch.full((1, 50_000), -1.2345), random_ids(rng, 1, 50_000), 0.9)


def test_rising_rows_move_the_maximum_at_every_step(rng: torch.Generator) -> None:
    rising = torch.arange(6000.0)
    check(torch.stack([rising, rising.flip(0), rising / 50]), random_ids(rng, 3, 6000))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan(rng: torch.Generator, dtype: torch.dtype) -> None:
    logits = torch.randn(7, 5000, generator=rng)
    logits[0] = -INF
    logits[1, :4990] = -INF
    logits[2, 77] = INF
    logits[3, [4, 4999]] = INF
    logits[4, 4321] = NAN
    logits[5] = NAN
    logits[6, ::2] = -INF
    logits[6, 1], logits[6, 3] = NAN, INF
    check(logits.to(dtype), torch.tensor([[77, 4, 4321, 0, 4995, -1]]).repeat(7, 1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_that_are_none_are_nan_and_read_nothing(rng: torch.Generator, dtype: torch.dtype) -> None:
    ids = torch.tensor([[-2, 100, 2**31 - 1, -(2**31), 5, -1]], dtype=dtype)
    logits = torch.randn(1, 100, generator=rng)
    logprobs, _ = host.gather_logprobs(logits, ids, 1.0)
    assert logprobs[0, :4].isnan().all()
    assert logprobs[0, 5] == -INF
    check(logits, ids[:, 4:])


def test_what_the_launcher_refuses() -> None:
    logits, out = torch.zeros(1, 4), torch.zeros(4)
    for dtype, id_type, vocab, expected in [(3, 0, 4, 2), (0, 2, 4, 2), (0, 0, 2**30 + 1, 2), (0, 0, 4, 0)]:
        arguments = (logits, dtype, 4, torch.zeros(1, 1, dtype=torch.int32), id_type, 1, vocab, 1, 1.0, out, out)
        assert host.kernels().call("asyncopd_cuda_gather_logprobs", *arguments, 0, None) == expected
    assert host.kernels().call("asyncopd_cuda_gather_logprobs", *arguments, 7, None) == -1  # no such device
