"""What each of two gloo processes of test_gloo.py runs; a module of its own, so that spawn can import it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from allocations import largest_allocation
from torch import Tensor, nn

import asyncopd
from asyncopd import Correction, Support, VocabShard, backends
from asyncopd.backends.cpu import walk

# An odd vocabulary, cut unevenly: K > V_r is possible, and the first part has several of the CPU walk's blocks.
WORLD, SIZES = 2, (130, 21)
N, V, H, K = 7, sum(SIZES), 6, 8
INF, NAN = float("inf"), float("nan")
Results = dict[str, Tensor]
SETUPS = (
    ("reference", torch.float64),
    ("reference", torch.float32),
    ("cpu", torch.float32),
    ("reference", torch.bfloat16),
    ("cpu", torch.bfloat16),
)
FULL = {"temperature": 0.8, "logit_scale": 1.3, "softcap": 4.0}


@dataclass(frozen=True)
class Problem:
    """Inputs of the whole vocabulary."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    support: Support
    mask: Tensor | None

    def to(self, dtype: torch.dtype) -> "Problem":
        s = self.support
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        return replace(
            self,
            hidden=self.hidden.to(dtype),
            weight=self.weight.to(dtype),
            bias=self.bias.to(dtype),
            support=Support(s.ids, s.teacher_logprobs.to(wide), s.log_weights.to(wide), s.draw),
        )


@dataclass(frozen=True)
class Case:
    """A loss, its options, and what is special about its inputs."""

    loss: str = "reverse"
    draw: Any = "head_tail"
    options: dict[str, Any] = field(default_factory=dict)
    bias: bool = True
    masked: bool = True
    change: Callable[[Problem], Problem] = lambda problem: problem


def ids_from(low: int, high: int) -> Callable[[Problem], Problem]:
    def change(p: Problem) -> Problem:
        # What the teacher thinks of them is beside the point; the pads stay.
        ids = torch.where(p.support.ids < 0, -1, low + p.support.ids % (high - low))
        return replace(p, support=Support(ids, p.support.teacher_logprobs, p.support.log_weights, p.support.draw))

    return change


def with_bias(*values: tuple[int | slice, float]) -> Callable[[Problem], Problem]:
    def change(p: Problem) -> Problem:
        bias = p.bias.clone()
        for where, value in values:
            bias[where] = value
        return replace(p, bias=bias)

    return change


def with_hidden(row: int, value: float) -> Callable[[Problem], Problem]:
    def change(p: Problem) -> Problem:
        hidden = p.hidden.clone()
        hidden[row] = value
        return replace(p, hidden=hidden)

    return change


def no_rows(p: Problem) -> Problem:
    return replace(p, hidden=p.hidden[:0], support=p.support[:0], mask=None)


CASES: dict[str, Case] = {
    "plain": Case(bias=False, masked=False),
    "everything": Case(options=FULL),
    "samples_loo": Case(draw="samples", options={"baseline": "loo", "reduction": "sum"}),
    "top_k": Case(draw="top_k", options={"temperature": 1.7}),
    "bucket": Case(draw="top_k", options={"tail": "bucket"}),
    "renormalize": Case(draw="top_k", options={"tail": "renormalize", **FULL}),
    "mean_baseline": Case(options={"baseline": "mean", **FULL}),
    "sampled": Case(draw="samples", options={"normalize": "sampled", **FULL}),
    "sampled_loo": Case(options={"normalize": "sampled", "baseline": "loo"}, bias=False),
    "clip": Case(draw="samples", options={"correction": Correction(clip_eps=0.2), **FULL}),
    "m2po": Case(draw="samples", options={"correction": Correction(m2_budget=0.04)}),
    "rows": Case(options={"reduction": "none"}),
    "num_items": Case(options={"num_items_in_batch": 11.5}),
    "forward": Case("forward", "teacher_samples", FULL),
    "forward_bucket": Case("forward", "top_k", {"tail": "bucket"}),
    "forward_renormalize": Case("forward", "top_k", {"tail": "renormalize"}, masked=False),
    "ids_on_rank_0": Case(change=ids_from(0, SIZES[0])),
    "ids_on_rank_1": Case(change=ids_from(SIZES[0], V), options=FULL),
    "ids_at_the_cut": Case(change=ids_from(SIZES[0] - 1, SIZES[0] + 1)),
    "sampled_ids_on_rank_1": Case(change=ids_from(SIZES[0], V), options={"normalize": "sampled"}),
    "shard_without_mass": Case(change=with_bias((slice(SIZES[0], V), -INF))),
    "banned_ids": Case(change=with_bias((3, -INF), (V - 1, -INF)), options=FULL),
    "infinite_logit": Case(change=with_bias((V - 1, INF)), options={"reduction": "none"}),
    "no_mass": Case(change=with_bias((slice(0, V), -INF)), options={"reduction": "none"}),
    "nan_row": Case(change=with_hidden(2, NAN)),
    "nan_in_a_masked_row": Case(change=with_hidden(5, NAN)),
    "nan_in_one_shard": Case(change=with_bias((V - 2, NAN)), options={"reduction": "none"}),
    "no_rows": Case(change=no_rows, masked=False),
}


