"""Training batches of the task, made a batch at a time in NumPy so that the model is the bottleneck."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from asyncopd.task.routes import (
    EOS_ID,
    FROM_ID,
    NUM_CELLS,
    PAD_ID,
    SIDE,
    Ints,
    choices,
    problem_cells,
    sample_choice,
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences and the rule's soft target at every answer position.

    tokens: int64 [B, L], prompt first. target_ids, target_probs: [B, L-2, MAX_CHOICES]; row t is the distribution of the
    token after tokens[:, t + 2]. Rows after eos have probabilities 0.
    """

    tokens: torch.Tensor
    target_ids: torch.Tensor
    target_probs: torch.Tensor


def _jump(rng: np.random.Generator, cell: Ints) -> Ints:
    """Where a broken prefix goes on: half of the time any cell, half of the time one at most three rows and columns away."""
    anywhere = rng.integers(0, NUM_CELLS, cell.shape)
    (y, x), (dy, dx) = np.divmod(cell, SIDE), rng.integers(-3, 4, (2, *cell.shape))
    near = np.clip(y + dy, 0, SIDE - 1) * SIDE + np.clip(x + dx, 0, SIDE - 1)
    return np.where(rng.random(cell.shape) < 0.5, anywhere, near)


def make_batch(
    rng: np.random.Generator, size: int, answer_tokens: int, *, jump_rate: float = 0.0, noise_rate: float = 0.0
) -> Batch:
    """Routes of ``size`` training problems, walked by the rule.

    With ``jump_rate`` 0 they are right answers: eos, then padding. Otherwise the prefixes are broken on purpose: at each
    place the walk jumps with that probability, always when it stands on the goal (so every
    sequence fills its ``answer_tokens``), and with ``noise_rate`` a token that is no cell stands in between. Where it
    jumped *to* is no target: targets are the rule's, after whatever was written.
    """
    goal, cell = problem_cells("train", rng.integers(0, 1 << 63, size).astype(np.uint64))
    tokens = np.full((size, 3 + answer_tokens), PAD_ID, np.int64)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = goal, FROM_ID, cell
    cells = np.empty((size, 1 + answer_tokens), np.int64)  # where the route stands at each place
    alive = np.ones((size, 1 + answer_tokens), bool)
    cells[:, 0] = cell
    for t in range(answer_tokens):
        token = sample_choice(rng, cell, goal)
        if jump_rate > 0:
            leave = (rng.random(size) < jump_rate) | (token == EOS_ID)
            token = np.where(leave, _jump(rng, cell), token)
            noise = rng.random(size) < noise_rate
            token = np.where(noise, rng.choice([FROM_ID, PAD_ID], size), token)
        else:
            token = np.where(alive[:, t], token, PAD_ID)
            alive[:, t + 1] = alive[:, t] & (token != EOS_ID)
        cell = np.where(token < NUM_CELLS, token, cell)
        tokens[:, 3 + t], cells[:, t + 1] = token, cell
    ids, probs = choices(cells, np.broadcast_to(goal[:, None], cells.shape))
    probs *= alive[..., None]
    return Batch(torch.from_numpy(tokens), torch.from_numpy(ids), torch.from_numpy(probs))


def soft_cross_entropy(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean KL(rule || model) in nats over the rows that have a target; logits [B, L, V] of ``batch.tokens``."""
    logprobs = logits[:, 2:].float().log_softmax(-1).gather(-1, batch.target_ids)
    q = batch.target_probs
    kl = torch.xlogy(q, q) - q * logprobs
    return kl.sum() / q.sum()
