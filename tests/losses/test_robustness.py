"""Where two features meet: autocast and sparse heads, infinities and zero sums, empty ranks, frozen heads."""

from typing import Any

import pytest
import torch
from torch import Tensor

from asyncopd import (
    Support,
    forward_kl,
    gather_logprobs,
    linear_forward_kl,
    linear_gather_logprobs,
    linear_reverse_kl,
    reverse_kl,
    sample_support,
    topk_logprobs,
)

N, V, H, K = 5, 30, 8, 6
HEAD_WORK: list[dict[str, Any]] = [
    {},
    {"baseline": "mean"},
    {"normalize": "sampled"},
    {"baseline": "loo"},
    {"tail": "renormalize"},
    {"tail": "bucket"},
]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(N, H, generator=rng), torch.randn(V, H, generator=rng)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.randn(N, V, generator=rng)


def support_for(options: dict[str, Any], hidden: Tensor, weight: Tensor, teacher: Tensor) -> Support:
    log_q = teacher.log_softmax(1)
    if "tail" in options:
        return Support.from_topk(topk_logprobs(teacher, K))
    draw = sample_support((hidden @ weight.t()).detach(), num_samples=K, seed=1)
    return Support(draw.ids, log_q.gather(1, draw.ids), draw.log_weights, "samples")


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("options", HEAD_WORK, ids=str)
def test_every_kind_of_head_work_runs_under_autocast(options: dict[str, Any], backward_inside: bool) -> None:
    hidden, weight, teacher = inputs()
    sup = support_for(options, hidden, weight, teacher)
    exact = linear_reverse_kl(hidden.bfloat16().float(), weight.bfloat16().float(), sup, **options)
    want = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_reverse_kl(hidden, weight, sup, **options)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    # The same bf16 inputs, products and sums in fp32: only the gradients' own rounding to bf16 is left.
    torch.testing.assert_close(loss, exact, atol=1e-5, rtol=1e-5)
    for got, expected in zip((hidden.grad, weight.grad), want, strict=True):
        assert got is not None
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, atol=1e-2 * float(expected.abs().max()), rtol=1e-2)


@pytest.mark.parametrize("impossible", ["teacher", "student"])
@pytest.mark.parametrize("loss", [linear_reverse_kl, linear_forward_kl])
def test_renormalised_gradient_is_that_of_the_unfused_loss_when_an_entry_drops_out(loss: Any, impossible: str) -> None:
    """The fused form leaves the normaliser's gradient out, which is right only if the coefficients sum to 0."""
    hidden, weight, teacher = inputs(torch.float64)
    bias = torch.zeros(V, dtype=torch.float64)
    top = topk_logprobs(teacher.double(), K)
    scores = top.logprobs.clone()
    if impossible == "teacher":
        scores[:, 2] = -torch.inf
    else:
        bias[top.ids[:, 2]] = -torch.inf
    sup = Support(top.ids, scores, torch.zeros_like(scores), "top_k")
    fused = loss(hidden, weight, sup, tail="renormalize", bias=bias, reduction="sum")
    at_ids = linear_gather_logprobs(hidden, weight, top.ids, bias=bias)
    unfused_loss = {linear_reverse_kl: reverse_kl, linear_forward_kl: forward_kl}[loss]
    unfused = unfused_loss(at_ids, sup, tail="renormalize", reduction="sum")
    for a, b in zip(
        torch.autograd.grad(fused, (hidden, weight)), torch.autograd.grad(unfused, (hidden, weight)), strict=True
    ):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b)


def test_rank_without_a_valid_row_has_loss_and_gradient_0_when_no_rank_has_one() -> None:
    hidden, weight, teacher = inputs()
    sup = support_for({}, hidden, weight, teacher)
    mask = torch.zeros(N, dtype=torch.bool)
    loss = linear_reverse_kl(hidden, weight, sup, mask=mask, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("bad", ["7", True, float("inf"), float("nan")])
def test_denominator_that_is_no_number_is_refused(bad: Any) -> None:
    hidden, weight, teacher = inputs()
    with pytest.raises((TypeError, ValueError), match="num_items_in_batch"):
        linear_reverse_kl(hidden, weight, support_for({}, hidden, weight, teacher), num_items_in_batch=bad)


@pytest.mark.parametrize("options", HEAD_WORK, ids=str)
def test_frozen_head_gets_no_gradient_and_the_hidden_states_the_same(options: dict[str, Any]) -> None:
    hidden, weight, teacher = inputs()
    sup = support_for(options, hidden, weight, teacher)
    (want,) = torch.autograd.grad(linear_reverse_kl(hidden, weight, sup, **options), hidden)
    frozen = weight.detach()
    loss = linear_reverse_kl(hidden, frozen, sup, **options)
    loss.backward()
    torch.testing.assert_close(hidden.grad, want, rtol=1e-5, atol=1e-6)
    assert frozen.grad is None


@pytest.mark.parametrize("options", HEAD_WORK, ids=str)
def test_row_that_the_caller_drops_cannot_poison_the_head(options: dict[str, Any]) -> None:
    hidden, weight, teacher = inputs()
    sup = support_for(options, hidden, weight, teacher)
    broken = hidden.detach().clone()
    broken[1] = torch.nan
    broken.requires_grad_()
    linear_reverse_kl(broken, weight, sup, reduction="none", **options)[[0, 2, 3, 4]].sum().backward()
    assert torch.isfinite(weight.grad).all()
    assert (broken.grad[1] == 0).all()


def test_sampled_normaliser_of_a_top_k_support_is_refused() -> None:
    _, _, teacher = inputs()
    top = topk_logprobs(teacher, K)
    with pytest.raises(ValueError, match="normalize: got 'sampled' with a top-k support"):
        reverse_kl(gather_logprobs(teacher, top.ids), Support.from_topk(top), normalize="sampled")


def test_draw_of_weight_one_is_not_taken_for_the_head() -> None:
    """Three equally likely tokens outside the head, three draws: each weight is 1, its logarithm not exactly 0."""
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    draw = sample_support(logits, num_samples=3, head=1, seed=0)
    assert draw.log_weights[0, 0] == 0
    assert (draw.log_weights[0, 1:] != 0).all()
    torch.testing.assert_close(draw.log_weights[0, 1:].exp(), torch.ones(3))
