"""What each process of test_split_head.py runs: two with gloo, or one for each of two GPUs (or of one) with NCCL.

A module of its own, so that spawn can import it.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from allocations import largest_allocation
from each_backend import runs
from split_head_cases import CASES, SIZES, TOPK, Case, N, V, problem, random_inputs
from torch import Tensor, nn

import asyncopd
from asyncopd import Support, VocabShard, backends
from asyncopd.backends.cpu import walk

Results = dict[str, Tensor]
Setup = tuple[str, str, torch.dtype]  # device, backend, dtype
SETUPS: list[Setup] = [
    ("cpu", "reference", torch.float64),
    *((device, engine, dtype)
      for device, engine in (("cpu", "reference"), ("cpu", "cpu"), ("cuda", "reference"), ("cuda", "triton"))
      for dtype in (torch.float32, torch.bfloat16)),
]  # fmt: skip
# What a backend needs to have.
OPS = ("linear_gather_logprobs", "linear_gather_logprobs_backward", "linear_gather_logits",
       "linear_gather_logits_backward", "linear_logsumexp", "linear_topk_logprobs", "topk_logprobs",
       "kl_rows")  # fmt: skip


def setups() -> list[Setup]:
    """Those that can run here."""
    devices = ["cpu"] if dist.is_available() and dist.is_gloo_available() else []
    if torch.cuda.is_available() and dist.is_nccl_available():
        devices.append("cuda")
    return [s for s in SETUPS if s[0] in devices and runs(s[1]) and all(backends.has_op(s[1], op) for op in OPS)]


def run_loss(
    case: Case,
    dtype: torch.dtype,
    shard: VocabShard | None,
    device: str = "cpu",
    wrap: Callable[[Any], Any] = lambda function: function,
) -> Results:
    """The loss and its gradients of this rank's part of the head; or of the plain function, in fp64, on such values."""
    p = problem(case).to(dtype)
    p = p.to(torch.float64) if shard is None else p.to(dtype, device)
    part = slice(0, V) if shard is None else slice(shard.offset, shard.offset + shard.size)
    hidden, weight, bias = (t.clone().requires_grad_() for t in (p.hidden, p.weight[part], p.bias[part]))
    name = f"linear_{case.loss}_kl"
    args: tuple[Any, ...] = (hidden, weight, p.support)
    if shard is not None:
        name, args = "vocab_parallel_" + name, (*args, shard)
    loss, metrics = wrap(getattr(asyncopd, name))(
        *args, mask=p.mask, bias=bias if case.bias else None, return_metrics=True, **case.options
    )
    # A factor of its own for the loss, or for every row of it.
    upstream = torch.linspace(0.5, -2.0, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()].reshape(loss.shape)
    loss.backward(upstream.to(device))
    out = {"loss": loss.detach(), "metrics": torch.stack(list(metrics)), "hidden": hidden.grad, "weight": weight.grad}
    return {**out, "bias": bias.grad} if case.bias else out


def run_topk(name: str, dtype: torch.dtype, shard: VocabShard | None, device: str = "cpu", *, linear: bool) -> Results:
    inputs, k, options = TOPK[name]
    part = slice(0, V) if shard is None else slice(shard.offset, shard.offset + shard.size)
    prefix, rest = ("", (k,)) if shard is None else ("vocab_parallel_", (k, shard))
    hidden, weight, bias = (t.to(dtype) for t in inputs())
    if linear:
        hidden, weight, bias = (t.double() if shard is None else t.to(device) for t in (hidden, weight, bias))
        # Parameters that train, as a trainer's are.
        top = getattr(asyncopd, f"{prefix}linear_topk_logprobs")(
            hidden.requires_grad_(), nn.Parameter(weight[part]), *rest, bias=nn.Parameter(bias[part]), **options
        )
    else:
        logits = (hidden.double() @ weight.double().t() + bias.double()).to(dtype)
        temperature = options.get("temperature", 1.0)
        logits = logits.double() if shard is None else logits.to(device)
        top = getattr(asyncopd, f"{prefix}topk_logprobs")(logits[:, part], *rest, temperature=temperature)
    assert not top.logprobs.requires_grad
    return {"ids": top.ids, "logprobs": top.logprobs, "logsumexp": top.logsumexp}


