"""The C++ sampled head (K dot products a row, their gradient) against the reference in fp64, on every isa."""

from dataclasses import replace

import pytest
import sparse_head_case
import torch
from sparse_head_case import CAPPED, DTYPES, Gradients
from torch import Tensor

from asyncopd.backends.cpu import sparse_head as cpu

INF, NAN = float("inf"), float("nan")

forward = cpu.linear_gather_logits
backward = cpu.linear_gather_logits_backward
backward_into = cpu.linear_gather_logits_backward_into


class Case(sparse_head_case.Case):
    def logits(self, **how: int) -> Tensor:
        return forward(*self.arguments, **how)

    def gradients(self, need_weight: bool = True, **how: int) -> Gradients:
        return backward(self.grad, self.logits(**how), *self.arguments, need_weight, **how)

    def add_into(self, weight_grad: Tensor, bias_grad: Tensor | None, **how: int) -> Tensor:
        arguments = replace(self, bias=None).arguments
        return backward_into(self.grad, self.logits(**how), *arguments, weight_grad, bias_grad, **how)


random_case = Case.random


def assert_matches(case: Case, isa: int) -> Gradients:
    return case.assert_matches(isa=isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 63, 64, 65, 200, 1023, 1024, 1025, 2100])
def test_matches_fp64(width: int, dtype: torch.dtype, isa: int) -> None:
    case = random_case(width=width, dtype=dtype)
    assert_matches(case, isa)
    assert_matches(replace(case, ids=case.ids.int(), mask=None, bias=None, scalars=(0.6, 1.0, None)), isa)
    assert_matches(replace(case, bias=None, scalars=(1.0, 2.5, None)), isa)
    assert_matches(replace(case, scalars=CAPPED), isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_hidden_states(dtype: torch.dtype, isa: int) -> None:
    """fp32 beside a narrower head: nothing of them is rounded, nor of their gradient."""
    case = random_case(width=200, dtype=dtype)
    wide = replace(case, hidden=torch.randn(6, 200, generator=torch.Generator().manual_seed(1)))
    assert_matches(replace(wide, scalars=CAPPED), isa)
    assert_matches(replace(wide, ids=case.ids.int(), mask=None, bias=None), isa)


@pytest.mark.parametrize("num_ids", [1, 2, 3, 4, 5, 8, 63, 64, 65, 70, 200])
def test_every_number_of_ids(num_ids: int, isa: int) -> None:
    """Four rows of the weight at a time, and 64 before partial sums are added."""
    case = random_case(num_ids=num_ids)
    assert_matches(replace(case, ids=case.ids.clamp(min=0)), isa)
    assert_matches(case, isa)


@pytest.mark.parametrize("bias_dtype", [*DTYPES, torch.float64], ids=str)
def test_a_bias_of_another_dtype(bias_dtype: torch.dtype, isa: int) -> None:
    case = random_case(dtype=torch.bfloat16)
    assert case.bias is not None
    assert_matches(replace(case, bias=case.bias.to(bias_dtype), scalars=CAPPED), isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype, isa: int) -> None:
    case = random_case(6, 46, 80, 9, dtype)
    hidden, weight, ids, grad = case.hidden, case.weight, case.ids.clamp(max=22), case.grad
    half = replace(case, ids=ids, bias=None, mask=None)
    assert_matches(replace(half, hidden=hidden[:, 3:43], weight=weight[::2, 17:57]), isa)
    assert_matches(replace(half, hidden=hidden[:, ::2], weight=weight[:, 1::2]), isa)
    assert_matches(replace(half, hidden=hidden.t().contiguous().t(), weight=weight.t().contiguous().t()), isa)
    assert_matches(replace(half, hidden=hidden[:1].expand(6, -1), weight=weight[:1].expand(46, -1)), isa)
    assert_matches(replace(half, ids=ids.t().contiguous().t(), grad=grad.t().contiguous().t()), isa)
    assert case.bias is not None
    apart = torch.stack([case.bias, torch.full_like(case.bias, NAN)], 1)[:, 0]
    mask = torch.tensor([[True, False]] * 3 + [[False, True]] * 3)[:, 0]
    assert_matches(replace(case, bias=apart, mask=mask), isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_further_apart_than_32_bits_count(dtype: torch.dtype, isa: int) -> None:
    stride = 1_100_000_000
    far = torch.empty(2 * stride + 8, dtype=dtype).as_strided((3, 8), (stride, 1))  # never touched but for three pages
    small = random_case(3, 3, 8, 4, dtype)
    for name in ("hidden", "weight"):
        case = replace(small, **{name: far.copy_(getattr(small, name))})
        assert torch.equal(case.logits(isa=isa), small.logits(isa=isa))
        for got, want in zip(case.gradients(isa=isa), small.gradients(isa=isa), strict=True):
            assert torch.equal(got, want)


def test_an_id_that_repeats(isa: int) -> None:
    case = random_case(rows=70, vocab=5, num_ids=7)
    assert_matches(case, isa)
    _, dweight, dbias = assert_matches(replace(case, ids=torch.full_like(case.ids, 3)), isa)
    assert dweight.any(dim=1).tolist() == [False, False, False, True, False]
    assert dbias.ne(0).tolist() == [False, False, False, True, False]


def test_duplicates_are_rounded_together(isa: int) -> None:
    ids = torch.tensor([[2, 2], [2, 0]])
    grad = torch.tensor([[1.0, 2.0**-8], [2.0**-8, 1.0]])  # 1 + 2^-8 is not a bf16 number, 1 + 2^-7 is
    case = Case(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16), ids, grad)
    dhidden, dweight, _ = case.gradients(isa=isa)
    assert (dweight[2] == 1 + 2.0**-7).all()
    assert (dweight[0] == 1).all()
    assert (dhidden == 1).all()  # ties to even


def test_long_sums_are_accurate(isa: int) -> None:
    """One after the other in fp32, 20,000 equal terms would be off by 2e-4, the 256 columns of a lane by 2e-6."""
    rows = 20_000
    case = Case(torch.full((rows, 3), 0.1), torch.ones(4, 3), torch.full((rows, 1), 2), torch.ones(rows, 1))
    _, dweight, dbias = replace(case, bias=torch.zeros(4)).gradients(isa=isa)
    torch.testing.assert_close(dweight[2].double(), rows * case.hidden[0].double(), rtol=1e-6, atol=0)
    assert dbias.tolist() == [0, 0, rows, 0]
    wide = Case(torch.full((1, 16_384), 0.1), torch.full((1, 16_384), 0.7), torch.tensor([[0]]), torch.ones(1, 1))
    torch.testing.assert_close(wide.logits(isa=isa).double(), wide.expected()[0], rtol=3e-7, atol=0)


@pytest.mark.parametrize("fill", [NAN, INF])
def test_rows_left_out_may_hold_anything(fill: float, isa: int) -> None:
    case = random_case(rows=5, vocab=11, num_ids=4)
    case.hidden[[1, 3]] = fill
    case.grad[3] = 0.0  # dropped by the caller
    case.grad[1] = fill  # masked
    mask = torch.tensor([True, False, True, True, True])
    ids = torch.randint(0, 11, (5, 4), generator=torch.Generator().manual_seed(1))
    gradients = assert_matches(replace(case, ids=ids, mask=mask, scalars=(0.5, 1.0, 3.0)), isa)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][[1, 3]] == 0).all()


