"""Who does what next: the scheduling of a run as a plain state machine, no process, no tensor.

A slot goes round: free -> filling (one rollout worker) -> filled -> scoring -> ready -> training ->
free. Events move it on; decisions say what may move, once `refuse_expired` has taken out what is too
old.

The batching rule: a step takes exactly batch_size sequences, those with the oldest version first and
among equals those that were ready first. A slot may be split over several steps and is free when its
last sequence is consumed or refused. There is one exception, so that a run with few slots cannot lock
up: when every slot is taken and rollouts cannot go on without one, the learner takes what is ready.

Late sequences: pacing admits what is in time in first-in first-out order, but a long sequence is
overtaken by short ones. Refusing it would train on short answers more often than they are written.
So the learner, by default, waits before a step that would make a sequence on its way too old.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from asyncopd.pipeline.messages import SequenceInfo
from asyncopd.pipeline.pacing import Books, Pacing
from asyncopd.pipeline.protocols import RolloutRequest

NextPrompt = Callable[[int], list[int]]


@dataclass(slots=True, frozen=True)
class Batch:
    """The sequences of one optimizer step: indices by slot, their headers, their staleness."""

    parts: list[tuple[int, list[int]]]
    sequences: list[SequenceInfo]
    staleness: list[int]


class Scheduler:
    """The books of a run.

    Args:
        pacing: the rules of the mode.
        steps: optimizer steps in the run.
        batch_size: sequences per step (B).
        sequences_per_slot: most sequences in a slot.
        max_staleness: bound in optimizer steps (eta); older sequences are refused.
        num_slots: slots of shared memory.
        places: for each rollout worker how many sequences it decodes at once.
        wait_for_late: whether a step waits for sequences on their way that it would make too old.
        next_prompt: called once for each new uid (0, 1, ...), returns the prompt's token ids.
    """

    def __init__(
        self,
        pacing: Pacing,
        *,
        steps: int,
        batch_size: int,
        sequences_per_slot: int,
        max_staleness: int,
        num_slots: int,
        places: Sequence[int],
        next_prompt: NextPrompt,
        wait_for_late: bool = True,
    ) -> None:
        self.pacing = pacing
        self.steps = steps
        self.batch_size = batch_size
        self.max_staleness = max_staleness
        self.wait_for_late = wait_for_late
        self.version = 0
        self.refused = 0
        self._next_prompt = next_prompt
        self._uids = 0
        self._prompts: dict[int, list[int]] = {}  # of every outstanding sequence
        self._since: dict[int, int] = {}  # of each of them: no token is older than this version
        self._again: deque[RolloutRequest] = deque()  # refused, to be granted before new ones
        self._places = list(places)
        # Busy is a worker with what it decodes, what waits for its slot to fill, and some prompts
        # more to refill places at once.
        self._caps = [pacing.cap(batch_size, len(places), p + sequences_per_slot + -(-p // 4)) for p in places]
        self._decoding = [0] * len(places)
        self._loaded = [-1] * len(places)
        self._free = list(range(num_slots))  # used as a stack: the same few slots stay in cache
        self._filling: list[int | None] = [None] * len(places)
        self._filled: deque[int] = deque()
        self._scoring: set[int] = set()
        self._ready: list[int] = []
        self._training: Batch | None = None
        self._contents: dict[int, dict[int, SequenceInfo]] = {}  # slot -> index -> not yet used

    # --- state ---

    @property
    def done(self) -> bool:
        return self.version >= self.steps

    @property
    def outstanding(self) -> int:
        """Sequences granted and neither consumed nor refused."""
        return len(self._prompts)

    def decoding(self, worker: int) -> int:
        """Sequences that ``worker`` was granted and has not handed in."""
        return self._decoding[worker]

    def has_slot(self, worker: int) -> bool:
        return self._filling[worker] is not None

    @property
    def training(self) -> bool:
        """Whether an optimizer step is running."""
        return self._training is not None

    @property
    def scoring(self) -> int:
        """Slots at the teacher."""
        return len(self._scoring)

    def slot_states(self) -> dict[str, int]:
        """How many slots are in each state."""
        training = len(self._training.parts) if self._training else 0
        return {
            "free": len(self._free),
            "filling": sum(slot is not None for slot in self._filling),
            "filled": len(self._filled),
            "scoring": len(self._scoring),
            "ready": len(self._ready) - training,
            "training": training,
        }

    def _books(self) -> Books:
        return Books(
            batch_size=self.batch_size,
            version=self.version,
            outstanding=self.outstanding,
            decoding=sum(self._decoding),
            loaded=tuple(self._loaded),
        )

    # --- decisions ---

    def refuse_expired(self) -> None:
        """Refuse the sequences that can no longer be used: filled ones unscored, ready ones untrained.

        To be called before the decisions, which then give out the slots and prompts that this frees.
        A step that is running has nothing to lose here: what it trains on was in time when it began.
        """
        self._refuse_expired(self._filled)
        self._refuse_expired(self._ready)

    def slots_to_fill(self) -> list[tuple[int, int]]:
        """(worker, slot) pairs: every rollout worker keeps one slot while there are free ones."""
        pairs = []
        # Those with work first: an idle worker's slot would only lie there.
        order = sorted(range(len(self._places)), key=lambda worker: self._decoding[worker] == 0)
        for worker in order:
            if self._filling[worker] is None and self._free:
                slot = self._free.pop()
                self._filling[worker] = slot
                pairs.append((worker, slot))
        return pairs

    def prompts_to_grant(self) -> list[tuple[int, list[RolloutRequest]]]:
        """(worker, requests) pairs: as many as pacing, the caps and the run's need allow."""
        grants: dict[int, list[RolloutRequest]] = {}
        workers = range(len(self._places))
        while (self.steps - self.version) * self.batch_size > self.outstanding:
            books = self._books()
            open_to = [
                worker
                for worker in workers
                if self._decoding[worker] < self._caps[worker] and self.pacing.room(books, worker) > 0
            ]
            if not open_to:
                break
            worker = min(open_to, key=lambda w: self._decoding[w] / self._places[w])
            request = self._take_prompt()
            self._prompts[request.uid] = request.prompt_ids
            self._decoding[worker] += 1
            self._since[request.uid] = self._loaded[worker]
            grants.setdefault(worker, []).append(request)
        return list(grants.items())

    def slot_to_score(self) -> int | None:
        """The filled slot that the teacher takes next, first in first out; None if it may not."""
        if not self._filled or not self.pacing.may_score(self._books()):
            return None
        slot = self._filled.popleft()
        self._scoring.add(slot)
        return slot

    def batch_to_train(self) -> Batch | None:
        """The next optimizer step; None while one runs, data is missing or the run is over."""
        if self._training is not None or self.done:
            return None
        available = sum(len(self._contents[slot]) for slot in self._ready)
        if not available or (available < self.batch_size and not self._locked_up()):
            return None
        waiting = [(slot, index) for slot in self._ready for index in self._contents[slot]]
        waiting.sort(key=lambda at: self._contents[at[0]][at[1]].oldest_version)  # stable
        chosen: dict[int, list[int]] = {}
        for slot, index in waiting[: self.batch_size]:
            chosen.setdefault(slot, []).append(index)
        batch = Batch([(slot, sorted(indices)) for slot, indices in chosen.items()], [], [])
        for slot, indices in batch.parts:
            batch.sequences.extend(self._contents[slot][index] for index in indices)
        on_their_way = self.outstanding > available
        if self.wait_for_late and on_their_way and self._makes_late(batch) and not self._locked_up():
            return None
        batch.staleness.extend(self.version - info.oldest_version for info in batch.sequences)
        self._training = batch
        return batch

    # --- events ---

    def slot_filled(self, worker: int, slot: int, sequences: list[SequenceInfo]) -> None:
        """``worker`` handed in its slot, full or not."""
        self._filling[worker] = None
        self._decoding[worker] -= len(sequences)
        self._since |= {info.uid: info.oldest_version for info in sequences}
        self._contents[slot] = dict(enumerate(sequences))
        self._filled.append(slot)

    def slot_scored(self, slot: int) -> None:
        self._scoring.remove(slot)
        self._ready.append(slot)

    def step_done(self) -> Batch:
        """The optimizer step of the last `batch_to_train` is done; returns that batch."""
        batch = self._training
        assert batch is not None, "step_done without a batch"
        for slot, indices in batch.parts:
            for index in indices:
                self._drop(slot, index)
            if not self._contents[slot]:
                self._release(slot, self._ready)
        self._training = None
        self.version += 1
        return batch

    def weights_loaded(self, worker: int, version: int) -> None:
        self._loaded[worker] = version

    # --- inner workings ---

    def _take_prompt(self) -> RolloutRequest:
        if self._again:
            return self._again.popleft()
        uid = self._uids
        self._uids += 1
        return RolloutRequest(uid, self._next_prompt(uid))

    def _makes_late(self, batch: Batch) -> bool:
        """Whether this step would leave a sequence that cannot be consumed in time any more.

        With the rest in line by age, number k is consumed k // B steps after the next one begins.
        """
        taken = {info.uid for info in batch.sequences}
        rest = sorted(version for uid, version in self._since.items() if uid not in taken)
        deadline = self.max_staleness - self.version - 1
        return any(version + deadline < k // self.batch_size for k, version in enumerate(rest))

    def _locked_up(self) -> bool:
        """Whether rollouts wait for a slot and only the learner can free one."""
        if self._free or self._filled or self._scoring:
            return False
        working = [w for w, count in enumerate(self._decoding) if count]
        return bool(working) and all(self._filling[w] is None for w in working)

    def _refuse_expired(self, slots: deque[int] | list[int]) -> None:
        """Take what can no longer be used out of these slots; queue the prompts again."""
        for slot in list(slots):
            contents = self._contents[slot]
            for index, info in list(contents.items()):
                if self.version - info.oldest_version > self.max_staleness:
                    self._again.append(RolloutRequest(info.uid, self._prompts[info.uid]))
                    self._drop(slot, index)
                    self.refused += 1
            if not contents:
                self._release(slot, slots)

    def _drop(self, slot: int, index: int) -> None:
        info = self._contents[slot].pop(index)
        del self._prompts[info.uid], self._since[info.uid]

    def _release(self, slot: int, where: deque[int] | list[int]) -> None:
        where.remove(slot)
        del self._contents[slot]
        self._free.append(slot)
