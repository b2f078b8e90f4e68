"""Log-probabilities straight from hidden states, of the top K or at K ids. The limit is the head's product alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import asyncopd
from bench.families.base import (
    COMPILED,
    EAGER,
    LIMIT,
    OURS,
    PRODUCT_TOLERANCE,
    Family,
    Provider,
    compiled,
    largest_difference,
    require,
    require_true,
    some_rows,
    worst,
)
from bench.families.extraction import torch_topk
from bench.inputs import HeadInputs, head_inputs


@dataclass(frozen=True)
class Oracle:
    rows: Tensor
    logprobs: Tensor  # [rows, V]
    k: int
    dtype: torch.dtype


def oracle(inputs: HeadInputs) -> Oracle:
    rows = some_rows(inputs.case.rows, inputs.hidden.device)
    hidden = inputs.hidden.detach()[rows].double()
    logits = torch.cat([hidden @ block.double().t() for block in inputs.weight.detach().split(8192)], 1)
    return Oracle(rows, logits.log_softmax(1), inputs.case.k, inputs.case.dtype)


def check(o: Oracle, top: asyncopd.TopK) -> float:
    """Rounding of the product may swap neighbours: the scores, not the order of the ids, are held to fp64."""
    ids, logprobs = top.ids[o.rows], top.logprobs[o.rows]
    best = o.logprobs.topk(o.k, dim=1).values
    error = worst(
        largest_difference(logprobs, o.logprobs.gather(1, ids)),
        largest_difference(logprobs, best),
    )
    require_true(bool((ids.sort(1).values.diff() > 0).all()), "ids: one occurs twice")
    return require(error, PRODUCT_TOLERANCE[o.dtype], "log-probabilities")


def limit(inputs: HeadInputs) -> Callable[[], Tensor]:
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    return lambda: torch.mm(hidden, weight.t(), out=logits)


def torch_linear_topk(hidden: Tensor, weight: Tensor, k: int) -> asyncopd.TopK:
    return torch_topk(hidden @ weight.t(), k)


def _prepare(function: Callable[..., asyncopd.TopK], i: HeadInputs) -> Callable[[], asyncopd.TopK]:
    return partial(function, i.hidden.detach(), i.weight.detach(), i.case.k)


LINEAR_TOPK = Family(
    name="linear_topk",
    title="Head + LSE + top-K log-probabilities",
    limit="the head's matrix product",
    error="nats",
    inputs=head_inputs,
    oracle=oracle,
    providers=(
        Provider(LIMIT, limit),
        Provider(EAGER, partial(_prepare, torch_linear_topk), check),
        Provider(COMPILED, lambda i: _prepare(compiled(torch_linear_topk), i), check),
        Provider(OURS, partial(_prepare, asyncopd.linear_topk_logprobs), check),
    ),
)


# ------------------------------------------------------------------------------------------------ at given ids


def torch_linear_gather(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return (hidden @ weight.t()).float().log_softmax(dim=1).gather(1, ids)


class Scores(NamedTuple):
    """What a teacher is asked for: its log-probabilities at the ids of the student's support."""

    ids: Tensor
    logprobs: Tensor


def _prepare_scores(function: Callable[..., Tensor], i: HeadInputs) -> Callable[[], Scores]:
    hidden, weight, ids = i.hidden.detach(), i.weight.detach(), i.support.ids
    return lambda: Scores(ids, function(hidden, weight, ids))


def check_scores(o: Oracle, out: Scores) -> float:
    error = largest_difference(out.logprobs[o.rows], o.logprobs.gather(1, out.ids[o.rows]))
    return require(error, PRODUCT_TOLERANCE[o.dtype], "log-probabilities")


LINEAR_GATHER = Family(
    name="linear_gather",
    title="Teacher scores: head + log-probabilities at K ids",
    limit="the head's matrix product",
    error="nats",
    inputs=head_inputs,
    oracle=oracle,
    providers=(
        Provider(LIMIT, limit),
        Provider(EAGER, partial(_prepare_scores, torch_linear_gather), check_scores),
        Provider(COMPILED, lambda i: _prepare_scores(compiled(torch_linear_gather), i), check_scores),
        Provider(OURS, partial(_prepare_scores, asyncopd.linear_gather_logprobs), check_scores),
    ),
)