def test_pads_reach_nothing(isa: int) -> None:
    case = random_case(rows=4, vocab=11, num_ids=5)
    ids = case.ids.clamp(min=1)
    ids[0, 1], ids[1], ids[2, 0], ids[3, 4] = -1, -1, -1, -1
    case.grad[ids < 0] = NAN
    case.weight[0] = NAN  # where an index of -1 that was clamped would land
    case.hidden[1] = INF
    padded = replace(case, ids=ids, mask=None)
    logits, gradients = padded.logits(isa=isa), padded.gradients(isa=isa)
    assert torch.equal(logits == -INF, ids < 0)
    assert not logits.isnan().any()
    assert all(gradient.isfinite().all() for gradient in gradients)
    zeros = replace(padded, hidden=case.hidden.nan_to_num(posinf=0), weight=case.weight.nan_to_num())
    zeros.grad[ids < 0] = 0
    for got, want in zip(gradients, zeros.expected()[1], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-5)


def test_a_nan_stays_with_its_row_and_its_ids(isa: int) -> None:
    case = random_case(rows=4, vocab=13, num_ids=3)
    ids = torch.arange(12).view(4, 3)
    case.grad[1, 2] = NAN
    case.hidden[3, 5] = INF
    case.grad[3] = torch.tensor([1.0, 0.0, -1.0])  # 0 times inf, in a row that takes part
    given = replace(case, ids=ids, mask=None)
    dhidden, dweight, dbias = assert_matches(given, isa)
    assert dhidden.isnan().any(dim=1).tolist() == [False, True, False, False]
    assert dweight.isnan().any(dim=1).nonzero()[:, 0].tolist() == [5, 10]
    assert dbias.isnan().nonzero()[:, 0].tolist() == [5]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_minus_infinity_in_the_bias(softcap: float | None, isa: int) -> None:
    case = random_case(rows=4, vocab=5, num_ids=6)
    assert case.bias is not None
    case.bias[[0, 3]] = -INF
    given = replace(case, scalars=(0.5, 1.5, softcap))
    gradients = assert_matches(given, isa)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if softcap is not None:  # the cap is saturated, and its slope 0
        assert (gradients[1][[0, 3]] == 0).all()
        assert (given.logits(isa=isa)[case.ids == 3] != 6.0).all()