# ------------------------------------------------------------------------------------------------------------ others


def refusals(shard: VocabShard) -> dict[str, str]:
    """What wrong arguments are told, each on every rank, so that nobody is left waiting."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    p = problem(Case())
    weight = p.weight[: shard.size]
    bad = p.support.ids.clone()
    bad[0, 0] = V
    low = p.support.ids.clone()
    low[0, 0] = -2
    supports = [Support(ids, p.support.teacher_logprobs, p.support.log_weights) for ids in (bad, low)]
    sharded = distribute_tensor(p.weight, init_device_mesh("cpu", (len(SIZES),)), [Shard(0)])
    reverse, topk = asyncopd.vocab_parallel_linear_reverse_kl, asyncopd.vocab_parallel_topk_logprobs
    calls: dict[str, Callable[[], Any]] = {
        "weight": lambda: reverse(p.hidden, p.weight, p.support, shard),
        "bias": lambda: reverse(p.hidden, weight, p.support, shard, bias=p.bias),
        "dtensor": lambda: reverse(p.hidden, sharded, p.support, shard),
        "id_too_large": lambda: reverse(p.hidden, weight, supports[0], shard),
        "id_below_the_pad": lambda: reverse(p.hidden, weight, supports[1], shard),
        "shard": lambda: reverse(p.hidden, weight, p.support, 3),  # type: ignore[arg-type]
        "mask": lambda: reverse(p.hidden, weight, p.support, shard, mask=torch.ones(N + 1)),
        "option": lambda: reverse(p.hidden, weight, p.support, shard, tail="bucket"),
        "k": lambda: topk(torch.zeros(2, shard.size), V + 1, shard),
        "logits": lambda: topk(torch.zeros(2, shard.size + 1), 1, shard),
        "size": lambda: VocabShard.of(dist.get_rank()),
        "vocab": lambda: VocabShard.of(SIZES[dist.get_rank()], vocab=V + dist.get_rank()),
        "size_type": lambda: VocabShard.of(2.0),  # type: ignore[arg-type]
        "size_tensor": lambda: VocabShard.of(weight),  # type: ignore[arg-type]
    }
    told = {}
    for name, call in calls.items():
        try:
            told[name] = f"nothing: {call()}"
        except (TypeError, ValueError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def alone(rank: int) -> tuple[Results, str]:
    """A head that is whole on each rank, in a group of that rank alone; and what the other's group is told."""
    groups = [dist.new_group([other]) for other in range(len(SIZES))]
    shard = VocabShard.of(V, groups[rank])
    out = {
        **run_loss(CASES["everything"], torch.float64, shard),
        **run_topk("plain", torch.float64, shard, linear=True),
    }
    try:
        return out, f"nothing: {VocabShard.of(V, groups[1 - rank])}"
    except ValueError as error:
        return out, str(error)


def memory(shard: VocabShard) -> dict[str, int]:
    """The largest allocation of each call, where N x V_r is larger than all inputs and gradients."""
    rows, size, width, k = 256, 1024, 4, 8
    wide = VocabShard(shard.group, shard.rank, (size, size))
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, width, generator=rng).requires_grad_()
    weight = torch.randn(size, width, generator=rng).requires_grad_()
    ids = torch.randint(0, 2 * size, (rows, k), generator=rng)
    support = Support(ids, torch.randn(rows, k, generator=rng).log_softmax(1), torch.zeros(rows, k))
    loss = asyncopd.vocab_parallel_linear_reverse_kl
    calls: dict[str, Callable[[], object]] = {
        "exact": lambda: loss(hidden, weight, support, wide).backward(),
        "mean": lambda: loss(hidden, weight, support, wide, baseline="mean").backward(),
        "topk": lambda: asyncopd.vocab_parallel_linear_topk_logprobs(hidden, weight, k, wide),
        "N x V_r": lambda: hidden @ weight.t(),
    }
    return {name: largest_allocation(call) for name, call in calls.items()}


