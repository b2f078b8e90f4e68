"""Top-64 and supports from logits, beside torch and beside the limit: one read of the logits, measured in the same run.

`make bench` runs it and prints one table a case; the ratio behind each time is against the fastest of its case, the
read. Every provider's result is checked before it is timed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case
from torch import Tensor

import asyncopd

K, HEAD, TAIL = 64, 16, 48


def read_once(logits: Tensor) -> Tensor:
    return logits.amax(dim=1)


def torch_topk(logits: Tensor) -> tuple[Tensor, Tensor]:
    top = logits.float().topk(K, dim=1)
    return top.values - logits.float().logsumexp(dim=1, keepdim=True), top.indices


def asyncopd_topk(logits: Tensor) -> tuple[Tensor, Tensor]:
    top = asyncopd.topk_logprobs(logits, K)
    return top.logprobs, top.ids


def torch_support(logits: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = logits.float().log_softmax(dim=1)
    head = logprobs.topk(HEAD, dim=1).indices
    rest = logprobs.exp().scatter_(1, head, 0.0)
    ids = torch.cat([head, torch.multinomial(rest, TAIL, replacement=True)], dim=1)
    return logprobs.gather(1, ids), ids


def asyncopd_support(logits: Tensor) -> tuple[Tensor, Tensor]:
    draw = asyncopd.sample_support(logits, num_samples=TAIL, head=HEAD, seed=0)
    return draw.logprobs, draw.ids


def is_right(provider: Callable[[Tensor], Any], logits: Tensor) -> bool:
    """Log-probabilities against fp64 at the ids that the provider chose."""
    result = provider(logits)
    if isinstance(result, Tensor):
        return True
    logprobs, ids = result
    exact = logits.double().log_softmax(dim=1).gather(1, ids)
    return bool((logprobs.double() - exact).abs().max() < 1e-4)


@pytest.mark.parametrize(
    "provider", [read_once, torch_topk, asyncopd_topk, torch_support, asyncopd_support], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_extraction(benchmark: Any, case: Case, provider: Callable[[Tensor], Any]) -> None:
    logits = case.logits()
    assert is_right(provider, logits)
    benchmark.group = f"{case.name}: {case.rows} x {case.vocab}, {case.nbytes / 1e6:.1f} MB, K = {K}"
    benchmark.pedantic(provider, args=(logits,), rounds=7, warmup_rounds=1)
    benchmark.extra_info["GB/s"] = round(case.nbytes / benchmark.stats.stats.min / 1e9, 2)
