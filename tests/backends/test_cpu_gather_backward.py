"""The C++ gradient of LSE + gather against the reference in fp64, on every instruction set of this machine."""

import pytest
import torch
from torch import Tensor

from asyncopd.backends import native
from asyncopd.backends.cpu import logits as cpu
from asyncopd.backends.reference import gather as reference

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

backward = cpu.gather_logprobs_backward


def random_case(
    rows: int, vocab: int, num_ids: int, dtype: torch.dtype = torch.float32, std: float = 4.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 7919 + vocab)
    logits = (torch.randn(rows, vocab, generator=generator) * std).to(dtype)
    ids = torch.randint(-1, vocab, (rows, num_ids), generator=generator)
    return torch.randn(rows, num_ids, generator=generator), logits, ids


def assert_matches(grad: Tensor, logits: Tensor, ids: Tensor, temperature: float = 1.0, isa: int = -1) -> Tensor:
    lse = torch.logsumexp(logits.double() / temperature, dim=1)
    dlogits = backward(grad, logits, lse.float(), ids, temperature, isa=isa)
    expected = reference.gather_logprobs_backward(grad.double(), logits.double(), lse, ids, temperature)
    assert dlogits.dtype == logits.dtype
    assert dlogits.stride() == torch.empty_like(logits).stride()
    # fp32: the rounding of lse, as large as 1e-6 for an lse of 20. The others: half a unit in the last place as well.
    kind = torch.finfo(logits.dtype)
    atol = 2e-6 * max(1.0, float(grad.nan_to_num().abs().sum(1).amax()) / temperature) if grad.numel() else 0.0
    rtol = 1e-6 if logits.dtype == torch.float32 else kind.eps * 0.51
    torch.testing.assert_close(dlogits.double(), expected, rtol=rtol, atol=atol, equal_nan=True)
    return dlogits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 511, 512, 513, 540, 4097])
