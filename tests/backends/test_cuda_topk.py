"""csrc/cuda/topk.cu on the host, against a stable sort and fp64: one part and several, every schedule."""

import cuda_on_host as host
import pytest
import torch
from torch import Tensor

from asyncopd.backends import reference
from asyncopd.backends.native import DTYPE_CODES

pytestmark = host.NEEDED
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SEGMENT = {torch.bfloat16: 8192, torch.float16: 8192, torch.float32: 4096}  # columns
# Beside the first run, forward in one part. 5 parts are more than some rows have segments.
FULL = ((host.BACKWARD, 1), (host.RANDOM, 2), (host.FORWARD, 5), (host.BACKWARD, 5))
BRIEF = ((host.RANDOM, 1), (host.BACKWARD, 5))


def check(logits: Tensor, k: int, temperature: float = 1.0, runs: tuple[tuple[int, int], ...] = FULL) -> None:
    """Ids exact, values within 2e-6 of fp64 or a unit of fp32; the same bits in every schedule and number of parts."""
    ids, logprobs, lse = reference.topk_logprobs(logits.double(), k, temperature)
    first = host.topk_logprobs(logits, k, temperature)
    assert torch.equal(first[0], ids)
    torch.testing.assert_close(first[1].double(), logprobs, rtol=2**-23, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(first[2].double(), lse, rtol=2**-23, atol=2e-6, equal_nan=True)
    for schedule, parts in runs:
        again = host.topk_logprobs(logits, k, temperature, parts=parts, schedule=schedule)
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 65, 1023, 2049, 4099, 20_001])
def test_any_length_at_any_address(rng: torch.Generator, dtype: torch.dtype, vocab: int) -> None:
    # Every row begins elsewhere in its 16 bytes, between columns that would show: NaN is the first of all.
    wide = torch.full((3, vocab + 11), NAN, dtype=dtype)
    for n, k in enumerate((1, 64, 256)):
        logits = wide[n : n + 1, 3 + n : 3 + n + vocab]
        logits.copy_(4 * torch.randn(1, vocab, generator=rng))
        check(logits, min(k, vocab))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("over", [-1, 0, 1])
def test_lengths_about_a_segment(rng: torch.Generator, dtype: torch.dtype, over: int) -> None:
    for columns in (SEGMENT[dtype], 3 * SEGMENT[dtype]):
        logits = (4 * torch.randn(1, columns + over, generator=rng)).to(dtype)
        check(logits, 3, runs=BRIEF)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1, 2, 3, 31, 64, 255, 256, 257, 512, 1000, 1024])
def test_every_k(rng: torch.Generator, dtype: torch.dtype, k: int) -> None:
    check((4 * torch.randn(2, 12_000, generator=rng)).to(dtype), k)
    check(torch.randn(1, k, generator=rng).to(dtype), k)  # all of the row


@pytest.mark.parametrize("k", [1, 64, 300, 1024])
@pytest.mark.parametrize("value", [0.0, -3.5, -INF, INF])
def test_rows_of_equal_logits_give_the_first_ids(k: int, value: float) -> None:
    check(torch.full((1, 9500), value).bfloat16(), k)


@pytest.mark.parametrize("k", [1, 64, 256, 1024])
def test_orders_that_are_hard_for_a_threshold(k: int) -> None:
    columns = torch.arange(20_000)
    last = torch.zeros(20_000)
    last[-1] = 1.0
    rows = [columns / 700, columns.flip(0) / 700, (columns % 64).float(), last, -(columns // 9000).float()]
    logits = torch.stack(rows)
    check(logits, k)
    check(logits.bfloat16(), k)


def test_hard_rows_take_linear_time_and_equal_ones_no_more_than_random(rng: torch.Generator) -> None:
    def cost(row: Tensor) -> int:
        host.topk_logprobs(row[None], 64, 1.0)
        return host.meetings()

    rising = [cost(torch.arange(float(columns))) for columns in (40_960, 81_920)]
    assert 1.9 < rising[1] / rising[0] < 2.1
    usual = cost(torch.randn(81_920, generator=rng))
    assert cost(torch.zeros(81_920)) < 1.2 * usual
    assert usual < rising[1] / 5


def test_zeros_of_either_sign_are_equal() -> None:
    logits = torch.full((1, 6000), -0.0)
    logits[0, ::3] = 0.0
    for dtype in DTYPES:
        check(logits.to(dtype), 200)
        check(logits.to(dtype), 900)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [2, 50, 3000])
def test_ties(rng: torch.Generator, dtype: torch.dtype, values: int) -> None:
    logits = (torch.randint(-values, values, (2, 20_000), generator=rng) / 64).to(dtype)
    for k in (7, 256, 700):
        check(logits, k, runs=BRIEF)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 40, 400])
