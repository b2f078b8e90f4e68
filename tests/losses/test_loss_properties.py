"""Properties of the losses over shapes, pads, masks and options that nobody picked by hand."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Options, forward_row, reverse_row, rows_of
from scenes import Scene, scene
from torch import Tensor

from asyncopd import Support, forward_kl, gather_logprobs, linear_forward_kl, linear_reverse_kl, reverse_kl

FEW = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def problems(draw: st.DrawFn, top_k: bool = False) -> tuple[Scene, Support, Tensor]:
    """A scene, a support of it with pads anywhere (distinct ids if `top_k`), and a mask."""
    n, v = draw(st.integers(0, 5)), draw(st.integers(2, 14))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    s = scene(rng, rows=n, vocab=v)
    k = draw(st.integers(0, v - 1 if top_k else 9))
    if top_k:
        ids = torch.stack([torch.randperm(v, generator=rng)[:k] for _ in range(n)]) if n else torch.zeros(0, k).long()
        log_w = torch.zeros(n, k, dtype=torch.float64)
    else:
        ids = torch.randint(0, v, (n, k), generator=rng)
        log_w = torch.randn(n, k, generator=rng, dtype=torch.float64)
        log_w[torch.rand(n, k, generator=rng) < 0.3] = 0.0
    log_q = s.log_q.gather(1, ids)
    pads = torch.rand(n, k, generator=rng) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    pieces = (log_q.masked_fill(pads, -torch.inf), log_w.masked_fill(pads, -torch.inf))
    mask = torch.rand(n, generator=rng) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    return s, Support(ids.masked_fill(pads, -1), *pieces), mask


def run(loss: Any, s: Scene, sup: Support, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    at_ids = s.log_p.gather(1, sup.ids.clamp(min=0)).masked_fill(sup.ids < 0, -torch.inf).requires_grad_()
    values = loss(at_ids, sup, mask=mask, reduction="none", **options)
    values.sum().backward()
    assert at_ids.grad is not None
    return values.detach(), at_ids.grad


@FEW
@given(problems(), st.sampled_from(["exact", "sampled"]), st.sampled_from(["none", "mean", "loo"]))
def test_reverse_kl_is_the_loop(problem: tuple[Scene, Support, Tensor], normalize: str, baseline: str) -> None:
    s, sup, mask = problem
    values, coef = run(reverse_kl, s, sup, mask, normalize=normalize, baseline=baseline)
    student = s.log_p.gather(1, sup.ids.clamp(min=0))
    expected, expected_coef = rows_of(reverse_row, student, sup, Options(normalize, baseline=baseline))
    torch.testing.assert_close(values, expected * mask)
    torch.testing.assert_close(coef, expected_coef * mask[:, None])
    assert (coef[sup.ids < 0] == 0).all()


@FEW
@given(problems(top_k=True), st.sampled_from(["drop", "bucket", "renormalize"]))
def test_truncated_losses_are_the_loops(problem: tuple[Scene, Support, Tensor], tail: str) -> None:
    s, sup, mask = problem
    student = s.log_p.gather(1, sup.ids.clamp(min=0))
    values, coef = run(reverse_kl, s, sup, mask, tail=tail)
    expected, expected_coef = rows_of(reverse_row, student, sup, Options(tail=tail))
    torch.testing.assert_close(values, expected * mask)
    torch.testing.assert_close(coef, expected_coef * mask[:, None])
    if tail != "drop":
        assert (values >= -1e-12).all()  # divergences
    values, coef = run(forward_kl, s, sup, mask, tail=tail)
    expected, expected_coef = rows_of(forward_row, student, sup, tail)
    torch.testing.assert_close(values, expected * mask)
    torch.testing.assert_close(coef, expected_coef * mask[:, None])
    if tail != "drop":
        assert (values >= -1e-12).all()


@FEW
@given(
    problems(),
    st.sampled_from([{}, {"baseline": "mean"}, {"baseline": "loo"}, {"normalize": "sampled"}, {"forward": True}]),
    st.integers(1, 4),
)
def test_fused_losses_are_the_gathered_ones(
    problem: tuple[Scene, Support, Tensor], options: dict[str, Any], width: int
) -> None:
    s, sup, mask = problem
    options = dict(options)
    fused, gathered = (linear_forward_kl, forward_kl) if options.pop("forward", 0) else (linear_reverse_kl, reverse_kl)
    n, v = s.log_p.shape
    rng = torch.Generator().manual_seed(n + 10 * v)
    shapes = ((n, width), (v, width), (v,))
    leaves = [torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]
    loss = fused(leaves[0], leaves[1], sup, bias=leaves[2], mask=mask, temperature=0.7, **options)
    mine = torch.autograd.grad(loss, leaves)
    z = (leaves[0] @ leaves[1].t() + leaves[2]) / 0.7
    at_ids = z.gather(1, sup.ids.clamp(min=0)) if "normalize" in options else gather_logprobs(z, sup.ids)
    expected = gathered(at_ids, sup, mask=mask, **options)
    theirs = torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
