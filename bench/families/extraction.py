"""Top-K and supports from logits. The limit is one read of the logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import asyncopd
from bench.cases import Case
from bench.families.base import (
    COMPILED,
    EAGER,
    LIMIT,
    OURS,
    TOLERANCE,
    Family,
    Provider,
    compiled,
    largest_difference,
    require,
    require_true,
    some_rows,
    worst,
)
from bench.inputs import LogitsInputs, logits_inputs

# bf16 and fp16 logits are exact numbers and log-probabilities are fp32 whatever the logits are.
BOUND = TOLERANCE[torch.float32]


@dataclass(frozen=True)
class Oracle:
    """Some rows in fp64."""

    case: Case
    rows: Tensor
    logits: Tensor
    lse: Tensor

    def at(self, ids: Tensor) -> Tensor:
        return self.logits.gather(1, ids.long()) - self.lse[:, None]


def oracle(inputs: LogitsInputs) -> Oracle:
    rows = some_rows(inputs.case.rows, inputs.logits.device)
    logits = inputs.logits[rows].double()
    return Oracle(inputs.case, rows, logits, logits.logsumexp(1))


def limit(inputs: LogitsInputs) -> Callable[[], Tensor]:
    return lambda: inputs.logits.amax(dim=1)


# ------------------------------------------------------------------------------------------------------- top-K


def torch_topk(logits: Tensor, k: int) -> asyncopd.TopK:
    # The values of bf16 logits are exact, their sum in bf16 would not be.
    top = logits.topk(k, dim=1)
    lse = logits.float().logsumexp(dim=1)
    return asyncopd.TopK(top.indices, top.values.float() - lse[:, None], lse)


def check_topk(o: Oracle, top: asyncopd.TopK, *, stable: bool) -> float:
    """`stable`: ids as a stable sort has them. Others may order ties as they like."""
    ids, logprobs, lse = (part[o.rows] for part in top)
    expected = o.logits.sort(dim=1, descending=True, stable=True)
    k = o.case.k
    if stable:
        require_true(bool(torch.equal(ids, expected.indices[:, :k])), "ids: not those of a stable sort")
    require_true(bool(torch.equal(o.logits.gather(1, ids), expected.values[:, :k])), "ids: not the K largest logits")
    error = worst(largest_difference(logprobs, o.at(ids)), largest_difference(lse, o.lse))
    return require(error, BOUND, "log-probabilities")


TOPK = Family(
    name="topk",
    title="LSE + top-K log-probabilities from logits",
    limit="one read of the logits (amax)",
    error="nats",
    inputs=logits_inputs,
    oracle=oracle,
    providers=(
        Provider(LIMIT, limit),
        Provider(EAGER, lambda i: partial(torch_topk, i.logits, i.case.k), partial(check_topk, stable=False)),
        Provider(
            COMPILED, lambda i: partial(compiled(torch_topk), i.logits, i.case.k), partial(check_topk, stable=False)
        ),
        Provider(OURS, lambda i: partial(asyncopd.topk_logprobs, i.logits, i.case.k), partial(check_topk, stable=True)),
    ),
)


# ---------------------------------------------------------------------------------------------------- supports


class Drawn(NamedTuple):
    """The fields of asyncopd.Draw that are checked, [N, K] each."""

    ids: Tensor
    log_weights: Tensor
    logprobs: Tensor


def torch_support(logits: Tensor, head: int, samples: int) -> Drawn:
    logprobs = logits.float().log_softmax(dim=1)
    top = logprobs.topk(head, dim=1).indices
    rest = logprobs.exp().scatter_(1, top, 0.0)
    tail = torch.multinomial(rest, samples, replacement=True)
    ids = torch.cat([top, tail], dim=1)
    chosen = logprobs.gather(1, ids)
    log_weights = rest.sum(dim=1, keepdim=True).log() - math.log(samples) - chosen
    log_weights[:, :head] = 0.0
    return Drawn(ids, log_weights, chosen)


def asyncopd_support(logits: Tensor, head: int, samples: int) -> Drawn:
    draw = asyncopd.sample_support(logits, num_samples=samples, head=head, seed=0)
    return Drawn(draw.ids, draw.log_weights, draw.logprobs)


def check_support(o: Oracle, drawn: Drawn) -> float:
    """Head and weights as specified, no draw inside the head. The draws' law is the tests' business."""
    ids, log_weights, logprobs = (part[o.rows] for part in drawn)
    head, samples = o.case.head, o.case.samples
    top = o.logits.topk(head, dim=1).values
    require_true(bool(torch.equal(o.logits.gather(1, ids[:, :head]), top)), "ids: head is not the largest logits")
    rest = o.logits.scatter(1, ids[:, :head], -torch.inf)
    require_true(bool(rest.gather(1, ids[:, head:]).isfinite().all()), "ids: a draw lies in the head")
    exact = o.at(ids)
    log_rest = rest.logsumexp(1, keepdim=True) - o.lse[:, None]
    weights = torch.cat([torch.zeros_like(exact[:, :head]), log_rest - math.log(samples) - exact[:, head:]], 1)
    error = worst(largest_difference(logprobs, exact), largest_difference(log_weights, weights))
    return require(error, BOUND, "log-probabilities or log-weights")


def _prepare_support(function: Callable[..., Drawn], i: LogitsInputs) -> Callable[[], Drawn]:
    return partial(function, i.logits, i.case.head, i.case.samples)


SUPPORT = Family(
    name="support",
    title="Head + tail support with its log-probabilities from logits",
    limit="one read of the logits (amax)",
    error="nats",
    inputs=logits_inputs,
    oracle=oracle,
    providers=(
        Provider(LIMIT, limit),
        Provider(EAGER, partial(_prepare_support, torch_support), check_support),
        Provider(COMPILED, lambda i: _prepare_support(compiled(torch_support), i), check_support),
        Provider(OURS, partial(_prepare_support, asyncopd_support), check_support),
    ),
)
