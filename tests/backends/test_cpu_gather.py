"""The C++ LSE + gather kernel against an fp64 computation, on every instruction set of this machine."""

import pytest
import torch
from torch import Tensor

from asyncopd.backends.cpu import logits as cpu

INF, NAN = float("inf"), float("nan")
REAL_VOCAB = 151_936
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

gather = cpu.gather_logprobs


def gather_ref(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """fp64 log-probabilities [N, K] and LSE [N], with the special values written out."""
    z = logits.double() / temperature
    lse = torch.logsumexp(z, dim=1)
    at_ids = z.gather(1, ids.long().clamp(min=0))
    logprobs = at_ids - lse[:, None]
    logprobs[(at_ids == -INF) & ~lse.isnan()[:, None]] = -INF
    logprobs[ids == -1] = -INF
    return logprobs, lse


def assert_matches(logits: Tensor, ids: Tensor, temperature: float = 1.0, isa: int = -1, atol: float = 2e-6) -> None:
    logprobs, lse = gather(logits, ids, temperature, isa=isa)
    expected_logprobs, expected_lse = gather_ref(logits, ids, temperature)
    assert logprobs.dtype == lse.dtype == torch.float32
    # rtol covers the rounding of the fp32 outputs themselves, half a unit in the last place.
    close = {"atol": atol, "rtol": 6e-8, "equal_nan": True}
    torch.testing.assert_close(lse.double(), expected_lse, **close)
    torch.testing.assert_close(logprobs.double(), expected_logprobs, **close)


def random_case(
    rows: int, vocab: int, num_ids: int, dtype: torch.dtype = torch.float32, std: float = 4.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 7919 + vocab)
    logits = torch.randn(rows, vocab, generator=generator) * std
    ids = torch.randint(-1, vocab, (rows, num_ids), generator=generator)
    return logits.to(dtype), ids


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 3, 15, 16, 17, 511, 512, 513, 1000, 4097])
def test_matches_fp64(vocab: int, dtype: torch.dtype, isa: int) -> None:
    logits, ids = random_case(5, vocab, 7, dtype)
    for id_type in (torch.int32, torch.int64):
        assert_matches(logits, ids.to(id_type), isa=isa)


