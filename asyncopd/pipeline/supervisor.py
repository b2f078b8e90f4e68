"""The supervisor: an event loop over the workers' pipes that does what the scheduler decides."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from asyncopd.pipeline import messages as msg
from asyncopd.pipeline.checkpoint import clean_up
from asyncopd.pipeline.config import PipelineConfig
from asyncopd.pipeline.errors import PipelineError, StallError, WorkerError
from asyncopd.pipeline.learner_worker import learner_loop
from asyncopd.pipeline.metrics import Meter, PipelineStatus, RunResult
from asyncopd.pipeline.pacing import AsyncPacing, Pacing, SyncPacing
from asyncopd.pipeline.processes import (
    WorkerHandle,
    interrupts_deferred,
    pickle_factory,
    start_tracker,
    stop_workers,
)
from asyncopd.pipeline.protocols import LearnerFactory, RolloutFactory, ScorerFactory
from asyncopd.pipeline.rollout_worker import rollout_loop
from asyncopd.pipeline.schedule import NextPrompt, Scheduler
from asyncopd.pipeline.shared import SharedBytes, TensorSpec
from asyncopd.pipeline.teacher_worker import teacher_loop
from asyncopd.pipeline.weights import WeightBuffers, segment_bytes
from asyncopd.pipeline.worker import WorkerArgs

TICK_S = 0.25
TEACHER_DEPTH = 2  # slots at the teacher: one being scored, one so that it never waits for the pipe

OnStep = Callable[[dict[str, float]], None]
OnTick = Callable[[PipelineStatus], None]


@dataclasses.dataclass(slots=True)
class Harvest:
    """When a rollout worker last finished a sequence, and its counters then."""

    at: float
    tokens: int = 0
    steps: int = 0


class Supervisor:
    """One run. The scheduler decides; this sends, receives, and watches the workers."""

    def __init__(self, config: PipelineConfig, next_prompt: NextPrompt) -> None:
        self.config = config
        self.on_step: OnStep | None = None
        self.on_tick: OnTick | None = None
        self.buffers = WeightBuffers(config.rollout_workers)
        self.meter = Meter([msg.StageStats() for _ in range(config.rollout_workers)])
        self._next_prompt = next_prompt
        self._slot_memory = SharedBytes()
        self._weight_memory = SharedBytes()
        self._workers: list[WorkerHandle] = []  # rollout workers by index, teacher, learner
        self._places = [0] * config.rollout_workers
        self._weights: list[TensorSpec] = []
        self._scheduler: Scheduler | None = None
        self._timeout_s = config.startup_timeout_s
        self._saving = False
        self._next_tick = 0.0
        self._watched = math.inf  # time of the last tick
        self._harvests: list[Harvest] = []  # by rollout worker

    @property
    def teacher(self) -> WorkerHandle:
        return self._workers[-2]

    @property
    def learner(self) -> WorkerHandle:
        return self._workers[-1]

    @property
    def rollouts(self) -> list[WorkerHandle]:
        return self._workers[:-2]

    @property
    def scheduler(self) -> Scheduler:
        assert self._scheduler is not None, "no scheduler before every worker is ready"
        return self._scheduler

    def run(
        self,
        rollout: RolloutFactory,
        teacher: ScorerFactory,
        learner: LearnerFactory,
        checkpoint: str | Path | None,
    ) -> RunResult:
        """Start everything, train, save, stop everything."""
        finished = False
        try:
            self._spawn(rollout, teacher, learner)
            self._start()
            while not self.scheduler.done:
                self._dispatch()
                self._listen()
            self.meter.finished = time.perf_counter()
            if checkpoint is not None:
                self._save(str(checkpoint))
            finished = True
        finally:
            # A second Ctrl-C comes out of stop_workers; what is left to do is done all the same.
            with ExitStack() as ending:
                ending.callback(self._slot_memory.close)
                ending.callback(self._weight_memory.close)
                if checkpoint is not None and self._saving:
                    ending.callback(_clean_up, Path(checkpoint))
                stop_workers(self._workers, gently=finished)
        return self.meter.result(
            steps=self.scheduler.version,
            refused=self.scheduler.refused,
            cache_bytes=self.config.slot_spec().bytes_per_response_token,
            checkpoint=None if checkpoint is None else str(checkpoint),
        )

    # --- start and end ---

    def _spawn(self, rollout: RolloutFactory, teacher: ScorerFactory, learner: LearnerFactory) -> None:
        spec = self.config.slot_spec()
        self._slot_memory.resize(
            spec.nbytes,
            holds=f"{spec.num_slots} slots",
            lower="num_slots, sequences_per_slot, max_response_tokens or num_scores",
        )
        start_tracker()
        jobs: list[tuple[str, Callable[..., None], Callable[[], object]]] = [
            *((f"rollout-{i}", rollout_loop, rollout) for i in range(self.config.rollout_workers)),
            ("teacher", teacher_loop, teacher),
            ("learner", learner_loop, learner),
        ]
        args = WorkerArgs(
            factory=b"",
            slot_spec=spec,
            slot_memory=self._slot_memory,
            weight_memory=self._weight_memory,
            threads=self.config.threads_per_worker,
            heartbeat_s=min(1.0, self.config.stall_timeout_s / 4),
        )
        for name, loop, factory in jobs:
            pickled = pickle_factory(name, factory)
            with interrupts_deferred():
                self._workers.append(WorkerHandle(name, loop, dataclasses.replace(args, factory=pickled)))

    def _start(self) -> None:
        """Wait until every engine is built and has version 0 of the weights; start the clock."""
        while not all(handle.ready for handle in self._workers):
            self._listen()
        config = self.config
        self._weight_memory.resize(
            segment_bytes(self._weights),
            holds="two buffers of the student's weights",
            lower="the size of the student",
            reserved=config.slot_spec().nbytes,
        )
        for handle in (*self.rollouts, self.learner):
            handle.send(msg.Attach(self._weights))
        pacing: Pacing = SyncPacing() if config.mode == "sync" else AsyncPacing(config.max_staleness)
        self._scheduler = Scheduler(
            pacing,
            steps=config.steps,
            batch_size=config.batch_size,
            sequences_per_slot=config.sequences_per_slot,
            max_staleness=config.max_staleness,
            num_slots=config.slot_count(),
            places=self._places,
            next_prompt=self._next_prompt,
            wait_for_late=config.late == "wait",
        )
        self._publish()
        while self._owes():
            self._listen()
        for handle in self._workers:
            handle.send(msg.Start())
        self._timeout_s = config.stall_timeout_s
        self._harvests = [Harvest(time.monotonic()) for _ in self.rollouts]
        self.meter.started = time.perf_counter()

    def _save(self, path: str) -> None:
        self.learner.send(msg.Save(path))
        self._saving = True
        self._timeout_s = self.config.startup_timeout_s  # like loading a model, it waits for the disk
        while self._saving:
            self._listen()

    # --- decisions to commands ---

    def _dispatch(self) -> None:
        """Send out everything that can begin now."""
        scheduler = self.scheduler
        scheduler.refuse_expired()
        for worker, slot in scheduler.slots_to_fill():
            self._workers[worker].send(msg.FillSlot(slot))
        for worker, requests in scheduler.prompts_to_grant():
            self._workers[worker].send(msg.Prompts(requests))
        while scheduler.scoring < TEACHER_DEPTH and (filled := scheduler.slot_to_score()) is not None:
            self.teacher.send(msg.Score(filled))
        if (batch := scheduler.batch_to_train()) is not None:
            version = scheduler.version + 1
            # No free buffer: this version is skipped, the next one publishes newer weights.
            buffer = self.buffers.free() if version < scheduler.steps else None
            if buffer is not None:
                self.buffers.writing(buffer)
            self.learner.send(msg.Step(version, batch.parts, buffer))
        elif not scheduler.training:
            # Rollouts may be short of a version that was skipped; nothing else would bring it.
            self._publish()

    def _publish(self) -> None:
        """Have the idle learner publish its version, unless that is done or no buffer is free."""
        version = self.scheduler.version
        buffer = self.buffers.free()
        if self.buffers.version < version and not self.buffers.being_written and buffer is not None:
            self.buffers.writing(buffer)
            self.learner.send(msg.Publish(buffer, version))

    # --- messages to events ---

    def _listen(self) -> None:
        """Watch over the workers, wait a moment for messages, and book what they say."""
        self._watch()
        awaited: dict[Any, int] = {}
        for i, handle in enumerate(self._workers):
            awaited |= {handle.conn: i, handle.process.sentinel: i}
        pause = max(0.0, self._next_tick - time.monotonic())
        for index in sorted({awaited[ready] for ready in wait(awaited, pause)}):
            for message in self._workers[index].messages():
                self._book(index, message)

    def _book(self, index: int, message: object) -> None:
        """Enter one message of worker ``index`` in the books."""
        meter = self.meter
        match message:
            case msg.Ready(places=places, weights=weights):
                handle = self._workers[index]
                handle.ready = True
                if index < len(self._places):
                    self._places[index] = places
                if handle is self.learner:
                    if not weights:
                        raise WorkerError(handle.name, "has no weights to publish: its weight_spec() is empty")
                    self._weights = weights
            case msg.Progress(stats=stats):
                self._rolled_out(index, stats)
            case msg.WeightsLoaded(version=version):
                self.buffers.acknowledged(index, version)
                self.scheduler.weights_loaded(index, version)
            case msg.SlotFilled(slot=slot, sequences=sequences, stats=stats):
                self._rolled_out(index, stats)
                self.scheduler.slot_filled(index, slot, sequences)
            case msg.SlotScored(slot=slot, stats=stats):
                meter.teacher = stats
                self.scheduler.slot_scored(slot)
            case msg.StepDone(metrics=metrics, stats=stats):
                meter.learner = stats
                batch = self.scheduler.step_done()
                step = self.scheduler.version
                report = meter.step(step, metrics, batch, self.scheduler.refused)
                if self.on_step is not None:
                    self.on_step(report)
            case msg.Published(buffer=buffer, version=version):
                self.buffers.published(buffer, version)
                for handle in self.rollouts:
                    handle.send(msg.LoadWeights(buffer, version))
            case msg.Saved():
                self._saving = False
            case _:
                raise PipelineError(f"unknown message {message!r}")

    def _rolled_out(self, worker: int, stats: msg.StageStats) -> None:
        """Book the counters of a rollout worker."""
        self.meter.rollout[worker] = stats
        if self._harvests and stats.tokens > self._harvests[worker].tokens:
            self._harvests[worker] = Harvest(time.monotonic(), stats.tokens, stats.steps)

    # --- watching ---

    def _watch(self) -> None:
        """About four times a second: show the status, and see that everybody who owes is alive."""
        now = time.monotonic()
        if now < self._next_tick:
            return
        away, self._watched, self._next_tick = now - self._watched - TICK_S, now, now + TICK_S
        if away > TICK_S:
            # This process was held up itself, by a slow callback or Ctrl-Z: that is nobody's silence.
            for handle in self._workers:
                handle.forgive(away)
        owes = self._owes()
        if not owes:
            raise PipelineError(f"the run is locked up, no worker owes anything: {self._status()}")
        for index, debt in owes.items():
            handle = self._workers[index]
            silent = now - handle.contact
            how = f"silent for {silent:.1f} s" if silent > self._timeout_s else self._fruitless(index, now)
            if how and not handle.has_news():  # what lies in its pipe is heard next
                raise StallError(handle.name, f"worker {handle.name!r} is stuck: {how}, it owes {debt}")
        if self.on_tick is not None and self._scheduler is not None:
            self.on_tick(self._status())

    def _fruitless(self, worker: int, now: float) -> str:
        """How long a rollout worker has decoded without an end; "" if that is all right.

        Every step brings each active sequence one token on, of its prompt at worst, so the steps
        between two finished ones are bounded; however slow, an engine that keeps to it is not stuck.
        """
        if worker >= len(self._harvests):
            return ""
        last = self._harvests[worker]
        steps, seconds = self.meter.rollout[worker].steps - last.steps, now - last.at
        if steps <= self.config.max_prompt_tokens + self.config.max_response_tokens or seconds <= self._timeout_s:
            return ""
        return f"{steps} decode steps in {seconds:.1f} s without finishing a sequence"

    def _owes(self) -> dict[int, str]:
        """What each worker that has work to do must deliver next."""
        debts = {i: "its start" for i, handle in enumerate(self._workers) if not handle.ready}
        scheduler = self._scheduler
        if scheduler is None:
            return debts
        teacher, learner = len(self._workers) - 2, len(self._workers) - 1
        for worker in range(len(self._places)):
            if self.buffers.owed_by(worker):
                debts[worker] = f"the loading of weights, version {self.buffers.version}"
            elif scheduler.decoding(worker) and scheduler.has_slot(worker):
                debts[worker] = f"{scheduler.decoding(worker)} sequences"
        if scheduler.scoring:
            debts[teacher] = f"the scores of {scheduler.scoring} slots"
        if self._saving:
            debts[learner] = "the checkpoint"
        elif scheduler.training:
            debts[learner] = f"optimizer step {scheduler.version + 1}"
        elif self.buffers.being_written:
            debts[learner] = f"the weights of version {scheduler.version}"
        return debts

    def _status(self) -> PipelineStatus:
        scheduler = self.scheduler
        return PipelineStatus(
            step=scheduler.version,
            steps=scheduler.steps,
            elapsed_s=self.meter.elapsed(),
            stage_tokens=self.meter.stage_tokens(),
            stage_busy_s=self.meter.stage_busy(),
            slots=scheduler.slot_states(),
            outstanding=scheduler.outstanding,
            staleness_max=self.meter.staleness_max,
            refused=scheduler.refused,
        )


def _clean_up(checkpoint: Path) -> None:
    """Remove half a checkpoint; that the disk refuses must not hide why the run ended."""
    with suppress(OSError):
        clean_up(checkpoint)
