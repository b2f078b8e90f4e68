"""The sampled head in Triton (K dot products a row, their gradient) against the reference in fp64."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import sparse_head_case
import torch
from each_backend import DEVICES
from sparse_head_case import CAPPED, DTYPES, Gradients
from torch import Tensor

from asyncopd.kernels import (
    linear_gather_logits,
    linear_gather_logits_backward,
    linear_gather_logits_backward_into,
    sparse_head,
    sparse_rows,
)
from asyncopd.kernels.sparse_rows import SLICES
from asyncopd.kernels.sparse_weight import COLUMNS, PIECES, RUN

DEVICE = DEVICES["triton"]
INF, NAN = float("inf"), float("nan")
SLICE = SLICES[0]  # columns that a program takes of a small weight


class Case(sparse_head_case.Case):
    def logits(self, **how: int) -> Tensor:
        return linear_gather_logits(*self.arguments)

    def gradients(self, need_weight: bool = True, **how: int) -> Gradients:
        return linear_gather_logits_backward(self.grad, self.logits(), *self.arguments, need_weight)

    def add_into(self, weight_grad: Tensor, bias_grad: Tensor | None) -> Tensor:
        arguments = replace(self, bias=None).arguments
        return linear_gather_logits_backward_into(self.grad, self.logits(), *arguments, weight_grad, bias_grad)


def random_case(**sizes: Any) -> Case:
    return Case.random(**sizes, device=DEVICE)


def tensor(values: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def entries_of(counts: list[int], num_ids: int) -> Case:
    return Case.of_counts(counts, num_ids, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, SLICE + 1, COLUMNS + 40])
def test_matches_fp64(width: int, dtype: torch.dtype) -> None:
    case = random_case(rows=4, width=width, dtype=dtype)
    replace(case, scalars=CAPPED).assert_matches()
    replace(case, ids=case.ids.int(), mask=None, bias=None, scalars=(0.6, 2.5, None)).assert_matches()


@pytest.mark.parametrize("num_ids", [20, 64, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_slices(num_ids: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the weight is much larger than the L2: 128 columns of 20 ids, 64 of more."""
    monkeypatch.setattr(sparse_rows, "_l2_bytes", lambda device: 1)
    case = random_case(rows=3, width=200, num_ids=num_ids, dtype=dtype)
    assert sparse_rows.slice_for(case.weight, num_ids) == (128 if num_ids == 20 else 64)
    replace(case, scalars=CAPPED).assert_matches()


def test_slices_stay_in_half_of_the_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50 MiB; and whatever the number of rows, since a row's sums must not depend on its batch."""
    monkeypatch.setattr(sparse_rows, "_l2_bytes", lambda device: 50 << 20)

    def columns(vocab: int, dtype: torch.dtype, k: int = 64) -> int:
        return sparse_rows.slice_for(torch.empty(vocab, 0, dtype=dtype), k)

    half = torch.bfloat16
    assert [columns(vocab, half) for vocab in (32_000, 51_200, 51_201, 102_401, 151_936, 10**6)] == [
        *(256, 256, 128, 64, 64, 64)
    ]
    assert [columns(vocab, torch.float32) for vocab in (25_600, 32_000, 51_201, 151_936)] == [256, 128, 64, 64]
    # 4,096 elements of the weight are the least that a program is started for.
    assert [columns(151_936, half, k) for k in (0, 1, 16, 17, 32, 33, 64, 200)] == [256, 256, 256, 128, 128, 64, 64, 64]


@pytest.mark.parametrize("num_ids", [1, 2, 16, 17, 64, 65])
def test_every_number_of_ids(num_ids: int) -> None:
    random_case(rows=3, num_ids=num_ids).assert_matches()


@pytest.mark.parametrize("bias_dtype", [*DTYPES, torch.float64], ids=str)
def test_a_bias_of_another_dtype(bias_dtype: torch.dtype) -> None:
    case = random_case(rows=3, dtype=torch.bfloat16)
    assert case.bias is not None
    replace(case, bias=case.bias.to(bias_dtype), scalars=CAPPED).assert_matches()


