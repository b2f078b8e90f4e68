"""Where the teacher is the student there is nothing to learn: value 0 and reverse-KL gradient 0, for every draw."""

from typing import Any

import pytest
import torch
from each_backend import Backend
from scenes import DRAWS, full_support, on, scene, support

from asyncopd import (
    Support,
    align_rows,
    forward_kl,
    gather_logprobs,
    linear_forward_kl,
    linear_reverse_kl,
    linear_topk_logprobs,
    reverse_kl,
    sample_support,
    topk_logprobs,
)

# A top-k has no independent draws to leave one out of.
CASES: list[tuple[str, dict[str, Any]]] = [
    (draw, {"baseline": b}) for draw in DRAWS for b in ("none", "mean", "loo") if b != "loo" or "top_k" not in draw
]
GATHER = ("gather_logprobs", "gather_logprobs_backward")
LINEAR = ("linear_gather_logprobs", "linear_gather_logprobs_backward", "linear_gather_logits",
          "linear_gather_logits_backward", "linear_logsumexp")  # fmt: skip


@pytest.mark.ops("kl_rows", *GATHER)
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(("draw", "options"), CASES, ids=str)
def test_reverse_kl_and_its_gradient_vanish(
    backend: Backend, rng: torch.Generator, draw: str, stale: bool, options: dict[str, Any]
) -> None:
    s = scene(rng, same=True, stale=stale)
    logits = backend.tensor(s.log_p + 2.0).requires_grad_()
    loss = reverse_kl(gather_logprobs(logits, (sup := on(backend, support(s, draw, rng))).ids), sup, **options)
    loss.backward()
    backend.close(loss.detach(), torch.zeros(()))
    assert logits.grad is not None
    backend.close(logits.grad, torch.zeros(logits.shape))


@pytest.mark.ops("kl_rows", *GATHER)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("draw", ["teacher_top_k", "student_top_k"])
def test_reverse_kl_with_a_tail_vanishes(backend: Backend, rng: torch.Generator, draw: str, tail: Any) -> None:
    s = scene(rng, same=True)
    logits = backend.tensor(s.log_p).requires_grad_()
    sup = on(backend, support(s, draw, rng))
    loss = reverse_kl(gather_logprobs(logits, sup.ids), sup, tail=tail)
    loss.backward()
    backend.close(loss.detach(), torch.zeros(()))
    assert logits.grad is not None
    backend.close(logits.grad, torch.zeros(logits.shape))


@pytest.mark.ops("kl_rows", *GATHER)
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("draw", DRAWS)
def test_forward_kl_vanishes(backend: Backend, rng: torch.Generator, draw: str, stale: bool) -> None:
    s = scene(rng, same=True, stale=stale)
    sup = on(backend, support(s, draw, rng))
    loss = forward_kl(backend.tensor(s.log_p).gather(1, sup.ids), sup, reduction="none")
    backend.close(loss, torch.zeros(5))


@pytest.mark.ops("kl_rows", *GATHER)
@pytest.mark.parametrize("tail", ["drop", "bucket", "renormalize"])
def test_forward_kl_gradient_vanishes_where_the_loss_is_a_divergence(
    backend: Backend, rng: torch.Generator, tail: Any
) -> None:
    s = scene(rng, same=True)
    logits = backend.tensor(s.log_p).requires_grad_()
    sup = on(backend, full_support(s.log_q) if tail == "drop" else support(s, "teacher_top_k", rng))
    loss = forward_kl(gather_logprobs(logits, sup.ids), sup, tail=tail)
    loss.backward()
    backend.close(loss.detach(), torch.zeros(()))
    assert logits.grad is not None
    backend.close(logits.grad, torch.zeros(logits.shape))


@pytest.mark.ops("kl_rows", *GATHER)
@pytest.mark.parametrize("draw", ["samples", "sampled_token", "head_tail"])
def test_sampled_normalisation_on_policy_too(backend: Backend, rng: torch.Generator, draw: str) -> None:
    # Samples of the current policy estimate LSE without error, and so does a head with them.
    s = scene(rng, same=True, stale=False)
    logits = backend.tensor(s.log_p + 3.0).requires_grad_()
    sup = on(backend, support(s, draw, rng))
    loss = reverse_kl(logits.gather(1, sup.ids), sup, normalize="sampled")
    loss.backward()
    backend.close(loss.detach(), torch.zeros(()))
    assert logits.grad is not None
    backend.close(logits.grad, torch.zeros(logits.shape))


# ------------------------------------------------------------- through the ops, with the helper that shifts


@pytest.mark.ops("kl_rows", "topk_logprobs", "linear_topk_logprobs", "sample_support", *LINEAR)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("draw", ["top_k", "linear_top_k", "samples", "own_token", "head_tail"])
def test_through_extraction_shift_and_fused_loss(
    backend: Backend, rng: torch.Generator, draw: str, temperature: float
) -> None:
    states = backend.tensor(torch.randn(3, 9, 6, generator=rng, dtype=torch.float64))
    weight = backend.tensor(torch.randn(40, 6, generator=rng, dtype=torch.float64))
    labels = backend.tensor(torch.randint(0, 40, (3, 9), generator=rng))
    labels[0, :4] = labels[2, 7:] = -100
    aligned = align_rows(states, labels)
    assert aligned.mask.sum() == (labels[:, 1:] != -100).sum()
    logits = aligned.rows @ weight.t()
    if draw == "top_k":
        sup = Support.from_topk(topk_logprobs(logits, 8, temperature=temperature))
    elif draw == "linear_top_k":
        sup = Support.from_topk(linear_topk_logprobs(aligned.rows, weight, 8, temperature=temperature))
    else:
        own = aligned.targets.clamp(min=0) if draw != "samples" else None
        m, head = {"samples": (8, 0), "own_token": (1, 0), "head_tail": (4, 4)}[draw]
        drawn = sample_support(logits, num_samples=m, head=head, seed=1, sampled_ids=own, temperature=temperature)
        sup = Support(drawn.ids, drawn.logprobs, drawn.log_weights, "head_tail" if head else "samples")
    hidden, weight = aligned.rows.detach().requires_grad_(), weight.requires_grad_()
    loss = linear_reverse_kl(hidden, weight, sup, mask=aligned.mask, temperature=temperature)
    loss.backward()
    backend.close(loss.detach(), torch.zeros(()))
    for leaf in (hidden, weight):
        assert leaf.grad is not None
        backend.close(leaf.grad, torch.zeros(leaf.shape))
    forward = linear_forward_kl(hidden, weight, sup, mask=aligned.mask, temperature=temperature)
    backend.close(forward.detach(), torch.zeros(()))


@pytest.mark.ops("kl_rows", "topk_logprobs", *GATHER)
def test_a_support_shifted_by_one_token_would_be_seen(backend: Backend, rng: torch.Generator) -> None:
    logits = backend.tensor(3 * torch.randn(12, 30, generator=rng, dtype=torch.float64))
    sup = Support.from_topk(topk_logprobs(logits, 8))
    right = reverse_kl(gather_logprobs(logits, sup.ids), sup)
    wrong = reverse_kl(gather_logprobs(logits[1:], sup.ids[:-1]), sup[:-1])
    backend.close(right, torch.zeros(()))
    assert abs(float(wrong)) > 0.1
