"""The sampled head whose weight gradient is added to a buffer: the same gradients, and only the rows that ids name."""

from typing import Any

import pytest
import torch
from each_backend import Backend
from torch import Tensor

from asyncopd import Support, linear_reverse_kl, reverse_kl
from asyncopd.ops import linear_gather_logits_into

N, V, H, K = 6, 17, 4, 5
SCALARS: list[dict[str, Any]] = [{}, {"temperature": 0.7, "logit_scale": -1.3, "softcap": 4.0}]
pytestmark = pytest.mark.ops(
    "linear_gather_logits", "linear_gather_logits_backward", "linear_gather_logits_backward_into"
)


def head(backend: Backend, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias = (
        backend.tensor(torch.randn(*s, generator=rng, dtype=torch.float64)) for s in ((N, H), (V, H), (V,))
    )
    ids = torch.randint(0, V - 3, (N, K), generator=rng)  # nobody names the last three
    ids[0, 3], ids[2, 0], ids[4] = ids[0, 1], -1, -1
    mask = torch.tensor([True, False, True, True, True, False])
    return hidden.requires_grad_(), weight, bias, backend.tensor(ids), backend.tensor(mask)


@pytest.mark.parametrize("scalars", SCALARS, ids=["plain", "capped"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_two_micro_batches_add_up(
    backend: Backend, rng: torch.Generator, with_bias: bool, scalars: dict[str, Any]
) -> None:
    hidden, weight, bias, ids, mask = head(backend, rng)
    upstream = backend.tensor(torch.randn(N, K, generator=rng, dtype=torch.float64))
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    temperature, scale, cap = scalars.get("temperature", 1.0), scalars.get("logit_scale", 1.0), scalars.get("softcap")
    expected = torch.ops.asyncopd.linear_gather_logits(
        leaves[0], leaves[1], ids, leaves[2] if with_bias else None, mask, temperature, scale, cap
    )
    expected.backward(upstream)
    weight_grad, bias_grad = torch.ones_like(weight), torch.full_like(bias, 2.0)
    weight_grad[-3:], bias_grad[-3:] = torch.nan, torch.nan
    for rows in (slice(0, 4), slice(4, N)):
        biases = {"bias": bias, "bias_grad": bias_grad} if with_bias else {}
        logits = linear_gather_logits_into(
            hidden[rows], weight, ids[rows], weight_grad, mask=mask[rows], **biases, **scalars
        )
        backend.close(logits, expected.detach()[rows])
        logits.backward(upstream[rows])
    assert hidden.grad is not None
    assert weight.grad is None
    for got, leaf, before in (
        (hidden.grad, leaves[0], 0),
        (weight_grad[:-3], leaves[1], 1),
        (bias_grad[:-3], leaves[2], 2),
    ):
        if leaf.grad is not None:
            backend.close(got, leaf.grad[: len(got)] + before)
    assert weight_grad[-3:].isnan().all()
    assert with_bias or (bias_grad[:-3] == 2).all()


def test_a_bf16_weight_with_an_fp32_gradient_is_not_rounded_in_between(engine: str, rng: torch.Generator) -> None:
    hidden = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(4, 3, dtype=torch.bfloat16)
    weight_grad = torch.full((4, 3), 2.0**-9)
    logits = linear_gather_logits_into(hidden, weight, torch.tensor([[1], [1]]), weight_grad)
    logits.backward(torch.tensor([[1.0], [2.0**-12]]))
    assert weight_grad[:, 0].tolist() == [2.0**-9, 1 + 2.0**-12 + 2.0**-9, 2.0**-9, 2.0**-9]
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.ops("kl_rows")
def test_with_the_loss_it_is_the_sampled_linear_loss(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight, _, ids, mask = head(backend, rng)
    log_q = backend.tensor(torch.randn(N, K, generator=rng, dtype=torch.float64)).log_softmax(1) - 1
    log_w = torch.zeros_like(log_q) + 0.5
    pads = ids < 0
    support = Support(ids, log_q.masked_fill(pads, -torch.inf), log_w.masked_fill(pads, -torch.inf))
    mask[4] = False
    weight_grad = torch.zeros_like(weight)
    logits = linear_gather_logits_into(hidden, weight, ids, weight_grad, mask=mask)
    loss = reverse_kl(logits, support, mask=mask, normalize="sampled")
    loss.backward()
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    expected = linear_reverse_kl(leaves[0], leaves[1], support, mask=mask, normalize="sampled")
    expected.backward()
    backend.close(loss, expected)
    for got, leaf in zip((hidden.grad, weight_grad), leaves, strict=True):
        assert got is not None
        assert leaf.grad is not None
        assert leaf.grad.any()
        backend.close(got, leaf.grad)


def test_what_would_not_add_up_is_refused(rng: torch.Generator) -> None:
    hidden, weight, bias, ids, _ = head(Backend("reference", torch.float32), rng)
    good = torch.zeros_like(weight)
    with pytest.raises(ValueError, match="hidden: does not require grad"):
        linear_gather_logits_into(hidden.detach(), weight, ids, good)
    with pytest.raises(ValueError, match=r"weight_grad: got shape \[16, 4\] .* expected shape \[17, 4\]"):
        linear_gather_logits_into(hidden, weight, ids, good[1:])
    with pytest.raises(ValueError, match=r"weight_grad: .* strides \[1, 17\]"):
        linear_gather_logits_into(hidden, weight, ids, good.t().contiguous().t())
    with pytest.raises(ValueError, match=r"weight_grad: .* strides \[0, 1\], expected .* rows that do not overlap"):
        linear_gather_logits_into(hidden, weight, ids, good[:1].expand(V, -1))
    with pytest.raises(ValueError, match=r"weight_grad: .* strides \[2, 1\]"):
        linear_gather_logits_into(hidden, weight, ids, good.as_strided((V, H), (2, 1)))
    with pytest.raises(TypeError, match=r"weight_grad: got torch.int64"):
        linear_gather_logits_into(hidden, weight, ids, good.long())
    with pytest.raises(TypeError, match=r"weight_grad: got NoneType"):
        linear_gather_logits_into(hidden, weight, ids, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight_grad: requires grad"):
        linear_gather_logits_into(hidden, weight, ids, good.clone().requires_grad_())
    with pytest.raises(ValueError, match="bias_grad: got none"):
        linear_gather_logits_into(hidden, weight, ids, good, bias=bias)
    with pytest.raises(ValueError, match="bias_grad: got one"):
        linear_gather_logits_into(hidden, weight, ids, good, bias_grad=bias)
    sharded = good.clone()
    sharded.full_tensor = None  # type: ignore[attr-defined]  # as a DTensor has one
    with pytest.raises(TypeError, match="weight_grad: got a DTensor, expected a plain tensor"):
        linear_gather_logits_into(hidden, weight, ids, sharded)
