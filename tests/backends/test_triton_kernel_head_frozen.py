"""The walk of a frozen head, which keeps nothing, on Triton against the reference in fp64; in several blocks."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from head_problem import DEVICE, DTYPES, INF, NAN, PLAIN, SCALARS, Problem, Scalars, V, compare_losses, in_fp64
from head_problem import on_device as carried
from torch import Tensor

from asyncopd.backends.reference.gather import logits_gradient
from asyncopd.kernels import head_frozen, head_walk


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of 128 columns at V = 300, the last of them not full."""
    monkeypatch.setattr(head_walk, "TILE_ELEMENTS", 1)


@pytest.fixture(autouse=True)
def nan_where_nothing_was_written() -> Iterator[None]:
    """In every tensor that is made empty."""
    torch.use_deterministic_algorithms(DEVICE == "cpu")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that a walk of a frozen head has launched."""
    names: list[str] = []
    launch = head_frozen.launch

    def counted(kernel: Any, *arguments: Any, **options: Any) -> None:
        names.append(kernel.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(head_frozen, "launch", counted)
    return names


@pytest.mark.parametrize("scalars", SCALARS, ids=str)
@pytest.mark.parametrize(("dtype", "mask"), [*((dtype, True) for dtype in DTYPES), (torch.bfloat16, False)])
def test_loss_and_gradient(dtype: torch.dtype, mask: bool, scalars: Scalars, launched: list[str]) -> None:
    compare_losses(Problem(dtype, bias=False, mask=mask), scalars, False, 4.0)
    assert launched == ["_online_kernel"] * 3 + ["_corrections_kernel"]


@pytest.mark.parametrize("options", [{"baseline": "mean"}, {"divergence": "forward"}, {"metrics": False}], ids=str)
def test_other_losses(options: dict[str, Any]) -> None:
    compare_losses(Problem(bias=False), (1.0, 1.0, None), False, 4.0, **options)


def test_blocks_that_are_wider_than_a_program(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """What few rows have: the columns beyond the first of a program are read twice."""
    monkeypatch.setattr(head_walk, "TILE_ELEMENTS", 1 << 26)
    monkeypatch.setattr(head_frozen, "TILE", 64)
    for scalars in (PLAIN, SCALARS[2]):
        compare_losses(Problem(torch.bfloat16, bias=False), scalars, False, 4.0)
    assert launched == ["_online_kernel", "_corrections_kernel"] * 2


def test_a_bias_takes_the_other_walk(launched: list[str]) -> None:
    """Its gradient needs the mass of a row before the row is summed over."""
    compare_losses(Problem(bias=True), PLAIN, False, 4.0)
    assert launched == []


def gradient_of(problem: Problem, coef: Tensor, scalars: Scalars = PLAIN) -> tuple[Tensor, Tensor, Tensor]:
    """dH of sum(coef * log p) by the walk; the same in fp64; and what an error is to be measured by, all [N, H]."""
    hidden, head, ids, coef = carried(problem.hidden, problem.head(scalars), problem.ids, coef)
    walk = head_frozen.FrozenWalk(hidden, ids, head, None)
    logprobs, _ = walk.scores()
    actual = walk.hidden_gradient(coef, logprobs)
    h, exact_head, exact_coef = in_fp64(problem.hidden, problem.head(scalars), coef.cpu())
    z = exact_head.logits(h)
    capped = z.clone()
    dz = logits_gradient(exact_coef, z, torch.logsumexp(z, 1), problem.ids)
    dz = exact_head.epilogue_gradient(dz, capped)
    return actual.cpu().double(), exact_head.times_weight(dz), dz.abs() @ exact_head.weight.abs()


@pytest.mark.parametrize("scalars", [PLAIN, (0.5, 2.0, 20.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_peaked_rows(size: float, dtype: torch.dtype, scalars: Scalars) -> None:
    """One logit with all the mass, at an id or beside them; the last of all columns, so that every block raises m.

    An error is measured against sum |dz| |W|: rounding e, and the sums, may be wrong by their own size; what would
    remain of two large terms that cancel may not.
    """
    problem = Problem(dtype, bias=False, mask=False)
    direction = torch.nn.functional.normalize(problem.hidden.double(), dim=1)
    problem.weight[:] = torch.randn(V, 16, generator=torch.Generator().manual_seed(3)) * 0.1
    for row, place in enumerate([0, 150, V - 1, 127, 128, 299, 5, 260, 130, 131, 132]):
        problem.weight[place] = (direction[row] * 4).to(dtype)
        problem.ids[row] = torch.tensor([place, 7, 200, -1, 7] if row % 2 else [9, 7, 200, -1, 7])
    problem.hidden = (direction * size / 4).to(dtype)
    coef = problem.grad.masked_fill(problem.ids < 0, 0.0)
    actual, expected, scale = gradient_of(problem, coef, scalars)
    # An exponential is off by what its fp32 logit is: some 1e-7 of the largest.
    largest = size * scalars[1] / scalars[0]
    rounding = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype] + 1e-7 * largest
    smallest = 1e-9 if dtype != torch.float16 else 2.0**-24
    assert ((actual - expected).abs() <= rounding * scale + smallest).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coefficients_that_cancel_the_softmax(dtype: torch.dtype) -> None:
    """c_k = p_k at ids that have nearly all the mass: their dz are 0 but for what is left of it."""
    problem = Problem(dtype, bias=False, mask=False)
    problem.ids = torch.tensor([[3, 140, 290, 3, -1]]).repeat(11, 1)
    problem.weight[:] = torch.randn(V, 16, generator=torch.Generator().manual_seed(4)) * 0.05
    problem.hidden[:, 0], problem.weight[:, 0] = 8.0, -1.0
    problem.weight[[3, 140, 290], 0] = torch.tensor([1.0, 1.02, 0.98]).to(dtype)
    h, head = in_fp64(problem.hidden, problem.head())
    p = head.logits(h).softmax(1)
    coef = p.gather(1, problem.ids.clamp(min=0)) * torch.tensor([0.25, 1.0, 1.0, 0.75, 0.0])
    actual, expected, scale = gradient_of(problem, coef.float())
    # 6e-8 of the coefficients themselves: they are rounded to fp32.
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    assert ((actual - expected).abs() <= rounding * scale + 1e-6).all()
    assert (scale < 1e-3).all()  # so an error of 2^-9 of p would show


def test_many_small_probabilities_in_fp16() -> None:
    """Each is below the smallest number of fp16, which the largest is not; all of dH but one column is of them."""
    problem = Problem(torch.float16, rows=3, bias=False, mask=False)
    problem.ids = torch.full((3, 5), -1)
    problem.ids[:, 0] = 5
    problem.hidden[:] = 0.0
    problem.hidden[:, 0] = 18.0
    problem.weight[:, 0] = 0.0
    problem.weight[[5, 17]] = 0.0
    problem.weight[17, 0] = 1.0
    actual, expected, scale = gradient_of(problem, 1000.0 * (problem.ids >= 0))
    assert (expected[:, 1:].abs().mean(dim=1) > 1e-5).all()
    assert ((actual - expected).abs() <= 2.0**-10 * scale + 2.0**-25)[:, 1:].all()


def test_what_is_infinite_shows_where_the_reference_shows_it() -> None:
    """+inf beside the ids in one row and at an id in another; a NaN row, and one that has no coefficients."""
    problem = Problem(mask=False, bias=False)
    for row in (3, 5):
        problem.hidden[row] = 0.0
        problem.hidden[row, 0] = INF
    problem.weight[:, 0] = -1.0
    problem.weight[200, 0] = 1.0
    problem.hidden[4], problem.hidden[2] = NAN, NAN
    problem.ids[3], problem.ids[5] = torch.tensor([1, 2, 130, 299, -1]), torch.tensor([1, 200, 130, 299, -1])
    coef = problem.grad.masked_fill(problem.ids < 0, 0.0)
    actual, expected, _ = gradient_of(problem, coef)
    expected[2] = 0.0  # which 0 * NaN in a product is not
    assert expected.isnan().all(dim=1).tolist() == [row in (3, 4, 5) for row in range(11)]
    assert torch.equal(actual.isnan(), expected.isnan())
    assert (actual[2] == 0).all()


def test_rows_and_blocks_without_mass() -> None:
    """A row of -inf has no softmax to subtract; another has its first mass in the last block."""
    problem = Problem(mask=False, bias=False)
    problem.hidden[1] = 0.0
    problem.hidden[1, 0], problem.weight[:, 0] = -INF, 1.0
    problem.hidden[5] = torch.full((16,), -1e38)
    problem.hidden[5, 0] = 0.0
    problem.weight[:256, 1:], problem.weight[256:, 1:] = 10.0, 0.0
    walk = head_frozen.FrozenWalk(*carried(problem.hidden, problem.ids, problem.head()), None)
    logprobs, lse = walk.scores()
    assert lse[1] == -INF
    assert lse[5].item() == pytest.approx(math.log(V - 256))
    assert walk.tile_peaks[5].tolist() == [-INF, -INF, 0.0]
    dhidden = walk.hidden_gradient(carried(problem.grad)[0], logprobs)
    coef = problem.grad[1].masked_fill(problem.ids[1] < 0, 0.0)
    torch.testing.assert_close(dhidden[1].cpu(), coef @ problem.weight[problem.ids[1]])
    assert dhidden.isfinite().all()


def test_no_valid_rows() -> None:
    problem = Problem(bias=False)
    problem.mask = torch.zeros(11, dtype=torch.bool)
    assert (compare_losses(problem, PLAIN, False, 1.0) == 0).all()


def test_every_run_gives_the_same_bits() -> None:
    problem = Problem(torch.bfloat16, bias=False)
    first, second = (compare_losses(problem, SCALARS[2], False, 4.0) for _ in range(2))
    assert torch.equal(first, second)
