"""Held-out accuracy: problems answered by sampling, and checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from asyncopd.engines.decode import Decoder
from asyncopd.pipeline.protocols import RolloutRequest
from asyncopd.task import RailwayTask

# Sequences of an evaluation are numbered from here, those of a run from 0: they never share random numbers.
FIRST_UID = 1 << 27


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Right answers to some problems, each problem answered about as often as any other.

    share: of the answers. standard_error: over the problems, whose answers are not independent of one another.
    """

    share: float
    standard_error: float
    answers: int
    problems: int

    @classmethod
    def of(cls, right: Sequence[Sequence[bool]]) -> "Accuracy":
        """From the answers to each problem."""
        answers, problems = sum(map(len, right)), len(right)
        share = sum(map(sum, right)) / answers
        squares = sum((sum(r) - share * len(r)) ** 2 for r in right)
        correction = problems / (problems - 1) if problems > 1 else 1.0
        return cls(share, math.sqrt(squares * correction) / answers, answers, problems)

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % ± {100 * self.standard_error:.1f}"


def evaluate(
    model: PreTrainedModel,
    task: RailwayTask,
    *,
    answers: int,
    places: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
) -> Accuracy:
    """Sample `answers` answers at `temperature`, going round the held-out problems; a seed gives the same answers."""
    decoder = Decoder(
        model,
        places=min(places, answers),
        max_prompt_tokens=task.max_prompt_tokens,
        max_response_tokens=task.max_response_tokens,
        eos_token_id=task.eos_token_id,
        draw="token",
        num_scores=1,
        head=0,
        temperature=temperature,
        seed=seed,
        check=task.check,
    )
    prompts = [task.problem(i, "heldout").prompt_ids for i in range(answers)]
    decoder.submit([RolloutRequest(FIRST_UID + i, list(prompt)) for i, prompt in enumerate(prompts)])
    right: dict[tuple[int, ...], list[bool]] = {}
    while decoder.active():
        for rollout in decoder.step():
            right.setdefault(tuple(rollout.prompt_ids), []).append(bool(rollout.correct))
    return Accuracy.of(list(right.values()))