def problem(case: Case) -> Problem:
    rng = torch.Generator().manual_seed(0)
    log_q, log_mu = (torch.randn(N, V, generator=rng, dtype=torch.float64).log_softmax(1) for _ in range(2))
    ids = torch.multinomial(log_mu.exp(), K, replacement=case.draw != "top_k", generator=rng)
    ids[:, 0], ids[:, 1] = torch.arange(N), V - 1 - torch.arange(N)  # both ranks, in every row
    ids[1, 4], ids[4, 2:], ids[6] = -1, -1, -1
    log_w = -log_mu.gather(1, ids.clamp(min=0)) - torch.tensor(K).double().log()
    if case.draw == "top_k":
        log_w = torch.zeros_like(log_w)
    if case.draw == "head_tail":
        log_w[:, :2] = 0.0
    scores = [t.masked_fill(ids < 0, -INF) for t in (log_q.gather(1, ids.clamp(min=0)), log_w)]
    shapes = ((N, H), (V, H), (V,))
    leaves = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in shapes)
    mask = torch.tensor([True] * 5 + [False, True]) if case.masked else None
    return case.change(Problem(*leaves, Support(ids, *scores, case.draw), mask))


def run_loss(
    case: Case, dtype: torch.dtype, shard: VocabShard | None, wrap: Callable[[Any], Any] = lambda function: function
) -> Results:
    """The loss and its gradients of this rank's part of the head; or of the plain function, in fp64, on such values."""
    p = problem(case).to(dtype)
    p = p.to(torch.float64) if shard is None else p
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
    loss.backward(upstream)
    out = {"loss": loss.detach(), "metrics": torch.stack(list(metrics)), "hidden": hidden.grad, "weight": weight.grad}
    return {**out, "bias": bias.grad} if case.bias else out


# ------------------------------------------------------------------------------------------------------------- top-K

TopKInputs = tuple[Tensor, Tensor, Tensor]  # hidden, weight, bias of the whole vocabulary


def random_inputs() -> TopKInputs:
    rng = torch.Generator().manual_seed(1)
    shapes = ((N, H), (V, H), (V,))
    hidden, weight, bias = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return 0.3 * hidden, weight, bias