def test_matches_fp64(vocab: int, dtype: torch.dtype, isa: int) -> None:
    grad, logits, ids = random_case(5, vocab, 16, dtype)
    for id_type in (torch.int32, torch.int64):
        for temperature in (1.0, 0.7, 3.0):
            assert_matches(grad, logits, ids.to(id_type), temperature, isa=isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_real_vocabulary(dtype: torch.dtype, isa: int) -> None:
    assert_matches(*random_case(2, 151_936, 64, dtype), isa=isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_ids", [65_536, 65_537, 70_000])
def test_more_ids_than_a_16_bit_number_counts(num_ids: int, dtype: torch.dtype, isa: int) -> None:
    """Most of them named again, many thousands of entries later."""
    grad, logits, ids = random_case(2, 50_000, num_ids, dtype)
    assert_matches(grad / num_ids**0.5, logits, ids, isa=isa)


def test_ids_of_another_shard(isa: int) -> None:
    """-2 counts in the sum and is scattered nowhere, in a row of which no id is held here as well."""
    grad, logits, ids = random_case(6, 1300, 9)
    ids[:, ::2] = -2
    ids[5] = -2
    for id_type in (torch.int32, torch.int64):
        dlogits = assert_matches(grad, logits, ids.to(id_type), 0.7, isa=isa)
        assert dlogits[5].abs().sum() > 0
    with pytest.raises(ValueError, match="ids"):
        backward(grad, logits, logits.logsumexp(1), ids - 1, 0.7, isa=isa)


def test_small_gradients_have_relative_accuracy(isa: int) -> None:
    grad, logits, ids = random_case(4, 3000, 3)
    lse = torch.logsumexp(logits.double(), dim=1)
    expected = reference.gather_logprobs_backward(grad.double(), logits.double(), lse, ids, 1.0)
    dlogits = backward(grad, logits, lse.float(), ids, 1.0, isa=isa)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, ids.clamp(min=0), False)
    torch.testing.assert_close(dlogits.double()[others], expected[others], rtol=4e-6, atol=1e-37)


def test_duplicates_accumulate_before_rounding(isa: int) -> None:
    logits = torch.zeros(1, 8, dtype=torch.bfloat16)
    grad = torch.tensor([[1.0, 2.0**-8, 2.0**-8, -1.0 - 2.0**-7]])  # 1 + 2^-8 is not a bf16 number
    dlogits = backward(grad, logits, torch.tensor([2.0794415]), torch.tensor([[3, 3, 3, 5]]), 1.0, isa=isa)
    assert dlogits[0, 3] == 1.0 + 2.0**-7
    assert dlogits[0, 5] == -1.0 - 2.0**-7
    assert_matches(torch.randn(3, 40), torch.randn(3, 9), torch.randint(-1, 9, (3, 40)), isa=isa)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits_is_torchs(dtype: torch.dtype, isa: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (300_000,), generator=generator).int()
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    near = torch.cat([halves, torch.nextafter(halves, torch.tensor(INF)), (halves + halves.roll(1)) / 2])
    values = torch.cat([bits.view(torch.float32), near, torch.tensor([65504.0, 65519.9, 65520.0, 1e-8, 2.0**-25])])
    values = values[values.isfinite()]
    # Each beside its opposite: gradients that sum to 0 are only scattered.
    grad = torch.stack([values, -values], 1)
    ids = torch.tensor([[0, 1]]).expand(len(values), 2)
    dlogits = backward(grad, torch.zeros(len(values), 2, dtype=dtype), torch.zeros(len(values)), ids, 1.0, isa=isa)
    assert torch.equal(dlogits, grad.to(dtype))


@pytest.mark.parametrize("fill", [NAN, INF, -INF])
def test_a_row_whose_gradients_sum_to_zero_is_only_scattered(fill: float, isa: int) -> None:
    logits = torch.full((3, 600), fill)
    logits[2] = 1.0
    grad = torch.tensor([[0.0, 0.0, 5.0], [1.5, -1.5, 9.0], [1.0, 1.0, 0.0]])
    ids = torch.tensor([[3, 4, -1], [3, 4, -1], [0, 1, -1]])
    dlogits = assert_matches(grad, logits, ids, isa=isa)
    assert (dlogits[0] == 0).all()
    assert dlogits[1, 3] == 1.5
    assert dlogits[1, 4] == -1.5
    assert dlogits[1].count_nonzero() == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_has_no_gradient(dtype: torch.dtype, isa: int) -> None:
    grad, logits, ids = random_case(3, 1100, 8, dtype)
    logits[0, ::3] = -INF
    logits[1, 1:] = -INF
    logits[2] = -INF
    dlogits = assert_matches(grad, logits, ids, isa=isa)
    assert dlogits.isfinite().all()


def test_nan_stays_in_its_row(isa: int) -> None:
    grad, logits, ids = random_case(5, 1100, 4)
    ids[:] = torch.tensor([5, 1, 7, 5])
    grad[1, 2] = NAN
    logits[2, 600] = NAN
    logits[3] = -INF
    grad[3, 0] = NAN
    dlogits = assert_matches(grad, logits, ids, isa=isa)
    assert dlogits[1:4].isnan().all()
    assert dlogits[[0, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_strides(dtype: torch.dtype, isa: int) -> None:
    grad, logits, ids = random_case(6, 1003, 9, dtype)
    assert_matches(grad, logits[:, 1:990], ids.clamp(max=988), isa=isa)
    assert_matches(grad[::2], logits[::2], ids[::2], isa=isa)
    assert_matches(grad, logits[:1].expand(6, -1), ids, isa=isa)
    assert_matches(grad, logits.t().contiguous().t(), ids, isa=isa)
    assert_matches(grad.t().contiguous().t(), logits, ids.t().contiguous().t(), isa=isa)
    assert_matches(grad, logits[:, :1], ids.clamp(max=0), isa=isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_over_the_logits(dtype: torch.dtype, isa: int) -> None:
    """What the fused head does with its tile of logits."""
    grad, logits, ids = random_case(6, 1300, 9, dtype)
    lse = logits.float().logsumexp(1)
    expected = backward(grad, logits, lse, ids, 0.8, isa=isa)
    status = cpu._C.cpu_gather_logprobs_backward(
        grad=grad.data_ptr(),
        logits=logits.data_ptr(),
        dtype=native.DTYPE_CODES[dtype],
        row_stride=1300,
        lse=lse.data_ptr(),
        ids=ids.data_ptr(),
        id_type=1,
        rows=6,
        first=0,
        columns=1300,
        vocab=1300,
        num_ids=9,
        inv_temperature=1 / 0.8,
        dlogits=logits.data_ptr(),
        out_stride=1300,
        threads=2,
        isa=isa,
    )
    assert status == 0
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("shape", [(64, 5003), (9, 70_001), (3000, 501)])
def test_threads_do_not_change_a_bit(shape: tuple[int, int], isa: int) -> None:
    grad, logits, ids = random_case(*shape, 16)
    lse = logits.logsumexp(1)
    one = backward(grad, logits, lse, ids, 0.9, threads=1, isa=isa)
    for threads in (2, 3, 8):
        assert torch.equal(backward(grad, logits, lse, ids, 0.9, threads=threads, isa=isa), one)


def test_empty_and_wrong_arguments() -> None:
    grad, logits, ids = random_case(2, 8, 3)
    lse = torch.zeros(2)
    assert backward(grad[:0], logits[:0], lse[:0], ids[:0], 1.0).shape == (0, 8)
    assert (backward(grad[:, :0], logits, lse, ids[:, :0], 1.0) == 0).all()
    with pytest.raises(ValueError, match=r"ids: .* 0\.\.7"):
        backward(grad, logits, lse, ids + 8, 1.0)
    with pytest.raises(ValueError, match="grad, lse: got"):
        backward(grad[:, :2], logits, lse, ids, 1.0)
    with pytest.raises(RuntimeError, match="status 2"):
        backward(grad, logits, lse, ids, 1.0, isa=99)
