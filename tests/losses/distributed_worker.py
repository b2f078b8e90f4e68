"""What each of two gloo processes of test_distributed.py runs; a module of its own, so that spawn can import it."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asyncopd import (
    LinearForwardKLLoss,
    LinearReverseKLLoss,
    Support,
    backends,
    linear_gather_logprobs,
    linear_topk_logprobs,
)

WORLD, N, V, H, K = 2, 6, 10, 4, 3
# Valid rows of each rank: unequal on purpose, so that a mean of means is wrong.
MASKS = ([1, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 1])
# One for each kind of work on the head.
LOSSES: dict[str, nn.Module] = {
    "reverse": LinearReverseKLLoss(),
    "mean_baseline": LinearReverseKLLoss(baseline="mean"),
    "sampled": LinearReverseKLLoss(normalize="sampled"),
    "forward": LinearForwardKLLoss(),
}
ENGINES = [name for name in ("reference", "cpu") if backends.unavailable_reason(name) is None]


def data(rank: int) -> tuple[Tensor, Support, Tensor]:
    """Inputs of one rank's language model [N, H], its support and its mask."""
    rng = torch.Generator().manual_seed(rank)
    log_q = torch.randn(N, V, generator=rng).log_softmax(1)
    ids = torch.randint(0, V, (N, K), generator=rng)
    sup = Support(ids, log_q.gather(1, ids), torch.full((N, K), 0.5), "samples")
    return torch.randn(N, H, generator=rng), sup, torch.tensor(MASKS[rank], dtype=torch.bool)


class Model(nn.Module):
    """A trunk and a head; the loss takes the head's weight and never its output."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.lm_head = nn.Linear(H, H), nn.Linear(H, V, bias=False)
        rng = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng))

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x)


class WithLoss(nn.Module):
    def __init__(self, model: Model, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor, support: Support, mask: Tensor, items: float) -> Tensor:
        return self.loss(self.model(x), self.model.lm_head.weight, support, mask=mask, num_items_in_batch=items)


def expected(loss: nn.Module) -> dict[str, Tensor]:
    """Gradients of the loss over both ranks' rows at once, divided by the valid rows of both."""
    model = Model()
    items = sum(sum(mask) for mask in MASKS)
    for rank in range(WORLD):
        x, sup, mask = data(rank)
        loss(model(x), model.lm_head.weight, sup, mask=mask, num_items_in_batch=items).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def ddp(rank: int, items: float, loss: nn.Module) -> dict[str, Tensor]:
    module = nn.parallel.DistributedDataParallel(WithLoss(Model(), loss))
    # DDP averages over ranks: WORLD times the sum over all valid rows, divided by their number.
    module(*data(rank), items / WORLD).backward()
    return {name.removeprefix("module.model."): p.grad for name, p in module.named_parameters() if p.grad is not None}


def fsdp(rank: int, items: float, loss: nn.Module, *, shard_head: bool, loss_inside: bool) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = Model()
    module = WithLoss(model, loss)
    if shard_head:
        fully_shard(model.lm_head)
    fully_shard(module if loss_inside else model)
    x, sup, mask = data(rank)
    if loss_inside:
        module(x, sup, mask, items / WORLD).backward()
    else:
        hidden = model(x)
        loss(hidden, model.lm_head.weight, sup, mask=mask, num_items_in_batch=items / WORLD).backward()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def tensor_parallel(rank: int, items: float, loss: nn.Module) -> dict[str, Tensor]:
    """A head sharded over ranks that all see the same rows: the gathered weight's gradient is scattered as it is."""
    model = Model()
    weight = nn.Parameter(sharded(model.lm_head.weight))
    for source in range(WORLD):
        x, sup, mask = data(source)
        loss(model(x), weight, sup, mask=mask, num_items_in_batch=items).backward()
    assert weight.grad is not None
    return {"lm_head.weight": whole(weight.grad)}


CASES: dict[str, Callable[[int, float, nn.Module], dict[str, Tensor]]] = {
    "ddp": ddp,
    "fsdp_loss_inside": lambda r, n, loss: fsdp(r, n, loss, shard_head=False, loss_inside=True),
    "fsdp_loss_outside": lambda r, n, loss: fsdp(r, n, loss, shard_head=False, loss_inside=False),
    "fsdp_sharded_head_loss_inside": lambda r, n, loss: fsdp(r, n, loss, shard_head=True, loss_inside=True),
    "fsdp_sharded_head_loss_outside": lambda r, n, loss: fsdp(r, n, loss, shard_head=True, loss_inside=False),
    "tensor_parallel": tensor_parallel,
}


def sharded(weight: Tensor) -> Any:
    """The rows of a head, as a DTensor of both ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(weight.detach(), init_device_mesh("cpu", (WORLD,)), [Shard(0)])


def scored(weight: Tensor) -> list[Tensor]:
    """What a teacher is asked for: top-K and scores at ids, from the hidden states of rank 0."""
    x, sup, _ = data(0)
    with torch.no_grad():
        return [*linear_topk_logprobs(x, weight, K), linear_gather_logprobs(x, weight, sup.ids)]


def scored_by_fsdp() -> list[Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = Model()
    fully_shard(model)
    return scored(model.lm_head.weight)


def main(rank: int, folder: str) -> None:
    """Run every case; leave the results in a file per rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    items = torch.tensor(float(sum(MASKS[rank])))
    dist.all_reduce(items)
    results: dict[Any, Any] = {}
    for engine in ENGINES:
        os.environ["ASYNCOPD_BACKEND"] = engine
        for case, run in CASES.items():
            for name, loss in LOSSES.items():
                results[engine, case, name] = run(rank, float(items), loss)
        results[engine, "scored by tensor parallel"] = scored(sharded(Model().lm_head.weight))
        results[engine, "scored by fsdp"] = scored_by_fsdp()
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
