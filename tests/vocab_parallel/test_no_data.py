"""The split head on tensors without data: nothing waits for a device, and shapes and dtypes are right on every path."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import asyncopd
from asyncopd import Correction, Support, VocabShard

N, V, H, K = 6, 15, 4, 3
OPTIONS: list[dict[str, Any]] = [
    {},
    {"baseline": "mean"},
    {"normalize": "sampled"},
    {"reduction": "none", "correction": Correction(m2_budget=0.04)},
]


@pytest.fixture
def shard() -> Iterator[VocabShard]:
    """The second of three ranks, in a group whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    assert dist.group.WORLD is not None
    yield VocabShard(dist.group.WORLD, 1, (4, 9, 2))
    dist.destroy_process_group()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses(shard: VocabShard, options: dict[str, Any], dtype: torch.dtype) -> None:
    hidden, weight, bias = (empty(*shape, dtype=dtype).requires_grad_() for shape in ((N, H), (9, H), (9,)))
    support = Support(empty(N, K, dtype=torch.int32), empty(N, K), empty(N, K), "samples")
    loss = asyncopd.vocab_parallel_linear_reverse_kl(
        hidden, weight, support, shard, bias=bias, mask=empty(N, dtype=torch.bool), **options
    )
    assert loss.dtype == torch.float32
    assert loss.shape == ((N,) if options.get("reduction") == "none" else ())
    loss.sum().backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, dtype)


@pytest.mark.parametrize("k", [1, 3, V])
def test_topk(shard: VocabShard, k: int) -> None:
    for top in (
        asyncopd.vocab_parallel_topk_logprobs(empty(N, 9, dtype=torch.bfloat16), k, shard),
        asyncopd.vocab_parallel_linear_topk_logprobs(empty(N, H), empty(9, H), k, shard, softcap=3.0),
    ):
        assert (top.ids.shape, top.ids.dtype) == ((N, k), torch.int64)
        assert (top.logprobs.shape, top.logprobs.dtype) == ((N, k), torch.float32)
        assert (top.logsumexp.shape, top.logsumexp.dtype) == ((N,), torch.float32)


def test_gradients_are_those_asked_for(shard: VocabShard) -> None:
    support = Support(empty(N, K, dtype=torch.int64), empty(N, K), empty(N, K))
    for loss in (asyncopd.vocab_parallel_linear_reverse_kl, asyncopd.vocab_parallel_linear_forward_kl):
        for trained in (0, 1):
            leaves = [empty(N, H), empty(9, H)]
            leaves[trained].requires_grad_()
            loss(*leaves, support, shard).backward()
            assert [leaf.grad is not None for leaf in leaves] == [trained == 0, trained == 1]
        assert not loss(empty(N, H), empty(9, H), support, shard).requires_grad
