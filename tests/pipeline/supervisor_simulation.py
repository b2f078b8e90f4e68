"""The supervisor itself, with workers that are played in this process and act in random order."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from asyncopd.pipeline import PipelineConfig
from asyncopd.pipeline import messages as msg
from asyncopd.pipeline.pacing import AsyncPacing, Pacing, SyncPacing
from asyncopd.pipeline.schedule import Batch, Scheduler
from asyncopd.pipeline.supervisor import Supervisor


class Played:
    """Stands in for a WorkerHandle."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready = True
        self.contact = time.monotonic()
        self.inbox: deque[Any] = deque()
        self.outbox: deque[Any] = deque()

    def send(self, message: object) -> None:
        self.inbox.append(message)

    def has_news(self) -> bool:
        return bool(self.outbox)

    def forgive(self, seconds: float) -> None:
        self.contact += seconds

    def turn(self) -> None:
        """Do one thing."""


class PlayedRollout(Played):
    """Decodes, refills places and packs like the rollout worker. ``length(uid)`` is in steps."""

    def __init__(self, name: str, places: int, per_slot: int, length: Callable[[int], int]) -> None:
        super().__init__(name)
        self.places, self.per_slot, self.length = places, per_slot, length
        self.version = 0
        self.prompts: deque[int] = deque()
        self.running: dict[int, list[int]] = {}  # uid -> steps left, oldest version
        self.finished: deque[msg.SequenceInfo] = deque()
        self.slot: int | None = None
        self.packed: list[msg.SequenceInfo] = []

    def turn(self) -> None:
        self.obey()
        self.pack()
        while not self.finished and self.prompts and len(self.running) < self.places:
            uid = self.prompts.popleft()
            self.running[uid] = [self.length(uid), self.version]
        for uid, state in list(self.running.items()):
            state[0] -= 1
            if state[0] <= 0:
                self.finished.append(msg.SequenceInfo(uid, self.running.pop(uid)[1], 1, None))
        self.pack()
        if not self.running and not self.prompts and not self.finished:
            self.hand_in()

    def obey(self) -> None:
        loaded = self.version
        while self.inbox:
            match self.inbox.popleft():
                case msg.Prompts(requests=requests):
                    self.prompts.extend(request.uid for request in requests)
                case msg.FillSlot(slot=slot):
                    self.slot = slot
                case msg.LoadWeights(version=version):
                    loaded = version
                    self.outbox.append(msg.WeightsLoaded(version))
        self.version = loaded

    def pack(self) -> None:
        while self.finished and self.slot is not None:
            self.packed.append(self.finished.popleft())
            if len(self.packed) == self.per_slot:
                self.hand_in()

    def hand_in(self) -> None:
        if self.slot is not None and self.packed:
            self.outbox.append(msg.SlotFilled(self.slot, self.packed, msg.StageStats()))
            self.slot, self.packed = None, []


class PlayedTeacher(Played):
    def turn(self) -> None:
        if self.inbox:
            self.outbox.append(msg.SlotScored(self.inbox.popleft().slot, msg.StageStats()))


class PlayedLearner(Played):
    def turn(self) -> None:
        if not self.inbox:
            return
        match self.inbox.popleft():
            case msg.Step(version=version, publish_buffer=buffer):
                self.outbox.append(msg.StepDone({}, msg.StageStats()))
                if buffer is not None:
                    self.inbox.appendleft(msg.Publish(buffer, version))
            case msg.Publish(buffer=buffer, version=version):
                self.outbox.append(msg.Published(buffer, version))


class Simulation:
    """A run from the moment that every worker is ready."""

    def __init__(self, config: PipelineConfig, places: int, length: Callable[[int], int]) -> None:
        self.config = config
        self.batches: list[Batch] = []
        self.fewest_free = config.slot_count()
        supervisor = self.supervisor = Supervisor(config, lambda uid: [uid])
        rollouts = [
            PlayedRollout(f"rollout-{i}", places, config.sequences_per_slot, length)
            for i in range(config.rollout_workers)
        ]
        self.workers: list[Played] = [*rollouts, PlayedTeacher("teacher"), PlayedLearner("learner")]
        supervisor._workers = self.workers  # type: ignore[assignment]
        supervisor._places = [places] * config.rollout_workers
        pacing: Pacing = SyncPacing() if config.mode == "sync" else AsyncPacing(config.max_staleness)
        self.scheduler = supervisor._scheduler = Scheduler(
            pacing,
            steps=config.steps,
            batch_size=config.batch_size,
            sequences_per_slot=config.sequences_per_slot,
            max_staleness=config.max_staleness,
            num_slots=config.slot_count(),
            places=supervisor._places,
            next_prompt=lambda uid: [uid],
            wait_for_late=config.late == "wait",
        )
        supervisor._publish()

    def dispatch(self) -> None:
        """One dispatch; afterwards somebody owes something, or nothing would ever happen again."""
        idle = not self.scheduler.training
        self.supervisor._dispatch()
        assert self.supervisor._owes(), f"nobody owes anything: {self.supervisor._status()}"
        batch = self.scheduler._training
        if idle and batch is not None:
            self.batches.append(batch)
        self.fewest_free = min(self.fewest_free, self.scheduler.slot_states()["free"])

    def book(self, index: int, message: object) -> None:
        self.supervisor._book(index, message)

    def run(self, rng: random.Random, *, attention: float, lazy: frozenset[int] = frozenset()) -> None:
        """``attention``: share of the turns at which the supervisor looks; ``lazy`` workers act rarely."""
        for _ in range(400_000):
            if rng.random() < attention:
                for index, worker in enumerate(self.workers):
                    while worker.outbox:
                        self.book(index, worker.outbox.popleft())
                if self.scheduler.done:
                    return
                self.dispatch()
            index = rng.randrange(len(self.workers))
            if index not in lazy or rng.random() > 0.97:
                self.workers[index].turn()
        raise AssertionError(f"the run locked up: {self.scheduler.slot_states()}")
