"""What the pipeline asks of a model: three small protocols, each built inside its own worker.

A factory is any picklable callable without arguments, such as a module-level function wrapped in
``functools.partial`` with its configuration. It runs in the worker, after the thread count is set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from asyncopd.pipeline.shared import TensorSpec

if TYPE_CHECKING:  # slots.py stores the Rollout of this file
    from asyncopd.pipeline.slots import SlotView


@dataclass(slots=True)
class RolloutRequest:
    """A prompt to answer. ``uid`` is unique in a run; a refused one comes back under its own."""

    uid: int
    prompt_ids: list[int]


@dataclass(slots=True)
class Rollout:
    """A finished sequence; L response tokens, K entries in a support.

    Args:
        uid: of the request.
        prompt_ids: of the request.
        response_ids: int32 [L], L >= 1, with the end-of-sequence token if one was written.
        versions: int32 [L], the weights' version that wrote each token.
        ids: int32 [L, K], the support drawn while decoding; None if the teacher will choose it.
        log_weights: float32 [L, K] or None, likewise.
        correct: whether the answer is right, where the task can tell.
    """

    uid: int
    prompt_ids: list[int]
    response_ids: Tensor
    versions: Tensor
    ids: Tensor | None = None
    log_weights: Tensor | None = None
    correct: bool | None = None


class RolloutEngine(Protocol):
    """Batched decoding that takes new prompts and new weights between any two steps."""

    places: int
    """How many sequences it decodes at once."""

    def active(self) -> int:
        """Sequences submitted and not finished."""

    def submit(self, requests: list[RolloutRequest]) -> None:
        """Start these; never more than ``places - active()``."""

    def step(self) -> list[Rollout]:
        """One decode step of everything active; returns what it finished."""

    def load_weights(self, named: dict[str, Tensor], version: int) -> None:
        """Copy new weights. The tensors are shared memory and valid during this call only."""


class Scorer(Protocol):
    """The teacher."""

    def score(self, slot: SlotView) -> None:
        """Write ``slot.teacher_logprobs``; ids and log_weights too where the teacher draws."""


class Learner(Protocol):
    """The student being trained. Its version is the number of optimizer steps done."""

    def weight_spec(self) -> list[TensorSpec]:
        """Names, shapes and dtypes of the weights that the rollout engines load."""

    def named_weights(self) -> dict[str, Tensor]:
        """The current weights, with the names and shapes of `weight_spec`."""

    def step(self, batch: list[tuple[SlotView, list[int]]]) -> dict[str, float]:
        """One optimizer step on these sequences (by index) of these slots; returns metrics."""

    def save(self, path: str) -> None:
        """Write a checkpoint, a file or a folder, to ``path``, which does not exist."""


RolloutFactory = Callable[[], RolloutEngine]
ScorerFactory = Callable[[], Scorer]
LearnerFactory = Callable[[], Learner]
