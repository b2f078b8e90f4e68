"""The exact head's walk on Triton against the reference in fp64, in blocks so small that a row crosses many of them."""

from typing import Any

import pytest
import torch
from head_problem import (
    DEVICE,
    DTYPES,
    INF,
    NAN,
    PLAIN,
    SCALARS,
    K,
    Problem,
    Scalars,
    V,
    close,
    compare_losses,
    in_fp64,
    on_device,
)
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from asyncopd import kernels
from asyncopd.backends import reference
from asyncopd.backends.loss_spec import LossSpec
from asyncopd.backends.reference.head import Head
from asyncopd.kernels import head_walk


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of 128 columns at V = 300, the last of them not full."""
    monkeypatch.setattr(head_walk, "TILE_ELEMENTS", 1)


@pytest.mark.parametrize("scalars", SCALARS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype: torch.dtype, scalars: Scalars) -> None:
    problem = Problem(dtype)
    arguments = (problem.hidden, problem.head(scalars), problem.ids, problem.mask)
    actual = kernels.linear_gather_logprobs(*on_device(*arguments))
    expected = reference.linear_gather_logprobs(*in_fp64(*arguments))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), e, rtol=1e-6, atol=3e-6)
    lse = kernels.linear_logsumexp(*on_device(problem.hidden, problem.head(scalars), problem.mask))
    torch.testing.assert_close(lse, actual[1], rtol=0, atol=0)


@pytest.mark.parametrize("scalars", SCALARS, ids=str)
@pytest.mark.parametrize(("dtype", "need_weight"), [*((dtype, True) for dtype in DTYPES), (torch.float32, False)])
def test_backward(dtype: torch.dtype, scalars: Scalars, need_weight: bool) -> None:
    problem = Problem(dtype, bias=need_weight, mask=need_weight)
    hidden, head, ids, mask = problem.hidden, problem.head(scalars), problem.ids, problem.mask
    lse = reference.linear_logsumexp(*in_fp64(hidden, head, mask))
    arguments = (problem.grad, hidden, head, lse, ids, mask, need_weight)
    expected = reference.linear_gather_logprobs_backward(*in_fp64(*arguments))
    arguments = (problem.grad, hidden, head, lse.float(), ids, mask, need_weight)
    actual = kernels.linear_gather_logprobs_backward(*on_device(*arguments))
    for a, e, like in zip(actual, expected, (hidden, head.weight, head.weight), strict=True):
        assert a.dtype == like.dtype
        close(a, e, dtype)


# Where the e of the rows lie: all inside dW; some in it, some beside, some multiplied again; nothing kept beside;
# no dW to be in.
ROOM = {
    "inside": (16, 1 << 30, True),
    "everywhere": (4, 3 * V * 4, True),
    "again": (4, 0, True),
    "frozen": (4, 1, False),
}


@pytest.mark.parametrize("scalars", SCALARS[1:], ids=str)
@pytest.mark.parametrize(
    ("dtype", "room"), [*((torch.float32, room) for room in ROOM), *((dtype, "everywhere") for dtype in DTYPES[1:])]
)
def test_loss_and_its_gradients(
    dtype: torch.dtype, room: str, scalars: Scalars, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, beside, need_weight = ROOM[room]
    monkeypatch.setattr(head_walk, "KEPT_BYTES", beside)
    problem = Problem(dtype, width=width, bias=room != "inside", mask=room != "everywhere")
    compare_losses(problem, scalars, need_weight, 4.0)


@pytest.mark.skipif(not kernels.launch.INTERPRET, reason="on a GPU the compiler refuses fp64 in these kernels")
def test_no_kernel_is_given_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher in fp64 makes the coefficients fp64. The interpreter promotes what the compiler would refuse."""
    given = []
    launch = GridExecutor.__call__

    def recording(self: GridExecutor, *arguments: Any, **options: Any) -> None:
        given.extend(a.dtype for a in (*arguments, *options.values()) if isinstance(a, Tensor))
        launch(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", recording)
    problem = Problem()
    problem.teacher = problem.teacher.double()
    compare_losses(problem, (1.3, -0.4, 3.0), True, 4.0)
    assert torch.float32 in given
    assert torch.float64 not in given


def test_room_is_used_as_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the cases above would test one path under four names."""
    weight = torch.randn(V, 4, dtype=torch.bfloat16)
    head = Head(weight, None, *PLAIN)
    columns = 304  # V, its last row rounded up to a multiple of 16
    monkeypatch.setattr(head_walk, "KEPT_BYTES", 2 * columns * 2)

    def rows_kept(rows: int, dweight: Tensor | None, head: Head = head) -> tuple[int, int]:
        blocks = head_walk.Blocks(rows, V, weight.dtype)
        kept = head_walk.room_for(rows, dweight, head, blocks)
        assert (kept.inside is None, kept.beside is None) == (kept.inside_rows == 0, kept.inside_rows == kept.rows)
        return kept.inside_rows, kept.rows

    # Of the last block's 44 columns each row takes 48, and dW has 4 x 44 elements there: room for 3 rows.
    assert rows_kept(11, torch.empty_like(weight)) == (3, 5)
    assert rows_kept(2, torch.empty_like(weight)) == (2, 2)
    assert rows_kept(11, None) == (0, 2)
    assert rows_kept(11, weight, Head(weight, None, 1.0, 1.0, 3.0)) == (0, 0)


def test_small_gradients_survive_fp16() -> None:
    """A mean over a large batch: 1e-9 beside a head whose smallest number is 6e-8; its unit is taken out first."""
    problem = Problem(torch.float16, mask=False)
    problem.hidden *= 500
    problem.weight /= 500
    compare_losses(problem, PLAIN, True, 3e6)


def keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncopd.kernels.head_loss.room_for", lambda *_: head_walk.NOTHING)


@pytest.mark.parametrize("kept", [True, False])
def test_infinite_and_nan_logits(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """-inf bias: no probability and no gradient. A NaN row is its own affair if its coefficients are 0."""
    if not kept:
        keep_nothing(monkeypatch)
    problem = Problem(mask=False)
    assert problem.bias is not None
    problem.bias[torch.arange(V) % 3 == 0] = -INF
    problem.bias[128:256] = -INF  # a whole tile
    problem.hidden[2] = NAN  # the row of pads
    compare_losses(problem, PLAIN, True, 2.0)


def test_nothing_depends_on_masked_rows() -> None:
    problem = Problem()
    hidden, head, ids, mask = problem.hidden, problem.head(), problem.ids, problem.mask
    assert mask is not None
    whole = kernels.linear_gather_logprobs(*on_device(hidden, head, ids, mask))
    alone = kernels.linear_gather_logprobs(*on_device(hidden[mask], head, ids[mask], None))
    for w, a in zip(whole, alone, strict=True):
        torch.testing.assert_close(w[mask.to(DEVICE)], a, rtol=1e-6, atol=2e-6)


def test_no_rows_and_no_valid_rows() -> None:
    problem = Problem()
    hidden, head, ids = problem.hidden, problem.head(), problem.ids
    nobody = torch.zeros(hidden.shape[0], dtype=torch.bool)
    logprobs, lse = kernels.linear_gather_logprobs(*on_device(hidden, head, ids, nobody))
    assert (logprobs == -INF).all()
    assert (lse == 0).all()
    problem.mask = nobody
    compare_losses(problem, PLAIN, True, 1.0)
    empty = kernels.linear_gather_logprobs(*on_device(hidden[:0], head, ids[:0], None))
    assert [tuple(t.shape) for t in empty] == [(0, K), (0,)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_cover_the_vocabulary_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_walk, "TILE_ELEMENTS", 1 << 26)
    bound = 1 << 26 if dtype != torch.float32 else 1 << 25
    for rows, vocab in ((1, 1), (8192, 151_936), (64, 151_936), (0, 100), (10**6, 1000), (4096, 262_144), (8192, 8320)):
        plan = head_walk.Blocks(rows, vocab, dtype)
        cols = [block.cols for block in plan.blocks]
        assert [0, *(c.stop for c in cols)] == [*(c.start for c in cols), vocab]
        assert all(c.start % head_walk.MULTIPLE == 0 for c in cols)
        widths = [block.width for block in plan.blocks]
        assert max(widths) == plan.widest
        assert max(widths) - min(widths) <= 2 * head_walk.MULTIPLE
        # As few as the bound allows, but for what a block is at least.
        allowed = max(head_walk.MULTIPLE, bound // max(1, rows) // head_walk.MULTIPLE * head_walk.MULTIPLE)
        assert len(cols) == -(-vocab // allowed)
        firsts = [block.first_tile for block in plan.blocks]
        assert [*firsts, plan.tiles] == [0, *(b.first_tile + b.tiles for b in plan.blocks)]
        assert all(block.tiles * plan.tile >= block.width > (block.tiles - 1) * plan.tile for block in plan.blocks)


def test_tiles_leave_few_lanes_idle() -> None:
    widths = (1, 127, 129, 1000, 1500, 4096, 4224, 8064, 151_936)
    assert [head_walk.tile_columns(width) for width in widths] == [128, 128, 256, 1024, 2048, 4096, 1024, 4096, 4096]


@pytest.mark.parametrize("need_weight", [True, False], ids=["kept", "multiplied again"])
def test_layouts_are_followed(need_weight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_walk, "KEPT_BYTES", 0)
    problem = Problem()
    assert problem.bias is not None
    problem.bias = torch.stack([problem.bias, torch.full_like(problem.bias, NAN)], 1)[:, 0]
    problem.weight = problem.weight.t().contiguous().t()
    problem.hidden = torch.cat([problem.hidden, problem.hidden], 1)[:, : problem.weight.shape[1]]
    compare_losses(problem, PLAIN, need_weight, 2.0)


def test_a_row_without_mass_has_no_nan() -> None:
    problem = Problem(mask=False)
    problem.bias = torch.full((V,), -INF)
    lse = torch.full((problem.hidden.shape[0],), -INF)
    arguments = (torch.ones_like(problem.grad), problem.hidden, problem.head(), lse, problem.ids, None, True)
    expected = reference.linear_gather_logprobs_backward(*in_fp64(*arguments))
    actual = kernels.linear_gather_logprobs_backward(*on_device(*arguments))
    for a, e in zip(actual, expected, strict=True):
        close(a, e)


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_infinite_shows_where_the_reference_shows_it(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """+inf at one column of one row; NaN all over another."""
    if not kept:
        keep_nothing(monkeypatch)
    problem = Problem(mask=False, bias=False)
    problem.hidden[3], problem.hidden[4] = 0.0, NAN
    problem.hidden[3, 0], problem.weight[:, 0] = INF, -1.0
    problem.weight[200, 0] = 1.0
    support = (problem.ids, problem.teacher, torch.zeros_like(problem.teacher), None)
    arguments = (problem.hidden, problem.head(), None, *support, torch.tensor(1.0))
    how = (True, True, LossSpec(divergence="forward", metrics=False))
    expected = reference.linear_kl(*in_fp64(*arguments), *how)
    actual = kernels.linear_kl(*on_device(*arguments), *how)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu().isnan(), e.isnan())


@pytest.mark.parametrize("room", ["inside", "everywhere", "again"])
def test_a_block_is_one_launch_of_each_kernel(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the e of its rows are."""
    launched: list[str] = []
    launch = head_walk.launch

    def counted(kernel: Any, *arguments: Any, **options: Any) -> None:
        launched.append(kernel.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(head_walk, "launch", counted)
    width, beside, _ = ROOM[room]
    monkeypatch.setattr(head_walk, "KEPT_BYTES", beside)
    compare_losses(Problem(width=width), PLAIN, True, 4.0)
    blocks = len(head_walk.Blocks(11, V, torch.float32).blocks)
    assert blocks == 3
    backward = ["backward_kernel", "scatter_kernel"]
    assert launched == ["forward_kernel"] * blocks + ["values_kernel"] + backward * blocks
