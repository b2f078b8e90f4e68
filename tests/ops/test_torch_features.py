"""Extraction, gathering and losses on scores inside torch.compile and under autocast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from each_backend import Backend
from torch import Tensor

from asyncopd import (
    Support,
    forward_kl,
    gather_logprobs,
    linear_gather_logprobs,
    linear_topk_logprobs,
    reverse_kl,
    sample_support,
    topk_logprobs,
)

N, V, H = 5, 40, 6
HEAD: dict[str, Any] = {"temperature": 0.8, "logit_scale": 1.3, "softcap": 4.0}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(backend: Backend, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H], bias [V], and ids with a pad."""
    shapes = ((N, H), (V, H), (V,))
    leaves = (backend.tensor(torch.randn(*shape, generator=rng, dtype=torch.float64)) for shape in shapes)
    ids = torch.randint(0, V, (N, 4), generator=rng)
    ids[1, 2] = -1
    return *leaves, backend.tensor(ids)  # type: ignore[return-value]


def whole(run: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=False)


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.ops("topk_logprobs")
def test_compiled_topk(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight, _, _ = tensors(backend, rng)
    logits = hidden @ weight.t()

    def run(logits: Tensor) -> tuple[Tensor, ...]:
        # With something before and after it that the compiler may move.
        top = topk_logprobs(2 * logits, 7, temperature=0.6)
        return top.ids + 1, top.logprobs.exp(), top.logsumexp

    assert_same(whole(run)(logits), run(logits))


@pytest.mark.ops("linear_topk_logprobs")
def test_compiled_linear_topk(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight, bias, _ = tensors(backend, rng)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear_topk_logprobs(hidden + 1, weight, 7, bias=bias, **HEAD))

    args = (hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_())
    assert_same(whole(run)(*args), run(*args))


def forward_and_gradients(run: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    out = run(*leaves)
    factors = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, factors)]


@pytest.mark.ops("gather_logprobs", "gather_logprobs_backward")
def test_compiled_gather(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight, _, ids = tensors(backend, rng)

    def run(logits: Tensor) -> Tensor:
        return gather_logprobs(logits, ids, temperature=0.7)

    logits = hidden @ weight.t()
    assert_same(forward_and_gradients(whole(run), (logits,)), forward_and_gradients(run, (logits,)))


@pytest.mark.ops("linear_gather_logprobs", "linear_gather_logprobs_backward")
def test_compiled_linear_gather(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight, bias, ids = tensors(backend, rng)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_gather_logprobs(hidden, weight, ids, bias=bias, **HEAD)

    leaves = (hidden, weight, bias)
    assert_same(forward_and_gradients(whole(run), leaves), forward_and_gradients(run, leaves))


@pytest.mark.ops("linear_topk_logprobs", "linear_gather_logprobs", "linear_gather_logprobs_backward")
def test_autocast_rounds_the_inputs_of_the_head_and_nothing_else(engine: str, rng: torch.Generator) -> None:
    hidden, weight, bias, ids = tensors(Backend(engine, torch.float32), rng)
    low = (hidden.bfloat16(), weight.bfloat16())
    with torch.autocast(hidden.device.type, torch.bfloat16):
        top = linear_topk_logprobs(hidden, weight, 7, bias=bias, **HEAD)
        got = forward_and_gradients(lambda h, w, b: linear_gather_logprobs(h, w, ids, bias=b), (hidden, weight, bias))
    assert_same(top, linear_topk_logprobs(*low, 7, bias=bias, **HEAD))
    assert top.logprobs.dtype == torch.float32
    by_hand = forward_and_gradients(lambda h, w, b: linear_gather_logprobs(h, w, ids, bias=b), (*low, bias))
    assert [t.dtype for t in got] == [torch.float32] * 4
    assert_same(got, [t.float() for t in by_hand])


@pytest.mark.ops("sample_support")
def test_autocast_leaves_draws_alone(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight, _, _ = tensors(backend, rng)
    logits = hidden @ weight.t()
    with torch.autocast(logits.device.type, torch.bfloat16):
        got = sample_support(logits, num_samples=5, head=2, seed=3)
    assert_same(got, sample_support(logits, num_samples=5, head=2, seed=3))


@pytest.mark.ops("kl_rows")
@pytest.mark.parametrize("loss", [reverse_kl, forward_kl])
def test_autocast_leaves_losses_on_scores_alone(backend: Backend, rng: torch.Generator, loss: Any) -> None:
    scores, teacher = (backend.tensor(torch.randn(N, 4, generator=rng).double().log_softmax(1)) for _ in range(2))
    support = Support(backend.tensor(torch.arange(4).expand(N, 4)), teacher, torch.zeros_like(teacher))

    def run(scores: Tensor) -> Tensor:
        return loss(scores, support)

    with torch.autocast(scores.device.type, torch.bfloat16):
        got = forward_and_gradients(run, (scores,))
    assert_same(got, forward_and_gradients(run, (scores,)))
    compiled = forward_and_gradients(whole(run), (scores,))
    assert_same(compiled, forward_and_gradients(run, (scores,)))


@pytest.mark.ops("topk_logprobs", "gather_logprobs")
def test_autocast_leaves_logits_alone(backend: Backend, rng: torch.Generator) -> None:
    hidden, weight, _, ids = tensors(backend, rng)
    logits = hidden @ weight.t()
    with torch.autocast(logits.device.type, torch.bfloat16):
        got = (*topk_logprobs(logits, 7), gather_logprobs(logits, ids))
    assert_same(got, (*topk_logprobs(logits, 7), gather_logprobs(logits, ids)))
