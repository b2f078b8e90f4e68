"""The map, the splits, the rule after any prefix, and the check of answers."""

import numpy as np
import pytest

from asyncopd.task.railway import (
    DIRECTION_ID,
    EOS_ID,
    LINE_ID,
    NUM_STATIONS,
    PAD_ID,
    VOCAB_SIZE,
    RailwayTask,
    problems,
    railway_map,
)

TASK = RailwayTask()
CHECKSUM_LINES, CHECKSUM_CHOICES = 8337, 34218277


def walk(prompt: tuple[int, ...], random: np.random.Generator, prefix: tuple[int, ...] = ()) -> list[int]:
    """An answer drawn by the rule, going on from a prefix."""
    answer = list(prefix)
    while not answer or answer[-1] != EOS_ID:
        probs = TASK.next_token_probs(prompt, answer).astype(float)
        answer.append(int(random.choice(VOCAB_SIZE, p=probs / probs.sum())))
    return answer


def test_map_is_the_one_that_the_weights_were_trained_on() -> None:
    network = railway_map()
    assert sum(len(line) * (i + 1) for i, line in enumerate(network.lines)) == CHECKSUM_LINES
    assert int((network.choices * np.arange(1, 4)).sum()) == CHECKSUM_CHOICES


def test_every_station_is_on_one_or_two_lines() -> None:
    counts = np.bincount([s for line in railway_map().lines for s in line], minlength=NUM_STATIONS)
    assert set(counts) == {1, 2}
    assert 0.15 < (counts == 2).mean() < 0.35
    assert all(len(set(line)) == len(line) for line in railway_map().lines)


def test_splits_share_no_problem_and_cover_all() -> None:
    train, heldout = ({tuple(p) for p in problems(split).tolist()} for split in ("train", "heldout"))
    assert not train & heldout
    assert len(train) + len(heldout) == sum(2 * len(line) for line in railway_map().lines)
    assert len(heldout) > 120


def test_problems_are_numbered_for_ever() -> None:
    assert TASK.problem(5, "train") == TASK.problem(5 + len(problems("train")), "train")
    assert TASK.problem(5, "train") != TASK.problem(6, "train")
    assert TASK.problem(-1, "heldout") == TASK.problem(len(problems("heldout")) - 1, "heldout")


def test_answer_lengths_have_a_long_tail() -> None:
    random = np.random.default_rng(0)
    lengths = sorted(len(walk(TASK.problem(i, "train").prompt_ids, random)) for i in range(400))
    assert lengths[200] < 15
    assert lengths[-20] > 2.5 * lengths[200]
    assert lengths[-1] <= TASK.max_response_tokens
    assert max(len(line) for line in railway_map().lines) < TASK.max_response_tokens


def test_rule_gives_a_distribution_after_any_prefix() -> None:
    random = np.random.default_rng(1)
    for i in range(200):
        prompt = TASK.problem(i, "train").prompt_ids
        broken = random.integers(0, VOCAB_SIZE, random.integers(0, 6)).tolist()
        probs = TASK.next_token_probs(prompt, broken)
        assert probs.sum() == pytest.approx(1.0)
        assert set(np.flatnonzero(probs)) <= {*range(NUM_STATIONS), EOS_ID}
        assert walk(prompt, random, tuple(b for b in broken if b != EOS_ID))[-1] == EOS_ID  # it always arrives


def test_right_answers_are_judged_right_and_any_change_wrong() -> None:
    random = np.random.default_rng(2)
    changed_right = 0
    for i in range(150):
        prompt = TASK.problem(i, "heldout").prompt_ids
        answer = walk(prompt, random)
        assert TASK.check(prompt, answer)
        assert not TASK.check(prompt, answer[:-1])  # no eos
        assert not TASK.check(prompt, [*answer, EOS_ID])  # something after eos
        assert not TASK.check(prompt, [*answer[:-1], PAD_ID])
        if len(answer) > 4:
            assert not TASK.check(prompt, [*answer[:-3], EOS_ID])  # too early
            assert not TASK.check(prompt, [answer[0], *answer])  # the same stop twice
        place = random.integers(len(answer))
        wrong = [*answer[:place], int(random.integers(NUM_STATIONS)), *answer[place + 1 :]]
        changed_right += wrong != answer and TASK.check(prompt, wrong)
    assert changed_right <= 3  # another station that happens to be right as well
    assert not TASK.check(TASK.problem(0, "train").prompt_ids, [])


def test_every_move_of_the_rule_is_one_that_the_check_allows() -> None:
    for i in range(100):
        prompt = TASK.problem(i, "train").prompt_ids
        for token in np.flatnonzero(TASK.next_token_probs(prompt, [])):
            rest = walk(prompt, np.random.default_rng(i), (int(token),)) if token != EOS_ID else [EOS_ID]
            assert TASK.check(prompt, rest)


def test_station_off_the_line_leads_along_its_home_line() -> None:
    line = railway_map().lines[0]
    other = next(
        s for s in railway_map().lines[3] if all(s not in n for i, n in enumerate(railway_map().lines) if i != 3)
    )
    i = railway_map().lines[3].index(other)
    ahead = [*railway_map().lines[3][i + 1 : i + 4]] or [EOS_ID]
    probs = TASK.next_token_probs((LINE_ID, DIRECTION_ID, line[0]), [other])
    assert set(np.flatnonzero(probs)) == set(ahead)
    assert probs[ahead[0]] == probs.max()


@pytest.mark.parametrize("prompt", [(0, DIRECTION_ID, 3), (LINE_ID, 3, 3), (LINE_ID, DIRECTION_ID, EOS_ID), (LINE_ID,)])
def test_prompt_that_is_none_is_refused(prompt: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="prompt_ids: got"):
        TASK.check(prompt, [EOS_ID])
