"""What a run reports: one flat dict a step, a status for live displays, a result at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncopd.pipeline.messages import StageStats
from asyncopd.pipeline.schedule import Batch

STAGES = ("rollout", "teacher", "learner")


@dataclass(slots=True, frozen=True)
class PipelineStatus:
    """A snapshot for a live display.

    Args:
        step, steps: optimizer steps done, and in the run.
        elapsed_s: seconds since all workers were ready.
        stage_tokens: response tokens that each stage has finished.
        stage_busy_s: wall seconds that each stage has been inside its engine (mean over its workers).
        slots: number of slots by state (free, filling, filled, scoring, ready, training).
        outstanding: sequences granted and not consumed.
        staleness_max: largest staleness consumed so far.
        refused: sequences refused so far because they were too old.
    """

    step: int
    steps: int
    elapsed_s: float
    stage_tokens: dict[str, int]
    stage_busy_s: dict[str, float]
    slots: dict[str, int]
    outstanding: int
    staleness_max: int
    refused: int


@dataclass(slots=True, frozen=True)
class RunResult:
    """Figures of a whole run. Times run from the moment all workers are ready to the last step.

    Args:
        steps: optimizer steps done.
        wall_seconds: start-up and checkpoint excluded.
        stage_tokens: response tokens by stage.
        stage_busy_seconds: wall time inside the engine's step, score or train call by stage; the mean
            over workers of a stage with several. Waiting for a core counts as busy.
        stage_cpu_seconds: CPU time that the worker, all its threads together, spent in the same calls;
            likewise a mean. Work on an accelerator is not in it.
        stage_tokens_per_second: tokens / busy seconds: what the stage does while it works.
        overlap: sum of the stages' busy seconds / wall seconds, so by wall time inside the stages; at
            most 3. Waiting for a core counts as busy.
        cpu_overlap: sum of the stages' CPU seconds / wall seconds; at most 3 times threads_per_worker.
        learner_tokens_per_second: response tokens consumed / wall seconds.
        staleness_mean, staleness_max: over consumed sequences (each counts once, however long it is), in
            optimizer steps between its oldest token's weights and the weights that trained on it.
        refused: sequences that came too late and were rolled out again.
        consumed_sequences, consumed_tokens: what the learner trained on (response tokens).
        rollout_wait_seconds: rollout workers idle for want of prompts (mean over workers).
        learner_wait_seconds: learner idle for want of data.
        backpressure_seconds: rollout workers idle for want of a slot (mean over workers).
        cache_bytes_per_token: bytes that travel per response token.
        checkpoint: where the learner saved, or None.
    """

    steps: int
    wall_seconds: float
    stage_tokens: dict[str, int]
    stage_busy_seconds: dict[str, float]
    stage_cpu_seconds: dict[str, float]
    stage_tokens_per_second: dict[str, float]
    overlap: float
    cpu_overlap: float
    learner_tokens_per_second: float
    staleness_mean: float
    staleness_max: int
    refused: int
    consumed_sequences: int
    consumed_tokens: int
    rollout_wait_seconds: float
    learner_wait_seconds: float
    backpressure_seconds: float
    cache_bytes_per_token: int
    checkpoint: str | None


@dataclass(slots=True)
class Totals:
    """Counters that the figures of one step are differences of."""

    rollout_wait_s: float = 0.0
    learner_wait_s: float = 0.0
    backpressure_s: float = 0.0
    rollout_tokens: int = 0
    teacher_tokens: int = 0
    learner_tokens: int = 0
    refused: int = 0


@dataclass(slots=True)
class Meter:
    """Collects the workers' counters and the consumed batches of one run."""

    rollout: list[StageStats]  # per rollout worker
    teacher: StageStats = field(default_factory=StageStats)
    learner: StageStats = field(default_factory=StageStats)
    started: float = field(default_factory=time.perf_counter)
    finished: float | None = None
    sequences: int = 0
    tokens: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0
    _last: Totals = field(default_factory=Totals)

    def elapsed(self) -> float:
        return (self.finished or time.perf_counter()) - self.started

    def stage_tokens(self) -> dict[str, int]:
        rollout = sum(stats.tokens for stats in self.rollout)
        return dict(zip(STAGES, (rollout, self.teacher.tokens, self.learner.tokens), strict=True))

    def stage_busy(self) -> dict[str, float]:
        rollout = _mean([stats.busy_s for stats in self.rollout])
        return dict(zip(STAGES, (rollout, self.teacher.busy_s, self.learner.busy_s), strict=True))

    def stage_cpu(self) -> dict[str, float]:
        rollout = _mean([stats.cpu_s for stats in self.rollout])
        return dict(zip(STAGES, (rollout, self.teacher.cpu_s, self.learner.cpu_s), strict=True))

    def step(self, step: int, learner: dict[str, float], batch: Batch, refused: int) -> dict[str, float]:
        """The metrics of one optimizer step; counters and seconds are since the step before."""
        self.sequences += len(batch.sequences)
        self.tokens += sum(info.response_tokens for info in batch.sequences)
        self.staleness_sum += sum(batch.staleness)
        self.staleness_max = max(self.staleness_max, *batch.staleness)
        tokens = self.stage_tokens()
        now = Totals(
            rollout_wait_s=_mean([stats.wait_s for stats in self.rollout]),
            learner_wait_s=self.learner.wait_s,
            backpressure_s=_mean([stats.backpressure_s for stats in self.rollout]),
            rollout_tokens=tokens["rollout"],
            teacher_tokens=tokens["teacher"],
            learner_tokens=tokens["learner"],
            refused=refused,
        )
        last, self._last = self._last, now
        metrics: dict[str, float] = {
            "step": step,
            "elapsed_s": self.elapsed(),
            **learner,
            "sample/staleness_mean": _mean(batch.staleness),
            "sample/staleness_max": max(batch.staleness),
            "sample/sequences": len(batch.sequences),
            "sample/refused": now.refused - last.refused,
            "perf/rollout_wait_s": now.rollout_wait_s - last.rollout_wait_s,
            "perf/learner_wait_s": now.learner_wait_s - last.learner_wait_s,
            "rollout/backpressure_s": now.backpressure_s - last.backpressure_s,
            "rollout/tokens": now.rollout_tokens - last.rollout_tokens,
            "teacher/tokens": now.teacher_tokens - last.teacher_tokens,
            "learner/tokens": now.learner_tokens - last.learner_tokens,
        }
        if judged := [info.correct for info in batch.sequences if info.correct is not None]:
            metrics["rollout/accuracy"] = _mean(judged)
        return metrics

    def result(self, *, steps: int, refused: int, cache_bytes: int, checkpoint: str | None) -> RunResult:
        wall, tokens, busy, cpu = self.elapsed(), self.stage_tokens(), self.stage_busy(), self.stage_cpu()
        return RunResult(
            steps=steps,
            wall_seconds=wall,
            stage_tokens=tokens,
            stage_busy_seconds=busy,
            stage_cpu_seconds=cpu,
            stage_tokens_per_second={stage: tokens[stage] / busy[stage] if busy[stage] else 0.0 for stage in STAGES},
            overlap=sum(busy.values()) / wall,
            cpu_overlap=sum(cpu.values()) / wall,
            learner_tokens_per_second=self.tokens / wall,
            staleness_mean=self.staleness_sum / max(self.sequences, 1),
            staleness_max=self.staleness_max,
            refused=refused,
            consumed_sequences=self.sequences,
            consumed_tokens=self.tokens,
            rollout_wait_seconds=_mean([stats.wait_s for stats in self.rollout]),
            learner_wait_seconds=self.learner.wait_s,
            backpressure_seconds=_mean([stats.backpressure_s for stats in self.rollout]),
            cache_bytes_per_token=cache_bytes,
            checkpoint=checkpoint,
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
