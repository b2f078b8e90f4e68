"""Rollout, teacher and learner processes over shared memory, on one node.

One supervisor (the calling process) schedules; each worker has its own pipe to it and shares no
lock with anybody. Models come in through three protocols: `RolloutEngine`, `Scorer`, `Learner`.
"""

from asyncopd.pipeline.config import PipelineConfig
from asyncopd.pipeline.errors import PipelineError, StallError, WorkerError
from asyncopd.pipeline.metrics import PipelineStatus, RunResult
from asyncopd.pipeline.protocols import Learner, Rollout, RolloutEngine, RolloutRequest, Scorer
from asyncopd.pipeline.run import run_pipeline
from asyncopd.pipeline.shared import TensorSpec
from asyncopd.pipeline.slots import SlotArena, SlotSpec, SlotView, Span
from asyncopd.pipeline.weights import WeightSegment, specs_of

__all__ = [
    "Learner",
    "PipelineConfig",
    "PipelineError",
    "PipelineStatus",
    "Rollout",
    "RolloutEngine",
    "RolloutRequest",
    "RunResult",
    "Scorer",
    "SlotArena",
    "SlotSpec",
    "SlotView",
    "Span",
    "StallError",
    "TensorSpec",
    "WeightSegment",
    "WorkerError",
    "run_pipeline",
    "specs_of",
]
