"""The C++ top-K kernel against a stable sort and fp64, on every instruction set of this machine."""

import time

import pytest
import torch
from torch import Tensor

from asyncopd.backends.cpu import logits as cpu
from asyncopd.backends.reference.extract import top_ids
from asyncopd.backends.reference.rows import normalized

INF, NAN = float("inf"), float("nan")
REAL_VOCAB = 151_936
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

topk = cpu.topk_logprobs


def random_logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32, std: float = 4.0) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 7919 + vocab)
    return (torch.randn(rows, vocab, generator=generator) * std).to(dtype)


def tied_logits(rows: int, vocab: int, values: int) -> Tensor:
    """Rows of few different values, so that every boundary of a top K cuts through a tie."""
    generator = torch.Generator().manual_seed(rows * 7919 + vocab)
    return torch.randint(-values, values, (rows, vocab), generator=generator).float() / 2


def assert_matches(logits: Tensor, k: int, temperature: float = 1.0, isa: int = -1) -> None:
    ids, logprobs, lse = topk(logits, k, temperature, isa=isa)
    expected_ids = top_ids(logits, k)
    z = logits.double() / temperature
    expected_lse = torch.logsumexp(z, dim=1)
    assert torch.equal(ids, expected_ids)
    assert logprobs.dtype == lse.dtype == torch.float32
    # rtol covers the rounding of the fp32 outputs themselves, half a unit in the last place.
    close = {"atol": 2e-6, "rtol": 6e-8, "equal_nan": True}
    torch.testing.assert_close(lse.double(), expected_lse, **close)
    expected = normalized(z.gather(1, expected_ids), expected_lse, expected_ids)
    torch.testing.assert_close(logprobs.double(), expected, **close)


def test_every_digit_of_the_exponential(isa: int) -> None:
    """Of two logits the LSE is so small that its own rounding hides nothing."""
    logits = torch.stack([torch.zeros(4001), torch.linspace(-4, 0, 4001)], 1)
    lse = topk(logits, 1, 1.0, isa=isa)[2]
    torch.testing.assert_close(lse.double(), logits.double().logsumexp(1), rtol=0, atol=1.5e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 63, 64, 65, 540, 1024, 1025, 4097])
def test_matches_a_stable_sort(vocab: int, dtype: torch.dtype, isa: int) -> None:
    for k in {1, 2, 16, 64, 1024, vocab - 1, vocab}:
        if 1 <= k <= vocab:
            assert_matches(random_logits(5, vocab, dtype), k, isa=isa)
            assert_matches(tied_logits(5, vocab, 3).to(dtype), k, isa=isa)


@pytest.mark.parametrize("k", [15, 16, 17, 31, 32, 33, 255, 256, 257])
def test_sizes_at_which_the_selection_changes(k: int, isa: int) -> None:
    """Whole vectors and one more or less; the largest number that is ordered by counting; -0 and +0 are equal."""
    for logits in (random_logits(7, 600), tied_logits(7, 600, 2), tied_logits(7, 600, 2) * -0.0):
        assert_matches(logits, k, isa=isa)


@pytest.mark.parametrize("k", [1, 64, 1024, REAL_VOCAB])
def test_a_real_vocabulary(k: int, isa: int) -> None:
    assert_matches(random_logits(2, REAL_VOCAB), k, isa=isa)
    assert_matches(random_logits(2, REAL_VOCAB, torch.bfloat16), k, isa=isa)  # few values: ties everywhere
    assert_matches(tied_logits(2, REAL_VOCAB, 50), k, isa=isa)


@pytest.mark.parametrize("temperature", [0.25, 0.7, 3.0])
def test_temperature(temperature: float, isa: int) -> None:
    for std in (1e-3, 3.0, 30.0):
        assert_matches(random_logits(3, 3001, std=std), 64, temperature, isa=isa)


@pytest.mark.parametrize("k", [1, 16, 64, 1024, 50_000])
def test_orders_that_are_hard_for_a_threshold(k: int, isa: int) -> None:
    vocab = 50_000
    rising = torch.arange(vocab, dtype=torch.float32) / 1000
    one_group = torch.zeros(vocab)
    one_group[128:192] = torch.arange(64.0)  # all of a top 64 in one group
    last = torch.zeros(vocab)
    last[-1] = 1.0
    zeros = torch.zeros(vocab)
    zeros[::3] = -0.0  # equal to 0, so by id
    sawtooth = (torch.arange(vocab) % 64).float()
    rows = [rising, rising.flip(0), torch.full((vocab,), -2.5), one_group, last, zeros, sawtooth]
    assert_matches(torch.stack(rows), k, isa=isa)


