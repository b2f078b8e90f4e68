"""A family: an op, its inputs, its specification in fp64, and those who provide it.

A provider is prepared once for its inputs (buffers are allocated, a compiler is set up) and gives a call without
arguments; its output is checked against the oracle before anything is timed.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, FamilyName

# The limit is not an implementation: it moves the bytes or does the products that every implementation needs.
LIMIT, EAGER, COMPILED, OURS = "limit", "torch eager", "torch.compile", "asyncopd"

CHECKED_ROWS = 16  # rows of the logits that are computed again in fp64

# Largest error that is rounding and not a fault, by the dtype that a result is rounded to.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# The same where the logits are products of hidden states and a head. Eager torch rounds them to the dtype of the head:
# logits of 16 to 32 are 0.125 apart in bf16 while the signal log p - log q is about 0.3. (In fp32 they are 2e-6 apart,
# and a sum of a thousand products is off by ten times that.) The error of everybody is in the table.
PRODUCT_TOLERANCE = {torch.float32: 5e-4, torch.float16: 5e-2, torch.bfloat16: 3e-1}


class Unavailable(Exception):
    """A provider that cannot run here; the message says why."""


class Wrong(AssertionError):
    """A provider whose result is not the specification's; the message says by how much."""


@dataclass(frozen=True, slots=True)
class Provider:
    """Who does the work: `prepare(inputs)` gives the call, `check(oracle, output)` its error or raises Wrong."""

    name: str
    prepare: Callable[[Any], Callable[[], Any]]
    check: Callable[[Any, Any], float] | None = None  # None for the limit, which has no result


@dataclass(frozen=True, slots=True)
class Family:
    """`error` says what the providers' errors are: of log-probabilities in nats, or relative to the largest value."""

    name: FamilyName
    title: str
    limit: str  # what the limit provider does
    error: str
    inputs: Callable[[Case, torch.device], Any]
    oracle: Callable[[Any], Any]
    providers: tuple[Provider, ...]

    def provider(self, name: str) -> Provider:
        return next(provider for provider in self.providers if provider.name == name)


def on_backend(provider: Provider, backend: str) -> Provider:
    """asyncopd's line with one backend forced, whatever it would choose by itself."""

    def forced(call: Callable[..., Any], *arguments: Any) -> Any:
        before = os.environ.get("ASYNCOPD_BACKEND")
        os.environ["ASYNCOPD_BACKEND"] = backend
        try:
            return call(*arguments)
        finally:
            del os.environ["ASYNCOPD_BACKEND"]
            if before is not None:
                os.environ["ASYNCOPD_BACKEND"] = before

    def prepare(inputs: Any) -> Callable[[], Any]:
        return partial(forced, forced(provider.prepare, inputs))

    return replace(provider, name=f"{provider.name} on {backend}", prepare=prepare)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one static shape; earlier cases' code is dropped, so that no recompilation limit is met."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def some_rows(rows: int, device: torch.device) -> Tensor:
    """Rows spread over all of them, the first and the last included."""
    return torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS), device=device).round().long()


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    """NaN anywhere gives NaN, which no bound accepts."""
    return float((actual.detach().double() - expected.double()).abs().max())


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest error over largest value: of a gradient, small entries beside large ones need no digits of their own."""
    return largest_difference(actual, expected) / float(expected.abs().max())


def worst(*errors: float) -> float:
    """The largest; NaN if one is, where max() might drop it."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def sum_difference(actual: Tensor, terms: Tensor) -> float:
    """Error of a sum over the sum of its terms' sizes: what cancels has taken its digits with it."""
    return largest_difference(actual, terms.sum()) / float(terms.abs().sum())


def require(error: float, at_most: float, what: str) -> float:
    if not error <= at_most:
        raise Wrong(f"{what} off by {error:.2e}, expected at most {at_most:.0e}")
    return error


def require_true(condition: bool, what: str) -> None:
    if not condition:
        raise Wrong(what)
