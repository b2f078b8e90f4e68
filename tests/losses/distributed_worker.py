"""What each of two gloo processes of test_distributed.py runs; a module of its own, so that spawn can import it."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asyncopd import LinearReverseKLLoss, Support, linear_reverse_kl

WORLD, N, V, H, K = 2, 6, 10, 4, 3
# Valid rows of each rank: unequal on purpose, so that a mean of means is wrong.
MASKS = ([1, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 1])


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
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.loss = model, LinearReverseKLLoss()

    def forward(self, x: Tensor, support: Support, mask: Tensor, items: float) -> Tensor:
        return self.loss(self.model(x), self.model.lm_head.weight, support, mask=mask, num_items_in_batch=items)


def expected() -> dict[str, Tensor]:
    """Gradients of the loss over both ranks' rows at once, divided by the valid rows of both."""
    model = Model()
    items = sum(sum(mask) for mask in MASKS)
    for rank in range(WORLD):
        x, sup, mask = data(rank)
        linear_reverse_kl(model(x), model.lm_head.weight, sup, mask=mask, num_items_in_batch=items).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def ddp(rank: int, items: float) -> dict[str, Tensor]:
    module = nn.parallel.DistributedDataParallel(WithLoss(Model()))
    # DDP averages over ranks: WORLD times the sum over all valid rows, divided by their number.
    module(*data(rank), items / WORLD).backward()
    return {name.removeprefix("module.model."): p.grad for name, p in module.named_parameters() if p.grad is not None}


def fsdp(rank: int, items: float, *, shard_head: bool, loss_inside: bool) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = Model()
    module = WithLoss(model)
    if shard_head:
        fully_shard(model.lm_head)
    fully_shard(module if loss_inside else model)
    x, sup, mask = data(rank)
    if loss_inside:
        module(x, sup, mask, items / WORLD).backward()
    else:
        hidden = model(x)
        linear_reverse_kl(hidden, model.lm_head.weight, sup, mask=mask, num_items_in_batch=items / WORLD).backward()
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def tensor_parallel(rank: int, items: float) -> dict[str, Tensor]:
    """A head sharded over ranks that all see the same rows: the gathered weight's gradient is scattered as it is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = Model()
    mesh = init_device_mesh("cpu", (WORLD,))
    weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    for source in range(WORLD):
        x, sup, mask = data(source)
        linear_reverse_kl(model(x), weight, sup, mask=mask, num_items_in_batch=items).backward()
    assert weight.grad is not None
    return {"lm_head.weight": whole(weight.grad)}


CASES = {
    "ddp": ddp,
    "fsdp_loss_inside": lambda r, n: fsdp(r, n, shard_head=False, loss_inside=True),
    "fsdp_loss_outside": lambda r, n: fsdp(r, n, shard_head=False, loss_inside=False),
    "fsdp_sharded_head_loss_inside": lambda r, n: fsdp(r, n, shard_head=True, loss_inside=True),
    "fsdp_sharded_head_loss_outside": lambda r, n: fsdp(r, n, shard_head=True, loss_inside=False),
    "tensor_parallel": tensor_parallel,
}


def main(rank: int, folder: str) -> None:
    """Run every case; leave gradients, or what was raised, in a file per rank."""
    os.environ["ASYNCOPD_BACKEND"] = "reference"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    items = torch.tensor(float(sum(MASKS[rank])))
    dist.all_reduce(items)
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            results[name] = case(rank, float(items))
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            results[name] = f"{type(error).__name__}: {error}"
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