@pytest.mark.parametrize("kind", ["equal", "rising"])
def test_hard_rows_take_linear_time(kind: str) -> None:
    """A row 16 times as long: 256 times the time if it were quadratic; the bound leaves room for a busy machine."""

    def seconds(vocab: int) -> float:
        row = torch.zeros(1, vocab) if kind == "equal" else torch.arange(vocab, dtype=torch.float32)[None]
        best = INF
        for _ in range(5):
            start = time.perf_counter()
            topk(row, 1024, 1.0, threads=1)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(1 << 20) < 80 * seconds(1 << 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_strides(dtype: torch.dtype, isa: int) -> None:
    logits = random_logits(6, 1103, dtype)
    assert_matches(logits[:, 1:990], 9, isa=isa)  # unaligned rows
    assert_matches(logits[::2], 9, isa=isa)
    assert_matches(logits[:1].expand(6, -1), 9, isa=isa)  # row stride 0
    assert_matches(logits.t().contiguous().t(), 9, isa=isa)  # no unit stride: copied


def test_rows_beyond_2_to_the_31_elements() -> None:
    stride = 2**31 + 5
    logits = torch.empty(3 * stride, dtype=torch.bfloat16).as_strided((3, 33), (stride, 1))
    logits.copy_(random_logits(3, 33))
    assert_matches(logits, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 16, 700, 1100])
def test_minus_infinity(k: int, dtype: torch.dtype, isa: int) -> None:
    logits = random_logits(6, 1100, dtype)
    logits[0, 3] = -INF
    logits[1, :600] = -INF
    logits[2, 1:] = -INF
    logits[3, :-1] = -INF
    logits[4] = -INF
    logits[5, ::2] = -INF
    assert_matches(logits, k, isa=isa)
    assert (topk(logits, k, 1.0, isa=isa)[1][4] == -INF).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 40, 1100])
def test_nan_and_plus_infinity(k: int, dtype: torch.dtype, isa: int) -> None:
    logits = random_logits(8, 1100, dtype)
    logits[0, 700] = NAN
    logits[1, 5::90] = NAN
    logits[2] = NAN
    logits[3, :] = -INF
    logits[3, 64:128] = NAN  # a whole group
    logits[4, 900] = INF
    logits[5, 3::70] = INF
    logits[6, 9], logits[6, 8] = NAN, INF
    assert_matches(logits, k, isa=isa)
    _, logprobs, lse = topk(logits, k, 1.0, isa=isa)
    assert lse[[0, 1, 2, 3, 6]].isnan().all()
    assert logprobs[[0, 1, 2, 3, 6]].isnan().all()
    assert (lse[4:6] == INF).all()
    assert lse[7].isfinite()


def test_extreme_values(isa: int) -> None:
    assert_matches(torch.tensor([[1.6e38, -1.6e38, 0.0], [-3e38, -3e38, -3.2e38], [1e-45, 0.0, -1e-45]]), 3, isa=isa)
    assert_matches(torch.tensor([[0.0, -80.0, -87.3, -103.0, -200.0]]), 5, isa=isa)


@pytest.mark.parametrize("value", [-1.2345, 0.0, 17.3])
def test_equal_logits_do_not_accumulate_error(value: float, isa: int) -> None:
    """Every group makes the same rounding error here, so nothing averages out."""
    logits = torch.full((2, REAL_VOCAB), value)
    logits[1, ::64] = value + 3.0
    assert_matches(logits, 5, 0.9, isa=isa)


def test_every_instruction_set_gives_the_same_ids(isa: int) -> None:
    for logits in (random_logits(4, 20_011), tied_logits(4, 20_011, 7), random_logits(4, 541, torch.bfloat16)):
        baseline = topk(logits, 128, 1.0, isa=0)[0]
        assert torch.equal(topk(logits, 128, 1.0, isa=isa)[0], baseline)


@pytest.mark.parametrize("shape", [(64, 5003), (9, 70_001), (3000, 501)])
def test_threads_do_not_change_a_bit(shape: tuple[int, int], isa: int) -> None:
    logits = random_logits(*shape)
    one = topk(logits, 32, 0.9, threads=1, isa=isa)
    for threads in (2, 3, 8):
        many = topk(logits, 32, 0.9, threads=threads, isa=isa)
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_a_row_does_not_depend_on_the_batch() -> None:
    logits = random_logits(16, 2003)
    all_rows = topk(logits, 8, 1.0)
    for n in (0, 7, 15):
        one_row = topk(logits[n : n + 1], 8, 1.0)
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(all_rows, one_row, strict=True))


def test_empty() -> None:
    ids, logprobs, _ = topk(torch.randn(0, 8), 3, 1.0)
    assert ids.shape == logprobs.shape == (0, 3)
    assert topk(torch.randn(3, 8), 0, 1.0)[0].shape == (3, 0)
    assert (topk(torch.empty(3, 0), 0, 1.0)[2] == -INF).all()


def test_wrong_arguments_are_refused() -> None:
    logits = random_logits(2, 8)
    with pytest.raises(TypeError, match=r"logits: got torch\.float64"):
        topk(logits.double(), 1, 1.0)
    with pytest.raises(ValueError, match=r"logits: got shape \[8\]"):
        topk(logits[0], 1, 1.0)
    with pytest.raises(ValueError, match="k: got 9"):
        topk(logits, 9, 1.0)
    with pytest.raises(ValueError, match="temperature: got 0"):
        topk(logits, 1, 0.0)
    with pytest.raises(RuntimeError, match="status 2"):
        topk(logits, 1, 1.0, isa=99)
