"""Log-probabilities at K ids of each row and their gradient, from logits."""

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
    TOLERANCE,
    Family,
    Provider,
    compiled,
    largest_difference,
    relative_difference,
    require,
    some_rows,
)
from bench.inputs import LogitsInputs, logits_inputs


class Gathered(NamedTuple):
    logprobs: Tensor  # [N, K]
    dlogits: Tensor  # [N, V]


@dataclass(frozen=True)
class Oracle:
    """Some rows in fp64: dz = scatter(g at ids) - (sum g) softmax(z)."""

    rows: Tensor
    logprobs: Tensor
    dlogits: Tensor
    dtype: torch.dtype


def oracle(inputs: LogitsInputs) -> Oracle:
    rows = some_rows(inputs.case.rows, inputs.logits.device)
    logits, ids, grad = inputs.logits[rows].double(), inputs.ids[rows], inputs.grad[rows].double()
    logprobs = logits.log_softmax(1)
    dlogits = (-grad.sum(1, keepdim=True) * logprobs.exp()).scatter_add_(1, ids, grad)
    return Oracle(rows, logprobs.gather(1, ids), dlogits, inputs.case.dtype)


def check(o: Oracle, out: Gathered) -> float:
    require(relative_difference(out.dlogits[o.rows], o.dlogits), TOLERANCE[o.dtype], "gradient")
    error = largest_difference(out.logprobs[o.rows], o.logprobs)
    return require(error, TOLERANCE[torch.float32], "log-probabilities")


def torch_gather(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.float().log_softmax(dim=1).gather(1, ids)


def limit(inputs: LogitsInputs) -> Callable[[], Tensor]:
    out = torch.empty_like(inputs.logits)

    def read_then_read_and_write() -> Tensor:
        out.copy_(inputs.logits)
        return inputs.logits.amax(dim=1)

    return read_then_read_and_write


def _prepare(function: Callable[[Tensor, Tensor], Tensor], inputs: LogitsInputs) -> Callable[[], Gathered]:
    logits = inputs.logits.detach().requires_grad_()

    def forward_and_backward() -> Gathered:
        logprobs = function(logits, inputs.ids)
        (dlogits,) = torch.autograd.grad(logprobs, logits, inputs.grad)
        return Gathered(logprobs.detach(), dlogits)

    return forward_and_backward


GATHER = Family(
    name="gather",
    title="Log-probabilities at K ids, forward + backward, from logits",
    limit="one read (amax), then one copy, of the logits",
    error="nats",
    inputs=logits_inputs,
    oracle=oracle,
    providers=(
        Provider(LIMIT, limit),
        Provider(EAGER, partial(_prepare, torch_gather), check),
        Provider(COMPILED, lambda i: _prepare(compiled(torch_gather), i), check),
        Provider(OURS, partial(_prepare, asyncopd.gather_logprobs), check),
    ),
)