def compiled(function: Any) -> Any:
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)


def under_autocast(function: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*args, **kwargs)

    return run


def features(shard: VocabShard) -> dict[str, tuple[Results, Results]]:
    """What torch.compile and autocast make of a loss and of top-K, each beside what it should be."""
    out = {}
    for name in ("everything", "mean_baseline", "sampled"):
        case = CASES[name]
        eager = run_loss(case, torch.float32, shard)
        out[f"compiled {name}"] = run_loss(case, torch.float32, shard, wrap=compiled), eager
        # The bias, which is no factor of a product, would not be rounded under autocast.
        unbiased = replace(case, bias=False)
        by_hand = run_loss(unbiased, torch.bfloat16, shard)
        out[f"autocast {name}"] = (
            run_loss(unbiased, torch.float32, shard, wrap=under_autocast),
            {key: value.float() for key, value in by_hand.items()},
        )
    hidden, weight, _ = (t.float() for t in random_inputs())
    weight = weight[shard.offset : shard.offset + shard.size]
    top = asyncopd.vocab_parallel_linear_topk_logprobs
    out["compiled top-K"] = (
        compiled(lambda h, w: top(h, w, 30, shard))(hidden, weight)._asdict(),
        top(hidden, weight, 30, shard)._asdict(),
    )
    out["autocast top-K"] = (
        under_autocast(top)(hidden, weight, 9, shard)._asdict(),
        top(hidden.bfloat16(), weight.bfloat16(), 9, shard)._asdict(),
    )
    return out


def unseen_id(shard: VocabShard) -> Tensor:
    """Row losses with an id that no rank holds, where nothing can refuse it: in a compiled graph, as on a device."""
    p = problem(Case()).to(torch.float32)
    ids = p.support.ids.clone()
    ids[0, 0] = V
    support = Support(ids, p.support.teacher_logprobs, p.support.log_weights)
    loss = compiled(asyncopd.vocab_parallel_linear_reverse_kl)
    return loss(p.hidden, p.weight[shard.offset :][: shard.size], support, shard, reduction="none")


def layouts(shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Row losses with ids that lie otherwise on one of the ranks; and as they should be."""
    p = problem(Case())
    ids = p.support.ids
    mine = ids.t().contiguous().t() if shard.rank == 0 else ids
    args = p.support.teacher_logprobs, p.support.log_weights
    loss, rest = asyncopd.vocab_parallel_linear_forward_kl, {"mask": p.mask, "reduction": "none"}
    weight = p.weight[shard.offset :][: shard.size]
    return loss(p.hidden, weight, Support(mine, *args), shard, **rest), loss(
        p.hidden, weight, Support(ids, *args), shard, **rest
    )


def main(rank: int, folder: str, device: str, world: int) -> None:
    """Run everything on one kind of device; leave the results in a file per rank."""
    torch.set_num_threads(1)
    walk.TILE_ELEMENTS = walk.MIN_COLUMNS = 64  # several blocks
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    shard = VocabShard.of(SIZES[rank] if world == len(SIZES) else V, vocab=V)
    results: dict[Any, Any] = {"shard": (shard.offset, shard.size, shard.vocab, shard.sizes)}
    for setup in setups():
        if setup[0] != device:
            continue
        _, os.environ["ASYNCOPD_BACKEND"], dtype = setup
        for name, case in CASES.items():
            results[setup, "loss", name] = run_loss(case, dtype, shard, device)
        for name in TOPK:
            for kind in ("logits", "linear"):
                results[setup, kind, name] = run_topk(name, dtype, shard, device, linear=kind == "linear")
    if device == "cpu":
        os.environ["ASYNCOPD_BACKEND"] = "reference"
        results["memory"] = memory(shard)
        results["refusals"] = refusals(shard)
        results["features"] = features(shard)
        results["unseen id"] = unseen_id(shard)
        results["layouts"] = layouts(shard)
        results["alone"] = alone(rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
