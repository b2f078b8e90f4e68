"""The rollout worker: decode, refill places, pack finished sequences into slots.

It looks at its pipe between decode steps, without blocking while there is anything to decode. New
weights are loaded there, in flight: the tokens after that carry the new version.
"""

from __future__ import annotations

import time
from collections import deque

from asyncopd.pipeline.messages import (
    FillSlot,
    LoadWeights,
    Progress,
    Prompts,
    Ready,
    SequenceInfo,
    SlotFilled,
    Stop,
    WeightsLoaded,
)
from asyncopd.pipeline.protocols import Rollout, RolloutEngine, RolloutRequest
from asyncopd.pipeline.slots import SlotView
from asyncopd.pipeline.worker import Context, Stopwatch


def rollout_loop(context: Context, engine: RolloutEngine) -> None:
    """Serve until told to stop."""
    context.send(Ready(places=engine.places))
    RolloutWorker(context, engine).run()


class RolloutWorker:
    """One engine, the prompts waiting for it and the slot being filled."""

    def __init__(self, context: Context, engine: RolloutEngine) -> None:
        self.context = context
        self.engine = engine
        self.prompts: deque[RolloutRequest] = deque()
        self.finished: deque[Rollout] = deque()  # not in a slot yet
        self.slot: SlotView | None = None
        self.packed: list[SequenceInfo] = []  # what the slot holds
        self.last_sent = time.monotonic()

    def run(self) -> None:
        while self._obey():
            self._pack()
            self._submit()
            if self.engine.active():
                with Stopwatch(self.context, "busy_s"):
                    rollouts = self.engine.step()
                self.finished.extend(rollouts)
                self.context.stats.steps += 1
                self.context.stats.tokens += sum(r.response_ids.numel() for r in rollouts)
                self._pack()
            if not self.engine.active() and not self.prompts and not self.finished:
                self._hand_in()  # drained: nobody knows when the slot would be full
            self._heartbeat()

    def _obey(self) -> bool:
        """Follow the commands in the pipe, waiting if there is nothing to do; False to stop."""
        idle = not self.engine.active() and not (self.prompts and not self.finished)
        if idle:
            # finished sequences here have found no slot
            reason = "backpressure_s" if self.finished else "wait_s"
            with Stopwatch(self.context, reason):
                commands = self.context.take(block=True)
        else:
            commands = self.context.take(block=False)
        newest: LoadWeights | None = None
        for command in commands:
            match command:
                case Prompts(requests=requests):
                    self.prompts.extend(requests)
                case FillSlot(slot=index):
                    self.slot = self.context.slots.slot(index)
                    self.slot.clear()
                case LoadWeights():
                    newest = command  # an older one in the same breath need not be loaded
                case Stop():
                    return False
        if newest is not None:
            self.engine.load_weights(self.context.weights.read(newest.buffer), newest.version)
            self._send(WeightsLoaded(newest.version))
        return True

    def _submit(self) -> None:
        """Refill places, unless finished sequences already have nowhere to go."""
        places = self.engine.places - self.engine.active()
        if self.finished or places <= 0 or not self.prompts:
            return
        count = min(places, len(self.prompts))
        self.engine.submit([self.prompts.popleft() for _ in range(count)])

    def _pack(self) -> None:
        """Move finished sequences to the slot, handing it in when it is full."""
        while self.finished and self.slot is not None:
            rollout = self.finished[0]
            if self.slot.append(rollout):
                self.finished.popleft()
                self.packed.append(
                    SequenceInfo(
                        uid=rollout.uid,
                        oldest_version=int(rollout.versions.min()),
                        response_tokens=rollout.response_ids.numel(),
                        correct=rollout.correct,
                    )
                )
                if len(self.packed) == self.slot.spec.max_sequences:
                    self._hand_in()
            else:
                self._hand_in()

    def _hand_in(self) -> None:
        """Give the slot to the supervisor if anything is in it."""
        if self.slot is not None and self.packed:
            self._send(SlotFilled(self.slot.index, self.packed, self.context.stats))
            self.slot, self.packed = None, []

    def _heartbeat(self) -> None:
        if time.monotonic() - self.last_sent > self.context.heartbeat_s and self.engine.active():
            self._send(Progress(self.context.stats))

    def _send(self, message: object) -> None:
        self.context.send(message)
        self.last_sent = time.monotonic()
