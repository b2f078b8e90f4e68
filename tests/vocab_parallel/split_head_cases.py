"""Losses and top-K of a whole vocabulary, for the tests that split it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from asyncopd import Correction, Support

# An odd vocabulary, cut unevenly: K > V_r is possible, and the first part has several of the CPU walk's blocks.
SIZES = (130, 21)
N, V, H, K = 7, sum(SIZES), 6, 8
INF, NAN = float("inf"), float("nan")
FULL = {"temperature": 0.8, "logit_scale": 1.3, "softcap": 4.0}


@dataclass(frozen=True)
class Problem:
    """Inputs of the whole vocabulary."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    support: Support
    mask: Tensor | None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        s = self.support
        wide = dtype if dtype.itemsize >= 4 else torch.float32
        scores = (t.to(device, wide) for t in (s.teacher_logprobs, s.log_weights))
        return Problem(
            *(t.to(device, dtype) for t in (self.hidden, self.weight, self.bias)),
            Support(s.ids.to(device), *scores, s.draw),
            None if self.mask is None else self.mask.to(device),
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
