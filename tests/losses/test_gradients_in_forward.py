"""The op that makes its gradients in the forward agrees with the losses row by row, whatever the backward brings."""

from typing import Any

import pytest
import torch
from each_backend import Backend
from scenes import KINDS, draw_ids, scene
from torch import Tensor

from asyncopd import Correction, LossMetrics, Support, linear_forward_kl, linear_reverse_kl, linear_topk_logprobs
from asyncopd.backends.cpu import head_loss, walk

OPS = ("linear_kl", "linear_gather_logprobs", "linear_gather_logprobs_backward", "kl_rows")
pytestmark = pytest.mark.ops(*OPS)
N, V, H = 9, 300, 5
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("teacher_top_k", {}),
    ("teacher_top_k", {"tail": "bucket"}),
    ("samples", {}),
    ("samples", {"baseline": "loo"}),
    ("samples", {"correction": Correction(clip_eps=0.1), "baseline": "mean"}),
    ("samples", {"correction": Correction(ratio_cap=1.2, advantage="behavior")}),
    ("head_tail", {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.4}),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows cross several blocks of columns."""
    monkeypatch.setattr(walk, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(walk, "MIN_COLUMNS", 64)


def problem(
    backend: Backend, rng: torch.Generator, draw: str, width: int = H
) -> tuple[Tensor, Tensor, Tensor, Support]:
    """hidden [N, H], weight [V, H], bias [V] as leaves, and a support with a pad, a row of pads and a double id."""
    s = scene(rng, N, V)
    ids, log_w = draw_ids(s, draw, rng)
    ids[0, 1], log_w[0, 1], ids[4, 2] = ids[0, 0], log_w[0, 0], -1
    ids[5] = -1
    log_q = s.log_q.gather(1, ids.clamp(min=0))
    support = Support(ids, *(backend.tensor(t.masked_fill(ids < 0, -torch.inf)) for t in (log_q, log_w)), KINDS[draw])
    shapes = ((N, width), (V, width), (V,))
    leaves = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in shapes)
    hidden, weight, bias = (backend.tensor(t).requires_grad_() for t in leaves)
    return hidden, weight, bias, support


def gradients(loss: Tensor, *leaves: Tensor, **kw: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, **kw))


@pytest.mark.parametrize("width", [H, 2 * N], ids=["rows in groups", "logits inside dW"])
@pytest.mark.parametrize(("draw", "options"), OPTIONS, ids=str)
def test_mean_is_the_mean_of_the_rows(
    backend: Backend, rng: torch.Generator, draw: str, options: dict[str, Any], width: int
) -> None:
    hidden, weight, bias, support = problem(backend, rng, draw, width)
    mask = torch.tensor([True] * 6 + [False, True, True])
    with torch.no_grad():
        hidden[6] = torch.nan
        hidden[5] = 1e30  # a row of pads: whatever it holds, it adds nothing
    args = {"mask": mask, "bias": bias, **options}
    loss, metrics = linear_reverse_kl(hidden, weight, support, return_metrics=True, **args)
    rows, expected_metrics = linear_reverse_kl(hidden, weight, support, reduction="none", return_metrics=True, **args)
    expected = rows.sum() / mask.sum()
    backend.close(loss, expected.double())
    for name, a, b in zip(LossMetrics._fields, metrics, expected_metrics, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if name == "ratio_p99" else 1e-5, atol=1e-6, msg=name)
    mine = gradients(loss, hidden, weight, bias)
    for a, b in zip(mine, gradients(expected, hidden, weight, bias), strict=True):
        backend.close(a, b.double())


@pytest.mark.parametrize("tail", ["drop", "bucket"])
def test_forward_kl(backend: Backend, rng: torch.Generator, tail: str) -> None:
    hidden, weight, _, support = problem(backend, rng, "teacher_top_k")
    loss = linear_forward_kl(hidden, weight, support, tail=tail, num_items_in_batch=4)
    rows = linear_forward_kl(hidden, weight, support, tail=tail, reduction="none")
    backend.close(loss, rows.sum().double() / 4)
    mine, theirs = gradients(loss, hidden, weight), gradients(rows.sum() / 4, hidden, weight)
    for a, b in zip(mine, theirs, strict=True):
        backend.close(a, b.double())


@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
def test_upstream_gradient_is_a_factor(backend: Backend, rng: torch.Generator, factor: float) -> None:
    hidden, weight, bias, support = problem(backend, rng, "samples")
    loss = linear_reverse_kl(hidden, weight, support, bias=bias, reduction="sum")
    once = gradients(loss, hidden, weight, bias, retain_graph=True)
    for a, b in zip(gradients(loss * factor, hidden, weight, bias), once, strict=True):
        backend.close(a, b.double() * factor)


def test_a_dropped_loss_has_no_gradient_even_where_it_is_nan(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight, _, support = problem(backend, rng, "samples")
    with torch.no_grad():
        hidden[0] = torch.nan
    loss = linear_reverse_kl(hidden, weight, support)
    assert loss.isnan()
    assert all((g == 0).all() for g in gradients(loss * 0.0, hidden, weight))


def test_a_retained_graph_gives_the_same_gradients_again(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight, bias, support = problem(backend, rng, "samples")
    loss = linear_reverse_kl(hidden, weight, support, bias=bias)
    first = gradients(loss, hidden, weight, bias, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    for a, b in zip(gradients(loss, hidden, weight, bias), kept, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_is_asked_for(backend: Backend, rng: torch.Generator, trained: str) -> None:
    hidden, weight, bias, support = problem(backend, rng, "samples")
    whole = gradients(linear_reverse_kl(hidden, weight, support, bias=bias), hidden, weight, bias)
    names = ("hidden", "weight", "bias")
    given = {n: t if n == trained else t.detach() for n, t in zip(names, (hidden, weight, bias), strict=True)}
    loss = linear_reverse_kl(given["hidden"], given["weight"], support, bias=given["bias"])
    loss.backward()
    assert [n for n, t in given.items() if t.grad is not None] == [trained]
    backend.close(given[trained].grad, whole[names.index(trained)].double())


@pytest.mark.parametrize("width", [H, 2 * N])
@pytest.mark.parametrize("rows", [0, N], ids=["no rows", "no valid rows"])
def test_nothing_to_learn_from(backend: Backend, rng: torch.Generator, rows: int, width: int) -> None:
    hidden, weight, bias, support = problem(backend, rng, "samples", width)
    some = Support(support.ids[:rows], support.teacher_logprobs[:rows], support.log_weights[:rows], "samples")
    mask = torch.zeros(rows, dtype=torch.bool)
    loss = linear_reverse_kl(hidden[:rows], weight, some, mask=mask, bias=bias)
    assert loss == 0
    assert all((g == 0).all() for g in gradients(loss, hidden, weight, bias))


def test_groups_of_rows(backend: Backend, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last group is smaller than the others, and every group adds to what the ones before have left."""
    hidden, weight, bias, support = problem(backend, rng, "samples")
    results = []
    for kept in (V, 2 * V, 100 * V):
        monkeypatch.setattr(head_loss, "KEPT_ELEMENTS", kept)
        loss = linear_reverse_kl(hidden, weight, support, bias=bias)
        results.append([loss, *gradients(loss, hidden, weight, bias)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            backend.close(a, b.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [6, 7, 4 * N])
def test_16_bit_gradients_sum_in_fp32(engine: str, rng: torch.Generator, dtype: torch.dtype, width: int) -> None:
    hidden, weight, _, support = problem(Backend(engine, torch.float32), rng, "samples", width)
    low = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
    high = [t.detach().double().requires_grad_() for t in low]
    wide = Support(support.ids, support.teacher_logprobs.double(), support.log_weights.double(), "samples")
    mine = gradients(linear_reverse_kl(*low, support), *low)
    theirs = gradients(linear_reverse_kl(*high, wide), *high)
    # Rounded once, at the end; but tensor cores take 16-bit operands, so on a GPU every term has its rounding too.
    terms = 0.0 if engine not in ("triton", "cuda") else torch.finfo(dtype).eps
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == dtype
        ulp = torch.finfo(dtype).eps * 0.51
        torch.testing.assert_close(a.double(), b, rtol=ulp + 1e-5, atol=(terms + 1e-5) * b.abs().max().item())


def test_a_second_derivative_is_refused(backend: Backend, rng: torch.Generator) -> None:
    """The gradients have no graph, and a penalty on them would be a constant."""
    hidden, weight, bias, support = problem(backend, rng, "samples")
    loss = linear_reverse_kl(hidden, weight, support, bias=bias)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_kl: has no second derivative"):
        gradient.pow(2).sum().backward()


def test_fp16_gradients_are_rounded_after_the_loss_is_scaled(engine: str, rng: torch.Generator) -> None:
    """As GradScaler scales it, so that they are not 0: a mean over 2^16 rows, times 2^16."""
    hidden, weight, _, support = problem(Backend(engine, torch.float32), rng, "samples", 16)
    low = [t.detach().half().requires_grad_() for t in (hidden, weight)]
    plain = gradients(linear_reverse_kl(*low, support, reduction="sum"), *low)
    mean = gradients(linear_reverse_kl(*low, support, num_items_in_batch=2**16) * 2**16, *low)
    for a, b in zip(plain, mean, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-3, atol=2e-3 * a.abs().max().item())
        assert ((a == 0) == (b == 0)).double().mean() > 0.99


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_plays_no_part(engine: str, rng: torch.Generator, default: torch.dtype) -> None:
    """Kernels are given pointers to what they take for fp32."""
    hidden, weight, bias, support = problem(Backend(engine, torch.float32), rng, "samples")

    def everything() -> list[Tensor]:
        loss, metrics = linear_reverse_kl(hidden, weight, support, bias=bias, return_metrics=True)
        rows = linear_reverse_kl(hidden, weight, support, bias=bias, reduction="none")
        top = linear_topk_logprobs(hidden, weight, 3, bias=bias)
        graded = [gradients(x, hidden, weight, bias) for x in (loss, rows.sum())]
        return [loss, *metrics, rows, *top, *graded[0], *graded[1]]

    expected = everything()
    torch.set_default_dtype(default)
    try:
        got = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_a_teacher_in_fp64_makes_the_loss_fp64(engine: str, rng: torch.Generator) -> None:
    hidden, weight, bias, support = problem(Backend(engine, torch.float32), rng, "samples")
    wide = Support(support.ids, support.teacher_logprobs.double(), support.log_weights, "samples")
    loss, metrics = linear_reverse_kl(hidden, weight, wide, bias=bias, return_metrics=True)
    assert {loss.dtype, *(m.dtype for m in metrics)} == {torch.float64}
    plain = linear_reverse_kl(hidden, weight, support, bias=bias)
    torch.testing.assert_close(loss.float(), plain, rtol=1e-5, atol=1e-6)
