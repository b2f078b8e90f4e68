"""Small random models and the supports of the design's table of draws, for the tests of the losses (fp64)."""

import math
from dataclasses import dataclass

import torch
from each_backend import Backend
from torch import Tensor

from asyncopd import Support

DRAWS = ("teacher_top_k", "student_top_k", "samples", "sampled_token", "teacher_samples", "head_tail")


@dataclass(frozen=True)
class Scene:
    """Log-probabilities [N, V] of the student, the teacher and the behaviour policy."""

    log_p: Tensor
    log_q: Tensor
    log_mu: Tensor


def scene(rng: torch.Generator, rows: int = 5, vocab: int = 11, *, stale: bool = True, same: bool = False) -> Scene:
    """`stale`: the student has moved on from mu. `same`: the teacher is the student."""
    z = 1.5 * torch.randn(rows, vocab, generator=rng, dtype=torch.float64)
    log_p = z.log_softmax(1)
    noise = torch.randn(rows, vocab, generator=rng, dtype=torch.float64)
    log_mu = (z + 0.5 * noise).log_softmax(1) if stale else log_p
    log_q = (1.5 * torch.randn(rows, vocab, generator=rng, dtype=torch.float64)).log_softmax(1)
    return Scene(log_p, log_p if same else log_q, log_mu)


def draw_ids(s: Scene, draw: str, rng: torch.Generator, samples: int = 6, head: int = 3) -> tuple[Tensor, Tensor]:
    """ids and log-weights [N, K] of one line of the design's table, by torch.multinomial."""
    rows = s.log_mu.shape[0]
    if draw == "teacher_top_k" or draw == "student_top_k":
        ids = (s.log_q if draw == "teacher_top_k" else s.log_mu).topk(samples, dim=1).indices
        return ids, torch.zeros(rows, samples, dtype=torch.float64)
    if draw in ("samples", "sampled_token", "teacher_samples"):
        policy = s.log_q if draw == "teacher_samples" else s.log_mu
        count = 1 if draw == "sampled_token" else samples
        ids = torch.multinomial(policy.exp(), count, replacement=True, generator=rng)
        return ids, -math.log(count) - policy.gather(1, ids)
    top = s.log_mu.topk(head, dim=1).indices
    rest = s.log_mu.scatter(1, top, -torch.inf)
    ids = torch.multinomial(rest.exp(), samples, replacement=True, generator=rng)
    log_w = rest.logsumexp(1, keepdim=True) - math.log(samples) - s.log_mu.gather(1, ids)
    return torch.cat([top, ids], 1), torch.cat([torch.zeros_like(top).double(), log_w], 1)


KINDS = {
    "teacher_top_k": "top_k",
    "student_top_k": "top_k",
    "sampled_token": "samples",
    "samples": "samples",
    "teacher_samples": "teacher_samples",
    "head_tail": "head_tail",
}


def support(s: Scene, draw: str, rng: torch.Generator, *, told: bool = True, samples: int = 6) -> Support:
    """A support of `s`; `told` whether it says how it was drawn."""
    ids, log_w = draw_ids(s, draw, rng, samples)
    return Support(ids, s.log_q.gather(1, ids), log_w, KINDS[draw] if told else None)  # type: ignore[arg-type]


def full_support(log_q: Tensor) -> Support:
    """Every token of the vocabulary, once."""
    ids = torch.arange(log_q.shape[1], device=log_q.device).expand(log_q.shape).contiguous()
    return Support(ids, log_q, torch.zeros_like(log_q))


def on(backend: Backend, s: Support) -> Support:
    """The same support, its scores in the backend's dtype."""
    return Support(*map(backend.tensor, (s.ids, s.teacher_logprobs, s.log_weights)), s.draw)


def with_pads(support: Support, columns: list[int]) -> Support:
    """The same support with a pad in front of each of the given columns."""
    pieces = [support.ids, support.teacher_logprobs, support.log_weights]
    fills = [-1, -math.inf, -math.inf]
    for column in sorted(columns, reverse=True):
        for i, fill in enumerate(fills):
            pad = torch.full_like(pieces[i][:, :1], fill)
            pieces[i] = torch.cat([pieces[i][:, :column], pad, pieces[i][:, column:]], 1)
    return Support(pieces[0], pieces[1], pieces[2], support.draw)
