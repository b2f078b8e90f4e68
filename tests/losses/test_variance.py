"""What many samples buy: M = 64 has 1/64 of the variance of one, and a head takes most of what is left."""

import pytest
import torch
from each_backend import Backend
from torch import Tensor

from asyncopd import Support, reverse_kl, sample_support

pytestmark = pytest.mark.ops("kl_rows", "sample_support")


def gradient_variance(log_p: Tensor, log_q: Tensor, m: int, head: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Total variance of dz = scatter(c) - (sum c) p over independent rows."""
    drawn = sample_support(log_p.to(dtype).expand(rows, -1), num_samples=m, head=head, seed=1000 * m + head)
    sup = Support(drawn.ids, log_q[drawn.ids].to(dtype), drawn.log_weights, "head_tail" if head else "samples")
    student = log_p.to(dtype)[drawn.ids].requires_grad_()
    reverse_kl(student, sup, reduction="sum").backward()
    assert student.grad is not None
    coef = student.grad.double()
    dz = torch.zeros(rows, log_p.numel(), dtype=torch.float64).scatter_add_(1, drawn.ids, coef)
    dz -= coef.sum(1, keepdim=True) * log_p.exp()
    return dz.var(0).sum()


def policies(rng: torch.Generator, vocab: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(vocab, generator=rng, dtype=torch.float64).log_softmax(0) for _ in range(2))  # type: ignore


def test_64_samples_have_a_64th_of_the_variance_of_one(backend: Backend, rng: torch.Generator) -> None:
    log_p, log_q = policies(rng, 24)
    one = gradient_variance(log_p, log_q, 1, 0, 50_000, backend.dtype)
    many = gradient_variance(log_p, log_q, 64, 0, 8_000, backend.dtype)
    # Both variances are known to about 1 %: the band is four times as wide.
    assert 1 / 70 < many / one < 1 / 58


def test_a_head_lowers_the_variance_at_equal_size(backend: Backend, rng: torch.Generator) -> None:
    # Tokens with very different probabilities, as language has: 2.2 nats over 400 tokens.
    log_p = (3 * torch.randn(400, generator=rng, dtype=torch.float64)).log_softmax(0)
    log_q = (log_p + torch.randn(400, generator=rng, dtype=torch.float64)).log_softmax(0)
    samples = gradient_variance(log_p, log_q, 64, 0, 800, backend.dtype)
    head_tail = gradient_variance(log_p, log_q, 48, 16, 800, backend.dtype)
    assert head_tail < samples / 4
