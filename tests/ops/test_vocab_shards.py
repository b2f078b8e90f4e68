"""The backward ops on parts of a split vocabulary: ids that another part holds count in the sum, and nowhere else."""

from typing import Any

import pytest
import torch
from each_backend import Backend
from torch import Tensor

from asyncopd.backends.reference.rows import ELSEWHERE, PAD

OPS = torch.ops.asyncopd
N, V, K = 6, 23, 7
PARTS = (slice(0, 9), slice(9, 22), slice(22, V))


def problem(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids and gradients [N, K]: a repeated id, pads, rows whose ids lie in one part, and a row that sums to zero."""
    ids = torch.randint(0, V, (N, K), generator=rng)
    ids[0, 1], ids[0, 2], ids[1, 3:] = ids[0, 0], PAD, PAD
    ids[2], ids[3] = torch.arange(K), torch.arange(9, 9 + K)
    grad = torch.randn(N, K, generator=rng, dtype=torch.float64)
    grad[ids == PAD] = 1e3
    grad[4] = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 0.0, 0.0])
    return ids, grad


def local(ids: Tensor, part: slice) -> Tensor:
    here = (ids >= part.start) & (ids < part.stop)
    return torch.where(here, ids - part.start, torch.where(ids == PAD, PAD, ELSEWHERE))


@pytest.mark.ops("gather_logprobs_backward")
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
def test_gradient_of_logits(backend: Backend, rng: torch.Generator, id_dtype: torch.dtype) -> None:
    ids, grad = problem(rng)
    logits = 2 * torch.randn(N, V, generator=rng, dtype=torch.float64)
    log_p = (logits / 0.7).log_softmax(1)
    lse = backend.tensor((logits / 0.7).logsumexp(1))
    valid = grad.masked_fill(ids == PAD, 0.0)
    whole = (-valid.sum(1, keepdim=True) * log_p.exp()).scatter_add(1, ids.clamp(min=0), valid) / 0.7
    for part in PARTS:
        mine = backend.tensor(logits[:, part].contiguous())
        args = (backend.tensor(grad), mine, lse, backend.tensor(local(ids, part).to(id_dtype)), 0.7)
        backend.close(OPS.gather_logprobs_backward(*args), whole[:, part])


HEADS: list[dict[str, Any]] = [{}, {"masked": True, "scalars": (0.7, 1.3, 4.0)}]


@pytest.mark.ops("linear_gather_logprobs", "linear_gather_logprobs_backward")
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_gradients_of_a_head(backend: Backend, rng: torch.Generator, options: dict[str, Any]) -> None:
    """The parts' dW and db are those of the whole; their dH add up to it."""
    ids, grad = (backend.tensor(t) for t in problem(rng))
    shapes = ((N, 5), (V, 5), (V,))
    hidden, weight, bias = (backend.tensor(torch.randn(*s, generator=rng, dtype=torch.float64)) for s in shapes)
    mask = backend.tensor(torch.arange(N) != 1) if options.get("masked") else None
    scalars = options.get("scalars", (1.0, 1.0, None))
    _, lse = OPS.linear_gather_logprobs(hidden, weight, ids, bias, mask, *scalars)
    whole = OPS.linear_gather_logprobs_backward(grad, hidden, weight, lse, ids, bias, mask, *scalars, True)
    parts = [
        OPS.linear_gather_logprobs_backward(
            grad, hidden, weight[part], lse, local(ids, part), bias[part], mask, *scalars, True
        )
        for part in PARTS
    ]
    dhidden, dweight, dbias = zip(*parts, strict=True)
    backend.close(sum(dhidden), whole[0].double())
    backend.close(torch.cat(dweight), whole[1].double())
    backend.close(torch.cat(dbias), whole[2].double())


@pytest.mark.ops("linear_gather_logprobs_backward", "linear_gather_logits_backward")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sampled", [False, True])
def test_wide_hidden_states_have_a_wide_gradient(
    engine: str, rng: torch.Generator, dtype: torch.dtype, sampled: bool
) -> None:
    """fp32 hidden states beside a 16-bit head: dH is not rounded, so that the parts of one can be added up."""
    ids, grad = problem(rng)
    hidden = torch.randn(N, 70, generator=rng).to(dtype).float()  # as they come: 16-bit ones, widened
    weight = (torch.randn(V, 70, generator=rng) / 8).to(dtype)
    logits = hidden.double() @ weight.double().t()
    if sampled:
        at_ids = logits.gather(1, ids.clamp(min=0)).float()
        got = OPS.linear_gather_logits_backward(grad, at_ids, hidden, weight, ids, None, None, 1.0, 1.0, None, True)
        total = torch.zeros(N, 1, dtype=torch.float64)
    else:
        lse = logits.logsumexp(1).float()
        got = OPS.linear_gather_logprobs_backward(grad, hidden, weight, lse, ids, None, None, 1.0, 1.0, None, True)
        total = grad.masked_fill(ids == PAD, 0.0).sum(1, keepdim=True)
    dz = (-total * logits.softmax(1)).scatter_add(1, ids.clamp(min=0), grad.masked_fill(ids == PAD, 0.0))
    assert got[0].dtype == torch.float32
    rtol = 0.51 * torch.finfo(dtype).eps
    # Tensor cores take 16-bit operands: there dz is rounded, but not dH.
    rounded = 2 * rtol if engine == "triton" and not sampled else 0.0
    expected = dz @ weight.double()
    torch.testing.assert_close(got[0].double(), expected, rtol=2e-6, atol=2e-6 + rounded * expected.abs().max().item())
    assert (got[0] != got[0].to(dtype).float()).any()
    assert got[1].dtype == dtype
    expected = dz.t() @ hidden.double()
    torch.testing.assert_close(got[1].double(), expected, rtol=rtol, atol=1e-5 + rounded * expected.abs().max().item())