def test_nan_comes_first_and_then_infinity(rng: torch.Generator, dtype: torch.dtype, k: int) -> None:
    logits = torch.randn(7, 10_000, generator=rng)
    logits[0, [9999, 70, 3]] = NAN
    logits[1, [200, 100, 9000]] = INF
    logits[2, 64], logits[2, 66], logits[2, 300], logits[2, 301] = NAN, INF, INF, NAN
    logits[3] = NAN
    logits[4, 5000:] = NAN
    logits[5, 800:1600] = -NAN  # a slot, a warp and more; the other sign
    # Row 6 must not notice its neighbours.
    check(logits.to(dtype), k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 64, 600])
def test_masked_vocabularies(rng: torch.Generator, dtype: torch.dtype, k: int) -> None:
    logits = torch.randn(5, 10_000, generator=rng)
    logits[0, 3] = -INF
    logits[1, :9990] = -INF
    logits[2, 10:] = -INF
    logits[3] = -INF
    logits[4, ::2] = -INF
    check(logits.to(dtype), k)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("offset", [0.0, -90.0])
def test_log_probabilities_are_right_to_2e_6(rng: torch.Generator, temperature: float, offset: float) -> None:
    check(10 * torch.randn(2, 30_000, generator=rng) + offset, 64, temperature, BRIEF)


def test_a_real_vocabulary(rng: torch.Generator) -> None:
    check((3 * torch.randn(1, 151_936, generator=rng)).bfloat16(), 64, 0.8, BRIEF)


def test_extreme_values() -> None:
    check(torch.tensor([[1.6e38, -1.6e38, 0.0], [1e-45, 0.0, -1e-45]]), 3)
    # fp64 would lose the log(2) here.
    _, logprobs, _ = host.topk_logprobs(torch.tensor([[-3e38, -3e38, -3.2e38]]), 3, 1.0)
    torch.testing.assert_close(logprobs, torch.tensor([[-0.6931472, -0.6931472, -2e37]]))
    check(torch.tensor([[0.0, -80.0, -87.3, -103.0, -200.0]]), 5)
    subnormal = torch.tensor([[6e-8, -6e-8, 1.2e-7, 0.0, 65504.0, -65504.0]]).half()
    check(subnormal, 6)


@pytest.mark.parametrize("stride", [9001, 9002, 12_000])
def test_rows_of_any_stride(rng: torch.Generator, stride: int) -> None:
    logits = torch.full((3 * stride,), NAN).bfloat16().as_strided((3, 9000), (stride, 1))
    logits.copy_(torch.randn(3, 9000, generator=rng))
    check(logits, 20)
    check(logits[:1].expand(3, -1), 20)


def test_row_offsets_are_64_bits_wide(rng: torch.Generator) -> None:
    check(torch.randn(1, 300, generator=rng).as_strided((1, 300), (2**40, 1)), 5)


def test_a_row_depends_on_nothing_beside_it(rng: torch.Generator) -> None:
    logits = torch.randn(5, 9000, generator=rng)
    whole = host.topk_logprobs(logits, 8, 0.9, parts=2)
    for n in range(5):
        for mine, theirs in zip(host.topk_logprobs(logits[n : n + 1], 8, 0.9), whole, strict=True):
            assert torch.equal(mine[0], theirs[n])


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_fill_a_device_and_no_more(dtype: torch.dtype) -> None:
    def parts(rows: int, vocab: int = 151_936, k: int = 64) -> int:
        return host.topk_size("parts", DTYPE_CODES[dtype], rows, vocab, k, 132)

    segments = -(-151_936 // SEGMENT[dtype])
    assert parts(1) == segments
    assert parts(8192) == parts(528) == 1
    # Blocks of one, two or more whole segments: at least one for each SM as soon as there are as many segments.
    assert all(132 <= rows * parts(rows) < 2 * 4 * 132 for rows in range(8, 528))
    assert parts(1, vocab=100) == parts(0) == 1
    assert parts(1, k=1024) == 8  # 8192 keys for one block to choose from


def test_what_the_launcher_refuses() -> None:
    logits, ids, out, scratch = torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int64), torch.zeros(10), torch.zeros(9)

    def status(
        dtype: int = 0, rows: int = 2, vocab: int = 5, k: int = 3, parts: int = 1, space: Tensor | None = scratch
    ) -> int:
        arguments = (logits, dtype, 5, rows, vocab, k, 1.0, parts, space, ids, out, out, 0, None)
        return host.kernels().call("asyncopd_cuda_topk_logprobs", *arguments)

    assert status() == status(rows=0) == status(space=None) == 0
    assert status(dtype=3) == status(k=0) == status(k=6) == status(vocab=2**30 + 1) == status(rows=2**31) == 2
    assert status(parts=0) == status(parts=2**16) == status(parts=2, space=None) == status(vocab=2000, k=1025) == 2
