"""The embedded task: routes on an open map.

The map has SIDE x SIDE cells, each cell one token. A prompt names a goal and a start; an answer is a route: hops of one or
two cells, each one strictly on the way (a hop of h cells brings the route h cells closer to the goal, in
4-neighbour distance), and eos once it stands on the goal. Every such route is right, so answers are
checked, never compared.

The rule is Markov: from the last cell written (the start, if none) all hops on the way are equally likely;
on the goal comes eos. It therefore says what to do after *any* prefix, however broken, and a teacher trained
on broken prefixes stays reliable where a student drifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

Split = Literal["train", "heldout"]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

SIDE = 24  # cells along one side of the map
NUM_CELLS = SIDE * SIDE  # ids 0..NUM_CELLS-1 are cells, row by row
FROM_ID, EOS_ID, PAD_ID = NUM_CELLS, NUM_CELLS + 1, NUM_CELLS + 2
VOCAB_SIZE = NUM_CELLS + 3
MAX_DISTANCE = 2 * (SIDE - 1)  # between opposite corners
MAX_CHOICES = 5  # two hops of one cell and three of two

# Distances of the problems are lognormal: mostly short, with a long tail up to the corners.
_DISTANCE_MEDIAN, _DISTANCE_SIGMA = 13.0, 0.6
_HELDOUT_ONE_IN = 8
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. ``prompt_ids`` is (goal, FROM_ID, start)."""

    prompt_ids: tuple[int, ...]

    @property
    def goal(self) -> int:
        return self.prompt_ids[0]

    @property
    def start(self) -> int:
        return self.prompt_ids[2]

    @property
    def distance(self) -> int:
        """4-neighbour distance from start to goal, in cells: the longest right answer without eos."""
        return int(distance(np.int64(self.start), np.int64(self.goal)))


def distance(cell: npt.ArrayLike, goal: npt.ArrayLike) -> Ints:
    """4-neighbour distance in cells; both int [...]."""
    (y0, x0), (y1, x1) = np.divmod(cell, SIDE), np.divmod(goal, SIDE)
    return np.asarray(np.abs(y1 - y0) + np.abs(x1 - x0), dtype=np.int64)


@cache
def _choice_table() -> tuple[Ints, Floats, Ints]:
    """Token-id offsets [5, 5, MAX_CHOICES], their probabilities, and their number [5, 5].

    The hops on the way depend only on the way that is left, clipped to two cells in each direction.
    """
    offsets = np.zeros((5, 5, MAX_CHOICES), np.int64)
    probs = np.zeros((5, 5, MAX_CHOICES), np.float32)
    counts = np.zeros((5, 5), np.int64)
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            hops = [
                int(np.sign(dy)) * hy * SIDE + int(np.sign(dx)) * hx
                for hy in range(abs(dy) + 1)
                for hx in range(abs(dx) + 1)
                if 1 <= hy + hx <= 2
            ]
            counts[dy + 2, dx + 2] = len(hops)
            offsets[dy + 2, dx + 2, : len(hops)] = hops
            probs[dy + 2, dx + 2, : len(hops)] = 1.0 / max(len(hops), 1)
    return offsets, probs, counts


def choices(cell: Ints, goal: Ints) -> tuple[Ints, Floats]:
    """What may follow ``cell`` [...] on the way to ``goal`` [...]: ids and probabilities [..., MAX_CHOICES].

    Unused places repeat an id with probability 0. On the goal the only choice is eos.
    """
    offsets, probs, _ = _choice_table()
    (y0, x0), (y1, x1) = np.divmod(cell, SIDE), np.divmod(goal, SIDE)
    row, col = np.clip(y1 - y0, -2, 2) + 2, np.clip(x1 - x0, -2, 2) + 2
    ids, weights = cell[..., None] + offsets[row, col], probs[row, col]
    arrived = cell == goal
    ids[arrived] = EOS_ID
    weights[arrived] = np.eye(1, MAX_CHOICES, dtype=np.float32)[0]
    return ids, weights


def sample_choice(rng: np.random.Generator, cell: Ints, goal: Ints) -> Ints:
    """One draw [...] of the rule for every (cell, goal)."""
    offsets, _, counts = _choice_table()
    (y0, x0), (y1, x1) = np.divmod(cell, SIDE), np.divmod(goal, SIDE)
    row, col = np.clip(y1 - y0, -2, 2) + 2, np.clip(x1 - x0, -2, 2) + 2
    pick = rng.integers(0, np.maximum(counts[row, col], 1))
    return np.where(cell == goal, EOS_ID, cell + offsets[row, col, pick])


