"""The fused heads' specification in fp64: loss, some rows of dH and some rows of dW.

The vocabulary is walked in blocks, so that neither the logits nor the weight are ever held whole in fp64. One gradient
serves all losses: dz = scatter(c at ids) - s softmax(z), with s = sum c where the normaliser is exact and 0 where it is
sampled.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.families.base import PRODUCT_TOLERANCE, relative_difference, require, require_true, sum_difference, worst
from bench.families.kl import weighted_terms, zero_sum
from bench.inputs import HeadInputs

VOCAB_BLOCK = 8192
CHECKED_ROWS, CHECKED_IDS = 8, 64


@dataclass(frozen=True)
class Gradients:
    """What a provider returns."""

    loss: Tensor
    dhidden: Tensor  # [N, H]
    dweight: Tensor | None  # [V, H]; None of a frozen head


@dataclass(frozen=True)
class Oracle:
    terms: Tensor  # sum to the loss
    rows: Tensor
    dhidden: Tensor  # [rows, H]
    ids: Tensor
    dweight: Tensor  # [ids, H]
    dtype: torch.dtype

    def check(self, out: Gradients, *, frozen: bool = False, at_most: float = 1.0) -> float:
        """The largest error; Wrong if it is above `at_most` times the usual tolerance, or if a dW is missing."""
        require_true((out.dweight is None) == frozen, "dW: there, or missing, where the other was expected")
        error = worst(sum_difference(out.loss, self.terms), relative_difference(out.dhidden[self.rows], self.dhidden))
        if out.dweight is not None:
            error = worst(error, relative_difference(out.dweight[self.ids], self.dweight))
        return require(error, at_most * PRODUCT_TOLERANCE[self.dtype], "loss, dH or dW")


class Head:
    """The valid rows of the inputs, and what every loss needs of the vocabulary: computed once, on first use."""

    def __init__(self, inputs: HeadInputs) -> None:
        self.inputs = inputs
        mask = inputs.mask
        rows = inputs.case.rows
        self.valid = torch.arange(rows, device=inputs.hidden.device) if mask is None else mask.nonzero().squeeze(1)
        self.hidden = inputs.hidden.detach()[self.valid].double()
        self.weight = inputs.weight.detach()
        self.targets = inputs.targets[self.valid, None]
        self.support = inputs.support[self.valid]
        self._lse: Tensor | None = None

    @property
    def lse(self) -> Tensor:
        if self._lse is None:
            parts = [(self.hidden @ block.double().t()).logsumexp(1) for block in self.weight.split(VOCAB_BLOCK)]
            self._lse = torch.stack(parts, 1).logsumexp(1)
        return self._lse

    def logits_at(self, ids: Tensor) -> Tensor:
        rows = zip(ids.split(64), self.hidden.split(64), strict=True)
        return torch.cat([torch.einsum("nkh,nh->nk", self.weight[i].double(), h) for i, h in rows])

    def oracle(self, terms: Tensor, coefficients: Tensor, ids: Tensor, *, normalised: bool) -> Oracle:
        """coefficients [valid, K] at ids, already divided by the number of valid rows."""
        chosen = torch.linspace(0, len(self.valid) - 1, min(CHECKED_ROWS, len(self.valid))).round().long()
        chosen = chosen.to(self.valid.device)
        vocab = self.weight.shape[0]
        spread = torch.linspace(0, vocab - 1, CHECKED_IDS // 2, device=ids.device).round().long()
        some_ids = torch.cat([ids[:: max(1, len(ids) // 32), 0], spread]).unique()
        # dW at some ids: every valid row takes part.
        dz = (coefficients[:, :, None] * (ids[:, :, None] == some_ids)).sum(1)
        if normalised:
            total = coefficients.sum(1, keepdim=True)
            logits = self.hidden @ self.weight[some_ids].double().t()
            dz -= total * (logits - self.lse[:, None]).exp()
        dweight = dz.t() @ self.hidden
        # dH of some rows: the whole vocabulary takes part.
        dhidden = torch.einsum("nk,nkh->nh", coefficients[chosen], self.weight[ids[chosen]].double())
        if normalised:
            for block in self.weight.split(VOCAB_BLOCK):
                block = block.double()
                p = (self.hidden[chosen] @ block.t() - self.lse[chosen, None]).exp()
                dhidden -= total[chosen] * (p @ block)
        return Oracle(terms, self.valid[chosen], dhidden, some_ids, dweight, self.inputs.case.dtype)


def exact(head: Head) -> Oracle:
    s = head.support
    logprobs = head.logits_at(s.ids) - head.lse[:, None]
    c = weighted_terms(logprobs, s.teacher_logprobs.double(), s.log_weights.double()) / len(head.valid)
    return head.oracle(c, c, s.ids, normalised=True)


def exact_zero_sum(head: Head) -> Oracle:
    """As `exact` with baseline="mean": the coefficients sum to 0, so the softmax has no part in the gradient."""
    s, log_weights = head.support, head.support.log_weights.double()
    logprobs = head.logits_at(s.ids) - head.lse[:, None]
    terms = weighted_terms(logprobs, s.teacher_logprobs.double(), log_weights) / len(head.valid)
    return head.oracle(terms, zero_sum(terms, logprobs, log_weights), s.ids, normalised=False)


def sampled(head: Head) -> Oracle:
    """Normalised over the support: log p = z - log sum w exp(z), so c loses its w p weighted share of sum c."""
    s, log_weights = head.support, head.support.log_weights.double()
    logits = head.logits_at(s.ids)
    logprobs = logits - (log_weights + logits).logsumexp(1, keepdim=True)
    c = weighted_terms(logprobs, s.teacher_logprobs.double(), log_weights) / len(head.valid)
    share = (log_weights + logprobs).exp()
    return head.oracle(c, c - c.sum(1, keepdim=True) * share, s.ids, normalised=False)


def cross_entropy(head: Head) -> Oracle:
    """c = -1 at the target."""
    count = len(head.valid)
    terms = (head.lse[:, None] - head.logits_at(head.targets)) / count
    c = torch.full_like(head.targets, -1, dtype=torch.float64) / count
    return head.oracle(terms, c, head.targets, normalised=True)
