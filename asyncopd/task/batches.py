"""Training batches of the task, made a batch at a time in NumPy so that the model is the bottleneck."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asyncopd.task.railway import DIRECTION_ID, EOS_ID, LINE_ID, NUM_STATIONS, PAD_ID, Floats, Ints, railway_map

PROMPT = 3  # tokens


@dataclass(frozen=True, slots=True)
class SoftBatch:
    """tokens: int64 [B, 3 + L]. After each of tokens[:, 2:] the rule's target_ids, target_probs [B, L + 1, C]."""

    tokens: Tensor
    target_ids: Tensor
    target_probs: Tensor


def _pick(random: np.random.Generator, ids: Ints, probs: Floats) -> Ints:
    """One draw [B] from ids, probs [B, C]."""
    passed = random.random(len(ids))[:, None] > probs.cumsum(axis=1)
    return ids[np.arange(len(ids)), np.minimum(passed.sum(axis=1), ids.shape[1] - 1)]


def broken_walks(random: np.random.Generator, problems: Ints, length: int, jump_rate: float) -> SoftBatch:
    """Walks by the rule that jump to random stations, with the rule's target at every place: the teacher's lessons.

    problems: (line, direction, start) [B, 3]. Walks jump with `jump_rate`, and always where the rule says eos, so each
    fills its length. Where a walk jumped *to* is no target; what comes after any station, right or wrong, is.
    """
    network = railway_map()
    line, direction, station = problems.T
    size = len(problems)
    tokens = np.empty((size, PROMPT + length), np.int64)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = LINE_ID + line, DIRECTION_ID + direction, station
    for t in range(length):
        chosen = _pick(random, network.choices[line, direction, station], network.probs[line, direction, station])
        jump = (random.random(size) < jump_rate) | (chosen == EOS_ID)
        station = np.where(jump, random.integers(0, NUM_STATIONS, size), chosen)
        tokens[:, PROMPT + t] = station
    at = (line[:, None], direction[:, None], tokens[:, PROMPT - 1 :])
    return SoftBatch(
        torch.from_numpy(tokens), torch.from_numpy(network.choices[at]), torch.from_numpy(network.probs[at])
    )


def right_answers(random: np.random.Generator, problems: Ints, length: int) -> Tensor:
    """Right answers drawn by the rule, int64 [B, 3 + L], padded with PAD_ID: the student's few examples."""
    network = railway_map()
    line, direction, station = problems.T
    tokens = np.full((len(problems), PROMPT + length), PAD_ID, np.int64)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = LINE_ID + line, DIRECTION_ID + direction, station
    under_way = np.ones(len(problems), bool)
    for t in range(length):
        chosen = _pick(random, network.choices[line, direction, station], network.probs[line, direction, station])
        tokens[under_way, PROMPT + t] = chosen[under_way]
        under_way &= chosen != EOS_ID
        station = np.where(under_way, chosen, station)
    longest = int((tokens != PAD_ID).sum(axis=1).max())
    return torch.from_numpy(tokens[:, :longest])
