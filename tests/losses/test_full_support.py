"""With the whole vocabulary as its support, every option of a loss is the dense loss: value and all gradients."""

from typing import Any

import pytest
import torch
from each_backend import Backend
from oracle import dense_forward, dense_logits, dense_reverse
from scenes import full_support
from torch import Tensor

from asyncopd import Support, forward_kl, gather_logprobs, linear_forward_kl, linear_reverse_kl, reverse_kl

LINEAR = ("linear_gather_logprobs", "linear_gather_logprobs_backward", "linear_gather_logits",
          "linear_gather_logits_backward", "linear_logsumexp")  # fmt: skip
N, V, H = 7, 19, 5
HEADS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"temperature": 0.6},
    {"bias": True, "temperature": 1.7, "logit_scale": -2.5, "softcap": 3.0},
]
REVERSE: list[dict[str, Any]] = [
    {},
    {"baseline": "mean"},
    {"baseline": "loo"},
    {"tail": "bucket"},
    {"tail": "renormalize"},
    {"normalize": "sampled"},
    {"normalize": "sampled", "baseline": "mean"},
    {"normalize": "sampled", "baseline": "loo"},
]
FORWARD: list[dict[str, Any]] = [{}, {"tail": "bucket"}, {"tail": "renormalize"}]


def leaves(rng: torch.Generator, backend: Backend, n: int = N) -> tuple[list[Tensor], Tensor]:
    hidden, weight, bias = (torch.randn(*shape, generator=rng).double() for shape in ((n, H), (V, H), (V,)))
    log_q = torch.randn(n, V, generator=rng).double().log_softmax(1)
    return [backend.tensor(t).requires_grad_() for t in (hidden, weight, bias)], log_q


def compare(
    backend: Backend,
    given: list[Tensor],
    loss: Tensor,
    head: dict[str, Any],
    log_q: Tensor,
    dense: Any,
    rows: Tensor | None = None,
) -> None:
    loss.backward()
    oracle = [t.detach().double().requires_grad_() for t in given]
    scalars = {name: value for name, value in head.items() if name != "bias"}
    z = dense_logits(oracle[0], oracle[1], oracle[2] if "bias" in head else None, **scalars)
    values = dense(z.log_softmax(1), log_q)
    expected = values.mean() if rows is None else values[rows].mean()
    expected.backward()
    backend.close(loss.detach(), expected.detach())
    for mine, theirs in zip(given[: 3 if "bias" in head else 2], oracle, strict=False):
        assert mine.grad is not None
        assert theirs.grad is not None
        backend.close(mine.grad, theirs.grad)


@pytest.mark.ops("kl_rows", *LINEAR)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("options", REVERSE, ids=str)
def test_reverse_kl_is_the_dense_one(
    backend: Backend, rng: torch.Generator, options: dict[str, Any], head: dict[str, Any]
) -> None:
    given, log_q = leaves(rng, backend)
    log_q = backend.tensor(log_q)
    bias = given[2] if "bias" in head else None
    loss = linear_reverse_kl(given[0], given[1], full_support(log_q), **{**head, "bias": bias}, **options)
    compare(backend, given, loss, head, log_q.double(), dense_reverse)


@pytest.mark.ops("kl_rows", *LINEAR)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("options", FORWARD, ids=str)
def test_forward_kl_is_the_dense_one(
    backend: Backend, rng: torch.Generator, options: dict[str, Any], head: dict[str, Any]
) -> None:
    given, log_q = leaves(rng, backend)
    log_q = backend.tensor(log_q)
    bias = given[2] if "bias" in head else None
    loss = linear_forward_kl(given[0], given[1], full_support(log_q), **{**head, "bias": bias}, **options)
    compare(backend, given, loss, head, log_q.double(), dense_forward)


@pytest.mark.ops("kl_rows")
@pytest.mark.parametrize("error", [-4.0, 4.0])
@pytest.mark.parametrize("loss", [reverse_kl, forward_kl])
def test_a_bucket_of_rounding_errors_is_empty(backend: Backend, rng: torch.Generator, loss: Any, error: float) -> None:
    """An LSE that is off by 4 eps moves 4 eps of the mass into the bucket or out of it. As large as the teacher's rest
    or several times as large, that is no outcome of its own."""
    log_p, log_q = (torch.randn(N, V, generator=rng).double().log_softmax(1) for _ in range(2))
    student = backend.tensor(log_p + error * torch.finfo(backend.dtype).eps).requires_grad_()
    rows = loss(student, full_support(backend.tensor(log_q)), tail="bucket", reduction="none")
    rows.sum().backward()
    p, q = log_p.exp(), log_q.exp()
    assert student.grad is not None
    if loss is reverse_kl:
        backend.close(rows.detach(), (p * (log_p - log_q)).sum(1))
        backend.close(student.grad, p * (log_p - log_q))
    else:
        backend.close(rows.detach(), (q * (log_q - log_p)).sum(1))
        backend.close(student.grad, p - q)


@pytest.mark.ops("kl_rows", *LINEAR)
@pytest.mark.parametrize("which", ["reverse", "reverse_mean", "reverse_sampled", "forward"])
def test_masked_rows_are_left_out(backend: Backend, rng: torch.Generator, which: str) -> None:
    given, log_q = leaves(rng, backend)
    log_q = backend.tensor(log_q)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1])
    support = full_support(log_q)
    loss = {
        "reverse": lambda: linear_reverse_kl(given[0], given[1], support, mask=mask),
        "reverse_mean": lambda: linear_reverse_kl(given[0], given[1], support, mask=mask.bool(), baseline="mean"),
        "reverse_sampled": lambda: linear_reverse_kl(given[0], given[1], support, mask=mask, normalize="sampled"),
        "forward": lambda: linear_forward_kl(given[0], given[1], support, mask=mask.float()),
    }[which]()
    dense = dense_forward if which == "forward" else dense_reverse
    compare(backend, given, loss, {}, log_q.double(), dense, mask.bool())
    assert given[0].grad is not None
    assert (given[0].grad[mask == 0] == 0).all()


@pytest.mark.ops("kl_rows", "gather_logprobs", "gather_logprobs_backward")
def test_gathered_and_fused_agree(backend: Backend, rng: torch.Generator) -> None:
    logits = backend.tensor(torch.randn(N, V, generator=rng, dtype=torch.float64)).requires_grad_()
    log_q = backend.tensor(torch.randn(N, V, generator=rng, dtype=torch.float64).log_softmax(1))
    support = full_support(log_q)
    loss = reverse_kl(gather_logprobs(logits, support.ids, temperature=0.8), support)
    loss.backward()
    z = logits.detach().double().requires_grad_()
    expected = dense_reverse((z / 0.8).log_softmax(1), log_q.double()).mean()
    expected.backward()
    backend.close(loss.detach(), expected.detach())
    assert logits.grad is not None
    assert z.grad is not None
    backend.close(logits.grad, z.grad)


@pytest.mark.ops("kl_rows", *LINEAR)
def test_the_vocabulary_in_any_order_is_still_the_vocabulary(backend: Backend, rng: torch.Generator) -> None:
    given, log_q = leaves(rng, backend)
    log_q = backend.tensor(log_q)
    ids = torch.stack([torch.randperm(V, generator=rng) for _ in range(N)])
    support = Support(ids, log_q.gather(1, ids), torch.zeros_like(log_q))
    compare(backend, given, linear_reverse_kl(given[0], given[1], support), {}, log_q.double(), dense_reverse)