def test_a_frozen_head_gets_no_gradient(isa: int) -> None:
    case = random_case(dtype=torch.float16)
    all_of_them = case.gradients(isa=isa)
    dhidden, dweight, dbias = case.gradients(need_weight=False, isa=isa)
    assert torch.equal(dhidden, all_of_them[0])
    assert (dweight.shape, dweight.dtype) == ((0, 40), torch.float16)
    assert torch.equal(dbias, all_of_them[2])
    bare = replace(case, bias=None).gradients(need_weight=False, isa=isa)
    assert torch.equal(bare[0], all_of_them[0])
    assert [t.numel() for t in bare[1:]] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_the_weight_that_no_id_names_are_zero(dtype: torch.dtype, isa: int) -> None:
    """In a buffer that is new from the system, and in one that has just held something else."""
    large = random_case(rows=8, vocab=40_000, width=512, num_ids=16, dtype=dtype)
    small = random_case(dtype=dtype)
    torch.full(small.weight.shape, NAN, dtype=dtype)  # freed at once
    for case in (large, small):
        gradient = case.gradients(isa=isa, threads=2)[1]
        assert case.mask is not None
        named = torch.zeros(len(case.weight), dtype=torch.bool)
        named[case.ids[case.mask].flatten().clamp(min=0)] = True
        named[0] = (case.ids[case.mask] == 0).any()
        assert torch.equal(gradient.ne(0).any(dim=1), named)
        assert not gradient.isnan().any()