def _mix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The splitmix64 finaliser: a fixed, well-mixed hash, the same on every machine."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def is_heldout(goal: npt.ArrayLike, start: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether a (goal, start) pair belongs to the held-out split: a hash of the pair decides, so none is in both."""
    key = np.asarray(goal, np.uint64) * np.uint64(NUM_CELLS) + np.asarray(start, np.uint64)
    return np.asarray(_mix64(np.atleast_1d(key)) % np.uint64(_HELDOUT_ONE_IN) == 0)


@cache
def _pairs(split: Split) -> tuple[Ints, Ints, npt.NDArray[np.float64]]:
    """All (goal, start) keys of a split by distance: keys [P], where each distance begins [D+2], cdf of distances [D+1]."""
    keys = np.arange(NUM_CELLS * NUM_CELLS, dtype=np.int64)
    goal, start = np.divmod(keys, NUM_CELLS)
    keep = is_heldout(goal, start) == (split == "heldout")
    keys, far = keys[keep], distance(start, goal)[keep]
    order = np.argsort(far, kind="stable")
    keys, far = keys[order], far[order]
    begins = np.searchsorted(far, np.arange(MAX_DISTANCE + 2)).astype(np.int64)
    d = np.arange(1, MAX_DISTANCE + 1)
    weight = np.exp(-0.5 * (np.log(d / _DISTANCE_MEDIAN) / _DISTANCE_SIGMA) ** 2) / d
    weight = np.concatenate([[0.0], weight]) * (np.diff(begins) > 0)  # never a start on the goal
    return keys, begins, np.cumsum(weight) / weight.sum()


def problem_cells(split: Split, index: npt.NDArray[np.uint64]) -> tuple[Ints, Ints]:
    """Goals and starts [N] of the problems numbered ``index`` [N] of a split."""
    keys, begins, cdf = _pairs(split)
    first = _mix64(index ^ np.uint64(0x5EED if split == "train" else 0x7E57ED00))
    u = np.stack([first, _mix64(first)]).astype(np.float64) / 2.0**64
    far = np.minimum(np.searchsorted(cdf, u[0], side="right"), len(cdf) - 1)
    low, high = begins[far], begins[far + 1]
    place = np.minimum(low + (u[1] * (high - low)).astype(np.int64), high - 1)
    goal, start = np.divmod(keys[place], NUM_CELLS)
    return goal, start


class RouteTask:
    """Problems, the check of an answer and the rule. Stateless; all tokens are ids, there is no text."""

    vocab_size: int = VOCAB_SIZE
    eos_token_id: int = EOS_ID
    pad_token_id: int = PAD_ID
    max_prompt_tokens: int = 3
    max_response_tokens: int = 64  # the longest right answer is MAX_DISTANCE + 1 = 47, eos included

    def problem(self, index: int, split: Split) -> Problem:
        """Problem number ``index`` (any integer) of a split; the same pair of arguments gives the same problem."""
        goal, start = problem_cells(split, np.array([index & _MASK64], np.uint64))
        return Problem((int(goal[0]), FROM_ID, int(start[0])))

    def check(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> bool:
        """Whether an answer, eos included, is a right route: only hops on the way, one eos, on the goal."""
        goal, cell = self._ends(prompt_ids)
        for token in response_ids:
            if cell == EOS_ID:
                return False  # something after eos
            ids, probs = choices(np.array(cell), np.array(goal))
            if token not in ids[probs > 0]:
                return False
            cell = token
        return cell == EOS_ID

    def next_token_probs(self, prompt_ids: Sequence[int], response_prefix: Sequence[int]) -> Floats:
        """The rule: the target distribution [vocab_size] after any prefix.

        It depends on the goal and on the last cell written alone; tokens that are no cells are skipped.
        """
        goal, start = self._ends(prompt_ids)
        cell = next((t for t in reversed(response_prefix) if 0 <= t < NUM_CELLS), start)
        ids, probs = choices(np.array(cell), np.array(goal))
        target = np.zeros(VOCAB_SIZE, np.float32)
        np.add.at(target, ids, probs)
        return target

    @staticmethod
    def _ends(prompt_ids: Sequence[int]) -> tuple[int, int]:
        """Goal and start of a prompt."""
        if len(prompt_ids) == 3 and prompt_ids[1] == FROM_ID:
            goal, _, start = (int(t) for t in prompt_ids)
            if 0 <= goal < NUM_CELLS and 0 <= start < NUM_CELLS:
                return goal, start
        raise ValueError(f"prompt_ids: expected (goal cell, {FROM_ID}, start cell), got {prompt_ids!r}")
