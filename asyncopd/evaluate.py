"""Held-out accuracy: every problem answered once, sampled, and checked."""

import math
from dataclasses import dataclass

from transformers import PreTrainedModel

from asyncopd.engines.decode import Decoder
from asyncopd.pipeline.protocols import RolloutRequest
from asyncopd.task import RailwayTask


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`correct` of `problems`; a share, with the standard error of a sample of that size."""

    correct: int
    problems: int

    @property
    def share(self) -> float:
        return self.correct / self.problems

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.share * (1 - self.share) / self.problems)

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % ± {100 * self.standard_error:.1f}"


def evaluate(
    model: PreTrainedModel,
    task: RailwayTask,
    *,
    problems: int,
    places: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
) -> Accuracy:
    """Answer held-out problems 0..problems-1 by sampling at `temperature`; the same seed gives the same answers."""
    decoder = Decoder(
        model,
        places=min(places, problems),
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
    decoder.submit([RolloutRequest(i, list(task.problem(i, "heldout").prompt_ids)) for i in range(problems)])
    correct = 0
    while decoder.active():
        correct += sum(bool(rollout.correct) for rollout in decoder.step())
    return Accuracy(correct, problems)
