"""The walk over the vocabulary against the reference in fp64, in blocks so small that a row crosses many of them."""

import pytest
import torch
from torch import Tensor

from asyncopd.backends import cpu, reference
from asyncopd.backends.cpu import head as head_ops
from asyncopd.backends.cpu import walk
from asyncopd.backends.loss_spec import LossSpec
from asyncopd.backends.reference.head import Head

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = (1.0, 1.0, None)
SCALARS = [PLAIN, (0.7, 1.0, None), (1.0, -0.4, None), (1.3, 2.0, 3.0)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(walk, "MIN_COLUMNS", 64)


def random_case(
    rows: int, vocab: int, num_ids: int, dtype: torch.dtype = torch.float32, width: int = 24
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rows * 7919 + vocab)
    hidden, weight = torch.randn(rows, width, generator=rng), torch.randn(vocab, width, generator=rng)
    ids = torch.randint(-1, vocab, (rows, num_ids), generator=rng)
    return hidden.to(dtype), weight.to(dtype), ids, torch.randn(vocab, generator=rng).to(dtype)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Within fp32 rounding of a sum of a few dozen products, and half a unit in the last place of a 16-bit result."""
    scale = expected.abs().nan_to_num(0.0, 0.0, 0.0).max().item() if expected.numel() else 0.0
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * 0.51
    torch.testing.assert_close(
        actual.double(), expected, rtol=rounding + 2e-6, atol=2e-6 * max(scale, 1.0), equal_nan=True
    )


def test_blocks_cover_the_vocabulary_once() -> None:
    for rows, vocab in ((1, 1), (1, 64), (3, 65), (0, 100), (10**6, 1000)):
        blocks = list(walk.column_blocks(rows, vocab))
        assert [v for cols in blocks for v in range(cols.start, cols.stop)] == list(range(vocab))
        assert len(blocks) == -(-vocab // 64)


@pytest.mark.parametrize("scalars", SCALARS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [63, 64, 65, 500])
def test_forward_and_backward(vocab: int, dtype: torch.dtype, scalars: tuple[float, float, float | None]) -> None:
    hidden, weight, ids, bias = random_case(7, vocab, 9, dtype)
    mask = torch.tensor([True, False, True, True, False, True, True])
    hidden[1], ids[0, 1] = NAN, ids[0, 0]
    head, wide = Head(weight, bias, *scalars), Head(weight.double(), bias.double(), *scalars)
    logprobs, lse = cpu.linear_gather_logprobs(hidden, head, ids, mask)
    expected, expected_lse = reference.linear_gather_logprobs(hidden.double(), wide, ids, mask)
    close(logprobs, expected)
    close(lse, expected_lse)
    assert torch.equal(logprobs == -INF, (ids < 0) | ~mask[:, None])

    grad = torch.randn(ids.shape, generator=torch.Generator().manual_seed(3))
    mine = cpu.linear_gather_logprobs_backward(grad, hidden, head, lse, ids, mask, True)
    theirs = reference.linear_gather_logprobs_backward(
        grad.double(), hidden.double(), wide, expected_lse, ids, mask, True
    )
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == dtype
        close(a, b, dtype)


def test_a_frozen_head_gets_no_gradient_tensor() -> None:
    hidden, weight, ids, _ = random_case(5, 300, 4)
    head = Head(weight, None, *PLAIN)
    lse = cpu.linear_logsumexp(hidden, head, None)
    grad = torch.ones(ids.shape)
    dh, dw, db = cpu.linear_gather_logprobs_backward(grad, hidden, head, lse, ids, None, False)
    assert dw.shape == (0, weight.shape[1])
    assert db.shape == (0,)
    whole = cpu.linear_gather_logprobs_backward(grad, hidden, head, lse, ids, None, True)
    assert torch.equal(dh, whole[0])


def test_rows_without_gradient_may_hold_anything() -> None:
    hidden, weight, ids, _ = random_case(5, 300, 4)
    head = Head(weight, None, *PLAIN)
    lse = cpu.linear_logsumexp(hidden, head, None)
    grad = torch.ones(ids.shape)
    grad[2] = 0.0
    hidden[2], lse[2] = NAN, NAN
    dh, dw, _ = cpu.linear_gather_logprobs_backward(grad, hidden, head, lse, ids, None, True)
    assert dh.isfinite().all()
    assert dw.isfinite().all()
    assert (dh[2] == 0).all()


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_special_logits_in_any_block(value: float) -> None:
    """An infinite or undefined logit decides the row's LSE whichever block it comes in, and only that row's."""
    for at in (0, 70, 299):
        hidden, weight, ids, bias = random_case(3, 300, 4)
        bias[at] = value
        ids[0, 0], ids[1] = at, -1
        logprobs, lse = cpu.linear_gather_logprobs(hidden, Head(weight, bias, *PLAIN), ids, None)
        wide = Head(weight.double(), bias.double(), *PLAIN)
        expected, expected_lse = reference.linear_gather_logprobs(hidden.double(), wide, ids, None)
        close(lse, expected_lse)
        if value != INF:  # inf - inf: both say NaN or inf of what cannot be trained on
            close(logprobs, expected)


def test_nothing_but_minus_inf() -> None:
    hidden, weight, ids, bias = random_case(2, 200, 3)
    bias[:] = -INF
    logprobs, lse = cpu.linear_gather_logprobs(hidden, Head(weight, bias, *PLAIN), ids, None)
    assert (logprobs == -INF).all()
    assert (lse == -INF).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_kept_inside_the_gradient(dtype: torch.dtype) -> None:
    """`Tiles.inside`: the logits wait in the memory of dW, block by block, and are gone when a block is complete."""
    hidden, weight, ids, bias = random_case(7, 500, 5, dtype)
    head = Head(weight, bias, 0.8, 1.5, 4.0)
    grad = torch.randn(ids.shape, generator=torch.Generator().manual_seed(3))
    results = []
    for storage in ("inside", "all", "none"):
        rows = walk.Walk(hidden, ids, head)
        gradients = walk.Gradients(torch.zeros(7, 24), torch.empty_like(weight), torch.zeros(bias.shape))
        tiles = {
            "inside": walk.Tiles.inside(gradients.weight, 7),
            "all": walk.Tiles.all(7, 500),
            "none": walk.Tiles.one(7, 500),
        }[storage]
        _, lse = rows.forward(tiles)
        rows.backward(grad, lse, gradients, None if storage == "none" else tiles)
        results.append((gradients.hidden, gradients.weight, gradients.bias))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_gradient_too_narrow_for_the_rows_holds_no_logits() -> None:
    assert walk.Tiles.inside(torch.empty(100, 8), 9) is None
    assert walk.Tiles.inside(torch.empty(100, 8), 8) is not None
    assert walk.Tiles.inside(torch.empty(100, 8, dtype=torch.bfloat16), 5) is None
    assert walk.Tiles.inside(torch.empty(100, 8, dtype=torch.bfloat16), 4) is not None
    assert walk.Tiles.inside(torch.empty(100, 7, dtype=torch.bfloat16), 1) is None


def test_gradients_of_groups_of_rows_add_up() -> None:
    hidden, weight, ids, bias = random_case(8, 300, 5)
    head, grad = Head(weight, bias, 1.0, 1.0, None), torch.ones(8, 5)
    whole = walk.Gradients(torch.zeros(8, 24), torch.empty_like(weight), torch.zeros(bias.shape))
    rows = walk.Walk(hidden, ids, head)
    rows.backward(grad, rows.forward(walk.Tiles.one(8, 300))[1], whole)
    parts = walk.Gradients(None, torch.empty_like(weight), torch.zeros(bias.shape))
    for part in (slice(0, 3), slice(3, 8)):
        rows = walk.Walk(hidden[part], ids[part], head)
        _, lse = rows.forward(walk.Tiles.one(rows.hidden.shape[0], 300))
        rows.backward(grad[part], lse, parts, first=part.start == 0)
    close(parts.weight, whole.weight.double())
    close(parts.bias, whole.bias.double())


@pytest.mark.parametrize("k", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_topk_over_blocks(rows: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties cross blocks, K exceeds a block, groups of rows; a NaN comes first, as in one pass over the whole row."""
    monkeypatch.setattr(head_ops, "TOPK_ROWS", 3)
    rng = torch.Generator().manual_seed(rows)
    # Integers: their products are exact, whatever the order of summation.
    hidden, weight = (torch.randint(-3, 4, shape, generator=rng).float() for shape in ((rows, 4), (300, 4)))
    bias = torch.zeros(300)
    bias[131], bias[270:] = 2.0, -INF
    for special in (0.0, NAN, INF):
        bias[77] = special
        whole = cpu.topk_logprobs(hidden @ weight.t() + bias, k, 0.7)
        tiled = cpu.linear_topk_logprobs(hidden, Head(weight, bias, 0.7, 1.0, None), k)
        assert torch.equal(tiled[0], whole[0])
        for a, b in zip(tiled[1:], whole[1:], strict=True):
            close(a, b.double())


@pytest.mark.parametrize("k", [1, 64, 300])
def test_topk_of_logits_that_fit_a_tile(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One product and one kernel: the same ids as in many blocks, and scores that agree."""
    rng = torch.Generator().manual_seed(k)
    hidden, weight = (torch.randint(-3, 4, shape, generator=rng).float() for shape in ((6, 4), (300, 4)))
    bias = torch.randint(-3, 4, (300,), generator=rng).float()
    bias[77], bias[270:] = NAN, -INF
    for scalars in SCALARS:
        head = Head(weight, bias, *scalars)
        tiled = cpu.linear_topk_logprobs(hidden, head, k)
        with monkeypatch.context() as patch:
            patch.setattr(walk, "TILE_ELEMENTS", 6 * 300)
            assert walk.fits_one_tile(6, 300)
            assert not walk.fits_one_tile(7, 300)
            whole = cpu.linear_topk_logprobs(hidden, head, k)
        for a, b in zip(whole, tiled, strict=True):
            close(a, b.double())
        if scalars[2] is None:  # tanh may round two logits alike, in one shape of a tensor and not in another
            assert torch.equal(whole[0], tiled[0])


@pytest.mark.parametrize("fill", [0.0, 1e30, INF, NAN])
@pytest.mark.parametrize("scalars", SCALARS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [64, 9 * 300], ids=["blocks", "one tile"])
def test_loss_with_a_row_of_pads(
    tile: int,
    dtype: torch.dtype,
    scalars: tuple[float, float, float | None],
    fill: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the hidden state of a row without entries holds, it adds nothing; with a mask, and without."""
    monkeypatch.setattr(walk, "TILE_ELEMENTS", tile)
    hidden, weight, ids, bias = random_case(9, 300, 6, dtype)
    ids[4], ids[0, 1] = -1, ids[0, 0]
    teacher = torch.randn(ids.shape, generator=torch.Generator().manual_seed(3)).log_softmax(1)
    mask = torch.tensor([True] * 7 + [False] * 2)
    for valid in (None, mask):
        rest = (valid, ids, teacher, torch.zeros(ids.shape), None, torch.tensor(7.0), True, True, LossSpec())
        hidden[4] = 0.0
        wide = Head(weight.double(), bias.double(), *scalars)
        expected = reference.linear_kl(hidden.double(), wide, *rest)
        hidden[4] = fill
        mine = cpu.linear_kl(hidden, Head(weight, bias, *scalars), *rest)
        for a, b, kind in zip(mine, expected, (torch.float32, torch.float32, dtype, dtype, dtype), strict=True):
            if a is not mine[1]:  # metrics: of the histogram of ratios, not of all of them
                close(a, b.double(), kind)


def test_ids_are_checked_where_they_are_read() -> None:
    hidden, weight, ids, _ = random_case(5, 300, 4)
    for bad in (-2, 300):
        wrong = ids.clone()
        wrong[3, 1] = bad
        for mask in (None, torch.tensor([True, True, True, False, True])):
            with pytest.raises(ValueError, match="ids: got"):
                cpu.linear_gather_logprobs(hidden, Head(weight, None, *PLAIN), wrong, mask)


def test_no_rows() -> None:
    hidden, weight, ids, bias = random_case(0, 200, 3)
    head = Head(weight, bias, *PLAIN)
    logprobs, lse = cpu.linear_gather_logprobs(hidden, head, ids, None)
    assert logprobs.shape == (0, 3)
    assert lse.shape == (0,)
    grads = cpu.linear_gather_logprobs_backward(logprobs, hidden, head, lse, ids, None, True)
    assert [g.shape for g in grads] == [hidden.shape, weight.shape, bias.shape]
    assert all((g == 0).all() for g in grads)
    assert [t.shape for t in cpu.linear_topk_logprobs(hidden, head, 3)] == [(0, 3), (0, 3), (0,)]