def test_strides() -> None:
    case = random_case(rows=3, vocab=46, width=80, dtype=torch.bfloat16)
    hidden, weight, ids, grad = case.hidden, case.weight, case.ids.clamp(max=22), case.grad
    half = replace(case, ids=ids, bias=None, mask=None)
    replace(half, hidden=hidden[:, 3:43], weight=weight[::2, 17:57]).assert_matches()
    replace(half, hidden=hidden[:, ::2], weight=weight[:, 1::2]).assert_matches()
    replace(half, hidden=hidden[:1].expand(3, -1), weight=weight[:1].expand(46, -1)).assert_matches()
    replace(half, ids=ids.t().contiguous().t(), grad=grad.t().contiguous().t()).assert_matches()
    assert case.bias is not None
    apart = torch.stack([case.bias, torch.full_like(case.bias, NAN)], 1)[:, 0]
    mask = tensor([[True, False], [False, True], [True, False]])[:, 0]
    replace(case, bias=apart, mask=mask).assert_matches()


def test_rows_further_apart_than_32_bits_count() -> None:
    stride = 1_100_000_000
    far = torch.empty(2 * stride + 8, dtype=torch.bfloat16, device=DEVICE)  # on a CPU, three pages of it are there
    far = far.as_strided((3, 8), (stride, 1))
    small = random_case(rows=3, vocab=3, width=8, num_ids=4, dtype=torch.bfloat16)
    for name in ("hidden", "weight"):
        case = replace(small, **{name: far.copy_(getattr(small, name))})
        assert torch.equal(case.logits(), small.logits())
        for got, want in zip(case.gradients(), small.gradients(), strict=True):
            assert torch.equal(got, want)
    weight_grad = torch.zeros_like(small.weight)
    small.add_into(weight_grad, None)
    small.add_into(far.zero_(), None)
    assert weight_grad.any()
    assert torch.equal(far, weight_grad)


# ------------------------------------------------------------------------- sums over the entries of an id


def test_segments_that_end_where_runs_do() -> None:
    """Within a run, up to its end, from its begin, over one border, over whole runs, one entry of a run each."""
    case = entries_of([RUN - 1, 1, RUN, 0, 3, RUN - 3, 2, 2 * RUN, RUN - 2, RUN // 2, RUN + 1, 1], num_ids=74)
    case.assert_matches()


@pytest.mark.parametrize(("runs", "more"), [(1, -1), (1, 0), (1, 1), (2, 0), (2 * PIECES + 1, 1)])
def test_one_id_everywhere(runs: int, more: int) -> None:
    """One segment over every run, whose pieces are added in several steps."""
    count = runs * RUN + more
    case = replace(entries_of([0, count, 0], num_ids=count), scalars=CAPPED)
    _, dweight, dbias = case.assert_matches()
    assert dweight.any(dim=1).tolist() == [False, True, False]
    assert dbias.ne(0).tolist() == [False, True, False]


def test_ids_that_repeat_in_a_row_and_across_rows() -> None:
    head = torch.arange(4, device=DEVICE).expand(12, 4)
    case = random_case(rows=12, vocab=40, num_ids=20)
    replace(case, ids=torch.cat([head, head, case.ids[:, 8:]], 1)).assert_matches()


def test_duplicates_are_rounded_together() -> None:
    grad = tensor([[1.0, 2.0**-8], [2.0**-8, 1.0]])  # 1 + 2^-8 is not a bf16 number, 1 + 2^-7 is
    ones = torch.ones(4, 3, dtype=torch.bfloat16, device=DEVICE)
    case = Case(ones[:2], ones, tensor([[2, 2], [2, 0]]), grad)
    dhidden, dweight, _ = case.gradients()
    assert (dweight[2] == 1 + 2.0**-7).all()
    assert (dweight[0] == 1).all()
    assert (dhidden == 1).all()  # ties to even


def test_long_sums_are_accurate() -> None:
    """One after the other in fp32, 1,000 equal terms would be off by 1e-5, 16,384 by more."""
    count = 1000
    ids, ones = torch.full((1, count), 2, device=DEVICE), torch.ones(1, count, device=DEVICE)
    case = Case(tensor([[0.1, 0.7, 0.3]]), torch.ones(4, 3, device=DEVICE), ids, ones, torch.zeros(4, device=DEVICE))
    dhidden, dweight, dbias = linear_gather_logits_backward(ones, ones, *case.arguments, True)
    torch.testing.assert_close(dweight[2].double(), count * case.hidden[0].double(), rtol=1e-6, atol=0)
    assert dhidden.tolist() == [[count] * 3]
    assert dbias.tolist() == [0, 0, count, 0]
    wide = torch.full((1, 16_384), 0.1, device=DEVICE)
    case = Case(wide, 7 * wide, tensor([[0]]), tensor([[1.0]]))
    torch.testing.assert_close(case.logits().double(), case.expected()[0], rtol=3e-7, atol=0)


def test_what_is_lost_when_parts_are_added_is_added_at_the_end() -> None:
    """2^24 + 1 is not a number of fp32. Parts: slices of a dot product and its bias, pieces of a segment."""
    weight = torch.zeros(1, 2 * SLICE + 1, device=DEVICE)
    weight[0, 0], weight[0, SLICE], weight[0, -1] = 2.0**24, 1.0, 1.0
    ones, twos = torch.ones_like(weight), tensor([2.0])
    assert Case(ones, weight, tensor([[0]]), twos, twos).logits().tolist() == [[2**24 + 4]]
    count = (PIECES + 2) * RUN
    grad = torch.zeros(1, count, device=DEVICE)
    grad[0, 0], grad[0, RUN], grad[0, -1] = 2.0**24, 1.0, 1.0
    ids = torch.full((1, count), 1, device=DEVICE)
    case = Case(
        torch.ones(1, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE), ids, grad, torch.zeros(2, device=DEVICE)
    )
    _, dweight, dbias = linear_gather_logits_backward(grad, grad, *case.arguments, True)
    assert dweight.tolist() == [[0] * 3, [2**24 + 2] * 3]
    assert dbias.tolist() == [0, 2**24 + 2]


def test_every_run_gives_the_same_bits() -> None:
    case = random_case(rows=5, vocab=7, width=SLICE + 9, num_ids=60, dtype=torch.bfloat16)
    assert torch.equal(case.logits(), case.logits())
    for got, want in zip(case.gradients(), case.gradients(), strict=True):
        assert torch.equal(got, want)


def test_a_row_does_not_depend_on_its_batch() -> None:
    case = replace(random_case(rows=9, width=SLICE + 44, num_ids=21), mask=None)
    logits, dhidden = case.logits(), case.gradients()[0]
    for rows in (slice(7, 8), slice(2, 6)):
        part = replace(case, hidden=case.hidden[rows], ids=case.ids[rows], grad=case.grad[rows])
        assert torch.equal(part.logits(), logits[rows])
        assert torch.equal(part.gradients()[0], dhidden[rows])


# --------------------------------------------------------------------------------- what must reach nothing


@pytest.mark.parametrize("fill", [NAN, INF])
def test_rows_left_out_may_hold_anything(fill: float) -> None:
    case = random_case(rows=5, vocab=11, num_ids=4)
    case.hidden[[1, 3]] = fill
    case.grad[3] = 0.0  # dropped by the caller
    case.grad[1] = fill  # masked
    case.ids.clamp_(min=0)
    case = replace(case, mask=tensor([True, False, True, True, True]), scalars=(0.5, 1.0, 3.0))
    gradients = case.assert_matches()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][[1, 3]] == 0).all()


