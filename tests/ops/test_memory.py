"""No linear_* call, forward or backward, ever allocates a tensor of N x V elements. Measured, not argued."""

from collections.abc import Callable

import pytest
import torch
from allocations import largest_allocation
from torch import Tensor

from asyncopd import Support, linear_forward_kl, linear_gather_logprobs, linear_reverse_kl, linear_topk_logprobs

# Logits are the one thing here whose size is N x V: hidden states and weight are 128 times smaller.
N, V, H, K = 512, 4096, 4, 8


def leaves(dtype: torch.dtype) -> tuple[Tensor, Tensor, Support]:
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, H, generator=rng).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=rng).to(dtype).requires_grad_()
    scores = torch.randn(N, K, generator=rng).log_softmax(1)
    return hidden, weight, Support(torch.randint(0, V, (N, K), generator=rng), scores, torch.zeros(N, K))


def calls(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    hidden, weight, support = leaves(dtype)
    return {
        "topk": lambda: linear_topk_logprobs(hidden, weight, K),
        "gather": lambda: linear_gather_logprobs(hidden, weight, support.ids, softcap=5.0).sum().backward(),
        "reverse": lambda: linear_reverse_kl(hidden, weight, support).backward(),
        "reverse_mean": lambda: linear_reverse_kl(hidden, weight, support, baseline="mean").backward(),
        "reverse_sampled": lambda: linear_reverse_kl(hidden, weight, support, normalize="sampled").backward(),
        "forward": lambda: linear_forward_kl(hidden, weight, support, tail="bucket").backward(),
    }


def test_the_measure_sees_a_materialised_head() -> None:
    hidden, weight, support = leaves(torch.float32)
    seen = largest_allocation(lambda: (hidden @ weight.t()).log_softmax(1).gather(1, support.ids).sum().backward())
    assert seen >= N * V * 4


@pytest.mark.ops(
    "linear_topk_logprobs",
    "linear_gather_logprobs",
    "linear_gather_logprobs_backward",
    "linear_gather_logits",
    "linear_gather_logits_backward",
    "linear_logsumexp",
    "kl_rows",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["topk", "gather", "reverse", "reverse_mean", "reverse_sampled", "forward"])
def test_no_allocation_is_as_large_as_the_logits(
    engine: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "triton":  # its blocks hold everything that fits into some 100 MiB: a quarter of these logits
        monkeypatch.setattr("asyncopd.kernels.linear_topk.CHUNK_BYTES", N * V)
        monkeypatch.setattr("asyncopd.kernels.head_walk.TILE_ELEMENTS", N * V // 4)
        monkeypatch.setattr("asyncopd.kernels.head_walk.KEPT_BYTES", N * V)
    call = calls(dtype)[name]
    call()  # the first product of a thread on a GPU allocates cuBLAS's workspace, 32 MiB on an H100
    # A quarter of the rows at a time, in fp32 or with int64 ids of a sort: at most half of N x V fp32 elements.
    limit = N * V * (2 if dtype == torch.bfloat16 else 4)
    assert largest_allocation(call) <= max(limit // 2, N * V * 2)


@pytest.mark.ops("linear_gather_logits", "linear_gather_logits_backward", "kl_rows")
def test_the_sampled_normalisation_never_walks_the_vocabulary(engine: str) -> None:
    # Nothing larger than the K picked rows of the head per position, or the weight's own gradient.
    assert largest_allocation(calls(torch.float32)["reverse_sampled"]) <= max(N * K * H, V * H) * 4


@pytest.mark.host_only
@pytest.mark.ops("linear_kl", "scale_gradient_")
def test_the_backward_of_the_fused_loss_holds_no_second_weight_gradient(engine: str) -> None:
    """Not even where the loss is divided by the number of micro-batches."""
    hidden, weight, support = leaves(torch.float32)
    loss = linear_reverse_kl(hidden, weight, support) / 8
    assert largest_allocation(loss.backward) < V * H * 4