@pytest.mark.parametrize("into", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adds_to_a_gradient_that_is_there(
    dtype: torch.dtype, into: torch.dtype, rng: torch.Generator, isa: int
) -> None:
    case = replace(random_case(vocab=30, width=1100, num_ids=70, dtype=dtype), scalars=CAPPED)
    case.assert_adds(into, rng, isa=isa)
    fp32 = torch.randn(6, 1100, generator=rng)
    replace(case, hidden=fp32).assert_adds(into, rng, isa=isa)


def test_adding_to_zeros_is_the_gradient(isa: int) -> None:
    case = random_case(rows=300, vocab=5, num_ids=7)  # more than 64 entries an id
    dhidden, dweight, dbias = case.gradients(isa=isa)
    weight_grad, bias_grad = torch.zeros_like(dweight), torch.zeros_like(dbias)
    assert torch.equal(case.add_into(weight_grad, bias_grad, isa=isa), dhidden)
    assert torch.equal(weight_grad, dweight)
    assert torch.equal(bias_grad, dbias)
    assert torch.equal(case.add_into(weight_grad, None, isa=isa, threads=3), dhidden)
    torch.testing.assert_close(weight_grad, 2 * dweight, rtol=1e-6, atol=0)
    assert torch.equal(bias_grad, dbias)


@pytest.mark.parametrize("shape", [(300, 997, 64, 16), (5, 50_000, 130, 40), (4000, 11, 8, 3)])
def test_threads_do_not_change_a_bit(shape: tuple[int, int, int, int], isa: int) -> None:
    case = random_case(*shape)
    logits, gradients = case.logits(threads=1, isa=isa), case.gradients(threads=1, isa=isa)
    for threads in (2, 3, 8):
        assert torch.equal(case.logits(threads=threads, isa=isa), logits)
        for got, want in zip(case.gradients(threads=threads, isa=isa), gradients, strict=True):
            assert torch.equal(got, want)


def test_a_row_does_not_depend_on_its_batch(isa: int) -> None:
    case = replace(random_case(rows=50, width=300, num_ids=11), mask=None)
    logits, dhidden = case.logits(isa=isa), case.gradients(isa=isa)[0]
    for rows in (slice(7, 8), slice(20, 33)):
        part = replace(case, hidden=case.hidden[rows], ids=case.ids[rows], grad=case.grad[rows])
        assert torch.equal(part.logits(isa=isa), logits[rows])
        assert torch.equal(part.gradients(isa=isa)[0], dhidden[rows])


def test_empty_problems(isa: int) -> None:
    case = random_case()
    for empty in (
        replace(case, hidden=case.hidden[:0], ids=case.ids[:0], grad=case.grad[:0], mask=None),
        replace(case, ids=case.ids[:, :0], grad=case.grad[:, :0]),
        replace(case, mask=torch.zeros(6, dtype=torch.bool)),
        replace(case, grad=torch.zeros_like(case.grad)),
    ):
        assert empty.logits(isa=isa).shape == empty.ids.shape
        gradients = assert_matches(empty, isa)
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("bad", [-2, 23, 2**31 - 1])
@pytest.mark.parametrize("row", [0, 1])
def test_ids_out_of_range_are_refused_in_masked_rows_too(row: int, bad: int, isa: int) -> None:
    case = random_case()
    logits = case.logits(isa=isa)
    case.ids[row, 8] = bad
    with pytest.raises(ValueError, match=r"ids: .* 0\.\.22"):
        case.logits(isa=isa)
    with pytest.raises(ValueError, match=r"ids: .* 0\.\.22"):
        backward(case.grad, logits, *case.arguments, True, isa=isa)
    weight_grad = torch.zeros_like(case.weight)
    with pytest.raises(ValueError, match=r"ids: .* 0\.\.22"):
        backward_into(case.grad, logits, *replace(case, bias=None).arguments, weight_grad, None, isa=isa)
    assert not weight_grad.any()


def test_wrong_arguments() -> None:
    case = random_case()
    bias = case.bias
    assert bias is not None
    for wrong, message in (
        (replace(case, hidden=case.hidden.half()), r"hidden, weight: got torch.float16, torch.float32"),
        (replace(case, weight=case.weight.double()), r"hidden, weight: got torch.float32, torch.float64"),
        (replace(case, weight=case.weight[:, 1:]), r"weight: got shape \[23, 39\], expected \[V, 40\]"),
        (replace(case, ids=case.ids[1:]), r"hidden, ids: got \[6, 40\], \[5, 9\]"),
        (replace(case, ids=case.ids.float()), "ids: got torch.float32"),
        (replace(case, bias=bias[1:]), r"bias: got shape \[22\], expected \[23\]"),
        (replace(case, mask=torch.ones(6)), r"mask: got torch.float32 \[6\], expected torch.bool \[6\]"),
        (replace(case, mask=torch.ones(5, dtype=torch.bool)), r"mask: got torch.bool \[5\]"),
        (replace(case, scalars=(0.0, 1.0, None)), "temperature: got 0.0"),
        (replace(case, scalars=(1.0, 1.0, 0.0)), "softcap: got 0.0"),
        (replace(case, bias=bias.to("meta")), r"got devices \['cpu', 'meta'\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            wrong.logits()
    with pytest.raises(ValueError, match=r"grad, logits: got \[6, 8\], \[6, 9\]"):
        replace(case, grad=case.grad[:, 1:]).gradients()
    with pytest.raises(ValueError, match=r"bias: got shape \[22\], expected \[23\]"):
        backward(case.grad, case.logits(), *replace(case, bias=bias[1:]).arguments, True)
    case.assert_refuses_gradients()
    with pytest.raises(RuntimeError, match="status 2"):
        case.logits(isa=99)


@pytest.mark.parametrize("too_many", ["rows", "vocab"])
def test_more_than_32_bits_can_number_is_refused(too_many: str) -> None:
    """Before anything is read or allocated."""
    scalars = {"temperature": 1.0, "logit_scale": 1.0, "softcap": 0.0}
    sizes = {"rows": 1, "vocab": 1, "width": 1, "num_ids": 1, too_many: 2**32}
    head = {"hidden": 0, "hidden_stride": 1, "weight": 0, "weight_stride": 1, "ids": 0, "mask": 0}
    common = {"dtype": 0, "hidden_dtype": 0, "id_type": 1, "threads": 1, "logits": 0, **head, **sizes, **scalars}
    assert cpu._C.cpu_linear_gather_logits(bias=0, **common) == 2
    gradients = {"dhidden": 0, "dweight": 0, "dweight_stride": 1, "dweight_dtype": 0, "add": False, "dbias": 0}
    assert cpu._C.cpu_linear_gather_logits_backward(grad=0, **gradients, **common) == 2