def test_pads_reach_nothing() -> None:
    case = random_case(rows=4, vocab=11, num_ids=5)
    ids = case.ids.clamp(min=1)
    ids[0, 1], ids[1], ids[2, 0], ids[3, 4] = -1, -1, -1, -1
    case.grad[ids < 0] = NAN
    case.weight[0] = NAN  # where an index of -1 that was clamped would land
    case.hidden[1] = INF
    padded = replace(case, ids=ids, mask=None)
    logits, gradients = padded.logits(), padded.gradients()
    assert torch.equal(logits == -INF, ids < 0)
    assert not logits.isnan().any()
    assert all(gradient.isfinite().all() for gradient in gradients)
    zeros = replace(padded, hidden=case.hidden.nan_to_num(posinf=0), weight=case.weight.nan_to_num())
    zeros.grad[ids < 0] = 0
    for got, want in zip(gradients, zeros.expected()[1], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("num_ids", [3, RUN + 2])
def test_a_nan_stays_with_its_row_and_its_ids(num_ids: int) -> None:
    """In segments within a run, and in those that are joined."""
    case = random_case(rows=4, vocab=13, num_ids=num_ids)
    ids = torch.arange(12, device=DEVICE).view(4, 3).repeat_interleave(-(-num_ids // 3), 1)[:, :num_ids]
    case.grad[1, -1] = NAN
    case.hidden[3, 5] = INF
    case.grad[3] = 0.0
    case.grad[3, :2] = tensor([1.0, -1.0])  # 0 times inf, in a row that takes part
    dhidden, dweight, dbias = replace(case, ids=ids, mask=None).assert_matches()
    assert dhidden.isnan().any(dim=1).tolist() == [False, True, False, False]
    nan_of_grad, nan_of_zero = 5, set(ids[3].tolist()) - {int(ids[3, 0]), int(ids[3, 1])}
    found = set(dweight.isnan().any(dim=1).nonzero()[:, 0].tolist())
    assert found == {nan_of_grad, *nan_of_zero, *([9] if num_ids > 3 else [])}
    assert dbias.isnan().nonzero()[:, 0].tolist() == [nan_of_grad]


# The last is 1 in fp32, and a product of 1 with its inverse is not.
@pytest.mark.parametrize("softcap", [None, 3.0, 0.5 + 0.9 * 2.0**-25])
def test_minus_infinity_in_the_bias(softcap: float | None) -> None:
    case = random_case(rows=4, vocab=5, num_ids=6)
    assert case.bias is not None
    case.bias[[0, 3]] = -INF
    gradients = replace(case, scalars=(0.5, 1.5, softcap)).assert_matches()
    assert all(gradient.isfinite().all() for gradient in gradients)
    if softcap is not None:  # the cap is saturated, and its slope 0
        assert (gradients[1][[0, 3]] == 0).all()


@pytest.mark.parametrize("scalars", [(1.0, 1.0, 3.0), (0.7, 2.5, 30.0), (1.3, -0.4, 0.1)], ids=str)
def test_softcap_from_the_smallest_to_the_largest_products(scalars: tuple[float, float, float]) -> None:
    size = torch.logspace(-7, 3, 60, dtype=torch.float64)
    weight = torch.cat([size, -size, torch.linspace(-4, 4, 67), tensor([0.0, INF, -INF]).cpu()]).float()[:, None]
    ids = torch.arange(len(weight))[None, :]
    case = Case(tensor([[1.0]]), weight.to(DEVICE), ids.to(DEVICE), torch.ones(1, len(weight), device=DEVICE))
    case = replace(case, scalars=scalars)
    expected, gradients = case.expected()
    torch.testing.assert_close(case.logits().double(), expected, rtol=3e-7, atol=1e-38)
    # From a z in fp32, 1 - tanh^2 is known to about 2e-7.
    dweight = case.gradients()[1].double()
    torch.testing.assert_close(dweight, gradients[1], rtol=1e-6, atol=3e-7 * abs(scalars[1] / scalars[0]))


def test_an_infinite_product_is_its_own_logit() -> None:
    case = Case(
        tensor([[INF], [1.0]]), tensor([[2.0], [-INF], [0.0]]), tensor([[0, 1, 2]] * 2), tensor([[1.0] * 3] * 2)
    )
    for scalars in ((1.0, 1.0, None), (0.7, -1.3, None)):
        logits = replace(case, scalars=scalars).logits()
        torch.testing.assert_close(logits.double(), replace(case, scalars=scalars).expected()[0], equal_nan=True)


def test_a_frozen_head_gets_no_gradient() -> None:
    case = random_case(dtype=torch.float16)
    all_of_them = case.gradients()
    dhidden, dweight, dbias = case.gradients(need_weight=False)
    assert torch.equal(dhidden, all_of_them[0])
    assert (dweight.shape, dweight.dtype) == ((0, 40), torch.float16)
    assert torch.equal(dbias, all_of_them[2])
    bare = replace(case, bias=None).gradients(need_weight=False)
    assert torch.equal(bare[0], all_of_them[0])
    assert [t.numel() for t in bare[1:]] == [0, 0]


def test_a_frozen_head_with_a_bias_whose_ids_fill_runs() -> None:
    case = entries_of([5, 3 * RUN, 1, RUN + 1], num_ids=173)
    torch.testing.assert_close(case.gradients(need_weight=False)[2], case.gradients()[2], rtol=0, atol=0)


@pytest.fixture
def nan_where_nothing_was_written() -> Iterator[None]:
    """In every tensor that is made empty."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's products would need their own settings to be deterministic")
@pytest.mark.usefixtures("nan_where_nothing_was_written")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_the_weight_that_no_id_names_are_zero(dtype: torch.dtype, bias: bool) -> None:
    """Their memory was not zero before."""
    assert torch.empty(9).isnan().all()
    case = random_case(rows=4, vocab=300, width=COLUMNS + 3, dtype=dtype)
    gradient = replace(case, bias=case.bias if bias else None).assert_matches()[1]
    assert case.mask is not None
    named = torch.zeros(301, dtype=torch.bool, device=DEVICE)
    named[case.ids[case.mask].flatten()] = True  # a pad names the last, which there is not
    assert torch.equal(gradient.ne(0).any(dim=1), named[:300])
    for nobody in (
        replace(case, grad=torch.zeros_like(case.grad)),
        replace(case, ids=case.ids[:, :0], grad=case.grad[:, :0]),
    ):
        assert not any(gradient.any() for gradient in nobody.assert_matches())


def test_empty_problems() -> None:
    case = random_case()
    for empty in (
        replace(case, hidden=case.hidden[:0], ids=case.ids[:0], grad=case.grad[:0], mask=None),
        replace(case, ids=case.ids[:, :0], grad=case.grad[:, :0]),
        replace(case, hidden=case.hidden[:, :0], weight=case.weight[:, :0]),
        replace(case, mask=torch.zeros_like(case.ids[:, 0], dtype=torch.bool)),
        replace(case, grad=torch.zeros_like(case.grad)),
    ):
        assert empty.logits().shape == empty.ids.shape
        gradients = empty.assert_matches()
        assert empty.hidden.shape[1] == 0 or not any(gradient.any() for gradient in gradients)


# --------------------------------------------------------------------------- adding to a gradient that is there


@pytest.mark.parametrize(("dtype", "into"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_adds_to_a_gradient_that_is_there(dtype: torch.dtype, into: torch.dtype, rng: torch.Generator) -> None:
    width = COLUMNS + 40  # the bias is added once, not once a slice
    case = replace(random_case(rows=4, vocab=30, width=width, num_ids=70, dtype=dtype), scalars=CAPPED)
    case.assert_adds(into, rng)


def test_adding_to_zeros_is_the_gradient_and_twice_is_twice() -> None:
    case = entries_of([3, 2 * RUN + 5, 0, 40], num_ids=76)
    dhidden, dweight, dbias = case.gradients()
    weight_grad, bias_grad = torch.zeros_like(dweight), torch.zeros_like(dbias)
    for times in (1, 2):
        assert torch.equal(case.add_into(weight_grad, bias_grad), dhidden)
        assert torch.equal(weight_grad, times * dweight)
        assert torch.equal(bias_grad, times * dbias)
    case.add_into(weight_grad, None)
    assert torch.equal(bias_grad, 2 * dbias)


# ------------------------------------------------------------------------------------------------ refusals


def test_wrong_arguments() -> None:
    case = random_case()
    bias = case.bias
    assert bias is not None
    for wrong, message in (
        (replace(case, hidden=case.hidden.half()), r"hidden, weight: got torch.float16, torch.float32"),
        (replace(case, weight=case.weight[:, 1:]), r"hidden, weight: got \[6, 40\], \[23, 39\], expected"),
        (replace(case, ids=case.ids[1:]), r"ids: got shape \[5, 9\], expected \[6, K\]"),
        (replace(case, ids=case.ids.float()), "ids: got torch.float32"),
        (replace(case, bias=bias[1:]), r"bias: got shape \[22\], expected \[23\]"),
        (replace(case, mask=torch.ones(6)), r"mask: got torch.float32 \[6\], expected torch.bool \[6\]"),
        (replace(case, scalars=(0.0, 1.0, None)), "temperature: got 0.0"),
        (replace(case, scalars=(1.0, 1.0, 0.0)), "softcap: got 0.0"),
        (replace(case, bias=bias.to("meta")), r"got devices \['.*', 'meta'\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            wrong.logits()
    with pytest.raises(ValueError, match=r"grad, logits: got \[6, 8\], \[6, 9\]"):
        replace(case, grad=case.grad[:, 1:]).gradients()
    case.assert_refuses_gradients()


@pytest.mark.skipif(DEVICE != "cpu", reason="a device cannot refuse them")
@pytest.mark.parametrize("bad", [-2, 23])
def test_ids_out_of_range_are_refused(bad: int) -> None:
    case = random_case()
    logits = case.logits()
    case.ids[1, 8] = bad
    with pytest.raises(ValueError, match=r"ids: .* 0\.\.22"):
        case.logits()
    with pytest.raises(ValueError, match=r"ids: .* 0\.\.22"):
        linear_gather_logits_backward(case.grad, logits, *case.arguments, True)


@pytest.mark.parametrize("bad", [-2, 23, 2**40])
def test_ids_out_of_range_on_a_device_show_and_reach_nothing(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_head, "check_ids_in_range", lambda ids, vocab: None)
    case = replace(random_case(), mask=None)
    padded = replace(case, ids=case.ids.clone())
    case.ids[1, 8], padded.ids[1, 8] = bad, -1
    logits = padded.logits()
    logits[1, 8] = NAN
    torch.testing.assert_close(case.logits(), logits, rtol=0, atol=0, equal_nan=True)
    for got, want in zip(case.gradients(), padded.gradients(), strict=True):
        assert torch.equal(got, want)
