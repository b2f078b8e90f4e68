"""What crosses a pipe: slot numbers, small headers and prompts; never tokens' scores or weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncopd.pipeline.protocols import RolloutRequest
from asyncopd.pipeline.shared import TensorSpec


@dataclass(slots=True)
class StageStats:
    """Counters of one worker since `Start`; cumulative, so that a lost update does no harm."""

    busy_s: float = 0.0  # wall time inside engine.step, score or learner.step; waiting for a core counts
    cpu_s: float = 0.0  # CPU time of all threads of the worker meanwhile
    wait_s: float = 0.0  # idle for want of prompts, slots to score, or a batch
    backpressure_s: float = 0.0  # idle because no slot was free
    tokens: int = 0  # response tokens finished, scored or trained on
    steps: int = 0  # decode steps that returned (rollout workers)


@dataclass(slots=True, frozen=True)
class SequenceInfo:
    """What the scheduler must know of one sequence in a slot."""

    uid: int
    oldest_version: int
    response_tokens: int
    correct: bool | None


# --- supervisor to any worker ---


@dataclass(slots=True)
class Attach:
    """The weights' memory has its size now."""

    weights: list[TensorSpec]


@dataclass(slots=True)
class Start:
    """Everybody is ready: count from here."""


@dataclass(slots=True)
class Stop:
    """Leave."""


# --- supervisor to a rollout worker ---


@dataclass(slots=True)
class Prompts:
    requests: list[RolloutRequest]


@dataclass(slots=True)
class FillSlot:
    slot: int


@dataclass(slots=True)
class LoadWeights:
    buffer: int
    version: int


# --- supervisor to the teacher and the learner ---


@dataclass(slots=True)
class Score:
    slot: int


@dataclass(slots=True)
class Step:
    """Train on these indices of these slots, then publish to a buffer unless it is None."""

    version: int  # that the weights have after the step
    parts: list[tuple[int, list[int]]]
    publish_buffer: int | None


@dataclass(slots=True)
class Publish:
    buffer: int
    version: int


@dataclass(slots=True)
class Save:
    path: str


# --- worker to supervisor ---


@dataclass(slots=True)
class Ready:
    """The engine is built."""

    places: int = 0  # rollout workers
    weights: list[TensorSpec] = field(default_factory=list)  # learner


@dataclass(slots=True)
class Failed:
    traceback: str


@dataclass(slots=True)
class Progress:
    """Sign of life of a worker that is busy for long."""

    stats: StageStats


@dataclass(slots=True)
class WeightsLoaded:
    """Done with this version and all before it."""

    version: int


@dataclass(slots=True)
class SlotFilled:
    slot: int
    sequences: list[SequenceInfo]
    stats: StageStats


@dataclass(slots=True)
class SlotScored:
    slot: int
    stats: StageStats


@dataclass(slots=True)
class StepDone:
    metrics: dict[str, float]
    stats: StageStats


@dataclass(slots=True)
class Published:
    buffer: int
    version: int


@dataclass(slots=True)
class Saved:
    """The checkpoint is in its place."""
