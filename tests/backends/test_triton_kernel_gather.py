"""LSE + gather and its gradient in Triton: several tiles, several blocks of ids, ids that repeat."""

import pytest
import torch
from each_backend import DEVICES

from asyncopd.kernels import gather_logprobs, gather_logprobs_backward
from asyncopd.kernels.gather import IDS, TILE

DEVICE = DEVICES["triton"]
INF = float("inf")


@pytest.mark.parametrize("vocab", [1, TILE - 1, TILE + 1, 4097])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_values_and_gradient_across_tiles(rng: torch.Generator, vocab: int, id_dtype: torch.dtype) -> None:
    logits = 3 * torch.randn(3, vocab, generator=rng)
    ids = torch.randint(-1, vocab, (3, 20), generator=rng).to(id_dtype)
    grad = torch.randn(3, 20, generator=rng)
    z = logits.double().requires_grad_()
    expected = (z / 0.7).log_softmax(1).gather(1, ids.clamp(min=0).long()).masked_fill(ids < 0, -INF)
    expected.backward(grad.double().masked_fill(ids < 0, 0.0))
    logprobs, lse = gather_logprobs(logits.to(DEVICE), ids.to(DEVICE), 0.7)
    torch.testing.assert_close(logprobs.double().cpu(), expected.detach(), rtol=2**-23, atol=2e-6)
    dlogits = gather_logprobs_backward(grad.to(DEVICE), logits.to(DEVICE), lse, ids.to(DEVICE), 0.7)
    assert z.grad is not None
    torch.testing.assert_close(dlogits.double().cpu(), z.grad, rtol=1e-5, atol=3e-6)


def test_ids_that_repeat_add_up_across_blocks_and_are_the_same_in_every_run(rng: torch.Generator) -> None:
    k = 2 * IDS + 37
    logits = torch.randn(2, 50, generator=rng)
    ids, grad = torch.randint(0, 5, (2, k), generator=rng), torch.randn(2, k, generator=rng)
    ids[:, IDS] = 40  # an id of one block only
    z = logits.double().requires_grad_()
    z.log_softmax(1).gather(1, ids).backward(grad.double())
    lse = logits.logsumexp(1)
    args = [x.to(DEVICE) for x in (grad, logits, lse, ids)]
    first = gather_logprobs_backward(*args, 1.0)
    assert z.grad is not None
    torch.testing.assert_close(first.double().cpu(), z.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(first, gather_logprobs_backward(*args, 1.0))


def test_a_row_that_is_masked_writes_zeros_over_any_logits() -> None:
    logits = torch.tensor([[float("nan"), 1.0, INF], [-INF, -INF, -INF], [0.0, -INF, 1.0]], device=DEVICE)
    ids = torch.tensor([[1, 2], [0, 1], [0, 0]], device=DEVICE)
    grad = torch.tensor([[0.0, 0.0], [0.5, -0.5], [1.0, -1.0]], device=DEVICE)
    _, lse = gather_logprobs(logits, ids, 1.0)
    dlogits = gather_logprobs_backward(grad, logits, lse, ids, 1.0)
    assert dlogits.tolist() == [[0.0, 0.0, 0.0], [0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]


def test_the_gradient_is_rounded_once(rng: torch.Generator) -> None:
    # Twenty gradients of one id: added in bf16 they would be off by more than the rounding of their sum.
    logits = torch.randn(1, 300, generator=rng).bfloat16()
    ids, grad = torch.full((1, 20), 7), torch.rand(1, 20, generator=rng)
    lse = logits.float().logsumexp(1)
    dlogits = gather_logprobs_backward(*(x.to(DEVICE) for x in (grad, logits, lse, ids)), 1.0).cpu()
    exact = -grad.double().sum() * logits.double().softmax(1)
    exact[0, 7] += grad.double().sum()
    torch.testing.assert_close(dlogits.double(), exact, rtol=torch.finfo(torch.bfloat16).eps * 0.51, atol=1e-12)
