"""Tensors for a case from a seeded generator: peaked like a language model's, the same in every run.

Made on the CPU whatever the device, so that a GPU and a CPU are given the same numbers. Cases of size "gpu", which no
CPU runs, are made on the device: one core would draw their 1.2 billion normal numbers for ten seconds each.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import asyncopd
from bench.cases import Case

SPREAD = 2.5  # standard deviation of the logits
NUM_PEAKS, PEAK = 20, 8.0  # tokens of a row that stand out, and by how much
ROW_CHUNK = 128  # rows whose logits are made at a time


@dataclass(frozen=True)
class LogitsInputs:
    case: Case
    logits: Tensor  # [N, V]
    ids: Tensor  # int64 [N, K], some of them among the peaks
    grad: Tensor  # fp32 [N, K], an upstream gradient of the log-probabilities


@dataclass(frozen=True)
class LossInputs:
    case: Case
    student_logprobs: Tensor  # fp32 [N, K], requires a gradient
    support: asyncopd.Support


@dataclass(frozen=True)
class HeadInputs:
    case: Case
    hidden: Tensor  # [N, H], requires a gradient
    weight: Tensor  # [V, H], requires a gradient
    support: asyncopd.Support
    targets: Tensor  # int64 [N], for losses with one target a row
    mask: Tensor | None  # bool [N]

    def with_masked(self, share: float) -> "HeadInputs":
        """The same tensors with another share of the rows masked."""
        return replace(self, case=replace(self.case, masked=share), mask=_mask(self.case.rows, share, self.hidden))


@dataclass(frozen=True)
class Random:
    """torch's random functions with one generator, on the device that makes the numbers."""

    generator: torch.Generator

    @classmethod
    def of(cls, case: Case, device: torch.device) -> "Random":
        return cls(torch.Generator(device if case.size == "gpu" else "cpu").manual_seed(0))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def below(self, end: int, *shape: int) -> Tensor:
        return torch.randint(0, end, shape, generator=self.generator, device=self.generator.device)

    def peaks(self, rows: int, vocab: int) -> Tensor:
        return self.below(vocab, rows, min(NUM_PEAKS, vocab // 16))


def logits_inputs(case: Case, device: torch.device) -> LogitsInputs:
    rng = Random.of(case, device)
    rows, vocab = case.rows, case.model.vocab
    logits = torch.empty(rows, vocab, dtype=case.dtype, device=device)
    ids = rng.below(vocab, rows, case.k)
    for start in range(0, rows, ROW_CHUNK):
        chunk = slice(start, min(start + ROW_CHUNK, rows))
        z = rng.normal(chunk.stop - start, vocab).mul_(SPREAD)
        peaks = rng.peaks(z.shape[0], vocab)
        z.scatter_add_(1, peaks, torch.full(peaks.shape, PEAK, device=z.device))
        logits[chunk] = z.to(device, case.dtype)
        ids[chunk, : peaks.shape[1]] = peaks[:, : case.k]
    grad = rng.normal(rows, case.k)
    return LogitsInputs(case, logits, ids.to(device), grad.to(device))


def loss_inputs(case: Case, device: torch.device) -> LossInputs:
    """Head + tail supports with everything that reaches the loss: a student that moved on, a teacher that differs."""
    rng = Random.of(case, device)
    shape = (case.rows, case.k)
    behaviour = (SPREAD * rng.normal(*shape)).log_softmax(1) - 0.1
    log_weights = -math.log(case.samples) - behaviour
    log_weights[:, : case.head] = 0.0
    student = behaviour + 0.1 * rng.normal(*shape)
    teacher = behaviour + 0.3 * rng.normal(*shape)
    ids = rng.below(case.model.vocab, *shape)
    support = asyncopd.Support(ids.to(device), teacher.to(device), log_weights.to(device), "head_tail")
    return LossInputs(case, student.to(device).requires_grad_(), support)


def head_inputs(case: Case, device: torch.device) -> HeadInputs:
    """Rows of W have norm SPREAD, and a hidden state leans towards those of its peaks."""
    rng = Random.of(case, device)
    (rows, vocab, width), dtype = (case.rows, case.model.vocab, case.model.width), case.dtype
    weight = rng.normal(vocab, width).mul_(SPREAD / math.sqrt(width))
    peaks = rng.peaks(rows, vocab)
    hidden = rng.normal(rows, width)
    hidden += PEAK / SPREAD**2 * weight[peaks].sum(1)
    weight, hidden = weight.to(device, dtype), hidden.to(device, dtype)
    draws = []
    for start in range(0, rows, ROW_CHUNK):
        streams = torch.arange(start, min(start + ROW_CHUNK, rows), device=device)
        logits = hidden[start : start + ROW_CHUNK] @ weight.t()
        draws.append(asyncopd.sample_support(logits, num_samples=case.samples, head=case.head, seed=streams))
    behaviour, log_weights = torch.cat([d.logprobs for d in draws]), torch.cat([d.log_weights for d in draws])
    noise = 0.3 * rng.normal(*behaviour.shape)
    support = asyncopd.Support(
        torch.cat([d.ids for d in draws]), behaviour + noise.to(device), log_weights, "head_tail"
    )
    mask = _mask(rows, case.masked, hidden)
    return HeadInputs(case, hidden.requires_grad_(), weight.requires_grad_(), support, peaks[:, 0].to(device), mask)


def _mask(rows: int, share: float, like: Tensor) -> Tensor | None:
    if share == 0.0:
        return None
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    return (order >= round(share * rows)).to(like.device)
