"""The sparse half of the head: K dot products a row, their gradient, and the LSE that goes with them."""

from typing import Any

import pytest
import torch
from each_backend import Backend
from torch import Tensor

import asyncopd  # noqa: F401  (registers the ops)

OPS = torch.ops.asyncopd
INF = float("inf")
SCALARS = [(1.0, 1.0, None), (0.7, -1.3, 4.0)]
pytestmark = pytest.mark.ops("linear_gather_logits", "linear_gather_logits_backward")


def head(backend: Backend, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = ((6, 4), (17, 4), (17,))
    hidden, weight, bias = (backend.tensor(torch.randn(*s, generator=rng, dtype=torch.float64)) for s in shapes)
    ids = torch.randint(0, 17, (6, 5), generator=rng)
    ids[0, 3] = ids[0, 1]
    ids[2, 0], ids[4] = -1, -1
    mask = torch.tensor([True, False, True, True, True, False])
    return hidden, weight, bias, ids, mask


def dense(hidden: Tensor, weight: Tensor, bias: Tensor | None, scalars: tuple[Any, ...]) -> Tensor:
    temperature, scale, cap = scalars
    z = (hidden @ weight.t() + (0 if bias is None else bias)) * scale
    return (z if cap is None else cap * torch.tanh(z / cap)) / temperature


@pytest.mark.parametrize("scalars", SCALARS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_logits_at_the_ids_and_their_gradient(
    backend: Backend, rng: torch.Generator, with_mask: bool, with_bias: bool, scalars: tuple[Any, ...]
) -> None:
    hidden, weight, bias, ids, mask = head(backend, rng)
    given = [t.requires_grad_() for t in (hidden, weight, bias)]
    out = OPS.linear_gather_logits(
        hidden, weight, ids, bias if with_bias else None, mask if with_mask else None, *scalars
    )
    here = (ids >= 0) & (mask[:, None] if with_mask else True)
    oracle = [t.detach().double().requires_grad_() for t in given]
    z = dense(oracle[0], oracle[1], oracle[2] if with_bias else None, scalars).gather(1, ids.clamp(min=0))
    backend.close(out, z.masked_fill(~here, -INF))
    # An upstream gradient at a pad or in a masked row reaches nothing.
    upstream = backend.tensor(torch.randn(ids.shape, generator=rng, dtype=torch.float64))
    out.backward(upstream)
    z.backward(upstream.double() * here)
    for mine, theirs in zip(given[: 3 if with_bias else 2], oracle, strict=False):
        assert mine.grad is not None
        assert theirs.grad is not None
        backend.close(mine.grad, theirs.grad)


@pytest.mark.ops("linear_logsumexp")
@pytest.mark.parametrize("scalars", SCALARS)
def test_logsumexp_of_the_head(backend: Backend, rng: torch.Generator, scalars: tuple[Any, ...]) -> None:
    hidden, weight, bias, _, mask = head(backend, rng)
    expected = dense(hidden.double(), weight.double(), bias.double(), scalars).logsumexp(1)
    backend.close(OPS.linear_logsumexp(hidden, weight, bias, None, *scalars), expected)
    backend.close(OPS.linear_logsumexp(hidden, weight, bias, mask, *scalars), expected * mask)


def test_masked_rows_may_hold_anything(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight, bias, ids, mask = head(backend, rng)
    hidden[~mask] = float("nan")
    given = [t.requires_grad_() for t in (hidden, weight, bias)]
    out = OPS.linear_gather_logits(hidden, weight, ids, bias, mask, 1.0, 1.0, 3.0)
    out.backward(torch.full_like(out, float("nan")).masked_fill(mask[:, None], 1.0))
    assert not out.isnan().any()
    for leaf in given:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_pads_touch_nothing(backend: Backend, rng: torch.Generator) -> None:
    """Neither a row of the head that only a pad might have read, nor a hidden state whose entries are all pads."""
    hidden, weight, _, ids, _ = head(backend, rng)
    ids = torch.where(ids == 0, 1, ids)
    weight[0], hidden[4] = torch.nan, torch.inf
    out = OPS.linear_gather_logits(hidden.requires_grad_(), weight.requires_grad_(), ids, None, None, 1.0, 1.0, None)
    out.backward(torch.ones_like(out))
    assert hidden.grad is not None
    assert weight.grad is not None
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()
    assert (weight.grad[0] == 0).all()
    assert (hidden.grad[4] == 0).all()


@pytest.mark.parametrize("op", ["linear_gather_logits", "linear_gather_logprobs"])
def test_masked_rows_that_are_not_compacted(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """On a device the reference keeps masked rows where they are, since their number would have to be read back."""
    from asyncopd.backends.reference import linear

    hidden, weight, bias, ids, mask = head(Backend("reference", torch.float64), rng)
    hidden[~mask] = float("nan")
    upstream = torch.randn(ids.shape, generator=rng, dtype=torch.float64)

    def run() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
        out = getattr(OPS, op)(leaves[0], leaves[1], ids, leaves[2], mask, 0.8, 1.2, 3.0)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(upstream)
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    compacted = run()
    monkeypatch.setattr(linear, "_valid_rows", lambda mask, num_rows, device: torch.arange(num_rows))
    for a, b in zip(run(), compacted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.host_only
@pytest.mark.parametrize("bad", [-2, 17])
def test_ids_out_of_range_are_refused_by_name(backend: Backend, rng: torch.Generator, bad: int) -> None:
    hidden, weight, bias, ids, _ = head(backend, rng)
    ids[5, 4] = bad
    with pytest.raises(ValueError, match=r"ids"):
        OPS.linear_gather_logits(hidden, weight, ids, bias, None, 1.0, 1.0, None)