def tied_inputs() -> TopKInputs:
    """Integer products are exact, so equal rows of the head tie exactly, within a rank and across the ranks."""
    rng = torch.Generator().manual_seed(2)
    hidden = torch.randint(-3, 4, (N, H), generator=rng).double()
    weight = torch.randint(-1, 2, (4, H), generator=rng).double().repeat(V // 4 + 1, 1)[:V]
    return hidden, weight, torch.zeros(V, dtype=torch.float64)


def odd_inputs() -> TopKInputs:
    """A NaN row; and a bias that bans nearly all ids of both ranks: fewer are left than are asked for."""
    hidden, weight, bias = random_inputs()
    hidden[3] = NAN
    bias[5:-3] = -INF
    return hidden, weight, bias


def one_sided_inputs() -> TopKInputs:
    """The best are all on the second rank."""
    hidden, weight, bias = random_inputs()
    bias[SIZES[0] :] += 20.0
    return hidden, weight, bias


TOPK: dict[str, tuple[Callable[[], TopKInputs], int, dict[str, Any]]] = {
    "plain": (random_inputs, 9, {}),
    "options": (random_inputs, 25, {"temperature": 0.6, "logit_scale": -1.7, "softcap": 3.0}),
    "more_than_a_shard_has": (random_inputs, SIZES[1] + 4, {"temperature": 1.4}),
    "all_of_them": (random_inputs, V, {}),
    "ties": (tied_inputs, 60, {}),
    "one": (one_sided_inputs, 1, {}),
    "nan_and_minus_infinity": (odd_inputs, 30, {}),
    "one_sided": (one_sided_inputs, 5, {}),
}


def run_topk(name: str, dtype: torch.dtype, shard: VocabShard | None, *, linear: bool) -> Results:
    inputs, k, options = TOPK[name]
    part = slice(0, V) if shard is None else slice(shard.offset, shard.offset + shard.size)
    prefix, rest = ("", (k,)) if shard is None else ("vocab_parallel_", (k, shard))
    hidden, weight, bias = (t.to(dtype) for t in inputs())
    if shard is None and linear:
        hidden, weight, bias = hidden.double(), weight.double(), bias.double()
    if linear:
        # Parameters that train, as a trainer's are.
        top = getattr(asyncopd, f"{prefix}linear_topk_logprobs")(
            hidden.requires_grad_(), nn.Parameter(weight[part]), *rest, bias=nn.Parameter(bias[part]), **options
        )
    else:
        logits = (hidden.double() @ weight.double().t() + bias.double()).to(dtype)
        temperature = options.get("temperature", 1.0)
        logits = logits.double() if shard is None else logits
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
    sharded = distribute_tensor(p.weight, init_device_mesh("cpu", (WORLD,)), [Shard(0)])
    reverse, topk = asyncopd.vocab_parallel_linear_reverse_kl, asyncopd.vocab_parallel_topk_logprobs
    calls: dict[str, Callable[[], Any]] = {
        "weight": lambda: reverse(p.hidden, p.weight, p.support, shard),
        "bias": lambda: reverse(p.hidden, weight, p.support, shard, bias=p.bias),
        "dtensor": lambda: reverse(p.hidden, sharded, p.support, shard),
        "id_too_large": lambda: reverse(p.hidden, weight, supports[0], shard),
        "id_below_the_pad": lambda: reverse(p.hidden, weight, supports[1], shard),
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
        out[f"compiled {name}"] = run_loss(case, torch.float32, shard, compiled), eager
        # The bias, which is no factor of a product, would not be rounded under autocast.
        unbiased = replace(case, bias=False)
        by_hand = run_loss(unbiased, torch.bfloat16, shard)
        out[f"autocast {name}"] = (
            run_loss(unbiased, torch.float32, shard, under_autocast),
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


def main(rank: int, folder: str) -> None:
    """Run everything on both backends; leave the results in a file per rank."""
    torch.set_num_threads(1)
    walk.TILE_ELEMENTS = walk.MIN_COLUMNS = 64  # several blocks
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    shard = VocabShard.of(SIZES[rank], vocab=V)
    results: dict[Any, Any] = {"shard": (shard.offset, shard.size, shard.vocab, shard.sizes)}
    for engine, dtype in SETUPS:
        if backends.unavailable_reason(engine):
            continue
        os.environ["ASYNCOPD_BACKEND"] = engine
        for name, case in CASES.items():
            results[engine, dtype, "loss", name] = run_loss(case, dtype, shard)
        for name in TOPK:
            for linear in (False, True):
                results[engine, dtype, "linear" if linear else "logits", name] = run_topk(
                    name, dtype, shard, linear=linear
                )
    os.environ["ASYNCOPD_BACKEND"] = "reference"
    results["memory"] = memory(shard)
    results["refusals"] = refusals(shard)
    results["features"] = features(shard)
    results["unseen id"] = unseen_id(shard)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
