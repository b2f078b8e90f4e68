"""The embedded task: travel along a line of a railway map that only the weights know.

512 stations lie on 24 lines of 7 to 78 stations; about one station in five is a junction of two. A prompt names a
line, a direction and a station on it. An answer is where a traveller stops: each stop is one, two or three stations
further along the line, the terminus is the last, then comes eos. Many answers are right, so they are checked, never
compared, and the teacher's distribution has an entropy. Answers are as long as the way: mostly short, up to 78 tokens.

The rule is Markov: from the last station written it prefers the next station to the one after that, and so on. A
station that is not on the line belongs to one line in the first place, its home line; from there the rule goes on along
that one in the same direction. So it says what to do after *any* prefix, however broken, and a teacher trained on
broken prefixes stays reliable where a student drifts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

Split = Literal["train", "heldout"]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

NUM_STATIONS, NUM_LINES = 512, 24  # ids 0..NUM_STATIONS-1 are stations
LINE_ID = NUM_STATIONS  # the first of NUM_LINES line tokens
DIRECTION_ID = LINE_ID + NUM_LINES  # outbound, inbound
EOS_ID = DIRECTION_ID + 2
PAD_ID = EOS_ID + 1
VOCAB_SIZE = PAD_ID + 1

STEP_PROBS = (0.6, 0.3, 0.1)  # of the next three stations, renormalised near the terminus
MAX_CHOICES = len(STEP_PROBS)
_HELDOUT_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Map:
    """The network: which stations a line has, in order, and what the rule says.

    choices: int64 [lines, 2, stations, MAX_CHOICES], the tokens that may follow a station (eos at the terminus).
    probs: float32, same shape; 0 for unused places.
    """

    lines: tuple[tuple[int, ...], ...]
    choices: Ints
    probs: Floats


@cache
def railway_map() -> Map:
    """The one map. RandomState's stream is frozen by NumPy's policy, so the shipped weights always fit it."""
    random = np.random.RandomState(7)
    share = np.exp(random.normal(0.0, 0.7, NUM_LINES))
    sizes = np.maximum(6, np.round(share / share.sum() * NUM_STATIONS)).astype(int)
    sizes[sizes.argmax()] += NUM_STATIONS - sizes.sum()
    home = np.repeat(np.arange(NUM_LINES), sizes)
    stations = random.permutation(NUM_STATIONS)
    home_of = np.empty(NUM_STATIONS, int)
    home_of[stations] = home
    lines = [[int(s) for s in stations[home == line]] for line in range(NUM_LINES)]
    junctions: dict[int, int] = {}  # station -> its second line
    for line, size in enumerate(sizes):
        for _ in range(size // 4 + 1):
            station = int(random.randint(NUM_STATIONS))
            if home_of[station] != line and station not in junctions:
                junctions[station] = line
                lines[line].insert(random.randint(1, len(lines[line])), station)
    return _with_rule([tuple(line) for line in lines], home_of)


def _with_rule(lines: list[tuple[int, ...]], home_of: Ints) -> Map:
    shape = (NUM_LINES, 2, NUM_STATIONS, MAX_CHOICES)
    choices, probs = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    place = [{station: i for i, station in enumerate(line)} for line in lines]
    for line in range(NUM_LINES):
        for station in range(NUM_STATIONS):
            along = line if station in place[line] else int(home_of[station])
            i = place[along][station]
            for direction, ahead in enumerate((lines[along][i + 1 :], lines[along][:i][::-1])):
                near = ahead[:MAX_CHOICES] or (EOS_ID,)
                weights = np.array(STEP_PROBS[: len(near)])
                choices[line, direction, station, : len(near)] = near
                probs[line, direction, station, : len(near)] = weights / weights.sum()
    return Map(tuple(lines), choices, probs)


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. ``prompt_ids`` is (line token, direction token, start)."""

    prompt_ids: tuple[int, ...]


@cache
def problems(split: Split) -> Ints:
    """(line, direction, start) [P, 3] of every problem of a split, shuffled; a problem is in one split only.

    The first MAX_CHOICES starts of a line and direction are never held out: where the way leads on from there, other
    problems show too seldom.
    """
    everything = np.array(
        [
            (number, direction, station, i >= MAX_CHOICES)
            for number, line in enumerate(railway_map().lines)
            for direction in (0, 1)
            for i, station in enumerate(line[:: 1 - 2 * direction])
        ]
    )
    random = np.random.RandomState(11)
    everything = everything[random.permutation(len(everything))]
    heldout = (everything[:, 3] == 1) & (random.random_sample(len(everything)) < _HELDOUT_SHARE)
    return everything[heldout if split == "heldout" else ~heldout, :3].astype(np.int64)


class RailwayTask:
    """Problems, the check of an answer and the rule. Stateless; all tokens are ids, there is no text."""

    vocab_size: int = VOCAB_SIZE
    eos_token_id: int = EOS_ID
    pad_token_id: int = PAD_ID
    max_prompt_tokens: int = 3
    max_response_tokens: int = 96  # the longest line has fewer stations

    def problem(self, index: int, split: Split) -> Problem:
        """Problem number ``index`` (any integer) of a split; indices go round its problems in a fixed order."""
        rows = problems(split)
        line, direction, start = rows[index % len(rows)].tolist()
        return Problem((LINE_ID + line, DIRECTION_ID + direction, start))

    def check(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> bool:
        """Whether an answer, eos included, is right: every stop one to three stations on, the terminus, then eos."""
        line, direction, station = _parts(prompt_ids)
        choices = _choice_sets()[line][direction]
        for token in response_ids[:-1]:
            if token not in choices[station] or token >= NUM_STATIONS:
                return False
            station = token
        return len(response_ids) > 0 and response_ids[-1] == EOS_ID and EOS_ID in choices[station]

    def next_token_probs(self, prompt_ids: Sequence[int], response_prefix: Sequence[int]) -> Floats:
        """The rule: the target distribution [vocab_size] after any prefix; tokens that are no stations are skipped."""
        line, direction, start = _parts(prompt_ids)
        station = next((t for t in reversed(response_prefix) if 0 <= t < NUM_STATIONS), start)
        network = railway_map()
        target = np.zeros(VOCAB_SIZE, np.float32)
        np.add.at(target, network.choices[line, direction, station], network.probs[line, direction, station])
        return target


@cache
def _choice_sets() -> list[list[list[frozenset[int]]]]:
    """What may follow, as sets [line][direction][station]: a token at a time, plain Python is quicker than NumPy."""
    network = railway_map()
    return [
        [
            [frozenset(ids[probs > 0].tolist()) for ids, probs in zip(*tables, strict=True)]
            for tables in zip(*by_line, strict=True)
        ]
        for by_line in zip(network.choices, network.probs, strict=True)
    ]


def _parts(prompt_ids: Sequence[int]) -> tuple[int, int, int]:
    """Line, direction and start of a prompt; ValueError if it is none."""
    if len(prompt_ids) == 3:
        line, direction, start = prompt_ids[0] - LINE_ID, prompt_ids[1] - DIRECTION_ID, prompt_ids[2]
        if 0 <= line < NUM_LINES and direction in (0, 1) and 0 <= start < NUM_STATIONS:
            return line, direction, start
    raise ValueError(f"prompt_ids: got {list(prompt_ids)}, expected (line token, direction token, station)")