@pytest.mark.parametrize("temperature", [0.25, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("std", [1e-3, 3.0, 30.0])
def test_matches_fp64_at_temperatures(temperature: float, std: float, isa: int) -> None:
    assert_matches(*random_case(4, 3001, 64, std=std), temperature=temperature, isa=isa)


def test_accuracy_at_a_real_vocabulary(isa: int) -> None:
    logits, ids = random_case(4, REAL_VOCAB, 64, std=2.0)
    logprobs, _ = gather(logits, ids.clamp(min=0), 1.0, isa=isa)
    expected, _ = gather_ref(logits, ids.clamp(min=0), 1.0)
    assert expected.abs().max() < 32
    assert (logprobs.double() - expected).abs().max() < 2e-6


@pytest.mark.parametrize("value", [-1.2345, 0.0, 17.3])
def test_equal_logits_do_not_accumulate_error(value: float, isa: int) -> None:
    """Every block makes the same rounding error here, so nothing averages out."""
    logits = torch.full((2, REAL_VOCAB), value)
    logits[1, 5] = value + 1.2
    assert_matches(logits, torch.tensor([[0, 5], [0, 5]]), temperature=0.9, isa=isa)


@pytest.mark.parametrize(("value", "vocab"), [(-18.03, 2048), (-16.9, REAL_VOCAB), (-13.878, REAL_VOCAB)])
def test_equal_logits_below_a_few_do_not_either(value: float, vocab: int, isa: int) -> None:
    logits = torch.full((1, vocab), value)
    logits[0, ::2048] = 0.0
    _, lse = gather(logits, torch.zeros(1, 1, dtype=torch.int64), 1.0, isa=isa)
    torch.testing.assert_close(lse.double(), logits.double().logsumexp(1), rtol=6e-8, atol=7e-7)


def test_every_digit_of_the_exponential(isa: int) -> None:
    """Of two logits the LSE is so small that its own rounding hides nothing."""
    logits = torch.stack([torch.zeros(4001), torch.linspace(-4, 0, 4001)], 1)
    _, lse = gather(logits, torch.zeros(4001, 1, dtype=torch.int64), 1.0, isa=isa)
    torch.testing.assert_close(lse.double(), logits.double().logsumexp(1), rtol=0, atol=1.5e-7)


def test_ties_and_duplicate_ids_get_equal_values(isa: int) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    logprobs, _ = gather(logits, torch.tensor([[1, 2, 3, 1]]), 1.0, isa=isa)
    assert logprobs.unique().numel() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_strides(dtype: torch.dtype, isa: int) -> None:
    logits, ids = random_case(6, 1003, 9, dtype)
    assert_matches(logits[:, 1:990], ids.clamp(max=988), isa=isa)  # unaligned rows
    assert_matches(logits[::2], ids[::2], isa=isa)
    assert_matches(logits[:1].expand(6, -1), ids, isa=isa)  # row stride 0
    assert_matches(logits.t().contiguous().t(), ids, isa=isa)  # no unit stride: copied
    assert_matches(logits, ids.t().contiguous().t(), isa=isa)


def test_rows_beyond_2_to_the_31_elements() -> None:
    """int32 offsets overflow from row 14,135 on at V = 151,936. Most of the storage is never touched: no memory."""
    stride = 2**31 + 5
    storage = torch.empty(3 * stride, dtype=torch.bfloat16)
    logits = storage.as_strided((3, 33), (stride, 1))
    logits.copy_(torch.randn(3, 33))
    assert_matches(logits, torch.tensor([[0, 32], [5, -1], [7, 7]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_has_probability_zero(dtype: torch.dtype, isa: int) -> None:
    logits, ids = random_case(6, 1100, 8, dtype)
    logits[0, 3] = -INF
    logits[1, :600] = -INF  # the first block has no finite logit
    logits[2, 1:] = -INF
    logits[3, :-1] = -INF
    logits[4] = -INF
    logits[5, :600] = -INF  # finite logits far below 0 after a block without any
    logits[5, 600:] -= 1000
    ids[:, :5] = torch.tensor([3, 0, 1099, 700, -1])
    assert_matches(logits, ids, isa=isa)
    logprobs, lse = gather(logits, ids, 1.0, isa=isa)
    assert lse[4] == -INF
    assert (logprobs[4] == -INF).all()
    assert not logprobs.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rest", [0.5, -INF, INF, NAN])
@pytest.mark.parametrize("column", [0, 513, 1099])
def test_nan_rows_stay_in_their_row(column: int, rest: float, dtype: torch.dtype, isa: int) -> None:
    logits, ids = random_case(3, 1100, 4, dtype)
    ids[:, 0], ids[:, 1] = -1, column
    logits[1] = rest
    logits[1, column] = NAN
    logprobs, lse = gather(logits, ids, 1.0, isa=isa)
    assert lse[1].isnan()
    assert logprobs[1, 0] == -INF
    assert logprobs[1][ids[1] >= 0].isnan().all()
    assert not logprobs[[0, 2]].isnan().any()
    assert_matches(logits, ids, isa=isa)


def test_nan_with_a_payload_is_not_lost(isa: int) -> None:
    """A kernel that scales by adding to exponent bits turns some NaNs into numbers."""
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00123, -1], dtype=torch.int32)
    logits = torch.zeros(4, 40)
    logits[:, 17] = payloads.view(torch.float32)
    _, lse = gather(logits, torch.zeros(4, 1, dtype=torch.int64), 1.0, isa=isa)
    assert lse.isnan().all()


def test_plus_infinity_follows_ieee(isa: int) -> None:
    logits = torch.zeros(1, 700)
    logits[0, 600] = INF
    logits[0, 1] = -INF
    logprobs, lse = gather(logits, torch.tensor([[600, 0, 1, -1]]), 1.0, isa=isa)
    assert lse.item() == INF
    assert logprobs[0, 0].isnan()
    assert (logprobs[0, 1:] == -INF).all()


def test_extreme_values(isa: int) -> None:
    logits = torch.tensor([[1.6e38, -1.6e38, 0.0], [-3e38, -3e38, -3.2e38], [1e-45, 0.0, -1e-45]])
    assert_matches(logits, torch.tensor([[0, 1, 2]] * 3), isa=isa)
    logits = torch.tensor([[0.0, -80.0, -87.3, -103.0, -200.0]])
    assert_matches(logits, torch.arange(5)[None], isa=isa)


def test_every_fp16_value_converts(isa: int) -> None:
    """Each of the 65,536 bit patterns against its own row of one, subnormals flushed or not."""
    logits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)[:, None]
    zeros = torch.zeros_like(logits, dtype=torch.int64)
    for flush in (False, True):
        expected = logits.double()[:, 0]
        torch.set_flush_denormal(flush)
        try:
            _, lse = gather(logits, zeros, 1.0, threads=1, isa=isa)
        finally:
            torch.set_flush_denormal(False)
        torch.testing.assert_close(lse.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rows", "num_ids"), [(0, 3), (3, 0), (0, 0)])
def test_empty(rows: int, num_ids: int) -> None:
    logprobs, lse = cpu.gather_logprobs(torch.randn(rows, 8), torch.zeros(rows, num_ids, dtype=torch.int64), 1.0)
    assert logprobs.shape == (rows, num_ids)
    assert lse.shape == (rows,)


def test_empty_vocabulary() -> None:
    logprobs, lse = cpu.gather_logprobs(torch.empty(2, 0), torch.full((2, 1), -1), 1.0)
    assert (lse == -INF).all()
    assert (logprobs == -INF).all()


@pytest.mark.parametrize("bad", [-2, 50, 2**31 - 1])
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64], ids=str)
def test_ids_out_of_range_are_refused(bad: int, id_type: torch.dtype) -> None:
    ids = torch.zeros(4, 3, dtype=id_type)
    ids[2, 1] = bad
    with pytest.raises(ValueError, match=r"ids: .* 0\.\.49"):
        cpu.gather_logprobs(torch.randn(4, 50), ids, 1.0)


def test_wrong_arguments_are_refused() -> None:
    logits, ids = random_case(2, 8, 3)
    with pytest.raises(TypeError, match=r"logits: got torch\.float64"):
        cpu.gather_logprobs(logits.double(), ids, 1.0)
    with pytest.raises(TypeError, match=r"ids: got torch\.int16"):
        cpu.gather_logprobs(logits, ids.short(), 1.0)
    with pytest.raises(ValueError, match=r"logits, ids: got \[2, 8\], \[1, 3\]"):
        cpu.gather_logprobs(logits, ids[:1], 1.0)
    with pytest.raises(ValueError, match="temperature: got 0"):
        cpu.gather_logprobs(logits, ids, 0.0)
    with pytest.raises(ValueError, match="expected one device"):
        cpu.gather_logprobs(logits, ids.to("meta"), 1.0)
    with pytest.raises(RuntimeError, match="status 2"):
        gather(logits, ids, 1.0, isa=99)


@pytest.mark.parametrize("shape", [(64, 5003), (9, 70_001), (3000, 501)])
def test_threads_do_not_change_a_bit(shape: tuple[int, int], isa: int) -> None:
    logits, ids = random_case(*shape, 16)
    one = gather(logits, ids, 0.9, threads=1, isa=isa)
    for threads in (2, 3, 8):
        many = gather(logits, ids, 0.9, threads=threads, isa=isa)
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_a_row_does_not_depend_on_the_batch() -> None:
    logits, ids = random_case(16, 2003, 8)
    all_rows = cpu.gather_logprobs(logits, ids, 1.0)
    for n in (0, 7, 15):
        one_row = cpu.gather_logprobs(logits[n : n + 1], ids[n : n + 1], 1.0)
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(all_rows, one_row, strict=True))
