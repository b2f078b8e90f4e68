"""linear_gather_logprobs: gather_logprobs through a head, with gradients of hidden states, weight and bias."""

from typing import Any

import pytest
import torch
from each_backend import Backend
from torch import Tensor

from asyncopd import linear_gather_logprobs
from asyncopd.backends.reference import rows

pytestmark = pytest.mark.ops("linear_gather_logprobs", "linear_gather_logprobs_backward")
INF = float("inf")
SCALARS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"logit_scale": 0.3},
    {"softcap": 2.0},
    {"temperature": 1.7, "logit_scale": -2.5, "softcap": 3.0},
]


def head(rng: torch.Generator, n: int, h: int, v: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return normal(n, h), normal(v, h), normal(v), torch.randint(0, v, (n, k), generator=rng)


def dense(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, scalars: dict[str, Any]) -> Tensor:
    z = hidden @ weight.t()
    z = (z if bias is None else z + bias) * scalars.get("logit_scale", 1.0)
    if "softcap" in scalars:
        z = scalars["softcap"] * torch.tanh(z / scalars["softcap"])
    return (z / scalars.get("temperature", 1.0)).log_softmax(1).gather(1, ids)


@pytest.mark.parametrize("scalars", SCALARS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients(backend: Backend, rng: torch.Generator, with_bias: bool, scalars: dict[str, Any]) -> None:
    hidden, weight, bias, ids = head(rng, 9, 6, 31, 4)
    given = [backend.tensor(t).requires_grad_() for t in (hidden, weight, bias)]
    upstream = backend.tensor(torch.randn(ids.shape, generator=rng, dtype=torch.float64))
    out = linear_gather_logprobs(given[0], given[1], ids, bias=given[2] if with_bias else None, **scalars)
    out.backward(upstream)
    oracle = [t.detach().double().requires_grad_() for t in given]
    expected = dense(oracle[0], oracle[1], ids, oracle[2] if with_bias else None, scalars)
    expected.backward(upstream.double())
    backend.close(out, expected)
    for mine, theirs in zip(given, oracle, strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            backend.close(mine.grad, theirs.grad)


@pytest.mark.parametrize("scalars", SCALARS, ids=str)
def test_gradcheck(rng: torch.Generator, scalars: dict[str, Any]) -> None:
    hidden, weight, bias, ids = head(rng, 3, 2, 5, 3)
    ids[0, 1], ids[2, 0] = ids[0, 0], ids[2, 2]
    leaves = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h, w, b: linear_gather_logprobs(h, w, ids, bias=b, **scalars), leaves)


def test_pads_are_minus_inf_and_receive_no_gradient(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight, _, ids = head(rng, 4, 3, 7, 3)
    ids[1, 2], ids[3] = -1, -1
    given = [backend.tensor(t).requires_grad_() for t in (hidden, weight)]
    out = linear_gather_logprobs(given[0], given[1], ids)
    assert torch.equal(out == -INF, ids == -1)
    out.backward(torch.ones_like(out))
    oracle = [t.detach().double().requires_grad_() for t in given]
    dense(oracle[0], oracle[1], ids.clamp(min=0), None, {}).backward((ids >= 0).double())
    for mine, theirs in zip(given, oracle, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        backend.close(mine.grad, theirs.grad)


def test_a_minus_inf_bias_bans_a_token(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight, bias, _ = head(rng, 2, 3, 5, 1)
    bias[3] = -INF
    given = [backend.tensor(t).requires_grad_() for t in (hidden, weight, bias)]
    ids = torch.tensor([[3, 0], [1, 2]])
    out = linear_gather_logprobs(given[0], given[1], ids, bias=given[2])
    assert out[0, 0] == -INF
    out.backward(torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=backend.dtype))
    for leaf in given:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert given[1].grad is not None
    assert (given[1].grad[3] == 0).all()


def test_int32_ids_are_the_same_ids(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight, _, ids = head(rng, 5, 4, 9, 3)
    hidden, weight = backend.tensor(hidden), backend.tensor(weight)
    same = linear_gather_logprobs(hidden, weight, ids.int())
    assert torch.equal(same, linear_gather_logprobs(hidden, weight, ids))


@pytest.mark.host_only
@pytest.mark.parametrize("bad", [-2, 9])
def test_ids_out_of_range_are_refused_by_name(engine: str, rng: torch.Generator, bad: int) -> None:
    hidden, weight, _, ids = head(rng, 5, 4, 9, 3)
    ids[4, 0] = bad
    with pytest.raises(ValueError, match=r"ids"):
        linear_gather_logprobs(hidden.float(), weight.float(), ids)


@pytest.mark.parametrize("tile", [1, 100, 10_000])
def test_chunk_size_does_not_matter(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    hidden, weight, bias, ids = head(rng, 13, 5, 29, 4)

    def run() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
        out = linear_gather_logprobs(leaves[0], leaves[1], ids, bias=leaves[2], softcap=4.0)
        out.square().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    whole = run()
    monkeypatch.setattr(rows, "TILE_ELEMENTS", tile)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradients_accumulate_in_fp32(
    engine: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    # 2048 equal rows, one a chunk: a bf16 sum stops growing at 256 terms, an fp16 one at 2048 loses its last bits.
    monkeypatch.setattr(rows, "TILE_ELEMENTS", 1)
    n, v = 2048, 5
    hidden = torch.ones(n, 3, dtype=dtype).requires_grad_()
    weight = (torch.randn(v, 3, generator=rng) / 4).to(dtype).requires_grad_()
    bias = torch.zeros(v, dtype=dtype).requires_grad_()
    ids = torch.full((n, 1), 2)
    (linear_gather_logprobs(hidden, weight, ids, bias=bias) / 16).sum().backward()
    oracle = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    (dense(oracle[0], oracle[1], ids, oracle[2], {}) / 16).sum().backward()
    for mine, theirs in zip((hidden, weight, bias), oracle, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == dtype
        # One rounding to the parameter's dtype at the end, plus fp32's own.
        rtol = 0.51 * torch.finfo(dtype).eps
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=rtol, atol=1e-5)


def test_low_precision_values_are_summed_in_fp32(engine: str, rng: torch.Generator) -> None:
    hidden = torch.randn(5, 512, generator=rng).bfloat16()
    weight = (torch.randn(20_011, 512, generator=rng) / 8).bfloat16()  # more than one block of upcast rows
    ids = torch.tensor([0, 8191, 8192, 16383, 16384, 20_010]).expand(5, 6)
    out = linear_gather_logprobs(hidden, weight, ids)
    assert out.dtype == torch.float32
    expected = dense(hidden.double(), weight.double(), ids, None, {})
    # fp32 sums of 512 products of size 1; logits rounded to bf16 would be off by 3e-2.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-5)


def test_strided_hidden_and_weight(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight, _, ids = head(rng, 8, 10, 18, 3)
    hidden, weight = backend.tensor(hidden)[::2, 1::2], backend.tensor(weight)[::2, 1::2]
    ids = ids[::2] // 2
    expected = dense(hidden.double(), weight.double(), ids, None, {})
    backend.close(linear_gather_logprobs(hidden, weight, ids), expected)
